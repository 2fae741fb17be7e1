"""Slides: titles hold what the tables hold; both files are whole, native and the same again."""

import html.parser
import io
import re
import shutil
import subprocess
import sys
import time
import zipfile

import deck
import numpy as np
import pandas as pd
import published
import pytest
from invented import ALONE, COMMITTED, invent
from PIL import Image

import findings
from vitlab import files

pptx = pytest.importorskip("pptx")


@pytest.fixture(scope="module")
def made(slides):
    return opened(deck.to_pptx(slides, title="title", date="2026-11-24"))


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    return invent(tmp_path_factory.mktemp("invented"), 3)


def run(*arguments):
    command = [sys.executable, "slides", *arguments]
    return subprocess.run(command, cwd=files.repository(), capture_output=True, text=True)


def opened(made):
    return pptx.Presentation(io.BytesIO(made))


def test_the_pptx_has_native_tables_and_whole_pictures_and_nothing_overlaps(slides, made):
    assert len(made.slides) == len(slides)
    for slide, one in zip(made.slides, slides, strict=True):
        assert slide.shapes.title.text_frame.text == one.title
        (table,) = [shape.table for shape in slide.shapes if shape.has_table]
        written = [[cell.text.strip("\u00a0") for cell in row.cells] for row in table.rows]
        assert written == [[*one.table.columns], *map(list, one.table.itertuples(index=False))]
        blobs = [shape.image.blob for shape in slide.shapes if shape.shape_type == 13]  # pictures
        assert blobs == ([one.picture.read_bytes()] if one.picture else [])
        assert one.source in [
            shape.text_frame.text for shape in slide.shapes if shape.has_text_frame
        ]
        places = [(s.left, s.top, s.left + s.width, s.top + s.height) for s in slide.shapes]
        for i, (left, top, right, bottom) in enumerate(places):
            assert (
                0 <= left < right <= made.slide_width and 0 <= top < bottom <= made.slide_height
            ), one.title
            for x, y, x1, y1 in places[:i]:
                assert left >= x1 or right <= x or top >= y1 or bottom <= y, one.title


def test_texts_fit_their_boxes(made):
    for box in (box for slide in made.slides for box in slide.shapes if box.has_text_frame):
        for run in box.text_frame.paragraphs[0].runs:
            lines = deck.lines_of(
                run.text, run.font.size.pt, box.width.inches + 1e-6, run.font.bold
            )
            assert lines * 1.2 * run.font.size.pt / 72 <= box.height.inches + 1e-6, run.text
            assert run.font.size.pt >= 7


def test_both_files_are_the_same_byte_for_byte_whenever_they_are_made(
    invented, tmp_path, monkeypatch
):
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


def test_the_page_is_whole_and_asks_no_server(slides):
    text = deck.to_html(slides, title="a < b")
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open and "a &lt; b" in text
    assert page.texts["h2"] == [slide.title for slide in slides]
    assert page.texts["td"] == [
        cell for slide in slides for row in slide.table.itertuples(index=False) for cell in row
    ]
    assert len(page.addresses) == sum(slide.picture is not None for slide in slides)
    assert all(
        re.match(r"data:image/(png|svg\+xml);base64,", address) for address in page.addresses
    )
    assert "//" not in re.sub(r"base64,[\w+/=]+", "", text).replace("</", "")


def test_a_folder_without_tables_says_what_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"make study STUDY={tmp_path.name}"):
        findings.slides(tmp_path)
    done = run("never-run")
    assert done.returncode == 1
    assert "figures/never-run has no results.csv" in done.stderr.replace("\\", "/")


def test_the_command_writes_both_files_where_it_is_told(tmp_path):
    if not COMMITTED:
        pytest.skip("no study is committed")
    assert (
        run(f"notebooks/params/{COMMITTED[0]}.yaml", "--out", str(tmp_path / "new")).returncode == 0
    )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "slides.html",
        "slides.pptx",
    ]


def test_without_python_pptx_there_is_the_page(invented, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pptx", None)
    with pytest.raises(ModuleNotFoundError, match="pptx"):
        deck.write(invented, tmp_path)
    assert (tmp_path / "slides.html").exists() and not (tmp_path / "slides.pptx").exists()


def test_no_torch_is_loaded():
    code = "import sys, deck; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=files.repository() / "slides")
    assert done.returncode == 0


@pytest.mark.parametrize(
    "text, width, lines", [("", 1, 1), ("one", 1, 1), ("one two", 0.6, 2), ("one " * 9, 0.6, 9)]
)
def test_lines_by_hand(text, width, lines):
    assert deck.lines_of(text.strip(), 18, width) == lines  # "one" is 0.46 inches wide in 18 points


def test_a_word_wider_than_its_box_does_not_fit():
    long = pd.DataFrame({"a": ["incomprehensibilities" * 20]})
    assert deck.lines_of(long.a[0], 18, 9) == float("inf")
    with pytest.raises(ValueError, match="a table is too large for its slide: why"):
        deck.to_pptx([findings.Slide("why", long)], title="", date="2026-11-24")


@pytest.mark.parametrize(
    "size, below", [((100, 100), False), ((200, 100), False), ((600, 100), True)]
)
def test_a_wide_picture_stands_above_its_table(tmp_path, size, below):
    Image.new("RGB", size).save(tmp_path / "picture.png")
    slide = findings.Slide("why", pd.DataFrame({"a": ["1", "2"]}), picture=tmp_path / "picture.png")
    (left, top), _, (wide, high) = deck.arrange(slide, 1.5, 4.7)
    assert wide / high == pytest.approx(size[0] / size[1])
    assert (top > 1.5 + high) == below and (left > 0.5 + wide) != below


# -- what slides say


def numbers(texts):
    return set(re.findall(r"\d+(?:[.,]\d+)*", " ".join(texts)))


def cells(table):
    return [*table.columns, *(cell for line in table.itertuples(index=False) for cell in line)]


def files_of(slide):
    return set(re.findall(r"[\w.-]+\.(?:csv|png)", slide.source))


def test_every_number_of_a_title_stands_in_its_table(folder, slides):
    assert len(slides) > 20
    for slide in slides:
        assert 1 <= len(slide.table) <= 9
        assert slide.table.map(lambda cell: isinstance(cell, str)).all(axis=None)
        assert numbers([slide.title.replace("top-1", "")]) <= numbers(cells(slide.table)), (
            slide.title
        )
        assert not re.search("nan|None|inf", " ".join([slide.title, *cells(slide.table)])), (
            slide.title
        )
        assert slide.source.startswith("Source: ") and folder.name in slide.source


def test_every_finding_has_a_slide_where_all_tables_are_there(invented, capsys):
    study = published.Published(invented)
    assert len(findings.slides(invented)) == len(findings.plan(study))
    assert "no slide" not in capsys.readouterr().out


def test_what_is_missing_drops_its_own_slides_and_a_line_says_so(invented, tmp_path, capsys):
    whole = findings.slides(invented)
    files = sorted(path.name for path in invented.glob("*.*") if path.name != "results.csv")
    used = {name for slide in whole for name in files_of(slide)}
    assert {path.name for path in invented.glob("*.csv")} <= used | {"table-data.csv"}
    for group in range(5):  # every file is missing once
        missing = set(files[group::5]) - {"table-data.csv"}
        part = tmp_path / str(group) / invented.name
        shutil.copytree(
            invented, part, ignore=lambda _, names, missing=missing: missing & set(names)
        )
        left = [slide.title for slide in whole if not missing & files_of(slide)]
        assert [slide.title for slide in findings.slides(part)] == left
        lines = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith("no slide ")
        ]
        assert len(left) == len(whole) - len(lines)
        assert all(line.endswith(" is missing") for line in lines)


def test_no_title_praises_a_random_control(tmp_path):
    folder = invent(tmp_path, 1)
    timed = pd.read_csv(folder / "efficiency.csv")
    timed.loc[timed.method == "random", "speedup"] = 9.0
    timed.to_csv(folder / "efficiency.csv", index=False)
    summary = pd.read_csv(folder / "summary.csv")
    control = summary[summary.method == "heads+svd"].assign(method="heads+svd, random", macs=1.0)
    summary.loc[summary.method == "random", ["cut", "reconstructed", "finetuned"]] = 99.0
    pd.concat([summary, control]).to_csv(folder / "summary.csv", index=False)
    begin = ("The fastest", "40", "Half")
    ranked = [slide for slide in findings.slides(folder) if slide.title.startswith(begin)]
    tables = "".join(slide.table.to_csv() for slide in ranked)
    assert "random, 50" in tables and "heads+svd, random" in tables
    assert len(ranked) >= 4 and not any("random" in slide.title for slide in ranked)


def test_sources_and_rankings_know_which_seeds_a_cut_has(tmp_path):
    folder = invent(tmp_path, 2)
    summary = pd.read_csv(folder / "summary.csv")
    alone = summary.seeds == 1
    assert 0 < alone.sum() < len(summary)
    summary["finetuned"] = summary.dense - np.where(
        alone, 1.0, 3.0
    )  # what one seed has loses least
    summary["reconstructed"] = summary.dense - np.where(alone, 2.0, 4.0)
    summary.to_csv(folder / "summary.csv", index=False)
    timed = pd.read_csv(folder / "efficiency.csv")
    timed.loc[timed.method.isin(ALONE), "speedup"] = 9.0  # and is fastest
    timed.to_csv(folder / "efficiency.csv", index=False)
    slides = findings.slides(folder)

    def one(beginning):
        (slide,) = [slide for slide in slides if slide.title.startswith(beginning)]
        return slide

    cut = one("40\u00a0% of heads and layers cut: heads+svd costs the ViT least")
    assert cut.table.seeds.tolist() == ["2", "1", "1"]
    assert "means over seeds 0, 1 (some cuts: 0), split 0" in cut.source
    half = one("Half the MACs, nothing trained: −4.0 points (ViT")
    assert "random" not in half.title and half.table.seeds.tolist() == ["2", "2", "1"]
    fast = one("The fastest ViT is")
    assert fast.table.seeds.max() == "2" and "9.0" not in fast.title
    assert not any(name in fast.title for name in ALONE)
    assert "means over seeds 0, 1" in one("The ViT depends most").source
