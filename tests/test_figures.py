"""The published tables and pictures are what the report makes of the published results, to the byte."""

import os
import shutil
import subprocess
import sys

import pytest
from invented import COMMITTED, FIGURES

from vitlab.files import repository

COMPARED = {".csv", ".md", ".tex", ".txt", ".svg", ".png"}


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
