"""What holds for the tree as a whole: who imports whom, what notebooks and environment files may hold."""

import ast
import graphlib
import json
import re

import pytest

from vitlab import record, run

ROOT = record.repository()
MAY_IMPORT = {
    "__init__": "",
    "parallel": "",
    "shapes": "",
    "data": "parallel record shapes",
    "attention": "",
    "models": "attention layers packed",
    "scores": "models parallel",
    "masks": "",
    "prune": "masks models",
    "layers": "",
    "lowrank": "masks",
    "shrink": "attention models layers lowrank cost",
    "budget": "bench models recover scores shrink lowrank cost",
    "sensitivity": "models masks parallel scores",
    "recover": "models layers lowrank prune scores shrink",
    "train": "cost evaluate parallel prune record",
    "evaluate": "cost models parallel",
    "cost": "models layers packed",
    "bench": "checkpoint cost export layers lowrank models parallel",
    "packed": "",
    "export": "cost layers",
    "checkpoint": "models packed parallel shrink",
    "record": "parallel",
    "plots": "record",
    "drawings": "plots",
    "findings": "plots record",
    "deck": "findings record",
    "explore": "budget checkpoint cost data evaluate masks models plots prune record scores",
    "run": "parallel record",
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STUDIES = sorted((ROOT / "notebooks" / "params").glob("*.yaml"))
IDS = [path.stem for path in NOTEBOOKS]


def imports(source):
    """Modules of vitlab that source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level or node.module == "vitlab":
                found |= {node.module} if node.level and node.module else {alias.name for alias in node.names}
            elif (node.module or "").startswith("vitlab."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("vitlab.")}
    return found


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_imports_are_found_wherever_they_stand():
    source = "from vitlab import a\nimport vitlab.b\ndef f():\n    from vitlab.c import x\nfrom . import d\n"
    assert imports(source + "import torch\nfrom .e import y") == {"a", "b", "c", "d", "e"}


def test_arrows_go_one_way():
    order = graphlib.TopologicalSorter({name: uses.split() for name, uses in MAY_IMPORT.items()})
    order.prepare()  # raises CycleError


@pytest.mark.parametrize("path", sorted((ROOT / "vitlab").glob("*.py")), ids=lambda path: path.stem)
def test_imports_go_the_written_way(path):
    assert path.stem in MAY_IMPORT, f"{path.name} is not in the table of modules"
    assert imports(path.read_text()) <= set(MAY_IMPORT[path.stem].split())


def test_the_command_line_and_figures_do_not_load_torch():
    for name in ("record", "run", "plots", "drawings", "findings", "deck"):
        tree = ast.parse((ROOT / "vitlab" / f"{name}.py").read_text())
        names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        assert not {"torch", "timm"} & set(names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_a_notebook_is_stripped_and_starts_with_a_question_and_literal_parameters(path):
    cells = json.loads(path.read_text())["cells"]
    assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).splitlines()[0].endswith("?")
    assert "parameters" in cells[1]["metadata"]["tags"]
    parameters = run.parameters_of(path)  # exactly one such cell, of literals
    assert parameters["study"] == "demo" and parameters["override"] == {}
    for cell in code_cells(path):
        assert not cell["outputs"] and cell["execution_count"] is None, "run nbstripout on it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_a_notebook_spells_out_the_experiment_and_nothing_else(path):
    source = "\n".join("".join(cell["source"]) for cell in code_cells(path))
    tree = ast.parse(source)  # no % or ! either
    assert not [node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert imports(source) <= set(MAY_IMPORT)
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert not [text for text in texts if isinstance(text, str) and re.match(r"[./~]+\w+/|\w+/\w+/", text)]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_has_the_values_of_the_demo(path):
    study, demo = record.study(path.stem), record.study("demo")
    for section in record.SECTIONS:
        if section not in ("about", "seeds", "models"):
            assert set(study[section]) == set(demo[section]), section
    assert "make " in study.about and "xpect" in study.about, "the command, and what to expect of it"
    assert {"vit", "swin"} <= set(study.models)


def test_conda_users_get_the_one_list_of_dependencies():
    text = (ROOT / "environment.yml").read_text()
    lines = text.partition("dependencies:\n")[2].splitlines()
    assert [line.strip() for line in lines] == ["- python>=3.11", "- pip", "- pip:", "- -e .[all]"]


def test_constraints_name_versions_and_no_addresses():
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and "torch==2.15.0\n" in text and "torchvision==0.29.2\n" in text


def test_what_is_generated_stays_out_of_git():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"data/*", "!data/README.md", "figures/demo/", ".venv/", ".snakemake/"} <= set(ignored)


def test_the_readme_command_is_what_ci_runs():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "make test" in lines and "make smoke" in lines


def test_steps_of_the_snakefile_are_the_notebooks():
    snakefile = (ROOT / "Snakefile").read_text()
    numbered = {name for name in IDS if name[0].isdigit()}
    assert numbered == set(re.findall(r"\d_\w+", snakefile)) == {*record.USES, "7_report"}
