"""Findings: sentences say what the tables hold, whatever these are; pages show what the tables say."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
from invented import ALONE, COMMITTED, FIGURES, invent

from vitlab import findings, record


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    return invent(tmp_path_factory.mktemp("invented"), 3)


def numbers(texts):
    return set(re.findall(r"\d+(?:[.,]\d+)*", " ".join(texts)))


def cells(table):
    return [*table.columns, *(cell for row in table.itertuples(index=False) for cell in row)]


def test_every_number_of_a_title_stands_in_its_table(folder, found):
    assert len(found) > 20
    for slide in found:
        assert 1 <= len(slide.table) <= 9 and slide.table.map(lambda cell: isinstance(cell, str)).all(axis=None)
        assert numbers([slide.title.replace("top-1", "")]) <= numbers(cells(slide.table)), slide.title
        assert not re.search("nan|None|inf", " ".join([slide.title, *cells(slide.table)])), slide.title
        assert slide.source.startswith("Source: ") and folder.name in slide.source


def test_all_findings_have_a_slide_where_all_tables_are_there(invented, capsys):
    study = findings.Study(invented)
    assert len(findings.slides(invented)) == len(findings.plan(study))
    assert "no slide" not in capsys.readouterr().out


def test_what_is_missing_drops_its_own_slides_and_each_is_said(invented, tmp_path, capsys):
    whole = findings.slides(invented)
    files = sorted(path.name for path in invented.glob("*.*") if path.name != "results.csv")
    assert {path.name for path in invented.glob("*.csv")} <= {name for slide in whole for name in named(slide)}
    for group in range(5):  # every file is missing once
        part, missing = tmp_path / str(group) / invented.name, set(files[group::5])
        shutil.copytree(invented, part, ignore=lambda _, names, missing=missing: missing & set(names))
        left = [slide.title for slide in whole if not missing & named(slide)]
        assert [slide.title for slide in findings.slides(part)] == left
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no slide ")]
        assert len(left) == len(whole) - len(said) and all(line.endswith(" is missing") for line in said)


def named(slide):
    return set(re.findall(r"[\w.-]+\.(?:csv|png)", slide.source))


def test_sentences_go_the_way_of_the_numbers(tmp_path):
    found = {}
    for name, change in [("worse", -2.04), ("better", 0.16)]:
        (tmp_path / name).mkdir()
        study = invent(tmp_path / name, 1)
        rows = pd.read_csv(study / "summary.csv")
        rows.loc[:, ["dense", "cut", "compensated", "reconstructed"]] = [80.0, 10.0, 20.0, 80 + change]
        rows.loc[:, "finetuned"] = np.where(rows.method == "units", 81.0, 60.0)
        rows.to_csv(study / "summary.csv", index=False)
        found[name] = [slide.title for slide in findings.slides(study)]
    end = "without training (units) and rises by 1.0 points fine-tuned (units)"
    assert f"With half the MACs, the ViT’s top-1 falls by 2.0 points {end}" in found["worse"]
    assert f"With half the MACs, the ViT’s top-1 rises by 0.2 points {end}" in found["better"]


# -- results on pages

ROOT = record.repository()
PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md"]


def table_of(text):
    """The frame of the one table of a text in Markdown, its first column as index."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line[:1] == "|"]
    return pd.DataFrame(lines[2:], columns=lines[0]).set_index("")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_what_the_tables_say(page):
    text = page.read_text()
    assert findings.MARKS.search(text)
    assert findings.filled(text, page=page.parent) == text, f"make readme writes the results into {page.name}"


def test_a_changed_number_of_a_page_is_put_right(tmp_path, capsys):
    text = PAGES[0].read_text()
    (tmp_path / "page.md").write_text(text.replace("|dense|", "|dense|99.9 / "))
    assert findings.main([str(tmp_path / "page.md")]) == 0
    made = (tmp_path / "page.md").read_text()
    assert table_of(findings.MARKS.search(made)[0]).equals(table_of(findings.MARKS.search(text)[0]))
    assert made.partition("<!--")[0] == text.partition("<!--")[0]
    (tmp_path / "page.md").write_text("<!-- results of never-run -->\nwhat was there\n<!-- /results -->\n")
    assert findings.main([str(tmp_path / "page.md")]) == 1
    assert "never-run has no results.csv" in capsys.readouterr().err
    assert "what was there" in (tmp_path / "page.md").read_text()


def test_cells_are_the_means_of_their_rows(folder):
    shown, study = table_of(findings.results([folder], page=folder)), findings.Study(folder)
    lines = {
        "dense": "method == 'dense' and stage == 'dense'",
        "90\u00a0% of the weights masked, fine-tuned": (
            "method == 'unstructured' and target == 0.9 and stage == 'finetuned'"
        ),
        "half the MACs: as many random units of each place, reconstructed": (
            "method == 'random' and target == 0.5 and stage == 'reconstructed'"
        ),
    }
    for words, query in lines.items():
        rows = study.untimed[study.untimed.model.isin(study.models)].query(query)
        for model, own in rows.groupby("model"):
            cell = shown.loc[words, f"{'ViT' if model.startswith('vit') else 'Swin'} top-1 (%)"]
            mean, _, spread = cell.partition("±")
            assert float(mean) == pytest.approx(own.top1.mean(), abs=0.0501)
            assert float(spread or 0) == pytest.approx((own.top1.max() - own.top1.min()) / 2, abs=0.0501)
            assert bool(spread) == (own.seed.nunique() > 1)


@pytest.mark.parametrize("name", COMMITTED)
def test_what_was_found_is_told_from_the_rows(name):
    study = findings.Study(FIGURES / name)
    told = {line.split("**")[1]: line for line in findings._found(study, front=False)}
    assert len(told) == len(findings.FOUND + findings.MORE_FOUND)
    assert findings._found(study, front=True) == [*told.values()][: len(findings.FOUND)]
    rows = pd.read_csv(FIGURES / name / "results.csv")

    def numbers_in(sentence):
        return [
            float(n)
            for n in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", told[sentence].replace("top-1", "").replace("−", "-"))
        ]

    def means(column, query, of_dense=None):
        """Of the ViT, then the Swin; of_dense: how a value and the dense model's of its seed are put together."""
        cut = rows[rows.latency_ms.isna()].query(query).set_index(["model", "seed"])[column]
        dense = rows[rows.latency_ms.isna() & (rows.stage == "dense")].set_index(["model", "seed"])[column]
        both = of_dense(cut, dense.reindex(cut.index)) if of_dense else cut
        return both.groupby("model").mean().sort_index(ascending=False).tolist()

    def change(method, target):
        asked = f"method == '{method}' and target == {target} and target_kind == 'macs' and stage == 'reconstructed'"
        return means("top1", asked, lambda cut, dense: cut - dense)

    near = {"abs": 0.0501}
    cuts = [("pool", 0.5), ("ranks", 0.5), ("units", 0.5)]
    cuts += [(method, 0.25) for method in ("pool", "ranks", "units", "random")]
    assert numbers_in("Half the MACs") == pytest.approx(sum((change(*cut) for cut in cuts), []), **near)
    methods = ["unstructured", "unstructured, magnitude", "unstructured, random"]
    scores = [means("top1", f"method == '{method}' and target == 0.9 and stage == 'cut'") for method in methods]
    assert numbers_in("Scores") == pytest.approx([90, *sum(scores, [])], **near)
    asked = "method == 'unstructured' and target == 0.9 and stage == 'finetuned'"
    disk = means("bytes_disk", asked, lambda cut, dense: 100 * cut / dense)
    assert numbers_in("Zeros")[:2] == pytest.approx(disk, abs=0.51)
    timed = pd.read_csv(FIGURES / name / "efficiency.csv").query("target == 0.9 and form == 'removed'")
    ends = timed.groupby("model").speedup.agg(["min", "max"]).round(1).sort_index(ascending=False)
    assert numbers_in("Zeros")[-sum(ends.nunique(axis=1)) :] == [n for row in ends.values for n in dict.fromkeys(row)]
    audit = pd.read_csv(FIGURES / name / "table-audit.csv").query("criterion == 'fisher' and target == 0.9")
    rises = audit.groupby(["kind", "model"]).measured.mean().sort_index(ascending=[True, False])
    kinds = ["ranks", "neurons", "heads", "width", "filters"]
    expected = [0.9, *(rise for kind in kinds for rise in rises[kind])]
    assert numbers_in("Kinds alone") == pytest.approx(expected, abs=0.000501)


def test_what_was_not_run_is_not_told(invented, tmp_path):
    study = findings.Study(shutil.copytree(invented, tmp_path / "made"))
    assert not findings._found(study, front=False)  # its pool is of no ranks, and nothing was cut by magnitude
    frame = pd.read_csv(study.folder / "summary.csv")
    mixed = frame[frame.method == "heads+svd"].assign(method="heads+svd+iht entries", form="masked", macs=1e5)
    frame = pd.concat([frame, mixed]).assign(dense=80.0, finetuned=[*[1.0] * len(frame), 60.04, 79.94])  # Swin, ViT
    frame.to_csv(study.folder / "summary.csv", index=False)
    study.dense["macs"] = 2e5
    (told,) = findings._found(study, front=True)
    assert "single weights −0.1 and −20.0 points at 50\u00a0% and 50\u00a0% of the MACs, SVD alone −79.0 and" in told
    frame[frame.model == "vit"].to_csv(study.folder / "summary.csv", index=False)
    assert not findings._found(study, front=False)


def by_hand(folder, rows):
    """A study whose results are rows: (model, seed, method, form, target_kind, target, stage, top1)."""
    names = ["model", "seed", "method", "form", "target_kind", "target", "stage", "top1"]
    frame = pd.DataFrame(rows, columns=names).assign(macs=2e6, nonzero=1e6, latency_ms=np.nan, total=100, data="shapes")
    (folder / "made").mkdir()
    frame.assign(date="2026-11-25").to_csv(folder / "made" / "results.csv", index=False)
    return folder / "made"


def test_lines_by_hand(tmp_path):
    none = (None, None, None)
    whole = [("vit", seed, "dense", *none, stage, 80 + seed) for seed in (0, 1) for stage in ("dense", "dense+epochs")]
    cut = ("unstructured", "masked", "sparsity")
    rows = [
        *whole,
        ("vit", 0, "dense", None, "ratio", None, "dense+epochs", 1),  # the control of other cuts
        ("vit", 0, *cut, 0.5, "finetuned", 79),  # a milder cut than the one shown
        ("vit", 0, *cut, 0.9, "finetuned", 70),
        ("vit", 0, "pool", "factored", "macs", 0.25, "reconstructed", 60),
        ("vit", 0, "pool", "factored", "macs", 0.5, "reconstructed", 75.25),
        ("vit", 0, "pool", "factored", "macs", 0.5, "cut", 2),  # not on the front page
        ("vit", 0, "unheard of", "removed", "macs", 0.5, "reconstructed", 3),
    ]
    text = findings.results([by_hand(tmp_path, rows)], page=tmp_path, front=True)
    assert text.startswith("![Top-1 after each step of recovery](made/ladder-macs-0.25-vit.png)\n\n||")
    assert table_of(text)["ViT top-1 (%)"].to_dict() == {
        "dense": "80.5±0.5",
        "dense, same epochs": "80.5±0.5",
        "90\u00a0% of the weights masked, fine-tuned": "70.0",
        "half the MACs: units and ranks in one pool, reconstructed": "75.3",
        "a quarter of the MACs: units and ranks in one pool, reconstructed": "60.0",
    }
    assert "means over seeds 0, 1 (cuts: 0), split" in text and "100 test images" in text
    assert text.endswith("±: half the range over seeds; without ±: seed 0.")
    assert list(table_of(text)) == ["ViT top-1 (%)", "ViT MACs (M)", "ViT non-zero (M)"]


def test_models_of_one_family_are_kept_apart_or_the_one_most_cut_is_shown(tmp_path):
    none, cut = (None, None, None), ("pool", "factored", "macs", 0.5)
    rows = [(model, 0, "dense", *none, "dense", top1) for model, top1 in [("vit", 10), ("vit-transfer", 20)]]
    rows += [("vit", 0, *cut, "reconstructed", 9), ("vit-transfer", 0, *cut, "reconstructed", 19)]
    folder = by_hand(tmp_path, rows)
    given = pd.read_csv(folder / "results.csv").assign(weights=[np.nan, "given/vit/x"] * 2)
    given.to_csv(folder / "results.csv", index=False)
    text, line = findings.results([folder], page=tmp_path), "half the MACs: units and ranks in one pool, reconstructed"
    shown = table_of(text)
    assert shown.loc["dense", ["ViT-transfer top-1 (%)", "ViT top-1 (%)"]].tolist() == ["20.0", "10.0"]
    assert shown.loc[line, ["ViT-transfer top-1 (%)", "ViT top-1 (%)"]].tolist() == ["19.0", "9.0"]
    assert "\nViT-transfer starts from the weights in given/vit." in text
    front = findings.results([folder], page=tmp_path, front=True)
    assert table_of(front)["ViT top-1 (%)"].to_dict() == {"dense": "20.0", line: "19.0"}
    assert "\nshapes starts from the weights in given/vit." in front
    more = pd.concat([given, given.iloc[[2]].assign(method="svd")])  # now the other one was cut more
    more.to_csv(folder / "results.csv", index=False)
    front = findings.results([folder], page=tmp_path, front=True)
    assert table_of(front).loc["dense", "ViT top-1 (%)"] == "10.0" and "starts from" not in front


def test_no_title_praises_a_random_control(tmp_path):
    folder = invent(tmp_path, 1)
    timed = pd.read_csv(folder / "efficiency.csv")
    timed.loc[timed.method == "random", "speedup"] = 9.0
    timed.to_csv(folder / "efficiency.csv", index=False)
    summary = pd.read_csv(folder / "summary.csv")
    control = summary[summary.method == "heads+svd"].assign(method="heads+svd, random", macs=1.0)
    summary.loc[summary.method == "random", ["cut", "reconstructed", "finetuned"]] = 99.0
    pd.concat([summary, control]).to_csv(folder / "summary.csv", index=False)
    begin = ("The fastest", "At 40", "With half")
    found = [slide for slide in findings.slides(folder) if slide.title.startswith(begin)]
    tables = "".join(slide.table.to_csv() for slide in found)
    assert "random, 50" in tables and "heads+svd, random" in tables
    assert len(found) >= 4 and not any("random" in slide.title for slide in found)


def test_every_cut_has_words_of_its_own():
    assert len(set(findings.CUTS.values())) == len(findings.CUTS)
    for name in COMMITTED:
        rows = findings.Study(FIGURES / name).untimed.query("top1.notna() and method != 'dense'")
        assert set(rows.method + " " + rows.form) <= set(findings.CUTS)
    values, known = record.study("demo"), {cut.rpartition(" ")[0] for cut in findings.CUTS}
    budgets = (ROOT / "notebooks" / "5_budget.ipynb").read_text()
    methods = re.findall(r'\\"([\w+]+)\\": \(\\"(?:fisher|random)', budgets) + ["svd", "ranks"]
    methods += [f"unstructured, {schedule}" for schedule in values.global_pruning.schedules]
    methods += [f"heads+{form}" for form in values.heads_svd_iht.forms]
    assert len(methods) > 12 and set(methods) <= known


@pytest.mark.parametrize(
    "tops, note",
    [
        ({"a": [1], "b": [2]}, []),
        ({"a": [1, 2], "b": [2, 2]}, ["±: half the range over seeds."]),
        ({"a": [1, 2, 3], "b": [2]}, ["±: half the range over seeds; without ±: seed 0."]),
        ({"a": [1, 2, 3], "b": [2, 1]}, ["±: half the range over seeds, in some lines of 2."]),
    ],
)
def test_what_has_no_spread_is_said_to_be_of_one_seed(tops, note):
    rows = [("vit", words, seed) for words, own in tops.items() for seed in range(len(own))]
    assert findings._seed_note(pd.DataFrame(rows, columns=["model", "words", "seed"])) == note


def test_sources_and_rankings_know_which_seeds_a_cut_has(tmp_path):
    folder = invent(tmp_path, 2)
    summary = pd.read_csv(folder / "summary.csv")
    alone = summary.seeds == 1
    assert 0 < alone.sum() < len(summary)
    summary["finetuned"] = summary.dense - np.where(alone, 1.0, 3.0)  # what one seed has loses least
    summary["reconstructed"] = summary.dense - np.where(alone, 2.0, 4.0)
    summary.to_csv(folder / "summary.csv", index=False)
    timed = pd.read_csv(folder / "efficiency.csv")
    timed.loc[timed.method.isin(ALONE), "speedup"] = 9.0  # and is fastest
    timed.to_csv(folder / "efficiency.csv", index=False)
    found = {slide.title: slide for slide in findings.slides(folder)}
    (cut,) = [
        slide for title, slide in found.items() if title.startswith("At 40\u00a0% cut, heads+svd costs the ViT least")
    ]
    assert cut.table.seeds.tolist() == ["2", "1", "1"] and "Ranked: cuts of 2 seeds" in cut.note
    (half,) = [
        slide for title, slide in found.items() if title.startswith("With half the MACs, the ViT’s top-1 falls by 4.0")
    ]
    (fast,) = [slide for title, slide in found.items() if title.startswith("The fastest ViT (")]
    assert fast.table.seeds.max() == "2" and fast.note.endswith(" Ranked: cuts of 2 seeds.")
    assert not any(name in fast.title for name in ALONE) and "9.0" not in fast.title
    assert "random" not in half.title and half.table.seeds.tolist() == ["2", "2", "1"]
    assert "means over seeds 0, 1 (some cuts: 0), split 0" in cut.source
    (curves,) = [slide for slide in found.values() if "table-curves.csv" in slide.source and "ViT" in slide.title]
    assert "means over seeds 0, 1, split 0" in curves.source
    assert [title for title in found if title.endswith("means are over up to 2 seeds")]


# -- the front page


def numbers_told(text):
    """Numbers of a page that stand neither among the results nor in code nor in names and addresses."""
    text = findings.MARKS.sub("", text)
    text = re.sub(r"^```.*?^```$|`[^`\n]*`|\]\([^)]*\)|CIFAR-10|Caltech-101", "", text, flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"\d+(?:[.,]\d+)*", text))


def test_the_front_page_is_short_and_its_numbers_stand_elsewhere():
    text = PAGES[0].read_text()
    assert len(text.split()) < 900  # as wc -w counts
    python = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    size = re.search(r"into \.venv: (\d+) GB", (ROOT / "install.sh").read_text())[1]
    assert numbers_told(text) == {python, size}
    assert numbers_told("`1` [2](3) ViT-4 5.5 CIFAR-10\n```\n6\n```\n<!-- results -->\n7\n<!-- /results -->") == {
        "2",
        "4",
        "5.5",
    }


def test_the_list_of_modules_is_whole():
    listed = re.findall(r"^  (\w+) {2,}", (ROOT / "docs" / "package.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "vitlab").glob("*.py") if path.stem != "__init__")
