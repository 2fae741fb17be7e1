"""make html: executed notebooks as pages that fit a phone and ask no server for anything."""

import html.parser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from vitlab import files


class Page(html.parser.HTMLParser):
    """What a page loads (by src, or by href of anything but links that are clicked), its viewport and its words."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.viewport, self.words = [], None, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.loads += [found[name] for name in ("src", "href") if name in found and tag != "a"]
        if found.get("name") == "viewport":
            self.viewport = found["content"]

    def handle_data(self, text):
        self.words += text


def make_html(data):
    command = ["make", "-o", "install", "html", "STUDY=smoke"]
    command += [f"VITLAB_DATA={data}", f"BIN={Path(sys.executable).parent}"]
    return subprocess.run(command, cwd=files.repository(), capture_output=True, text=True)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_executed_notebooks_become_pages_for_phones_that_ask_no_server(tmp_path):
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    shown = [
        v4.new_output("display_data", {"image/png": pixel}),
        *[v4.new_output("stream", text=words) for words in ("84.7 ", "%")],
    ]
    cells = [v4.new_markdown_cell("# How good?"), v4.new_code_cell("print(top1)", outputs=shown)]
    for folder in ("notebooks", "vit/seed0/notebooks"):
        path = tmp_path / "runs" / "smoke" / folder / "1_train.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(v4.new_notebook(cells=cells), path)
    before = path.read_text()
    done = make_html(tmp_path)
    assert path.read_text() == before
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    found = [page.relative_to(tmp_path / "runs/smoke").as_posix() for page in pages]
    assert found == ["notebooks/1_train.html", "vit/seed0/notebooks/1_train.html"]
    for path in pages:
        text = path.read_text()
        page = Page(text)
        assert "width=device-width" in page.viewport
        assert [each[:5] for each in page.loads] == ["data:"], "the picture, embedded"
        assert not re.search(r"@import|url\(['\"]?http|import .* from ['\"]http", text)
        assert not re.search(r"In\s*\[", page.words), "prompts take a sixth of a phone's width"
        assert all(words in page.words for words in ("How good?", "84.7 %", "print"))


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_without_runs_make_html_says_what_to_run(tmp_path):
    done = make_html(tmp_path)
    assert done.returncode and "make study STUDY=smoke" in done.stdout


def test_notebooks_need_no_script_that_pages_leave_out():
    for path in (files.repository() / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            assert cell.cell_type == "code" or not re.search(r"\$|\\\(|```mermaid", cell.source), (
                path.name
            )
