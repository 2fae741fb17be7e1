"""The command line, and the wheel that brings it with the notebooks."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
import yaml

import vitlab
from vitlab import files
from vitlab.__main__ import command_line, main

ROOT = files.repository()


def vitlab_in(folder, *arguments, package=ROOT, **variables):
    """Run the command line of a package in a folder, and return what came of it."""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    environment.pop("VITLAB_DATA", None)
    environment |= variables
    command = [sys.executable, "-X", "importtime", "-m", "vitlab", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def seen(folder, pattern):
    """Return paths in a folder of the repository, without those in hidden ones, as Jupyter leaves."""
    paths = (ROOT / folder).rglob(pattern)
    return [path for path in paths if "/." not in str(path.relative_to(ROOT))]


def test_help_has_words_for_every_option_and_names_the_notebooks(capsys):
    commands = command_line()._actions[-1]
    assert set(commands.choices) == {"init", "run", "results", "export", "slides"}
    for parser in commands.choices.values():
        assert parser.description and all(action.help for action in parser._actions)
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert vitlab.__version__ in capsys.readouterr().out
    assert main(["init", "lab"]) == 2 and "work there" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--help"])
    said = capsys.readouterr().out
    assert all(path.stem in said for path in seen("notebooks", "[!.]*.[iy][pa][ym]*"))


def without_torch(done):
    """Whether a process of `vitlab_in` loaded vitlab and not torch."""
    loaded = re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE)
    return "vitlab" in loaded and "torch" not in loaded


@pytest.mark.parametrize(
    "line, words",
    [
        ("run 3", "3_global_pruning"),
        ("run 3 --study d", "demo"),
        ("run 3 --study mi", "mine.yaml"),
        ("run 3 --study demo --model s", "swin"),
        ("results ca", "caltech101 caltech101-dinov2 caltech101-small"),
        ("slides cifar10-s", "cifar10-small"),
        ("slides demo --o", "--out --only"),
        ("export data/runs/demo/v", "data/runs/demo/vit/seed0/dense"),
        ("export da", "data/runs/demo/vit/seed0/dense"),
    ],
)
def test_the_shell_completes_what_the_lab_has_without_torch(line, words, tmp_path):
    pytest.importorskip("argcomplete")
    folder = tmp_path / "data/runs/demo/vit/seed0/dense"
    folder.mkdir(parents=True)
    (folder / "model.json").touch()
    (tmp_path / "mine.yaml").touch()
    said, line = tmp_path / "said", f"vitlab {line}"
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1"}
    asked |= {"_ARGCOMPLETE_IFS": " ", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(said), "VITLAB_DATA": str(tmp_path / "data")}
    done = vitlab_in(tmp_path, **asked)
    assert said.read_text() == words and without_torch(done)


def test_help_and_errors_come_without_torch(tmp_path):
    for arguments, status, words in [
        (["run", "1", "--study", "dmeo"], 2, "unknown study 'dmeo', did you mean 'demo'"),
        (["run", "1", "--study", "dmeo", "--processes", "2"], 2, "did you mean 'demo'"),
        (["run", "1", "--log", "tensorbord"], 2, "'tensorbord', did you mean 'tensorboard'"),
        (["export", "nowhere"], 2, "no checkpoint"),
    ]:
        done = vitlab_in(tmp_path, *arguments)
        assert done.returncode == status and words in done.stdout + done.stderr
        assert without_torch(done)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder of a package as `pip install .` lays it out."""
    pytest.importorskip("setuptools", "77")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("vitlab", "notebooks", "slides"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = "from setuptools import build_meta; build_meta.build_wheel('out')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (built,) = (tree / "out").glob("*.whl")
    zipfile.ZipFile(built).extractall(tree / "site")
    return tree / "site"


def test_a_wheel_brings_a_lab(wheel, tmp_path):
    bare = vitlab_in(tmp_path, "run", "0", package=wheel)
    assert bare.returncode == 2 and "`vitlab init DIR` makes a folder" in bare.stderr
    made = vitlab_in(tmp_path, "init", "lab", package=wheel)
    assert made.returncode == 0 and "vitlab run 0 --study demo" in made.stdout
    lab = tmp_path / "lab"
    for folder in ("notebooks", "slides"):
        names = {path.relative_to(ROOT) for path in seen(folder, "[!.]*")}
        names = {name for name in names if "__pycache__" not in name.parts and "." in name.name}
        assert names and all((lab / name).exists() for name in names)
    for page in [*(lab / "notebooks").glob("*.md"), *(lab / "notebooks").glob("*.ipynb")]:
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        paths = [page.parent / link for link in links if re.fullmatch(r"[\w./-]+", link)]
        assert [path for path in paths if not path.exists()] == [], page.name
    again = vitlab_in(tmp_path, "init", "lab", package=wheel)
    assert again.returncode == 2 and "already" in again.stderr
    inside = vitlab_in(lab / "notebooks", "run", "0", "--study", "dmeo", package=wheel)
    assert "did you mean 'demo'" in inside.stderr
    for command in (["results"], ["slides", "demo"]):
        done = vitlab_in(lab, *command, package=wheel)
        assert done.returncode == 1 and "make study" not in done.stderr
        assert "vitlab run 0 1 2 3 4 5 6 7 --study demo" in done.stderr
    assert (wheel / "vitlab" / "py.typed").exists()
    [entry] = wheel.glob("*.dist-info/entry_points.txt")
    assert "vitlab = vitlab.__main__:main" in entry.read_text()


def test_without_a_lab_the_data_root_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("VITLAB_DATA", raising=False)
    monkeypatch.setattr(files, "repository", lambda: tmp_path)
    assert files.root() == files.root() == tmp_path / "data"
    assert capsys.readouterr().out.count(f"in {tmp_path / 'data'}; VITLAB_DATA names another") == 1
    assert not list(tmp_path.iterdir())


def test_another_clone_is_told(tmp_path, monkeypatch):
    files.warn_of_other_lab()
    (tmp_path / "notebooks" / "params").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks")
    with pytest.warns(UserWarning, match="writes there, not to"):
        files.warn_of_other_lab()


def test_a_copied_folder_that_nobody_installed_works(capsys, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and "vitlab unknown" in capsys.readouterr().out


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == vitlab.__version__ and cited["cff-version"] == "1.2.0"
    assert f"version = {{{vitlab.__version__}}}" in (ROOT / "README.md").read_text()
    assert {"message", "title", "authors"} <= cited.keys() and cited["license"] == "MIT"


def test_modules_are_listed_before_they_are_imported():
    assert {"budget", "models", "__version__"} <= set(dir(vitlab))


def test_what_takes_long_on_a_large_model_has_a_bar(vit, batch, monkeypatch):
    """Some calls at the end of long work, which have loops of their own."""
    titles = []
    monkeypatch.setattr(files, "progress", lambda items, title, **_: titles.append(title) or items)
    batches, x = [batch], torch.randn(12, 4)
    size = vitlab.scores.weights(vit, criteria=["magnitude"])["magnitude"]
    keep = vitlab.masks.keep_largest(size, sparsity=0.5)
    grams = vitlab.scores.grams(vit, batches)
    titles.clear()
    vitlab.scores.loss(vit, batches)
    vitlab.scores.change(vit, vit, batches)
    vitlab.compensate.refit(vit, keep, grams)
    vitlab.evaluate.linear_probe(x, torch.arange(12) % 3, x, torch.arange(12) % 3)
    made, _, _ = vitlab.runtimes.settings({"vit": vit}, ["eager float32"], images=None)
    assert titles == [
        "measuring the loss",
        "comparing features",
        "compensating",
        "fitting a probe",
        "making files",
    ]


@pytest.mark.parametrize(
    "headless, terminal, notebook, delay, is_shown",
    [
        ("0", True, False, 0, True),
        ("0", True, False, 60, False),
        ("1", True, False, 0, False),
        ("0", False, False, 0, False),  # a pipe or a file
        ("0", False, True, 0, True),
    ],
)
def test_bars_are_for_slow_work_that_somebody_watches(
    monkeypatch, capsys, headless, terminal, notebook, delay, is_shown
):
    monkeypatch.setenv("VITLAB_HEADLESS", headless)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    if notebook:  # tqdm.auto takes another class there
        monkeypatch.setattr(files, "notebook_tqdm", object())
    assert list(files.progress(range(3), "deciding", delay=delay)) == [0, 1, 2]
    said = capsys.readouterr().err
    assert ("deciding" in said) == bool(said.strip()) == is_shown
