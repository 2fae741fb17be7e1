"""Benchmarks: each runs and says where its numbers come from. Times themselves are never asserted."""

import subprocess
import sys

import pandas as pd
import pytest

from vitlab import record

ROOT = record.repository()


def run(*arguments):
    command = [sys.executable, ROOT / "benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_an_unknown_case_names_those_there_are():
    done = run("--only", "everything")
    assert done.returncode and "invalid choice: 'everything'" in done.stderr and "removal" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("case", ["removal", "alone", "svd", "files", "training"])
def test_a_case_writes_its_table_with_where_it_comes_from(case, tmp_path):
    done = run("--only", case, "--rounds", "1", "--threads", "2", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / f"{case}.csv")
    assert {"commit", "torch", "timm", "device", "date", "threads"} <= set(table) and table.threads.eq(2).all()
    assert (tmp_path / f"{case}.md").exists()
    if case == "alone":  # what the peer cannot do without help
        assert table.set_index("case").outcome["Swin-T"].startswith("RuntimeError")
    else:
        assert table.seconds.gt(0).all() and table.ratio.gt(0).all()
