"""Understand a folder of images: which image is of which class and split. Nothing is decoded.

Read are class folders, class folders in folders of the splits, and plain folders of images with a
table of labels. What is hidden never counts.

Public: SPLITS, Layout, read.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from PIL import Image

SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {
    **dict.fromkeys(["train", "training"], "train"),
    **dict.fromkeys(["val", "valid", "validation", "dev"], "val"),
    **dict.fromkeys(["test", "testing"], "test"),
}
_ONLY_NAMED = "BUFR EPS GRIB HDF5 IPTC MPEG WMF".split()  # Pillow knows these, and cannot draw them
_ENDINGS = tuple(
    ending
    for ending, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in _ONLY_NAMED
)
_TABLES = (".csv", ".tsv", ".txt")
_NEVER_MEANT = {  # what systems and network drives leave, such as thumbnails and deleted files
    "__MACOSX",
    "__pycache__",
    "@eaDir",
    "@Recycle",
    "#recycle",
    "#snapshot",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
}
_LABEL_TITLE = r"(class|label|category|target)([ _]?(name|id))?s?"


@dataclass
class Layout:
    """Hold the images of a folder, and how they were found.

    folder: the folder that was given
    """

    folder: Path
    images: list = field(default_factory=list)  # (path, name of the class, split or "")
    notes: list = field(default_factory=list)  # what is not plain to see
    left_out: Counter = field(default_factory=Counter)  # {ending: files}
    strays: dict = field(default_factory=dict)  # {table: names in it that are no image}
    undivided: str = ""  # folder from which splits that are not there are taken

    def __str__(self):
        """Return in a line what was read and what was left out."""
        counts = Counter(_ending(path) for path, _, _ in self.images)
        words = [*self.notes, f"{len(self.images)} images ({_counted(counts)})"]
        if self.left_out:
            words.append(f"left out: {_counted(self.left_out)}")
        return "; ".join(words)


def read(folder, leave=()):
    """Return the Layout of a folder.

    leave: class folders that are left out

    Raises ValueError, naming folder or file, for what is none of the layouts or could be two.
    """
    layout = Layout(folder)
    root, parts = _parts(folder)
    if root != folder:
        layout.notes.append(f"read from {root.relative_to(folder)}/")
    layout.undivided = f"{parts.get('train', root).name}/"
    first = None
    for split, part in parts.items():
        if split and part.name != split:
            layout.notes.append(f"{part.name}/ is {split}")
        found = _read_part(layout, root, split, part, first, leave)
        if found is None:
            layout.notes.append(f"{part.name}/ is left out, nothing says its labels")
            continue
        classes = {name for _, name in found}
        if len(classes) < 2 and not (first and classes):
            raise ValueError(
                f"{part}: at least two class folders are needed, found {_folders(part)}; or beside "
                "the images one table (.csv, .tsv, .txt) with a column of their names and one of "
                "their classes"
            )
        first = first or classes
        if strange := sorted(first ^ classes):
            more = f" and {len(strange) - 9} more" if len(strange) > 9 else ""
            raise ValueError(
                f"{part}: its classes differ from those of train in {strange[:9]}{more}"
            )
        layout.images += [(path, name, split) for path, name in found]
    for table, strays in layout.strays.items():
        if strays:
            raise ValueError(
                f"{table} has labels of {len(strays)} images that are not there: "
                f"the first is {min(strays)!r}"
            )
    return layout


def _parts(folder):
    """Return the folder that holds the splits or classes, and {split or "": its folder}."""
    tops = _folders(folder)
    split_of = {name: _split_of(name) for name in tops}
    trains = [name for name in tops if split_of[name] == "train"]
    others = [name for name in tops if not split_of[name]]
    # A class may be called train: it holds images, as do others beside it, and no table is there.
    if trains and others and _images(folder / trains[0]) and not _tables(folder):
        trains = []
    if not trains:
        if (inner := _only_inner(folder)) is not None:
            return _parts(inner)
        return folder, {"": folder}
    if others:
        raise ValueError(f"{folder}: beside train/ only val/ and test/ are read; found {others}")
    parts = {}
    for split in SPLITS:
        named = [name for name in tops if split_of[name] == split]
        if len(named) > 1:
            raise ValueError(f"{folder}: which one is {split}? found {named}: leave one of them")
        if named:
            parts[split] = folder / named[0]
    return folder, parts


def _read_part(layout, root, split, part, classes, leave):
    """Return [(path, name of the class)] of a split's folder, None for a test without labels.

    classes: names of the classes of train, None in train itself
    """
    inside = part
    while split and (inner := _only_inner(inside)) is not None:
        inside = inner
    plain = _plain(inside, classes or ())
    if plain is None:
        return _read_classes(layout, inside, leave)
    places = list(dict.fromkeys([part, inside, plain]))
    table, labels = _find_labels(layout, root, split, places)
    if table is None:
        return None if split == "test" and not any(map(_tables, places)) else []
    layout.notes.append(f"labels of {plain.relative_to(layout.folder)}/ from {table.name}")
    found = [(str(plain / name), label) for name, label in labels.items()]
    used = {str(table), *(path for path, _ in found)}
    layout.left_out.update(map(_ending, set(_files(part)) - used))
    return sorted(found, key=lambda row: row[::-1])


def _read_classes(layout, folder, leave):
    """Return [(path, name of the class)] of a folder of class folders, in ImageFolder's order."""
    classes = [name for name in _folders(folder) if name not in leave]
    inner = [set(_folders(folder / name)) for name in classes]
    same = sorted(set.intersection(*inner)) if inner else []
    if len(same) > 1 and not any(_images(folder / name) for name in classes):
        raise ValueError(
            f"{folder}: {classes[:9]} all hold folders {same[:9]} and no images. If they are "
            "splits, name them train, val and test; if they are classes, put their images "
            "together; else give the one folder that holds the class folders"
        )
    layout.left_out.update(f"{_ending(name)} beside the classes" for name in _images(folder))
    found = []
    for name in classes:
        files = _files(folder / name)
        images = [path for path in files if _is_image(path)]
        others = Counter(map(_ending, set(files).difference(images)))
        if not images:
            held = f", only {_counted(others)}" if others else ""
            raise ValueError(f"empty class folder: {folder / name} has no image files{held}")
        layout.left_out += others
        found += [(path, name) for path in images]
    return found


# Tables of labels


def _plain(folder, classes):
    """Return the folder in which images lie without class folders, or None.

    It is folder, its only folder, or the one that is called images.
    """
    inner = _folders(folder)
    if set(inner) & set(classes):
        return None
    if len(inner) < 2 and _images(folder):
        return folder
    for name in inner:
        if (len(inner) == 1 or name.lower() == "images") and _images(folder / name):
            return folder / name
    return None


def _find_labels(layout, root, split, places):
    """Return the one table that names the images of a plain folder, and {file name: class}.

    places: folders of the split in which it may lie, the plain one last; else it lies in root

    Without one, both are None.
    """
    plain = places[-1]
    candidates = sum(map(_tables, places), [])
    if not candidates:
        # val_annotations.txt beside val/ is of val alone, labels.csv is of all splits.
        of = {table: _split_of(re.split(r"[-_. ]", table.stem)[0]) for table in _tables(root)}
        own = [table for table in of if of[table] == split]
        candidates = own or [table for table in of if not of[table]]
    found = {}
    images = _images(plain)
    for table in candidates:
        rows = _rows(table, images)
        if rows is not None:
            found[table] = rows
    if len(found) > 1:
        names = [table.name for table in found]
        raise ValueError(f"{plain}: several tables name its images, {names}: leave one of them")
    if not found:
        return None, None
    [(table, rows)] = found.items()
    rest = layout.strays.get(table, set(rows.name))
    rows = rows.dropna()
    # A table of train alone would also fit a test whose images are numbered from 1 again.
    if twice := sorted(set(rows.name) - rest):
        raise ValueError(
            f"{table} names images of two splits alike, the first is {twice[0]}: call it "
            "train_labels if it is of train alone, or give each split a table"
        )
    layout.strays[table] = rest - set(rows.name)
    rows = rows.drop_duplicates(["image", "label"])
    if twice := sorted(rows.image[rows.image.duplicated()]):
        raise ValueError(f"{table} gives {len(twice)} images two classes, the first is {twice[0]}")
    labels = dict(zip(rows.image, rows.label, strict=True))
    if unlabelled := [name for name in images if not labels.get(name)]:
        raise ValueError(
            f"{len(unlabelled)} images of {plain} have no label in {table}, the first is "
            f"{unlabelled[0]}: add their rows, or take them out"
        )
    return table, labels


def _rows(path, images):
    """Return a frame of name (as written), image (file name or nan) and label, None if no table.

    images: file names; rows may name them with or without folder and ending
    """
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
    separator = next((mark for mark in "\t,;" if mark in first), r"\s+")
    options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    try:
        table = pd.read_csv(path, sep=separator, header=None, **options)
    except ValueError as error:  # of parsing, too
        if path.suffix.lower() == ".txt":  # prose
            return None
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    table = table.fillna("").apply(lambda column: column.str.strip())
    names = table.apply(lambda column: column.str.replace(r".*[/\\]", "", regex=True))
    image_of = {Path(name).stem: name for name in images} | {name: name for name in images}
    # Distinct ones: classes may look like names, 0 like 0.jpg.
    hits = names.apply(lambda column: column[column.isin(image_of)].nunique())
    if len(hits) < 2 or not hits.max():
        return None
    column = hits.idxmax()
    titles = dict.fromkeys(table, "")
    top = names[column].iloc[0]
    if top not in image_of and not _is_image(top):
        titles = table.iloc[0]
        table = table.iloc[1:]
    label = _label_column(path, table.drop(columns=column), titles)
    names = names.loc[table.index, column]
    return pd.DataFrame({"name": names, "image": names.map(image_of), "label": table[label]})


def _label_column(path, table, titles):
    """Return the column of the classes: one that says so, or the only one, or the only words."""
    titled = [name for name in table if re.fullmatch(_LABEL_TITLE, titles[name].lower())]
    numbers = table.apply(pd.to_numeric, errors="coerce")
    words = [name for name in table if numbers[name].isna().any()]
    for chosen in (titled, list(table), words):
        if len(chosen) == 1:
            return chosen[0]
    shown = [titles[name] or f"column {name + 1}" for name in table]
    raise ValueError(f"{path}: which column has the classes? found {shown}: call it label")


# What lies in a folder


def _folders(folder):
    """Return the names of the folders in folder, sorted, without hidden ones."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return sorted(name for name in names if _is_visible(name))


def _only_inner(folder):
    """Return the only folder in folder if it holds folders and no image lies beside it, or None."""
    inner = _folders(folder)
    is_shell = len(inner) == 1 and _folders(folder / inner[0]) and not _images(folder)
    return folder / inner[0] if is_shell else None


def _images(folder):
    """Return the names of the images that lie directly in folder, sorted."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
    return sorted(name for name in names if _is_visible(name) and _is_image(name))


def _tables(folder):
    """Return the paths of what may be tables of labels in folder; a submission has none."""
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _TABLES]
    return [p for p in paths if _is_visible(p.name) and "submission" not in p.name.lower()]


def _files(folder):
    """Return the paths, str, of all visible files under folder, in torchvision's order."""
    paths = []
    for inside, folders, files in os.walk(folder, followlinks=True):
        folders[:] = filter(_is_visible, folders)
        paths += [os.path.join(inside, name) for name in files if _is_visible(name)]
    return sorted(paths, key=os.path.split)


def _is_visible(name):
    return not name.startswith(".") and name not in _NEVER_MEANT


def _split_of(name):
    """Return which split a folder's name means, None for others."""
    return _SPLIT_WORDS.get(re.sub(r"[-_ ]?(set|data|images)$", "", name.lower()))


def _is_image(path):
    return path.lower().endswith(_ENDINGS)


def _ending(path):
    return os.path.splitext(path)[1].lower()


def _counted(counts):
    """Return "3 .heic, 1 .txt", the most first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {name or 'without ending'}" for name, count in ordered)
