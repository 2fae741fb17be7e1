"""Slides: sentences say what the tables hold, whatever these are; both files are whole, native and the same again."""

import html.parser
import io
import re
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vitlab import deck, plots, record

pptx = pytest.importorskip("pptx")
FIGURES = record.repository() / "figures"
COMMITTED = sorted(path.parent.name for path in FIGURES.glob("*-small/results.csv"))
MODELS = ["swin", "vit"]
PICTURES = ["sensitivity", "agreement", "recovery", "training", "weights", "heads_svd_iht", "audit", "speedup"]
PICTURES += ["ladder-macs-0.5", "classes-macs-0.5", *(f"tradeoff-{cost}" for cost in plots.AXES)]


def invent(folder, number):
    """A study of invented numbers with every table and picture there is. number: of the draw; 0 is of one in which
    little was lost, 2 of two seeds."""
    rng = np.random.default_rng(number)
    low = 80 if number == 0 else 5

    def frame(name, keys, **columns):
        rows = [key if isinstance(key, tuple) else (key,) for key in keys]
        made = pd.DataFrame([(model, *row) for model in MODELS for row in rows])
        made.columns = ["model", *columns["names"]]
        drawn_anew = name not in ("summary", "best", "audit-spearman")  # those are of all seeds
        parts = [made.assign(seed=seed) for seed in range(1 + (number == 2 and drawn_anew))]
        made = pd.concat(parts, ignore_index=True)
        for column, (least, most) in columns["drawn"].items():
            made[column] = rng.uniform(least, most, len(made))
        made.to_csv(folder / f"{name}.csv", index=False)
        return made

    costs = dict.fromkeys(("params", "nonzero", "macs", "macs_ideal", "bytes_disk"), (100000.0, 90000000.0))
    names = ["method", "form", "target_kind", "target", "stage"]
    masked = [(m, "masked", "sparsity", t) for m in ("unstructured", "structured") for t in (0.5, 0.9)]
    ratios = [(f"heads+{form}", "factored", "ratio", 0.4) for form in ("svd", "iht", "threshold")]
    budgets = [(m, "removed", "macs", 0.5) for m in ("pool", "units", "random")]
    cuts = [*masked, *ratios, *budgets]
    whole = [("dense", "masked", None, None, stage) for stage in ("dense", "dense+epochs")]
    drawn = {"top1": (low, 80), "epochs": (5, 5), "mean_per_class": (low, 80)} | costs
    stages = ["cut", "compensated", "reconstructed", "finetuned"]
    rows = frame("results", [*whole, *((*c, s) for c in cuts for s in stages)], names=names, drawn=drawn)
    about = dict(latency_ms=np.nan, batch=np.nan, threads=1, precision="float32", data="shapes", split_seed=0)
    about |= dict(commit="0123456789", torch="2.15.0", timm="1.0.31", device="a machine", date="2026-11-24T01:02:03Z")
    rows = rows.assign(**about)
    timed = rows.assign(latency_ms=1.0, batch=64.0)
    pd.concat([rows, timed]).to_csv(folder / "results.csv", index=False)
    rows[rows.method == "dense"].to_csv(folder / "dense.csv", index=False)
    points = dict.fromkeys(("dense", *stages), (low, 80)) | {"macs": costs["macs"]}
    frame("summary", cuts, names=names[:4], drawn=points)
    frame("efficiency", [whole[0][:4], *cuts], names=names[:4], drawn=costs | {"speedup": (0.5, 4), "top1": (low, 80)})
    tuned = [(method, target, 5) for method, _, _, target in masked]
    drawn = {"train_top1": (low, 99), "val_top1": (low, 99), "training_mb": (9, 99)}
    frame("training", tuned, names=["method", "target", "epoch"], drawn=drawn)
    scored = [(c, k) for c in ("random", "taylor", "fisher") for k in ("heads", "neurons")]
    frame("table-agreement", scored, names=["criterion", "kind"], drawn={"spearman": (-1, 1)})
    drawn = {"spearman": (-1, 1), "ratio": (0.01, 9), "cuts": (2, 2)}
    frame("audit-spearman", scored, names=["criterion", "kind"], drawn=drawn)
    masked = [(m, c, t) for m, _, _, t in masked for c in ("random", "taylor")]
    frame("table-criteria", masked, names=["method", "criterion", "target"], drawn={"val_top1": (low, 80)})
    layers = [(f"blocks.{i}.mlp.fc1", ratio) for i in range(9) for ratio in (0.3, 0.9)]
    frame("table-curves", layers, names=["layer", "ratio"], drawn={"increase": (-1, 1)})
    bins = [
        (m, t, s, "all", left, left + 1)
        for m, _, t in masked[::2]
        for s in ("unpruned", "pruned", "finetuned")
        for left in (-1, 0)
    ]
    names = ["method", "target", "stage", "role", "left", "right"]
    frame("table-distributions", bins, names=names, drawn={"count": (1, 9), "zeros": (1, 9)})
    named = [(f"class {i}", "macs", 0.5, "pool") for i in range(12)]
    drawn = {"before": (low, 80), "after": (low, 80), "change": (-9, 9), "images": (9, 9)}
    frame("table-classes", named, names=["class", "target_kind", "target", "method"], drawn=drawn)
    ways = [(c, r, p, 64) for c in ("dense", "budget-pool-0.5") for r in ("eager", "onnxruntime") for p in ("bf16",)]
    frame("table-runtimes", ways, names=["checkpoint", "runtime", "precision", "batch"], drawn={"speedup": (0.5, 9)})
    limits = [
        (c, x, "pool", "removed", 0.5, "finetuned", "val") for c in ("macs", "relative_latency") for x in (0.5, 1)
    ]
    names = ["cost", "limit", "method", "form", "target", "stage", "chosen_on"]
    frame("best", limits, names=names, drawn={"top1": (low, 80), "dense": (80, 80)})
    meters = {f"macs_{meter} / macs": (0.9, 1.1) for meter in ("torchprofile", "thop")} | {"macs_torch / macs": (1, 1)}
    frame("meters", cuts, names=["method", "form", "target_kind", "target"], drawn=meters)
    splits = [("train", 90), ("val", 10), ("test", 20)]
    pd.DataFrame(splits, columns=["split", "images"]).to_csv(folder / "table-data.csv", index=False)
    for i, name in enumerate(f"{picture}-{model}" for picture in PICTURES for model in MODELS):
        Image.new("RGB", (200 + i, 100), "white").save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module", params=[*COMMITTED, 0, 1, 2])
def folder(request, tmp_path_factory):
    """Committed tables as they are, and invented ones, whose pictures are small."""
    if isinstance(request.param, str):
        return FIGURES / request.param
    return invent(tmp_path_factory.mktemp("folder"), request.param)


@pytest.fixture(scope="module")
def found(folder):
    return deck.slides(folder)


@pytest.fixture(scope="module")
def made(found):
    return opened(deck.to_pptx(found, title="title", date="2026-11-24"))


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    return invent(tmp_path_factory.mktemp("invented"), 3)


def numbers(texts):
    return set(re.findall(r"\d+(?:[.,]\d+)*", " ".join(texts)))


def cells(table):
    return [*table.columns, *(cell for row in table.itertuples(index=False) for cell in row)]


def opened(made):
    return pptx.Presentation(io.BytesIO(made))


def test_every_number_of_a_title_stands_in_its_table(folder, found):
    assert len(found) > 20
    for slide in found:
        assert 1 <= len(slide.table) <= 9 and slide.table.map(lambda cell: isinstance(cell, str)).all(axis=None)
        assert numbers([slide.title.replace("top-1", "")]) <= numbers(cells(slide.table)), slide.title
        assert not re.search("nan|None|inf", " ".join([slide.title, *cells(slide.table)])), slide.title
        assert slide.source.startswith("Source: ") and folder.name in slide.source


def test_all_findings_have_a_slide_where_all_tables_are_there(invented, capsys):
    study = deck.Study(invented)
    assert len(deck.slides(invented)) == len(list(deck._plan(study)))
    assert "no slide" not in capsys.readouterr().out


def test_what_is_missing_drops_its_own_slides_and_each_is_said(invented, tmp_path, capsys):
    whole = deck.slides(invented)
    files = sorted(path.name for path in invented.glob("*.*") if path.name != "results.csv")
    assert {path.name for path in invented.glob("*.csv")} <= {name for slide in whole for name in named(slide)}
    for group in range(5):  # every file is missing once
        part, missing = tmp_path / str(group) / invented.name, set(files[group::5])
        shutil.copytree(invented, part, ignore=lambda _, names, missing=missing: missing & set(names))
        left = [slide.title for slide in whole if not missing & named(slide)]
        assert [slide.title for slide in deck.slides(part)] == left
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no slide ")]
        assert len(left) == len(whole) - len(said) and all(line.endswith(" is missing") for line in said)


def named(slide):
    return set(re.findall(r"[\w.-]+\.(?:csv|png)", slide.source))


def test_sentences_go_the_way_of_the_numbers(tmp_path):
    found = {}
    for name, change in [("worse", -2.04), ("better", 0.16)]:
        (tmp_path / name).mkdir()
        study = invent(tmp_path / name, 1)
        rows = pd.read_csv(study / "summary.csv")
        rows.loc[:, ["dense", "cut", "compensated", "reconstructed"]] = [80.0, 10.0, 20.0, 80 + change]
        rows.loc[:, "finetuned"] = np.where(rows.method == "units", 81.0, 60.0)
        rows.to_csv(study / "summary.csv", index=False)
        found[name] = [slide.title for slide in deck.slides(study)]
    end = "without training (units) and rises by 1.0 points fine-tuned (units)"
    assert f"With half the MACs, the ViT’s top-1 falls by 2.0 points {end}" in found["worse"]
    assert f"With half the MACs, the ViT’s top-1 rises by 0.2 points {end}" in found["better"]


def test_the_pptx_has_native_tables_and_whole_pictures_and_nothing_overlaps(found, made):
    assert len(made.slides) == len(found)
    for slide, one in zip(made.slides, found, strict=True):
        assert slide.shapes.title.text_frame.text == one.title
        (table,) = [shape.table for shape in slide.shapes if shape.has_table]
        written = [[cell.text.strip("\u00a0") for cell in row.cells] for row in table.rows]
        assert written == [[*one.table.columns], *map(list, one.table.itertuples(index=False))]
        blobs = [shape.image.blob for shape in slide.shapes if shape.shape_type == 13]  # pictures
        assert blobs == ([one.picture.read_bytes()] if one.picture else [])
        assert one.source in [shape.text_frame.text for shape in slide.shapes if shape.has_text_frame]
        places = [(s.left, s.top, s.left + s.width, s.top + s.height) for s in slide.shapes]
        for i, (left, top, right, bottom) in enumerate(places):
            assert 0 <= left < right <= made.slide_width and 0 <= top < bottom <= made.slide_height, one.title
            for x, y, x1, y1 in places[:i]:
                assert left >= x1 or right <= x or top >= y1 or bottom <= y, one.title


def test_texts_fit_their_boxes(made):
    for box in (box for slide in made.slides for box in slide.shapes if box.has_text_frame):
        for run in box.text_frame.paragraphs[0].runs:
            lines = deck._lines(run.text, run.font.size.pt, box.width.inches + 1e-6, run.font.bold)
            assert lines * 1.2 * run.font.size.pt / 72 <= box.height.inches + 1e-6, run.text
            assert run.font.size.pt >= 7


def test_both_files_are_the_same_byte_for_byte_whenever_they_are_made(invented, tmp_path, monkeypatch):
    first = [path.read_bytes() for path in deck.write(invented, tmp_path / "a")]
    later = time.gmtime(time.time() + 90_000)
    monkeypatch.setattr(time, "localtime", lambda *_: later)  # what zipfile stamps
    assert [path.read_bytes() for path in deck.write(invented, tmp_path / "b")] == first
    with zipfile.ZipFile(io.BytesIO(first[0])) as file:
        assert {one.date_time for one in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert opened(first[0]).core_properties.modified.isoformat()[:10] == "2026-11-24"


class Page(html.parser.HTMLParser):
    """Tags that are open, texts of headings and cells, and addresses of what a page shows."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.addresses = [], {"h2": [], "td": [], "th": []}, []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.texts:
            self.texts[self.open[-1]][-1] += data


def test_the_page_is_whole_and_asks_no_server(found):
    text = deck.to_html(found, title="a < b")
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open and "a &lt; b" in text
    assert page.texts["h2"] == [slide.title for slide in found]
    assert page.texts["td"] == [cell for slide in found for row in slide.table.itertuples(index=False) for cell in row]
    assert len(page.addresses) == sum(slide.picture is not None for slide in found)
    assert all(re.match(r"data:image/(png|svg\+xml);base64,", address) for address in page.addresses)
    assert "//" not in re.sub(r"base64,[\w+/=]+", "", text).replace("</", "")


def test_a_folder_without_tables_says_what_makes_them(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=f"make study STUDY={tmp_path.name}"):
        deck.slides(tmp_path)
    assert deck.main(["never-run"]) == 1
    assert "figures/never-run has no results.csv" in capsys.readouterr().err.replace("\\", "/")


def test_the_command_writes_both_files_where_it_is_told(tmp_path):
    if not COMMITTED:
        pytest.skip("no study is committed")
    assert deck.main([f"notebooks/params/{COMMITTED[0]}.yaml", "--out", str(tmp_path / "new")]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["slides.html", "slides.pptx"]


def test_without_python_pptx_there_is_the_page_and_a_word(invented, tmp_path, monkeypatch, capsys):
    shutil.copytree(invented, tmp_path / "figures" / "again")
    monkeypatch.setattr(record, "repository", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "pptx", None)
    assert deck.main(["again", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "slides.html").exists() and not (tmp_path / "slides.pptx").exists()
    assert "pip install python-pptx" in capsys.readouterr().err


def test_importing_it_loads_no_torch():
    code = "import sys, vitlab.deck; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=record.repository()).returncode == 0


@pytest.mark.parametrize("text, width, lines", [("", 1, 1), ("one", 1, 1), ("one two", 0.6, 2), ("one " * 9, 0.6, 9)])
def test_lines_by_hand(text, width, lines):
    assert deck._lines(text.strip(), 18, width) == lines  # "one" is 0.46 inches wide in 18 points


def test_a_word_wider_than_its_box_does_not_fit():
    long = pd.DataFrame({"a": ["incomprehensibilities" * 20]})
    assert deck._lines(long.a[0], 18, 9) == float("inf")
    with pytest.raises(ValueError, match="a table is too large for its slide: why"):
        deck.to_pptx([deck.Slide("why", long, "")], title="", date="2026-11-24")


@pytest.mark.parametrize("size, below", [((100, 100), False), ((200, 100), False), ((600, 100), True)])
def test_a_wide_picture_stands_above_its_table(tmp_path, size, below):
    Image.new("RGB", size).save(tmp_path / "picture.png")
    slide = deck.Slide("why", pd.DataFrame({"a": ["1", "2"]}), "", picture=tmp_path / "picture.png")
    (left, top), _, (wide, high) = deck._arrange(slide, 1.5, 4.7)
    assert wide / high == pytest.approx(size[0] / size[1])
    assert (top > 1.5 + high) == below and (left > 0.5 + wide) != below
