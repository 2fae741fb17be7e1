"""The published tables and pictures are what the report makes of the published results, to the byte."""

import os
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from invented import COMMITTED, FIGURES

from vitlab.files import repository

COMPARED = {".csv", ".md", ".tex", ".txt", ".svg", ".png"}

MAPS = {"ablations", "heads", "kept", "sensitivity"}  # whose ticks may be names of blocks
NAME = re.compile(r"\b(blocks|layers)\.\d|[a-z]_[a-z]|[a-z]-\d\.\d")  # of code, no words


def groups_of(element, start):
    """Return the groups of an SVG below an element whose names begin so."""
    return [each for each in element.iter() if each.get("id", "").startswith(start)]


@pytest.mark.parametrize("path", sorted(FIGURES.rglob("*.svg")), ids=lambda path: path.stem)
def test_a_published_picture_has_few_series_in_words_that_can_be_read(path):
    root = ElementTree.parse(path).getroot()
    for legend in groups_of(root, "legend_"):
        assert len(groups_of(legend, "text_")) <= 6
    words = ["".join(each.itertext()) for each in groups_of(root, "text_")]
    if path.stem.partition("-")[0] in MAPS:
        ticks = [*groups_of(root, "xtick_"), *groups_of(root, "ytick_")]
        named = {"".join(text.itertext()) for tick in ticks for text in groups_of(tick, "text_")}
        words = [word for word in words if word not in named]
    assert words and not [word for word in words if NAME.search(word)]
    sizes = re.findall(r"font[^;\"]*?([\d.]+)px", path.read_text())
    smallest = 7 if path.stem == "hero" else 12  # the front page's has its source below
    assert min(map(float, sizes)) >= smallest


@pytest.mark.long
@pytest.mark.parametrize("study", COMMITTED)
def test_the_report_gives_the_published_tables_and_pictures_again(study, tmp_path):
    for name in ("vitlab", "notebooks", f"figures/{study}"):
        shutil.copytree(repository() / name, tmp_path / name)
    shutil.copy(repository() / "pyproject.toml", tmp_path)
    # Only what the report reads stays: all else must be made anew.
    for path in (tmp_path / "figures" / study).iterdir():
        is_read = path.name in ("results.csv", "history.csv") or path.match("table-*.csv")
        if path.suffix in COMPARED and not is_read:
            path.unlink()
    command = [sys.executable, "-m", "vitlab", "run", "7_report", "--study", study]
    places = {"PYTHONPATH": str(tmp_path), "VITLAB_DATA": str(tmp_path / "data")}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | places, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    published = [path for path in (FIGURES / study).iterdir() if path.suffix in COMPARED]
    assert len(published) > 100
    changed = []
    for path in published:
        again = tmp_path / "figures" / study / path.name
        if not again.is_file() or again.read_bytes() != path.read_bytes():
            changed.append(path.name)
    assert changed == []
