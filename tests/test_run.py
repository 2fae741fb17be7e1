import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from vitlab import files
from vitlab.__main__ import main
from vitlab.studies import notebooks, runs, settings

PARAMETERS = 'study = "demo"  # a file of notebooks/params\nmodel = "vit"\nseed = 0\noverride = {}'
OPEN = "from vitlab import runs\nlab = runs.open_run(study, model, seed, override)"


def notebook(path, *cells, parameters=PARAMETERS):
    """Write a notebook with a parameters cell and these code cells."""
    made = nbformat.v4.new_notebook()
    made.cells = [
        nbformat.v4.new_markdown_cell("# What?"),
        *map(nbformat.v4.new_code_cell, (parameters, *cells)),
    ]
    made.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(made, path)
    return path


@pytest.fixture(autouse=True)
def data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("VITLAB_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


# -- before anything is started


def test_parameters_are_read_with_their_values(tmp_path):
    path = notebook(
        tmp_path / "a.ipynb", parameters="x = 1  # one\ny = [0.5,\n  -1]\nz = {'a': None}"
    )
    assert notebooks._parameters_of(path) == {"x": 1, "y": [0.5, -1], "z": {"a": None}}


@pytest.mark.parametrize("line", ["y = x // 5", "import os", "y: int = 1", "a = b = 1", "print(x)"])
def test_a_parameter_that_is_no_literal_is_refused(tmp_path, line):
    path = notebook(tmp_path / "a.ipynb", parameters=f"x = 1\n{line}")
    with pytest.raises(ValueError, match="a.ipynb: a parameters cell holds literals only"):
        notebooks._parameters_of(path)


def test_one_parameters_cell_is_needed(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "x = 1")
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(ValueError, match="0 cells tagged `parameters`"):
        notebooks._parameters_of(path)


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"sed": 1}, ValueError, "unknown parameter of a.ipynb: 'sed', did you mean 'seed'"),
        ({"seed": "1"}, TypeError, "seed should be a valid integer, got str"),
        ({"study": "dmeo"}, ValueError, "unknown study 'dmeo', did you mean 'demo'"),
        ({"modle": "vit"}, ValueError, "unknown parameter of a.ipynb: 'modle', did you mean 'mod"),
        ({"model": "swim"}, ValueError, "unknown model of study demo: 'swim', did you mean 'swin'"),
        ({"override": {"train.epcohs": 1}}, ValueError, "did you mean 'train.epochs'"),
        ({"override": {"train.epochs": 0.5}}, TypeError, "train.epochs should be a valid integer"),
        ({"override": 3}, TypeError, "override is a dict"),
    ],
)
def test_a_wrong_parameter_is_refused_before_the_start(tmp_path, data_root, given, error, words):
    path = notebook(tmp_path / "a.ipynb")
    with pytest.raises(error, match=words):
        notebooks._execute(path, given)
    assert not data_root.exists()


def test_right_parameters_pass_and_the_others_keep_their_values(tmp_path):
    given = {"model": "swin", "override": {"train.lr": 1}}
    values = notebooks._check(notebook(tmp_path / "a.ipynb"), given)
    assert values == {"study": "demo", "seed": 0, **given}


def test_a_tuple_for_a_list_reaches_the_notebook_as_the_list_that_was_checked(
    tmp_path, monkeypatch
):
    override = {"budget.shares": (0.5, 0.25), "data.normalise": ((0.5, 0.5, 0.5), [0.2, 0.2, 0.2])}
    moments = [[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]]
    given = {}

    def execute(path, running, parameters, **options):
        given.update(parameters)
        running.touch()

    monkeypatch.setattr("papermill.execute_notebook", execute)
    path = notebook(tmp_path / "a.ipynb")
    notebooks._execute(path, {"override": override}, out=tmp_path / "out.ipynb")
    wanted = {"budget.shares": [0.5, 0.25], "data.normalise": moments}
    assert given == {"override": wanted, "model": "vit"}
    assert wanted == settings.as_lists(override)
    lab = runs.open_run("demo", "vit", 0, override)
    assert lab.override == wanted and lab.params.data.normalise == moments


def test_without_a_model_the_first_of_a_study_is_run(tmp_path):
    path = notebook(tmp_path / "a.ipynb")
    values = yaml.safe_load((files.repository() / "notebooks/params/demo.yaml").read_text())
    for models, first in ((["swin", "vit"], "vit"), (["mine", "other"], "mine")):
        values["models"] = {name: {"name": "conv_vit"} for name in models}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        assert notebooks._check(path, {"study": str(tmp_path / "own.yaml")})["model"] == first


@pytest.mark.parametrize(
    "text, value",
    [
        ("a=2", 2),
        ("a=1e-3", 0.001),
        ("a=[0.5,0.9]", [0.5, 0.9]),
        ("a=null", None),
        ("a=true", True),
        ("a=x=y", "x=y"),
    ],
)
def test_values_on_the_command_line_are_json_or_text(text, value):
    assert notebooks._parse_value(text) == ("a", value)


def test_the_command_line_says_what_is_wrong_and_starts_nothing(tmp_path, capsys, data_root):
    path = str(notebook(tmp_path / "a.ipynb"))
    for arguments, words in [
        ([path, "--set", "train.epochs=x"], "train.epochs should be a valid integer"),
        ([path, "--set", "train.epochs"], "expected name=value"),
        ([path, "--study", "x.yaml"], f"there is no file {Path('x.yaml').absolute()}"),
        (["7", "--model", "vit"], "7_report.ipynb is about the whole study and takes no model"),
        (["0", "--seed", "1"], "0_data.ipynb is about the whole study and takes no seed"),
        (["99"], "unknown notebook '99'"),
        (["1", "2", "--out", "copy.ipynb"], "--out names the copy of one notebook"),
    ]:
        assert main(["run", *arguments]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):  # no abbreviations: --mod could become something else
        main(["run", path, "--mod", "vit"])
    assert not data_root.exists()


def test_a_notebook_is_found_by_number_name_and_path(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    made = notebook(tmp_path / "notebooks" / "3_global_pruning.ipynb")
    monkeypatch.setattr(files, "repository", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in (
        "3",
        "3_global_pruning",
        "3_global_pruning.ipynb",
        "notebooks/3_global_pruning.ipynb",
        made,
    ):
        assert notebooks._find_notebook(name) == made
    with pytest.raises(
        ValueError, match="unknown notebook '3_globl_pruning', did you mean '3_global_pruning'"
    ):
        notebooks._find_notebook("3_globl_pruning")


def test_several_notebooks_share_a_kernel_that_forgets_their_names(tmp_path, data_root):
    say = "import os\nprint(os.getpid(), 'x' in globals())\nx = 1"
    paths = [notebook(tmp_path / name, say) for name in ("a.ipynb", "b.ipynb")]
    with notebooks._kernel() as kernel:
        done = [notebooks._execute(path, {}, kernel=kernel) for path in paths]
    cells = [json.loads(path.read_text())["cells"][-1] for path in done]
    first, second = (cell["outputs"][0]["text"][0].split() for cell in cells)
    assert first == second and first[1] == "False"


def test_the_same_notebook_of_the_same_run_is_not_executed_twice_at_once(tmp_path):
    path, out = notebook(tmp_path / "a.ipynb"), tmp_path / "out.ipynb"
    with (
        files.lock(tmp_path / ".out.lock", "it"),
        pytest.raises(RuntimeError, match="out of this run is under way in another process"),
    ):
        notebooks._execute(path, {}, out=out)
    assert not out.exists()


# -- with kernels


def start(path, *arguments):
    command = [sys.executable, "-m", "vitlab", "run", str(path), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


DRAWN = """import pandas as pd
from vitlab import plots
axes = plots.agreement(pd.DataFrame({"criterion": ["a"], "kind": ["heads"], "spearman": [0.5]}))"""


def test_two_notebooks_at_once_one_of_which_fails(tmp_path, data_root):
    shown = "import os, sys\nprint(sys.executable, seed, lab.params.train.epochs, os.environ['VITLAB_HEADLESS'])"
    fine = notebook(
        tmp_path / "fine.ipynb",
        OPEN,
        shown,
        "lab.save_table('x', __import__('pandas').DataFrame({'a': [1]}))",
        *[DRAWN] * 2,
    )
    bad = notebook(
        tmp_path / "bad.ipynb",
        OPEN,
        "# looks for it\nlab.need('dense', '1_train')",
        "print('never')",
    )
    before = fine.read_bytes(), bad.read_bytes()
    good = start(fine, "--model", "swin", "--seed", "3", "--set", "train.epochs=7")
    failing = start(bad)
    out, err = good.communicate(timeout=300)
    assert good.returncode == 0, err
    assert f"{sys.executable} 3 7 1" in out and not err, "the output is streamed, and nothing else"
    folder = data_root / "runs" / "demo+train.epochs=7" / "swin" / "seed3"
    assert (folder / "table-x.csv").exists() and f"{folder / 'notebooks' / 'fine.ipynb'}" in out
    cells = json.loads((folder / "notebooks" / "fine.ipynb").read_text())["cells"]
    injected = next(
        cell for cell in cells if "injected-parameters" in cell["metadata"].get("tags", [])
    )
    assert "seed = 3" in "".join(injected["source"])
    drawn = [cell["outputs"] for cell in cells if "".join(cell["source"]) == DRAWN]
    assert [sum("image/png" in o.get("data", {}) for o in outputs) for outputs in drawn] == [
        1,
        1,
    ], "not only the first"

    out, err = failing.communicate(timeout=300)
    assert failing.returncode == 1 and "never" not in out
    assert "line 2, `lab.need('dense', '1_train')` raised" in err
    assert "FileNotFoundError" in err and "run notebooks/1_train.ipynb first" in err
    copy = data_root / "runs" / "demo" / "vit" / "seed0" / "notebooks" / "bad.failed.ipynb"
    assert str(copy) in err and "1_train" in copy.read_text()
    assert (fine.read_bytes(), bad.read_bytes()) == before
    assert not list(data_root.rglob("*.running.ipynb")) and not copy.with_name("bad.ipynb").exists()


def strike(draw, command, environment, within):
    """Run command, and kill it and all that it started after a random time of at most `within` seconds.

    Returns the seconds that it took if it came to its end before, else None.
    """
    begun = time.time()
    process = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        process.wait(draw.uniform(0, within))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None
    return time.time() - begun


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_twenty_kills_over_train_prune_tune_and_report_change_nothing(tmp_path):
    """Notebooks 1, 3 and 7 of a small study, the kernels killed with them: the rows are those of an unbroken run."""
    kills, draw = {"1_train": 7, "3_global_pruning": 10, "7_report": 3}, random.Random()
    changed = {
        "train.epochs": 3,
        "global_pruning.epochs": 2,
        "global_pruning.schedules": ["one-shot"],
    }
    options = [
        word for key, value in changed.items() for word in ("--set", f"{key}={json.dumps(value)}")
    ]
    struck, took = 0, {}
    for name in ("whole", "killed"):
        environment = os.environ | {"VITLAB_DATA": str(tmp_path / name), "OMP_NUM_THREADS": "1"}
        for step, count in kills.items():
            command = [
                sys.executable,
                "-m",
                "vitlab",
                "run",
                step,
                "--study",
                "smoke",
                *options,
            ]
            if name == "killed":
                within, tries = took[step], iter(range(5 * count))
                while count and next(tries, None) is not None:
                    ended = strike(draw, command, environment, within)
                    struck, count = (struck + 1, count - 1) if ended is None else (struck, count)
                    within = ended or within  # what is done already takes less time
            begun = time.time()
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, done.stderr
            took.setdefault(step, time.time() - begun)
    assert struck == 20, "so many met a process that was still running"
    folders = {name: next((tmp_path / name / "runs").iterdir()) for name in ("whole", "killed")}
    for file in (
        "results-1_train.csv",
        "results-3_global_pruning.csv",
        "history-3_global_pruning.csv",
    ):
        one, other = (pd.read_csv(folder / "vit" / "seed0" / file) for folder in folders.values())
        clock = [
            "seconds",
            "date",
            "commit",
            "images_per_s",
            "data_share",
            "resident_mb",
            "training_mb",
            "device_mb",
        ]
        pd.testing.assert_frame_equal(
            *(f.drop(columns=clock, errors="ignore") for f in (one, other))
        )
    reports = [
        sorted(path.name for path in (folder / "figures").glob("[!.]*"))
        for folder in folders.values()
    ]
    assert reports[0] == reports[1] and "results.csv" in reports[0]


# -- the graph


@pytest.fixture
def snakemake(tmp_path, monkeypatch):
    """A copy of the tree whose demo has run for the ViT, and a function that says what would run now."""
    tree = tmp_path / "tree"
    for name in ("vitlab", "notebooks", "profiles"):
        shutil.copytree(files.repository() / name, tree / name)
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(files.repository() / name, tree)
    for name in [*settings.USES, "7_report"]:
        notebook(tree / "notebooks" / f"{name}.ipynb", "x = 1")
    study = tree / "notebooks" / "params" / "demo.yaml"
    study.write_text(study.read_text().replace("name: shapes", "name: pictures"))
    (tree / "pictures" / "a").mkdir(parents=True)
    (tree / "pictures" / "a" / "1.png").write_text("")
    stub = "import sys\nopen(sys.argv[sys.argv.index('--out') + 1], 'w').close()"  # instead of executing it
    (tree / "vitlab" / "__main__.py").write_text(stub)
    monkeypatch.delenv("VITLAB_DATA")
    monkeypatch.setenv("PYTHONPATH", str(tree))

    def steps(*arguments, pattern=r"^(\w+) +\d+$"):
        command = [
            Path(sys.executable).with_name("snakemake"),
            *arguments,
            "--config",
            "study=demo",
            "model=vit",
        ]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return set(re.findall(pattern, done.stdout + done.stderr, re.MULTILINE)) - {"all", "total"}

    assert steps() == {name.partition("_")[2] for name in [*settings.USES, "7_report"]}
    return tree, steps


def test_a_changed_value_code_or_image_reruns_what_depends_on_it_and_nothing_else(snakemake):
    tree, steps = snakemake
    (tree / "pictures" / ".2.png").write_text("hidden")
    assert steps("-n") == set()
    study = tree / "notebooks" / "params" / "demo.yaml"
    before = study.read_text()
    study.write_text(re.sub("kappa: [0-9.]+", "kappa: 0.123", before))
    assert steps("-n") == {"heads_svd_iht", "efficiency", "report"}
    study.write_text(before + "other_seeds: {heads_svd_iht.kappa: 0.123}\n")
    assert steps("-n") == set(), "the first seed keeps its values"
    study.write_text(before)
    for name, cell in [("3_global_pruning", {"outputs": []}), ("5_budget", {"source": "x = 2"})]:
        path = tree / "notebooks" / f"{name}.ipynb"
        content = json.loads(path.read_text())
        content["cells"][-1] |= {"execution_count": 3} | cell  # as JupyterLab saves it
        path.write_text(json.dumps(content))
    assert steps("-n") == {"budget", "efficiency", "report"}
    (tree / "pictures" / "a" / "2.png").write_text("")
    assert steps("-n") == {name.partition("_")[2] for name in [*settings.USES, "7_report"]}


def test_a_changed_report_reruns_itself_alone_and_a_failure_keeps_the_others_going(snakemake):
    tree, steps = snakemake
    path = tree / "notebooks" / "7_report.ipynb"
    path.write_text(path.read_text().replace("x = 1", "x = 2"))
    assert steps("-n") == {"report"}
    assert steps() == {"report"} and steps("-n") == set()
    study = tree / "notebooks" / "params" / "demo.yaml"
    study.write_text(study.read_text().replace("epochs: 6", "epochs: 9"))
    runner = tree / "vitlab" / "__main__.py"
    runner.write_text(
        "import sys\nif '5_budget' in sys.argv[2]:\n    sys.exit('no budget')\n"
        + runner.read_text()
    )
    with pytest.raises(AssertionError, match=r"no budget[\s\S]*What is done is kept"):
        steps()
    assert steps("-n") == {"budget", "efficiency", "report"}, "what did not need the budget has run"


def test_notebooks_that_need_only_the_first_share_the_cores(snakemake):
    _, steps = snakemake
    all_steps = ("-n", "--forceall", "--quiet", "host", "--cores", "10")
    found = dict(steps(*all_steps, pattern=r"^rule (\w+):\n(?:    .+\n)*?    threads: (\d+)$"))
    gpu = shutil.which("nvidia-smi")  # where each waits for the one before
    five = "sensitivity global_pruning heads_svd_iht budget foundation".split()
    five = dict.fromkeys(five, "10" if gpu else "2")
    assert found == {"train": "10", "efficiency": "10", **five}


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_a_study_that_cannot_be_run_is_told_in_a_sentence():
    command = ["make", "-o", "install", "study", f"BIN={Path(sys.executable).parent}"]
    how = dict(cwd=files.repository(), capture_output=True, text=True)
    done = subprocess.run([*command, "STUDY=dmeo"], **how)
    said = done.stdout + done.stderr
    assert done.returncode and "Study dmeo cannot be run: unknown study 'dmeo', did you" in said
    assert not re.search("Traceback|Snakefile|is kept", said)
    done = subprocess.run([*command, "STUDY=demo", "ARGS=-n"], **how)
    assert done.returncode == 0 and "Figures and tables" not in done.stdout, "nothing was run"


# -- make


@pytest.mark.parametrize(
    "pretend, words",
    [
        ("sys.version_info = (3, 9, 0)", "Python 3.11 or newer, and .* is 3.9"),
        (
            "import shutil; shutil.disk_usage = lambda path: type('', (), {'free': 3e9})",
            "8 GB of disk .* 3.0 GB free",
        ),
    ],
)
@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_says_why_it_cannot_install(tmp_path, pretend, words):
    for name in ("Makefile", "install.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(files.repository() / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys; {pretend}; exec(sys.argv[1])" "$2"\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "demo", f"PY={python}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode and re.search(words, done.stderr + done.stdout)
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_names_a_python_that_is_not_there(tmp_path):
    for name in ("Makefile", "install.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(files.repository() / name, tmp_path)
    done = subprocess.run(
        ["make", "test", "PY=no-python"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode and "There is no no-python. Install Python 3.11" in done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_long_tests_end_with_the_oldest_packages():
    command = ["make", "-n", "-o", "install", "test-long"]
    said = subprocess.run(command, cwd=files.repository(), capture_output=True, text=True).stdout
    runs = re.findall(r"^(\S+)/bin/python -m pytest", said, re.MULTILINE)
    assert runs == [".venv", ".venv/oldest"]


def test_a_parameter_of_the_notebook_itself_is_given_by_p(capsys):
    assert main(["run", "1_train", "--study", "demo", "-p", "retrian=true"]) == 2
    assert "'retrian', did you mean 'retrain'" in capsys.readouterr().err


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_logger_that_is_not_here_is_told_before_anything_starts(
    capsys, data_root, monkeypatch, processes
):
    monkeypatch.setattr(notebooks.importlib.util, "find_spec", lambda name: None)
    run = ["run", "1", "--study", "smoke", "--processes", processes]
    for asked, words in [
        ("wandb", "wandb is missing: pip install wandb"),
        ("", "tensorboard is missing: pip install tensorboard"),
        ("tensorbord", "unknown logger 'tensorbord', did you mean 'tensorboard'?"),
    ]:
        assert main([*run, "--log", *filter(None, [asked])]) == 2
        assert capsys.readouterr().err.startswith(f"vitlab run: {words}")
    monkeypatch.setenv("VITLAB_LOG", "mlflow")
    assert main(run) == 2
    assert "mlflow is missing" in capsys.readouterr().err
    assert not data_root.exists()


def test_loggers_write_below_the_data_root_unless_they_are_told_where(tmp_path, monkeypatch):
    monkeypatch.setenv("VITLAB_DATA", str(tmp_path))
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    environment = notebooks._environment("kernels")
    assert environment["WANDB_DIR"] == str(tmp_path / "runs")
    assert environment["MLFLOW_TRACKING_URI"] == "http://there"
