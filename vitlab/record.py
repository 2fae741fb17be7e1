"""Records: the values of a study, the folder of a run, its rows with provenance; files are written whole.

A study is one YAML file in notebooks/params with all its values; a run is one model and seed of it, in
`<data root>/runs/<study>/<model>/seed<seed>/`. Notebooks open one with `open_run` and never name a path.
"""

import argparse
import contextlib
import copy
import difflib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import yaml
from tqdm.auto import tqdm

from vitlab import parallel

# What each notebook reads of a study, itself or through the notebooks before it.
USES = {
    "0_data": ("data",),
    "1_train": ("data", "models", "train"),
    "2_sensitivity": ("data", "models", "train", "calibration", "sensitivity"),
    "3_global_pruning": ("data", "models", "train", "calibration", "global_pruning"),
    "4_heads_svd_iht": ("data", "models", "train", "calibration", "heads_svd_iht"),
    "5_budget": ("data", "models", "train", "calibration", "budget"),
    "6_efficiency": (
        *("data", "models", "train", "calibration", "global_pruning", "heads_svd_iht", "budget"),
        "efficiency",
    ),
}
SECTIONS = ("about", "seeds", *dict.fromkeys(section for uses in USES.values() for section in uses))
SETTINGS = ("epochs", "lr", "images", "warmup_epochs")  # of train.fit, that a section has of its own
# Values that came later: what stands for them in studies, checkpoints and training states that do not have them.
OFF = {
    "data": {"skip_broken": None},
    "train": {"mixup": 0.0, "cutmix": 0.0},
    "calibration": {"labels": "true", "augment": False},
    "global_pruning": {"controls": False, "schedules": ["one-shot"], "steps": 1, "distil": False},
    "heads_svd_iht": {"controls": False},
}
# Examples of what else than the study's a value may be, by its name.
ALSO = {"images": (0, None), "faster_at": (0, None), "skip_broken": (False, None), "weights": ("", None)}
ALSO |= {"normalise": ("", []), "calibration.images": (), "sensitivity.images": ()}
# Examples of what models and augmentation may have where demo.yaml has not; of models `models.create` knows the rest.
MODEL = {"name": "", "pretrained": False, "weights": ""}
AUGMENT = {"crop": 0, "flip": True, "scale": [0.0, 1.0], "erase": 0.0}
OPTIONAL = {"pretrained", "weights", *AUGMENT}
SHARES = {  # which 0 may be one of, and 1 may not
    "train.label_smoothing": True,
    "train.ema": True,
    "sensitivity.ratios": False,
    "global_pruning.sparsities": True,
    "heads_svd_iht.ratios": True,
    "heads_svd_iht.kappa": False,
    "budget.shares": False,
    "budget.audit": False,
}

IDENTITY = ["study", "model", "seed"]
KEY = ["model", "notebook", "method", "criterion", "form", "schedule", "target_kind", "target", "stage"]  # with seed
METER = "closed form (vitlab.cost)"  # of params, MACs and FLOPs; other meters have columns of their own
LOG = "results.jsonl"  # of a run: every row that was ever saved
ROW = [
    *IDENTITY,
    *("method", "criterion", "form", "target_kind", "target", "stage"),
    *("correct", "total", "top1", "mean_per_class", "loss", "ece"),
    *("params", "nonzero", "macs", "macs_ideal", "flops", "meter", "macs_torchprofile", "macs_thop"),
    *("bytes_memory", "bytes_disk"),
    *("latency_ms", "latency_q1", "latency_q3", "images_per_s", "memory_mb"),
    *("batch", "threads", "precision", "image_size"),
    *("epochs", "seconds"),
    *("checkpoint", "data", "split_seed", "commit", "torch", "timm", "device", "date"),
]
WORDS = {"labels": str}  # columns that read_csv would take for something else: true, there, is a word
HISTORY = [*IDENTITY, "method", "criterion", "form", "target_kind", "target", "stage", "epoch"]


def repository():
    """The folder of the repository that vitlab is imported from; the working folder where it has none."""
    folder = Path(__file__).parents[1]
    return folder if (folder / "pyproject.toml").exists() else Path.cwd()


def of_shipped(folder):
    """(study, model, seed) of a folder of checkpoints/."""
    model, seed = re.fullmatch(r"(.+?)(?:-seed(\d+))?", folder.name).groups()
    return folder.parent.name, model, int(seed or 0)


def root():
    """The data root: the environment's VITLAB_DATA, else `data` of the repository."""
    given = os.environ.get("VITLAB_DATA")
    return Path(given).expanduser().absolute() if given else repository() / "data"


def unknown(kind, name, known):
    """Words for an error: which name is not known, the nearest that is, and all that are."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    hint = f", did you mean {close[0]!r}?" if close else "."
    return f"unknown {kind} {name!r}{hint} Known are {', '.join(str(k) for k in known)}."


class Values(dict):
    """A dict that reads as attributes too: values.train.epochs."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(unknown("value", name, self))


# -- studies


def study(name, *, seed=None, override=None):
    """All values of a study as nested Values; `name` in it is the study's name.

    name: a file of notebooks/params without its ending, or the path of a .yaml file of your own.
    seed: of the run (None: the study's first). What a study says under `other_seeds` holds for all but the first.
    override: {"section.value": new value}, for instance {"train.epochs": 2}; `other_seeds` is written so, too.
    Raises ValueError for an unknown study, section or value (with the nearest known name), a missing one, an empty
    list or a share out of range, TypeError for a value of another type than the demo's or, of override, the study's.
    """
    folder = repository() / "notebooks" / "params"
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ValueError(unknown("study", name, known) + " Your own is given by the path of its .yaml file.")
    values = _read_yaml(path)
    others = values.pop("other_seeds", {})
    for section in values:
        if section not in SECTIONS:
            raise ValueError(f"{path.name}: {unknown('section', section, (*SECTIONS, 'other_seeds'))}")
    if missing := [section for section in SECTIONS if section not in values]:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}; demo.yaml has every section")
    for section, later in OFF.items():
        if isinstance(values[section], dict):
            values[section].update({key: value for key, value in later.items() if key not in values[section]})
    try:
        demo = yaml.safe_load((folder / "demo.yaml").read_text())
        _check_file(values, {section: demo[section] for section in SECTIONS})
        later = _replaced(values, others, "other_seeds")
        for each in (values, later):
            _check_shares(each)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path.name}: {error}") from None
    values = _replaced(later if seed not in (None, values["seeds"][0]) else values, override or {}, "override")
    _check_shares(values)
    return Values(name=path.stem, **values)


def _replaced(values, changes, name):
    """A copy of values with changes, a dict called name of {"section.value": new value}, in their places."""
    if not isinstance(changes, dict):
        raise TypeError(f'{name} is a dict like {{"train.epochs": 2}}, got {changes!r}')
    values = copy.deepcopy(values)
    for dotted, given in changes.items():
        place = values
        *parents, last = dotted.split(".")
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            names = _dotted(values)
            near = [known for known in names if known.split(".")[0] in parents[:1]]
            raise ValueError(unknown("value", dotted, near or names))
        place[last] = checked(dotted, place[last], given)
    return values


def _check_shares(values):
    """Raise ValueError for a value of SHARES that is out of its range."""
    for dotted, zero in SHARES.items():
        section, name = dotted.split(".")
        found = values[section][name]
        for share in found if isinstance(found, list) else [found]:
            if not 0 <= share < 1 or share == 0 and not zero:
                bounds = "[0, 1)" if zero else "(0, 1)"
                raise ValueError(f"{dotted} is a share in {bounds}, not a percentage; got {share}")


class _Loader(yaml.SafeLoader):
    """Reads plain values alone: no aliases, by which a few lines can stand for gigabytes, and no key twice."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"write out what *{self.peek_event().anchor} stands for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.YAMLError(f"a name stands twice in the section that begins at line {node.start_mark.line + 1}")
        return found


def _read_yaml(path):
    """The content of a study file as Values. Raises ValueError that names it for anything else."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no text, no such date or number
        raise ValueError(f"{path.name} is not written as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} has no sections; demo.yaml has every section")
    return _values(content, path.name)


def in_force(section, values):
    """values of a section without those of OFF that are off, to be compared with older ones that do not have them."""
    off = OFF.get(section, {})
    return {name: value for name, value in values.items() if name not in off or value != off[name]}


def _check_file(values, demo):
    """Raise for a value of a study that the demo does not have, for one that is missing, and for another type."""
    models = values["models"] if isinstance(values["models"], dict) and values["models"] else {"vit": {}}
    models = {name: {**(options if isinstance(options, dict) else {}), **MODEL} for name, options in models.items()}
    data = {**demo["data"], "augment": AUGMENT}

    def compare(name, known, given):
        if not isinstance(known, dict):
            return checked(name, known, given)
        if not isinstance(given, dict):
            raise TypeError(f"{name} is a section with {', '.join(known)}, got {type(given).__name__} {given!r}")
        names = [f"{name}.{key}" for key in known]
        for key in given:
            if key not in known:
                raise ValueError(unknown("value", f"{name}.{key}", names))
        if missing := [f"{name}.{key}" for key in known if key not in OPTIONAL | given.keys()]:
            raise ValueError(f"{', '.join(missing)} missing; demo.yaml has every value")
        for key in given:
            compare(f"{name}.{key}", known[key], given[key])

    for section, known in {**demo, "data": data, "models": models}.items():
        compare(section, known, values[section])


def checked(name, now, given):
    """given, if it may take the place of the value `now` called name.

    It must be of the same type; an int may stand for a float, and what ALSO names may be what it says. Lists are
    checked by element. Raises TypeError, or ValueError for an empty list.
    """

    def fits(old, new):
        if isinstance(old, bool) or isinstance(new, bool):
            return isinstance(old, bool) and isinstance(new, bool)
        return isinstance(new, (int, float) if isinstance(old, float) else type(old))

    also = ALSO.get(name, ALSO.get(name.rpartition(".")[2]))
    if isinstance(now, dict):
        raise TypeError(f"{name} is a section; override its values: {', '.join(_dotted(now, name))}")
    wanted = type(now).__name__
    if also:
        fine = any(fits(example, given) for example in also)
        wanted = " or ".join("null" if example is None else type(example).__name__ for example in also)
    elif isinstance(now, list) and isinstance(given, list | tuple):
        if not given:
            raise ValueError(f"{name} is empty; it needs at least one element")
        old = next((v for v in now if isinstance(v, float)), now[0] if now else given[0])
        wanted, given = f"list of {type(old).__name__}", list(given)
        fine = all(fits(old, new) for new in given)
    else:
        fine = fits(now, given)
    if not fine:
        raise TypeError(f"{name} must be {wanted} (such as {now!r}), got {type(given).__name__} {given!r}")
    return given


def _values(content, where):
    """content with every dict as Values. Raises ValueError for a number that YAML took for text."""
    if isinstance(content, dict):
        return Values({str(key): _values(value, f"{where}: {key}") for key, value in content.items()})
    if isinstance(content, list):
        return [_values(value, where) for value in content]
    if isinstance(content, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", content, re.IGNORECASE):
        raise ValueError(f"{where} is {content!r}, which YAML reads as text; write {float(content)!r}")
    return content


def _dotted(values, above=""):
    """Names of all values as "section.value"."""
    names = []
    for key, value in values.items():
        name = f"{above}.{key}" if above else key
        names += _dotted(value, name) if isinstance(value, dict) else [name]
    return names


def _label(name, override):
    """Name of the folder of a study: apart when overridden, so that the study's own is never replaced."""
    if not override:
        return name
    text = ",".join(f"{key}={json.dumps(value)}" for key, value in sorted(override.items()))
    plain = len(text) <= 60 and re.fullmatch(r"[\w.,=-]+", text)
    return f"{name}+{text if plain else hashlib.sha256(text.encode()).hexdigest()[:10]}"


# -- runs


def open_run(study_name, model=None, seed=0, override=None):
    """The Run of one model and seed of a study; without a model that of the study as a whole (data, report).

    study_name, override: as in `study`. An overridden run has a folder of its own, and reads from the study's
    own what those notebooks wrote that the override does not concern.
    Raises what `study` raises, ValueError for an unknown model, TypeError for a seed that is not an int >= 0,
    PermissionError where the folder cannot be written.
    """
    values = study(study_name, seed=seed if model else None, override=override)
    if model is not None and model not in values.models:
        raise ValueError(unknown(f"model of study {values.name}:", model, values.models))
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise TypeError(f"seed must be an int of at least 0, got {type(seed).__name__} {seed!r}")
    return Run(study_name, values, model, seed, dict(override or {}))


class Run:
    """One model and seed of a study: its values, its folder, its rows. Made by `open_run`.

    .study and .model_name are names, .seed an int, .params the study's Values, .folder where this run writes.
    """

    def __init__(self, given, params, model_name, seed, override):
        self.study, self.params, self.model_name, self.seed = params.name, params, model_name, seed
        self.override = override
        self._given = given  # name or path that was asked for
        inner = Path(model_name, f"seed{seed}") if model_name else Path()
        self.folder = root() / "runs" / _label(self.study, override) / inner
        self._base = root() / "runs" / self.study / inner
        make_folder(self.folder)
        self._commit = _commit()  # of the code as imported, not as it is when rows are saved

    def __repr__(self):
        parts = [self.study, self.model_name, f"seed {self.seed}" if self.model_name else None]
        changed = [f"{name}={value}" for name, value in self.override.items()]
        return "Run(" + ", ".join([part for part in parts if part] + changed) + ")"

    @property
    def model(self):
        """Arguments of models.create: `models.create(**lab.model, num_classes=…, image_size=…)`."""
        options = dict(self.params.models[self.model_name])
        if options.get("weights"):
            options["weights"] = str(repository() / options["weights"])
        return options

    @property
    def data(self):
        """Arguments of data.load: `data.load(**lab.data)`."""
        options = {key: value for key, value in self.params.data.items() if key != "augment"}
        inside = repository() / str(options["name"])  # a relative path is meant from the repository, as `weights` is
        return options | ({"name": str(inside)} if inside.is_dir() and "/" in str(options["name"]) else {})

    def training(self, section="train"):
        """Settings of train.fit: those of `train`, under any epochs, lr, images, warmup_epochs of section."""
        own = {key: value for key, value in self.params[section].items() if key in SETTINGS}
        return {**self.params.train, **own, "augment": dict(self.params.data.augment), "seed": self.seed}

    def calibration(self, split, *, images=None, augment=None, device="cpu"):
        """List of (x, y) batches for scores: a stratified part of split, a data.Split, in evaluation transforms.

        As many images as the study's `calibration` says, or `images`; all of a smaller split. augment: whether each is
        augmented as in training, by a draw from the run's seed (None: as the study's `calibration` says; False for
        what is to be compared with it, such as val).
        """
        values = self.params.calibration
        chosen = split.subset(min(images or values.images, len(split)), seed=self.seed)
        augment = values.augment if augment is None else augment
        options = {"augment": dict(self.params.data.augment), "seed": self.seed} if augment else {}
        return list(chosen.batches(values.batch_size, device=device, **options))

    def save_calibration(self, batches, losses):
        """Write the table `calibration`, which says what scores were taken from: images, batch_size, labels, augment,
        calibration_loss and val_loss. batches: of `calibration`. losses: both, of scores.check_calibration."""
        row = {**self.params.calibration, "images": sum(len(y) for _, y in batches)}
        row |= dict(zip(("calibration_loss", "val_loss"), losses, strict=True))
        return self.save_table("calibration", pd.DataFrame([row]))

    def path(self, name):
        """Where this run writes the file or folder called name."""
        return self.folder / name

    def need(self, name, notebook):
        """Path of what an earlier notebook wrote. Raises FileNotFoundError that says which one to run first.

        An overridden run takes it from the study's own where that notebook does not use what changed.
        """
        if notebook not in USES:
            raise ValueError(unknown("notebook", notebook, USES))
        concerned = any(dotted.split(".")[0] in USES[notebook] for dotted in self.override)
        for folder in [self.folder] if concerned else [self.folder, self._base]:
            if (folder / name).exists():
                return folder / name
        raise FileNotFoundError(
            f"{self.path(name)} is missing: run notebooks/{notebook}.ipynb first, in JupyterLab or with\n"
            f"  {self.command(notebook)}"
        )

    def shipped(self, settings, images):
        """Folder of the dense checkpoint that the repository ships for this study, model and seed (checkpoints/STUDY/
        MODEL, or MODEL-seed1); None if there is none, or it was trained by other settings (as `training` gives them)
        or on other data than images, the data.Dataset."""
        name = f"{self.model_name}-seed{self.seed}" if self.seed else str(self.model_name)
        folder = repository() / "checkpoints" / self.study / name
        if not (folder / "model.json").is_file():
            return None
        kept = json.loads((folder / "model.json").read_text())["extra"]
        same = in_force("train", kept.get("settings", {})) == in_force("train", settings)
        same = same and kept.get("values") == self.origin
        same = same and kept.get("data") == images.description  # CIFAR-10 is not CIFAR-10 (JPEG)
        return folder if same else None

    @property
    def origin(self):
        """What a dense checkpoint of this run depends on beside training settings: values of data and model."""
        data = {key: value for key, value in self.data.items() if value is not None}
        return json.loads(json.dumps({"data": data, "model": self.params.models[self.model_name]}))

    def command(self, notebook):
        """The command that runs notebook for this run."""
        words = ["python -m vitlab.run", notebook, "--study", str(self._given)]
        if self.model_name and notebook not in ("0_data", "7_report"):
            words += ["--model", self.model_name, "--seed", str(self.seed)]
        for name, value in self.override.items():
            words += ["--set", f"'{name}={json.dumps(value)}'"]
        return " ".join(words)

    def save_rows(self, notebook, rows, *, data=None):
        """Write the results of notebook, all of them, and return them as a frame with provenance.

        rows: frame or list of dicts, one per model measured; at least `method` and `stage`, and a number as
        `target` where something was cut. data: what the images are called, such as "CIFAR-10 (JPEG)". Columns become
        those of ROW in that order, then any others.
        """
        frame = pd.DataFrame(rows)
        if missing := [column for column in ("method", "stage") if column not in frame]:
            raise ValueError(f"rows of {notebook} lack {' and '.join(missing)}")
        if data:
            frame["data"] = data
        if "target" in frame:
            frame["target"] = pd.to_numeric(frame["target"])
        frame = frame.assign(**{key: value for key, value in self._provenance().items() if key not in frame})
        frame = frame.reindex(columns=[*ROW, *(c for c in frame if c not in ROW)])
        self._save(f"results-{notebook}.csv", frame)
        used = USES.get(notebook, tuple(self.params))
        values = {section: in_force(section, self.params[section]) for section in used if section in self.params}
        if self.model_name and "models" in values:
            values["models"] = self.params.models[self.model_name]
        about = {"notebook": notebook, "save": uuid.uuid4().hex, "parameters": values}
        _append(self.path(LOG), [about | row for row in json.loads(frame.to_json(orient="records"))])
        return frame

    def load_rows(self, notebook):
        """The rows that notebook saved for this run. Raises FileNotFoundError as `need` does."""
        return pd.read_csv(self.need(f"results-{notebook}.csv", notebook))

    def save_history(self, notebook, history):
        """Write histories of notebook: train.fit's frame, or a list of them, marked by method, target, …"""
        frame = pd.concat(history, ignore_index=True) if isinstance(history, list) else history
        frame = frame.assign(study=self.study, model=self.model_name, seed=self.seed)
        first = [column for column in HISTORY if column in frame]
        rest = [column for column in frame if column not in first]
        return self._save(f"history-{notebook}.csv", frame[first + rest])

    def save_table(self, name, frame):
        """Write any other frame as table-<name>.csv, marked with study, model and seed."""
        identity = {"study": self.study, "model": self.model_name, "seed": self.seed}
        rest = frame.drop(columns=IDENTITY, errors="ignore")
        return self._save(f"table-{name}.csv", pd.concat([pd.DataFrame(identity, rest.index), rest], axis=1))

    def read(self):
        """All rows, histories and tables of the study so far. See `read_study`."""
        return read_study(self._given, override=self.override)

    @property
    def figures(self):
        """Folder of the study's figures and tables. See `figures_folder`."""
        return figures_folder(self._given, override=self.override)

    def _save(self, name, frame):
        if frame.empty:
            raise ValueError(f"nothing to write to {name}: no rows")
        write_atomic(self.path(name), frame.to_csv(index=False))
        return frame

    def _provenance(self):
        own = {"study": self.study, "model": self.model_name, "seed": self.seed}
        own |= {"split_seed": self.params.data.split_seed} | provenance() | {"commit": self._commit}
        own |= {"meter": METER}
        return own | {"override": json.dumps(self.override) if self.override else None}


def read_study(name, *, override=None):
    """All that the runs of a study have saved, over models and seeds.

    What a run has not saved here but the study's folder of figures holds, as in a fresh clone, is taken from there:
    results and histories by model, seed and notebook (timings of 6_efficiency by method, too, as they are of what
    several notebooks left, and only of methods of which there are other rows), other tables by model and seed, unless
    the dense model of that run is another one here. Returns Values with the frames `results` and `history`, and
    `tables`, frames by name; `kept` names what came from the figures. Raises FileNotFoundError if there
    are no results yet.
    """
    values = study(name, override=override)
    folder = root() / "runs" / _label(values.name, override)
    published = None if override else repository() / "figures" / values.name
    here = {path.stem for path in [*folder.glob("*.csv"), *folder.glob("*/seed*/*.csv")]}
    there = {path.stem for path in published.glob("table-*.csv")} if published else set()

    def read(stem):
        frames = []
        for path in sorted([*folder.glob(f"{stem}.csv"), *folder.glob(f"*/seed*/{stem}.csv")]):
            frames.append(pd.read_csv(path, dtype=WORDS))
            if stem.endswith("-*"):
                frames[-1].insert(len(IDENTITY), "notebook", path.stem.partition("-")[2])
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def read_published(stem):
        file = published and published / f"{stem.removesuffix('-*')}.csv"
        frame = pd.read_csv(file, dtype=WORDS) if file and file.is_file() else pd.DataFrame()
        if frame.empty or stem.endswith("-*") and "notebook" not in frame:
            return pd.DataFrame()
        known = frame.model.isna() | (frame.model.isin(values.models) & frame.seed.isin(values.seeds))
        return frame[known & frame.notebook.isin(USES) if "notebook" in frame else known]

    results, before = read("results-*"), read_published("results-*")
    changed = _changed_models(results, before)
    kept = []

    def merged(stem, frame, before):
        by = ["model", "seed", "notebook"] if stem.endswith("-*") else ["model", "seed"]

        def keys_of(rows):
            timed = rows.reindex(columns=["notebook"]).notebook == "6_efficiency"
            rows = rows.reindex(columns=[*by, "method"]).astype(object)
            rows["method"] = rows.method.where(timed)
            return list(rows.where(rows.notna(), "").itertuples(index=False, name=None))

        if len(before):
            have, keys = set(keys_of(frame)), keys_of(before)
            missing = [key not in have and key[:2] not in changed for key in keys]
            for key in dict.fromkeys(key for key, gone in zip(keys, missing, strict=True) if gone):
                kept.append(f"{key[0]} seed {key[1]} {key[2] if len(by) == 3 else stem}")
            frame = pd.concat([part for part in (frame, before[missing]) if len(part)] or [frame], ignore_index=True)
        return frame.sort_values(by, kind="stable", ignore_index=True) if len(frame) else frame

    results = merged("results-*", results, before)
    if len(results):  # published timings of what no notebook makes any more would outlive its rows
        runs = results.set_index(["model", "seed", "method"]).index
        timed = results.notebook == "6_efficiency"
        results = results[~timed | runs.isin(runs[~timed])].reset_index(drop=True)
    if results.empty:
        raise FileNotFoundError(f"no results in {folder}; run the study: make study STUDY={name}")
    history = merged("history-*", read("history-*"), read_published("history-*"))
    tables = {stem for stem in here | there if stem.startswith("table-")}
    tables = {stem: merged(stem, read(stem), read_published(stem)) for stem in sorted(tables)}
    tables = {stem.removeprefix("table-"): frame for stem, frame in tables.items() if len(frame)}
    return Values(results=results, history=history, tables=Values(tables), kept=list(dict.fromkeys(kept)))


def gather(name=None, *, every=False):
    """Rows of all runs of this data root as one frame, or of one study, overridden ones too.

    Each run keeps a log, to which every save of rows adds them with their notebook and all the values of the study
    that it uses. every: the whole log, with rows that later saves of the same notebook have replaced; `save` tells one
    from another. Columns: folder, notebook, save, those of ROW, any others, and parameters (JSON). A line that was cut
    short, by a full disk say, is left out, with a word. Raises FileNotFoundError if there are no rows.
    """
    runs = root() / "runs"
    rows = []
    for path in sorted(runs.rglob(LOG)):
        folder = path.parent.relative_to(runs)
        if name is not None and folder.parts[0].partition("+")[0] != name:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                row["parameters"] = json.dumps(row["parameters"])
            except (ValueError, KeyError, TypeError):
                say(f"line {number} of {path} is no row, perhaps cut short; left out")
                continue
            rows.append({"folder": folder.as_posix()} | row)
    if not rows:
        raise FileNotFoundError(f"no rows of {name or 'any study'} under {runs}; run a study: make study STUDY=demo")
    frame = pd.DataFrame(rows)
    if not every:
        last = frame.groupby(["folder", "notebook"]).save.transform("last")
        frame = frame[frame.save == last].reset_index(drop=True)
    first = [column for column in ["folder", "notebook", "save", *ROW] if column in frame]
    rest = [column for column in frame if column not in [*first, "parameters"]]
    return frame[[*first, *rest, "parameters"]]


def compare(again, kept, *, least=1.0):
    """What came out again, beside what was kept: one line for each row of the models and seeds that both have.

    again, kept: rows as `read_study` gives them, or of figures/<study>/results.csv; those of 6_efficiency are left
    out, as timings are of their machine. Columns: seed, KEY, top1 and macs of both (`_kept`; of a row that only one
    table has the other's are missing), `spread` (points that the kept row's seeds span, `least` at least, as other
    threads and processors round otherwise) and `agrees`: both are there, top-1 is within the spread, and MACs within
    1 %, which is what budgets promise.
    Raises ValueError where no row is in both.
    """
    key = ["seed", *(name for name in KEY if name in again and name in kept)]
    again, kept = (rows[rows.top1.notna() & (rows.notebook != "6_efficiency")] for rows in (again, kept))
    again, kept = (rows.assign(target=pd.to_numeric(rows.target)) for rows in (again, kept))
    texts = dict.fromkeys([*key[1:]], object) | {"target": float}  # an empty column would be of numbers
    again, kept = (rows.astype({name: texts[name] for name in key[1:]}) for rows in (again, kept))
    spans = kept.groupby(key[1:], dropna=False).top1.transform(lambda top1: top1.max() - top1.min())
    kept = kept.assign(spread=spans.clip(lower=least))[[*key, "top1", "macs", "spread"]]
    kept = kept.merge(again[["model", "seed"]].drop_duplicates())
    both = again[[*key, "top1", "macs"]].merge(kept, on=key, suffixes=("", "_kept"), how="outer")
    if both.dropna(subset=["top1", "top1_kept"]).empty:
        raise ValueError("no row stands in both tables: they are of other models, seeds or values of the study")
    near = (both.top1 - both.top1_kept).abs() <= both.spread
    return both.assign(agrees=near & ((both.macs / both.macs_kept - 1).abs() <= 0.01))


def _append(path, rows):
    """Add rows to a file of JSON lines, whole and in one piece even if others add at the same time."""
    if not parallel.is_first():
        return
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with open(path, "ab+") as file, parallel.in_turn(file):
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text  # after a line that was cut short
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _changed_models(results, before):
    """{(model, seed)} whose dense model in results is another one than in before."""
    if results.empty or before.empty:
        return set()
    now, then = (frame[frame.notebook == "1_train"] for frame in (results, before))
    both = now.merge(then, on=["model", "seed"], suffixes=("", "_before"))
    close = (both.top1 - both.top1_before).abs() < 0.05  # of percent: another processor rounds otherwise
    changed = both[both.params.ne(both.params_before) | ~close]
    return set(zip(changed.model, changed.seed, strict=True))


def figures_folder(name, *, override=None):
    """figures/<study> of the repository, made if need be; of an overridden study `figures` in its runs."""
    label = _label(study(name, override=override).name, override)
    folder = root() / "runs" / label / "figures" if override else repository() / "figures" / label
    make_folder(folder)
    return folder


def provenance():
    """Where numbers of this process come from: threads, commit of the code, torch, timm, device, date."""
    import torch  # here: the command line reads studies without waiting for it

    return {
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "torch": version("torch"),
        "timm": version("timm"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _commit():
    """Short hash of the commit of the code, with "+dirty" if it was changed since; "unknown" without git."""
    git = ["git", "-C", str(repository())]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        if found.returncode:
            return "unknown"
        same = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "vitlab", "notebooks", "benchmarks"])
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() + ("+dirty" if same.returncode else "")


def _processor():
    """Name of the processor, as Linux knows it, else its architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


# -- files and progress


def write_atomic(path, content, *, keep=None):
    """Write a file whole or not at all: under another name in its folder, then renamed.

    content: text, bytes, or a function that is called with the path to write to. keep: a path that what was there
    before is moved to. Makes the folder if need be. Of several processes (see `parallel`) the first alone writes.
    Raises PermissionError with what to do where it cannot be written, OSError likewise where the disk is full.
    """
    path = Path(path)
    if not parallel.is_first():
        return
    make_folder(path.parent)
    part = path.with_name(f".{os.getpid()}-{path.name}")  # ends like path: savers look at the ending
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        if keep and path.exists():
            path.replace(keep)
        part.replace(path)
        for left in path.parent.glob(f".*-{path.name}"):  # by killed processes
            with contextlib.suppress(FileNotFoundError):  # one of a process that has just finished
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()
    except PermissionError as error:
        raise PermissionError(f"cannot write {path} ({error.strerror}); {_ELSEWHERE}") from error
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        if _is_full(error, path.parent):
            raise OSError(errno.ENOSPC, f"the disk of {path.parent} is full: {_ROOM}") from error
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


_ELSEWHERE = "set VITLAB_DATA to a folder that can be written"
_ROOM = "make room, or set VITLAB_DATA to a folder elsewhere, and run the same again; what was finished is kept"


def _is_full(error, folder):
    """Whether error is of a full disk, a quota or a limit of file sizes; libraries do not always say so."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return shutil.disk_usage(folder).free < 1_000_000


@contextlib.contextmanager
def alone(lock, what):
    """Hold the file lock, which the system frees whatever happens to this process.

    what: what is done meanwhile, in words. Raises RuntimeError if another one holds it.
    """
    with open(lock, "w") as file:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"{what} is under way in another process: wait for it, or stop it") from None
        yield


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # not all file systems mean what they say of permissions
            pass
    except OSError as error:
        raise PermissionError(f"cannot write to {folder} ({error.strerror}); {_ELSEWHERE}") from error


def headless():
    """Whether nobody watches a progress bar (vitlab.run sets VITLAB_HEADLESS)."""
    return os.environ.get("VITLAB_HEADLESS", "0") not in ("", "0")


def say(text):
    """Print one line now, without breaking a progress bar; of several processes the first alone does."""
    if not parallel.is_first():
        return
    print(text, flush=True) if headless() else tqdm.write(str(text))


def main(arguments=None):
    """python -m vitlab.record [STUDY] [--every | --compare]: the rows of `gather` as CSV, or whether those of a study
    agree with the published ones. Returns the exit status: 0, or 1 without rows or where some do not agree."""
    parser = argparse.ArgumentParser("python -m vitlab.record", description="Rows of all runs as one CSV table.")
    parser.add_argument("study", nargs="?", help="of this study alone")
    parser.add_argument("--every", action="store_true", help="rows, too, that were replaced since")
    parser.add_argument("--compare", action="store_true", help="set them beside figures/STUDY/results.csv instead")
    asked = parser.parse_args(arguments)
    if asked.compare and not asked.study:
        parser.error("--compare needs a study")
    try:
        if not asked.compare:
            print(gather(asked.study, every=asked.every).to_csv(index=False), end="")
            return 0
        values = study(asked.study)
        rows = gather(values.name)
        kept = pd.read_csv(repository() / "figures" / values.name / "results.csv")
        found = compare(rows[rows.override.isna()], kept)
    except (FileNotFoundError, ValueError) as error:
        print(f"vitlab.record: {error}", file=sys.stderr)
        return 1
    shown = ["model", "seed", "method", "form", "target", "stage", "top1", "top1_kept", "spread", "agrees"]
    print(found[shown].to_string(index=False, float_format="{:.2f}".format, na_rep=""))
    lacking = {"were not made again": found.top1, "are not published": found.top1_kept}
    words = [f"{column.isna().sum()} {what}" for what, column in lacking.items() if column.isna().any()]
    print(f"Of {len(found)} rows {', '.join([f'{found.agrees.sum()} agree', *words])} (figures/{values.name}).")
    return int(not found.agrees.all())


if __name__ == "__main__":
    sys.exit(main())
