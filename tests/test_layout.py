"""What holds for the tree as a whole: who imports whom, what notebooks and environment files may hold."""

import ast
import graphlib
import json
import re
import subprocess
import sys

import pytest

import vitlab
from vitlab.files import repository
from vitlab.studies import notebooks, settings

ROOT = repository()
PACKAGE = ROOT / "vitlab"
# The floors of the package, from the ground up. A file imports its own floor and those below it.
FLOORS = [
    ("names", "files", "parallel"),
    ("studies",),
    ("models",),
    ("evaluation",),
    ("pruning",),
    ("training",),
    ("report",),
    ("__main__",),
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STUDIES = sorted((ROOT / "notebooks" / "params").glob("*.yaml"))
IDS = [path.stem for path in NOTEBOOKS]


def module_of(path):
    """Return the dotted name of a file of the package: vitlab.pruning.scores."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source):
    """Return the files of vitlab that a source imports, anywhere in it, by their dotted names."""
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names if alias.name.startswith("vitlab")}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written one way: from vitlab.folder import module"
            if node.module.split(".")[0] == "vitlab":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    imported.add(inner if inner in FILES else node.module)
    return imported


def floor_of(module):
    """Return the number of a file's floor, from the ground up."""
    name = module.split(".")[1]
    (floor,) = [number for number, floor in enumerate(FLOORS) if name in floor]
    return floor


def forbidden_imports(module, source):
    """Return the imports of a file that lie on a higher floor, or are the package itself."""
    forbidden = []
    for imported in imports(source):
        if imported == "vitlab" or floor_of(imported) > floor_of(module):
            forbidden.append(imported)
    return sorted(forbidden)


@pytest.mark.parametrize("module", [name for name in FILES if name != "vitlab"])
def test_a_file_imports_its_own_floor_and_those_below(module):
    assert forbidden_imports(module, FILES[module].read_text()) == []


def test_a_forbidden_import_is_found():
    source = "import torch\nfrom vitlab.models import anatomy\ndef f():\n    from vitlab.pruning import scores\n"
    assert forbidden_imports("vitlab.models.checkpoint", source) == ["vitlab.pruning.scores"]
    assert forbidden_imports("vitlab.pruning.shrink", source) == []
    assert forbidden_imports("vitlab.studies.runs", "from vitlab.models import anatomy") == [
        "vitlab.models.anatomy"
    ]
    assert forbidden_imports("vitlab.report.plots", "from vitlab import budget") == ["vitlab"]


def order(sources):
    """Return modules in an order in which each comes after those it imports. Raises CycleError for a circle."""
    graph = {module: imports(source) - {module} for module, source in sources.items()}
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_no_imports_go_in_a_circle():
    order({module: path.read_text() for module, path in FILES.items()})
    circle = {
        "vitlab.names": "from vitlab import files",
        "vitlab.files": "def f():\n    from vitlab import names\n",
    }
    with pytest.raises(graphlib.CycleError):
        order(circle)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name
)
def test_a_folder_says_what_it_is_for(path):
    first = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
    assert first.endswith(".")


@pytest.mark.parametrize("module", [name for name in FILES if not name.endswith("__main__")])
def test_a_module_ends_its_docstring_with_its_public_names(module):
    path = FILES[module]
    if path.name == "__init__.py":
        return
    tree = ast.parse(path.read_text())
    listed = ast.get_docstring(tree).partition("Public: ")[2].rstrip(".")
    listed = {name.strip() for name in listed.replace("\n", " ").split(",")} - {""}
    defined = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                defined |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
    public = {name for name in defined if not name.startswith("_")}
    assert listed == public, "list public names after `Public:` at the end of the docstring"


def loaded_by(code):
    """Return the modules that are loaded after a piece of code has run in a Python of its own."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_studies_and_figures_load_no_torch():
    studies = [name for name in FILES if name.startswith("vitlab.studies.")]
    report = [f"vitlab.report.{name}" for name in ("tables", "_style", "plots", "drawings")]
    assert not {"torch", "timm"} & loaded_by(f"import {', '.join([*studies, *report])}")


def test_tables_load_no_matplotlib():
    assert "matplotlib" not in loaded_by("import vitlab.report.tables")


def test_the_package_loads_nothing_before_it_is_used():
    loaded = {name for name in loaded_by("import vitlab") if name.startswith("vitlab")}
    assert loaded == {"vitlab"}
    assert "torch" not in loaded_by("from vitlab import runs, results")


def doors_used():
    """Return the names that notebooks and the README import from vitlab."""
    sources = ["".join(cell["source"]) for path in NOTEBOOKS for cell in code_cells(path)]
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        sources += re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    used = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module == "vitlab":
                used |= {alias.name for alias in node.names}
    return used


def test_the_package_offers_what_notebooks_and_pages_use():
    assert set(vitlab.__all__) == doors_used()
    for name in vitlab.__all__:
        assert getattr(vitlab, name).__name__.startswith("vitlab.")
    with pytest.raises(AttributeError, match="did you mean 'budget'"):
        vitlab.budgets  # noqa: B018


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_a_notebook_is_stripped_and_starts_with_a_question_and_literal_parameters(path):
    cells = json.loads(path.read_text())["cells"]
    assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).splitlines()[
        0
    ].endswith("?")
    assert "parameters" in cells[1]["metadata"]["tags"]
    parameters = notebooks._parameters_of(path)  # exactly one such cell, of literals
    assert parameters["study"] == "demo" and parameters["override"] == {}
    for cell in code_cells(path):
        assert not cell["outputs"] and cell["execution_count"] is None, "run nbstripout on it"
    for cell in cells:
        assert not "".join(cell["source"]).startswith("**"), (
            "a heading leads to it from the contents"
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_a_notebook_spells_out_the_experiment_and_nothing_else(path):
    source = "\n".join("".join(cell["source"]) for cell in code_cells(path))
    tree = ast.parse(source)  # no % or ! either
    assert not [
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert not [
        text for text in texts if isinstance(text, str) and re.match(r"[./~]+\w+/|\w+/\w+/", text)
    ]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_has_the_values_of_the_demo(path):
    study, demo = settings.study(path.stem), settings.study("demo")
    for section in settings._SECTIONS:
        if section not in ("about", "seeds", "models"):
            assert set(study[section]) == set(demo[section]), section
    assert "make " in study.about and "xpect" in study.about, (
        "the command, and what to expect of it"
    )
    assert {"vit", "swin"} <= set(study.models)


def test_conda_users_get_the_one_list_of_dependencies():
    text = (ROOT / "environment.yml").read_text()
    lines = text.partition("dependencies:\n")[2].splitlines()
    assert [line.strip() for line in lines] == [
        "- python>=3.11",
        "- pip",
        "- pip:",
        "- -c constraints.txt",
        "- -e .[all]",
    ]


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
    assert numbered == set(re.findall(r"\d_\w+", snakefile)) == {*settings.USES, "7_report"}
