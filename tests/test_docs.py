"""The docs: snippets run, names and links lead somewhere, and whatever can be asked for by its name is on a page."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import toy
from safetensors.torch import load_file

from vitlab import files, models
from vitlab.evaluation import cost
from vitlab.models import _layers, anatomy
from vitlab.pruning import compensate, factor, pool, prune, recover, scores, shrink
from vitlab.studies import settings
from vitlab.training import data

ROOT = files.repository()
INDEX, CONTRIBUTING = ROOT / "docs" / "methods" / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = sorted(set(INDEX.parent.glob("*.md")) - {INDEX})
DOCS = [ROOT / "README.md", CONTRIBUTING, *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGE = ROOT / "vitlab"
# The file of each module by its stem, which is all that pages say; a folder stands for what it hands on.
MODULES = {path.stem: path for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__")}
MODULES |= {"models": PACKAGE / "models" / "__init__.py"}


def module(name):
    """Return the module that pages call by this stem."""
    parts = MODULES[name].relative_to(ROOT).with_suffix("").parts
    return importlib.import_module(".".join(part for part in parts if part != "__init__"))


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    """The fenced blocks of a language on a page, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def prose(path):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def drawn(count, seed):
    """A data.Split of count images of noise, 16 px, 3 classes."""
    store = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    labels = torch.arange(count) % 3
    return data.Split(store, np.arange(count), labels, 16, 16, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_timings_stand_in_the_table_that_they_name(page):
    for paragraph in re.split(r"\n\s*\n", prose(page)):
        tables = re.findall(r"figures/bench/\w+\.md", paragraph)
        if not tables:
            continue
        known = [
            float(each)
            for path in tables
            for each in re.findall(r"\d+(?:\.\d+)?", (ROOT / path).read_text())
        ]
        for told in re.findall(r"(?<![\w.])\d+\.\d+", paragraph):
            digits = len(told.partition(".")[2])
            within = 0.51 * 10**-digits  # a table rounds, too
            near = [
                each
                for each in known
                for scale in (1, 1000)
                if abs(each / scale - float(told)) <= within
            ]
            assert near, f"{told} is not in {' or '.join(tables)}"


@pytest.mark.long
@pytest.mark.skipif(
    not (files.root() / "cifar10").is_dir(), reason="needs CIFAR-10 in the data folder"
)
def test_the_front_page_cuts_a_trained_model_to_half(capsys, monkeypatch):
    """Its lines, run as they stand: a plan of half the MACs, and at most a point of top-1 lost."""
    monkeypatch.chdir(ROOT)
    code = re.search(r"^```python\n(.*?)^```$", DOCS[0].read_text(), re.MULTILINE | re.DOTALL)[1]
    made = {}
    exec(code, made)
    lines = re.findall(r"(\d+) MACs, ([\d.]+) % right", capsys.readouterr().out)
    (whole, before), (left, after) = ((int(macs), float(top1)) for macs, top1 in lines)
    assert before > 84 and after > before - 1
    assert left == cost.macs(made["small"]) <= 0.5 * whole == 0.5 * cost.macs(made["model"])


def test_the_way_without_a_network_is_a_swin_of_the_clone():
    page = blocks(ROOT / "docs" / "your-own-model.md", "python")
    (code,) = [each for each in page if "swin-dinov2" in each]
    made = {"models": models, "images": SimpleNamespace(classes=["a", "b", "c"])}
    with pytest.warns(UserWarning, match="has no head, which starts new with 3 classes"):
        exec(code.replace("CLONE", str(ROOT)), made)
    own = settings.study("caltech101-dinov2").models.swin
    assert {"name": made["name"], **made["shape"]}.items() <= own.items()
    stored = load_file(ROOT / own.weights)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    state = made["model"].state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in stored.items())
    assert set(state) - set(stored) <= {"head.fc.weight", "head.fc.bias"}


def test_a_plan_is_printed_as_the_page_of_ones_own_model_shows_it():
    text = (ROOT / "docs" / "your-own-model.md").read_text()
    shown = text.partition("It printed:\n\n```\n")[2].partition("\n```")[0].splitlines()
    of_kinds = [line.split() for line in shown if line.startswith(("heads", "neurons", "ranks"))]
    rows = [(kind, "somewhere", *map(float, rest[1:])) for kind, *rest in of_kinds]
    table = pd.DataFrame(rows, columns="kind block units dropped predicted macs_saved".split())
    table = table.astype({"units": int, "dropped": int})
    first, *others = repr(pool.Plan({}, {}, table, 0.5)).splitlines()
    assert first == shown[0]
    assert others[0].split() == shown[1].split() and others[-1] == shown[len(of_kinds) + 3]


@pytest.fixture
def given(model, tmp_path):
    """What the snippets take as given, docs/methods/README.md says so: on toys here."""
    train, val, test = (drawn(count, seed) for seed, count in enumerate((48, 12, 12)))
    images = data.Dataset("noise", ["a", "b", "c"], train, val, test, 16, "noise")
    batches = list(train.batches(16))
    return {"model": model, "images": images, "batches": batches, "folder": tmp_path / "checkpoint"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_of_methods_run(page, given, capsys):
    found = blocks(page, "python")
    assert found, "a method without its call"
    for number, code in enumerate(found, 1):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), given)


def calls(code):
    """(module, function, positional arguments, keywords, whether more is unpacked) of all calls into vitlab in code,
    which imports it or goes on from code that did."""
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    for node in (node for node in found if isinstance(node.func, ast.Attribute)):
        if isinstance(node.func.value, ast.Name) and node.func.value.id in MODULES:
            keywords = [keyword.arg for keyword in node.keywords]
            unpacks = None in keywords or any(
                isinstance(argument, ast.Starred) for argument in node.args
            )
            named = [keyword for keyword in keywords if keyword]
            yield (
                node.func.value.id,
                node.func.attr,
                0 if unpacks else len(node.args),
                named,
                unpacks,
            )


def check_calls(code):
    """TypeError for a call of code whose arguments its function does not take; AttributeError for no function."""
    for name, function, count, named, unpacks in calls(code):
        signature = inspect.signature(getattr(module(name), function))
        bind = signature.bind_partial if unpacks else signature.bind
        bind(*[None] * count, **dict.fromkeys(named))


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_calls_fit_their_functions(page):
    for code in blocks(page, "python"):
        check_calls(code)


@pytest.mark.parametrize(
    "code", ["scores.weight(model)", "scores.weights(m, criterion='taylor')", "cost.macs()"]
)
def test_calls_that_do_not_fit_are_found(code):
    with pytest.raises((AttributeError, TypeError)):
        check_calls(code)


def unknown_names(text):
    """module.name in inline code, of modules of vitlab that have no such name."""
    found = [
        re.findall(r"(?<![\w./])([a-z]+)\.(\w+)", code) for code in re.findall(r"`([^`\n]+)`", text)
    ]
    named = [(module, name) for pairs in found for module, name in pairs if module in MODULES]
    named = [pair for pair in named if pair[1] not in ("csv", "md", "py")]  # of files
    return [pair for pair in named if not hasattr(module(pair[0]), pair[1])]


@pytest.mark.parametrize("page", [*PAGES, INDEX, CONTRIBUTING], ids=name_of)
def test_names_in_prose_are_the_packages_own(page):
    assert unknown_names(prose(page)) == []
    assert unknown_names("`scores.rows`, `scores.rwos(model)`, `vitlab/scores.py`") == [
        ("scores", "rwos")
    ]


def leads_somewhere(page, target):
    """Whether a link's file is there, and in a page the heading that it names."""
    name, _, heading = target.partition("#")
    file = page.parent / name if name else page
    if not heading or not file.is_file() or file.suffix != ".md":
        return file.exists()
    titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    return heading in [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in titles]


def dead_links(page, text):
    """Relative links of a page, and paths in inline code under the repository's folders, that lead nowhere."""
    links = re.findall(r'(?:\]\(|src=")([^)"\s]+)', text)
    links = [target for target in links if "://" not in target]
    top = "benchmarks|checkpoints|docs|figures|notebooks|profiles|tests|vitlab"
    paths = re.findall(rf"`((?:{top})/[\w./-]+)`", text)
    return [t for t in links if not leads_somewhere(page, t)] + [
        p for p in paths if not (ROOT / p).exists()
    ]


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_links_lead_somewhere(page):
    assert dead_links(page, prose(page)) == []
    text = "[a](docs/b.md), [c](README.md), [d](README.md#cite), [e](README.md#site), `tests/d.py`"
    text += ' <img src="docs/f.png">'
    assert dead_links(CONTRIBUTING, text) == [
        "docs/b.md",
        "README.md#site",
        "docs/f.png",
        "tests/d.py",
    ]


WORDS = {
    "criterion of weights": scores.WEIGHTS,
    "criterion of rows": scores.ROWS,
    "criterion of units": scores.UNITS,
    "kind of unit": anatomy.UNITS,
    "method of compression": factor.METHODS,
    "support": _layers.SUPPORTS,
    "refit": compensate._REFITS,
    "compensation": ("mean", "least squares"),  # of budget.cut
    "target": pool._TARGETS,
    "schedule": ("one-shot", "cubic", "iterative"),  # of prune.shares
}


def absent(words, text):
    """Words that do not stand in text as code or in quotes."""
    return [word for word in words if not re.search(rf'[`"]{re.escape(word)}[`"]', text)]


@pytest.mark.parametrize("sort", WORDS)
def test_every_word_has_a_page(sort):
    text = "\n".join(page.read_text() for page in PAGES)
    assert absent(WORDS[sort], text) == [], f"a {sort} that no page of docs/methods mentions"
    assert absent(["svd", "svd+iht"], "by `svd`") == ["svd+iht"]


def test_every_way_of_recovery_has_a_page():
    own = [
        f"recover.{name}"
        for name, each in vars(recover).items()
        if inspect.isfunction(each) and name[0] != "_"
    ]
    text = "\n".join(page.read_text() for page in PAGES)
    assert own and [name for name in own if f"`{name}" not in text] == []


def test_every_page_is_in_the_index():
    linked = re.findall(r"\]\((\w+\.md)\)", INDEX.read_text())
    assert {page.name for page in PAGES} == set(linked)


def changed(source, diff):
    """source after a diff as CONTRIBUTING shows it: hunks between @@ lines, put wherever their old lines stand; …
    stands for the rest of a line."""
    for hunk in re.split(r"^(?:---|@@).*\n", diff, flags=re.MULTILINE)[1:]:
        old, new = (
            "".join(line[1:] for line in hunk.splitlines(True) if line[0] in kind)
            for kind in (" -", " +")
        )
        pattern = re.compile("^" + re.escape(old).replace("…", "(.*)"), re.MULTILINE)
        source, count = pattern.subn(
            lambda found, new=new: new.replace("…", found[found.re.groups]), source
        )
        assert count, f"CONTRIBUTING.md shows lines that are not there:\n{old}"
    return source


@pytest.fixture
def rewritten():
    """A function that gives a module another source until the test has ended."""
    kept = []

    def rewrite(module, source):
        kept.append((module, dict(vars(module))))
        exec(compile(source, module.__file__, "exec"), vars(module))

    yield rewrite
    for module, before in reversed(kept):
        vars(module).clear()
        vars(module).update(before)


def the_largest_weight_of_each_layer_has_the_highest_score_of_all(vit, batch):
    found = scores.weights(vit, criteria=["lamp", "magnitude"])
    for name, score in found["lamp"].items():
        assert score.max() == 1 and score.argmax() == found["magnitude"][name].argmax()


def no_map_of_that_rank_is_nearer_than_the_whitened_one(vit, batch):
    grams = scores.grams(vit, [batch])
    scaled, whitened = (
        factor.compress(vit, ratio=0.5, method=m, grams=grams)[1] for m in ("asvd", "svd")
    )
    assert (scaled.objective >= whitened.objective).all() and scaled.macs.equals(whitened.macs)


def removed_heads_of_a_pit_equal_masked_ones(vit, batch):
    model = toy("pit_ti_224", base_dims=(8, 8), depth=(1, 1), heads=(2, 4), patch_size=4, stride=4)
    small = shrink.remove(model, drop := {("transformers.1.blocks.0", "heads"): [1, 2]})
    prune.apply(model, prune.units_to_masks(model, drop))
    torch.testing.assert_close(small(batch[0]), model(batch[0]))


LAWS = {
    "scores": the_largest_weight_of_each_layer_has_the_highest_score_of_all,
    "factor": no_map_of_that_rank_is_nearer_than_the_whitened_one,
    "anatomy": removed_heads_of_a_pit_equal_masked_ones,
}
EXAMPLES = {
    re.match(r"--- vitlab/\w+/(\w+)\.py\n", diff)[1]: diff for diff in blocks(CONTRIBUTING, "diff")
}


@pytest.mark.parametrize("name", LAWS)
def test_what_contributing_adds_keeps_its_law(name, vit, batch, rewritten):
    assert EXAMPLES.keys() == LAWS.keys()
    with pytest.raises((TypeError, ValueError)):  # it is about the lines that are not there yet
        LAWS[name](vit, batch)
    source = module(name)
    rewritten(source, changed(Path(source.__file__).read_text(), EXAMPLES[name]))
    LAWS[name](vit, batch)


def test_lines_that_are_not_there_are_found():
    diff = "--- vitlab/a.py\n-A = (…)\n+A = (…, 3)\n@@\n     b\n+    c\n"
    assert changed("A = (1, 2)\n    b\n", diff) == "A = (1, 2, 3)\n    b\n    c\n"
    with pytest.raises(AssertionError, match="lines that are not there"):
        changed("A = (1, 2)\n", diff)
