"""Slides: both files are whole, native and the same again."""

import html.parser
import io
import re
import shutil
import subprocess
import sys
import time
import zipfile

import pandas as pd
import pytest
from invented import COMMITTED, invent
from PIL import Image

from vitlab import deck, findings, record

pptx = pytest.importorskip("pptx")


@pytest.fixture(scope="module")
def made(found):
    return opened(deck.to_pptx(found, title="title", date="2026-11-24"))


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    return invent(tmp_path_factory.mktemp("invented"), 3)


def opened(made):
    return pptx.Presentation(io.BytesIO(made))


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
        findings.slides(tmp_path)
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
        deck.to_pptx([findings.Slide("why", long)], title="", date="2026-11-24")


@pytest.mark.parametrize("size, below", [((100, 100), False), ((200, 100), False), ((600, 100), True)])
def test_a_wide_picture_stands_above_its_table(tmp_path, size, below):
    Image.new("RGB", size).save(tmp_path / "picture.png")
    slide = findings.Slide("why", pd.DataFrame({"a": ["1", "2"]}), picture=tmp_path / "picture.png")
    (left, top), _, (wide, high) = deck._arrange(slide, 1.5, 4.7)
    assert wide / high == pytest.approx(size[0] / size[1])
    assert (top > 1.5 + high) == below and (left > 0.5 + wide) != below
