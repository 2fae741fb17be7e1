"""Pages show what the tables say."""

import re
import shutil

import numpy as np
import pages
import pandas as pd
import published
import pytest
from invented import COMMITTED, FIGURES, invent

from vitlab import files
from vitlab.report import tables
from vitlab.studies import settings


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    return invent(tmp_path_factory.mktemp("invented"), 3)


ROOT = files.repository()
PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md"]


def table_of(text):
    """The frame of the one table of a text in Markdown, its first column as index."""
    lines = [
        [cell.strip() for cell in line[1:-1].split("|")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    return pd.DataFrame(lines[2:], columns=lines[0]).set_index("")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_what_the_tables_say(page):
    text = page.read_text()
    assert pages.MARKS.search(text)
    assert pages.fill(text, page=page.parent) == text, (
        f"make readme writes the results into {page.name}"
    )


def test_a_changed_number_of_a_page_is_put_right(tmp_path, capsys):
    text = PAGES[0].read_text()
    (tmp_path / "page.md").write_text(text.replace("|dense|", "|dense|99.9 / "))
    assert pages.main([str(tmp_path / "page.md")]) == 0
    made = (tmp_path / "page.md").read_text()
    shown, expected = (list(pages.MARKS.finditer(page)) for page in (made, text))
    assert [mark[2] for mark in shown] == ["claim", "results"]
    assert shown[0][0].splitlines()[1] == expected[0][0].splitlines()[1]
    assert table_of(shown[1][0]).equals(table_of(expected[1][0]))
    assert made.partition("<!--")[0] == text.partition("<!--")[0]
    (tmp_path / "page.md").write_text(
        "<!-- results of never-run -->\nwhat was there\n<!-- /results -->\n"
    )
    assert pages.main([str(tmp_path / "page.md")]) == 1
    assert "never-run has no tables of a study" in capsys.readouterr().err
    assert "what was there" in (tmp_path / "page.md").read_text()


def test_cells_are_the_means_of_their_rows(folder):
    shown, study = table_of(pages.results([folder], page=folder)), published.Published(folder)
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
            assert float(spread or 0) == pytest.approx(
                (own.top1.max() - own.top1.min()) / 2, abs=0.0501
            )
            assert bool(spread) == (own.seed.nunique() > 1)


@pytest.mark.parametrize("name", COMMITTED)
def test_claims_are_read_from_the_results(name):
    """The numbers of the claims again, from results.csv alone."""
    study = published.Published(FIGURES / name)
    claims = pages.claims(study, front=False)
    assert len(claims) == len(pages.CLAIMS)
    results = pd.read_csv(FIGURES / name / "results.csv")
    results = results[results.latency_ms.isna()].set_index(["model", "seed"])
    dense = results[results.stage == "dense"]

    def numbers_after(beginning):
        (claim,) = [claim for claim in claims if claim.startswith(f"- **{beginning}")]
        values = re.findall(r"(?:ViT|Swin) ([−+]?[\d.]+)", claim)
        return [float(value.replace("−", "-")) for value in values]

    def means(column, query, against_dense=None):
        """Means over seeds of the ViT, then the Swin; against_dense: how a value meets the dense model's."""
        cut = results.query(query)[column]
        if against_dense:
            cut = against_dense(cut, dense[column].reindex(cut.index))
        return cut.groupby("model").mean().sort_index(ascending=False).tolist()

    def change(method, target):
        query = f"method == '{method}' and target == {target} and stage == 'reconstructed'"
        return means("top1", query, lambda cut, dense: cut - dense)

    near = {"abs": 0.0501}
    assert numbers_after("Half of the MACs**") == pytest.approx(change("pool", 0.5), **near)
    assert numbers_after("A quarter of the MACs**") == pytest.approx(change("pool", 0.25), **near)
    assert numbers_after("A quarter by random") == pytest.approx(change("random", 0.25), **near)
    assert numbers_after("A quarter of the MACs, ranks") == pytest.approx(
        change("ranks", 0.25), **near
    )
    assert numbers_after("A quarter of the MACs, units") == pytest.approx(
        change("units", 0.25), **near
    )
    by_units = "method == 'units' and target == 0.25 and stage == 'cut'"
    expected = means("top1", by_units)
    assert numbers_after("A quarter of the MACs by units") == pytest.approx(expected, **near)
    for beginning, method in [
        ("90\u00a0% of the weights zeroed** by", "unstructured"),
        ("90\u00a0% by magnitude", "unstructured, magnitude"),
        ("90\u00a0% of the weights zeroed at random", "unstructured, random"),
    ]:
        query = f"method == '{method}' and target == 0.9 and stage == 'cut'"
        assert numbers_after(beginning) == pytest.approx(means("top1", query), **near)
    query = "method == 'unstructured' and target == 0.9 and stage == 'finetuned'"
    disk = means("bytes_disk", query, lambda cut, dense: 100 * cut / dense)
    assert numbers_after("90\u00a0% zeros on disk") == pytest.approx(disk, abs=0.51)
    timed = pd.read_csv(FIGURES / name / "efficiency.csv")
    timed = timed.query("target == 0.9 and form == 'removed'")
    least = timed.groupby("model").speedup.min().sort_index(ascending=False)
    assert numbers_after("90\u00a0% of the rows removed** save") == pytest.approx(
        least.tolist(), **near
    )
    # "At least" that: rounded down.
    assert (np.array(numbers_after("90\u00a0% of the rows removed** save")) <= least).all()
    audit = pd.read_csv(FIGURES / name / "table-audit.csv")
    audit = audit.query("criterion == 'fisher' and target == 0.9")
    rises = audit.groupby(["kind", "model"]).measured.mean().sort_index(ascending=[True, False])
    assert numbers_after("Heads alone") == pytest.approx(rises["heads"].tolist(), abs=0.000501)
    expected = rises["filters"].tolist()
    assert numbers_after("Filters of the stem") == pytest.approx(expected, abs=0.000501)


@pytest.mark.parametrize("name", COMMITTED)
def test_each_claim_of_the_front_page_has_one_number_of_the_first_model(name):
    study = published.Published(FIGURES / name)
    front = pages.claims(study, front=True)
    assert len(front) == len(pages.FRONT_CLAIMS)
    for claim, whole in zip(front, pages.claims(study, front=False)[2:], strict=False):
        (value,) = re.findall(r"[−+]?\d+\.\d+", claim)
        assert value in re.search(r"ViT ([^,]+), Swin", whole)[1]
        assert "the ViT" in claim and "Swin" not in claim


def test_what_was_not_run_is_not_claimed(invented, tmp_path):
    study = published.Published(shutil.copytree(invented, tmp_path / "made"))
    claims = pages.claims(study, front=False)
    assert not any("magnitude" in claim or "one pool" in claim for claim in claims)
    summary = pd.read_csv(study.folder / "summary.csv")
    mixed = summary[summary.method == "heads+svd"]
    mixed = mixed.assign(method="heads+svd+iht entries", form="masked", macs=1e5)
    summary = pd.concat([summary, mixed])
    finetuned = [*[1.0] * (len(summary) - 2), 60.04, 79.94]  # of the Swin, then of the ViT
    summary = summary.assign(dense=80.0, finetuned=finetuned)
    summary.to_csv(study.folder / "summary.csv", index=False)
    claims = pages.claims(study, front=False)
    (claim,) = [claim for claim in claims if "IHT on weights, fine-tuned" in claim]
    assert claim.endswith("by SVD + IHT on weights, fine-tuned: ViT −0.1, Swin −20.0 points.")
    summary[summary.model == "vit"].to_csv(study.folder / "summary.csv", index=False)
    assert not any("SVD + IHT" in claim for claim in pages.claims(study, front=False))


def by_hand(folder, rows):
    """A study whose results are rows: (model, seed, method, form, target_kind, target, stage, top1)."""
    names = ["model", "seed", "method", "form", "target_kind", "target", "stage", "top1"]
    frame = pd.DataFrame(rows, columns=names).assign(
        macs=2e6, nonzero=1e6, latency_ms=np.nan, total=100, data="shapes"
    )
    (folder / "made").mkdir()
    frame.assign(date="2026-11-25").to_csv(folder / "made" / "results.csv", index=False)
    return folder / "made"


def test_lines_by_hand(tmp_path):
    none = (None, None, None)
    whole = [
        ("vit", seed, "dense", *none, stage, 80 + seed)
        for seed in (0, 1)
        for stage in ("dense", "dense+epochs")
    ]
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
    folder = by_hand(tmp_path, rows)
    text = pages.results([folder], page=tmp_path, front=True)
    study = published.Published(FIGURES / "cifar10-small")
    sentence, picture, real = pages.headline(study, page=tmp_path).split("\n\n")
    rows = pd.read_csv(FIGURES / "bench" / "foundation.csv")
    rows = rows[(rows.data == "Caltech-101") & rows.budget.isin([0.5, 1]) & (rows.stage == "cut")]
    shown = rows.groupby("method").probe_anew.median()[["vitlab, pool", "dense"]]
    assert re.findall(r"(\d\d\.\d) %", real)[:2] == [f"{top1:.1f}" for top1 in shown]
    (half, *_) = pages.claims(study)
    told = re.findall(r"(ViT|Swin) ([−+]?[\d.]+)", half)
    assert " and ".join(f"{change} ({family})" for family, change in told) in sentence
    assert re.fullmatch(
        r'<img src=".*figures/hero\.png" alt="With a quarter of the MACs [^"]*" width="480">',
        picture,
    )
    assert table_of(text)["ViT top-1 (%)"].to_dict() == {
        "dense": "80.5±0.5",
        "90\u00a0% of the weights masked, fine-tuned": "70.0",
        "half the MACs: units and ranks in one pool, reconstructed": "75.3",
        "a quarter of the MACs: units and ranks in one pool, reconstructed": "60.0",
    }
    assert "results.csv" not in text  # docs/results.md says where it comes from
    assert text.endswith("±: half the range over seeds; without ±: seed 0.")
    assert list(table_of(text)) == ["ViT top-1 (%)", "ViT MACs (M)"]
    whole = pages.results([folder], page=tmp_path)
    assert "means over seeds 0, 1 (cuts: 0), split" in whole and "100 test images" in whole
    assert "ViT non-zero (M)" in table_of(whole) and "dense, same epochs" in table_of(whole).index


def test_models_of_one_family_are_kept_apart_or_the_one_most_cut_is_shown(tmp_path):
    none, cut = (None, None, None), ("pool", "factored", "macs", 0.5)
    rows = [
        (model, 0, "dense", *none, "dense", top1)
        for model, top1 in [("vit", 10), ("vit-transfer", 20)]
    ]
    rows += [("vit", 0, *cut, "reconstructed", 9), ("vit-transfer", 0, *cut, "reconstructed", 19)]
    folder = by_hand(tmp_path, rows)
    given = pd.read_csv(folder / "results.csv").assign(weights=[np.nan, "given/vit/x"] * 2)
    given.to_csv(folder / "results.csv", index=False)
    text, line = (
        pages.results([folder], page=tmp_path),
        "half the MACs: units and ranks in one pool, reconstructed",
    )
    shown = table_of(text)
    assert shown.loc["dense", ["ViT-transfer top-1 (%)", "ViT top-1 (%)"]].tolist() == [
        "20.0",
        "10.0",
    ]
    assert shown.loc[line, ["ViT-transfer top-1 (%)", "ViT top-1 (%)"]].tolist() == ["19.0", "9.0"]
    assert "\nViT-transfer starts from the weights in given/vit." in text
    front = pages.results([folder], page=tmp_path, front=True)
    assert table_of(front)["ViT top-1 (%)"].to_dict() == {"dense": "20.0", line: "19.0"}
    more = pd.concat(
        [
            given,
            given.iloc[[2]].assign(
                method="heads+svd+iht entries",
                form="masked",
                target_kind="ratio",
                stage="finetuned",
            ),
        ]
    )  # now the other one was cut more
    more.to_csv(folder / "results.csv", index=False)
    front = pages.results([folder], page=tmp_path, front=True)
    assert table_of(front).loc["dense", "ViT top-1 (%)"] == "10.0"


def test_every_cut_has_words_of_its_own():
    assert len(set(pages.LABELS.values())) == len(pages.LABELS)
    for name in COMMITTED:
        rows = published.Published(FIGURES / name).untimed.query(
            "top1.notna() and method != 'dense'"
        )
        assert set(rows.method + " " + rows.form) <= set(pages.LABELS)
    values, known = settings.study("demo"), {cut.rpartition(" ")[0] for cut in pages.LABELS}
    budgets = (ROOT / "notebooks" / "5_budget.ipynb").read_text()
    methods = re.findall(r'\\"([\w+]+)\\": \{\\"kinds', budgets) + ["svd"]
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
    assert pages._seed_note(pd.DataFrame(rows, columns=["model", "words", "seed"])) == note


# -- the front page


def test_the_picture_of_the_front_page_is_what_the_benchmark_says(tmp_path):
    shutil.copytree(FIGURES / "bench", tmp_path / "bench")
    pages.hero(tmp_path)
    for ending in ("svg", "png", "txt"):
        name = f"hero.{ending}"
        assert (tmp_path / name).read_bytes() == (FIGURES / name).read_bytes(), "make readme"
    lines = tables.peers(pd.read_csv(FIGURES / "bench" / "accuracy.csv"))
    lines = lines[(lines.model == pages.HERO) & (lines.share == 0.25)]
    drawn = (tmp_path / "hero.svg").read_text()
    for lost in lines.groupby("name").lost.mean():
        assert published.number(lost) in drawn  # in the sentence above


def test_the_drawing_of_the_pool_is_the_one_that_is_committed(tmp_path):
    assert pages.pool(tmp_path) == tmp_path / "pool.png"
    for name in ("pool.svg", "pool.png"):
        assert (tmp_path / name).read_bytes() == (FIGURES / name).read_bytes(), "make readme"


def numbers_told(text):
    """Numbers of a page that stand neither among the results nor in code nor in names and addresses."""
    text = pages.MARKS.sub("", text)
    text = re.sub(
        r"^```.*?^```$|`[^`\n]*`|\]\([^)]*\)|CIFAR-10|Caltech-101",
        "",
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    return set(re.findall(r"\d+(?:[.,]\d+)*", text))


def test_the_front_page_is_short_and_its_numbers_stand_elsewhere():
    text = PAGES[0].read_text()
    assert len(text.split()) < 900  # as wc -w counts
    python = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    size = re.search(r"into \.venv: (\d+) GB", (ROOT / "install.sh").read_text())[1]
    assert numbers_told(text) == {python, size}
    assert numbers_told(
        "`1` [2](3) ViT-4 5.5 CIFAR-10\n```\n6\n```\n<!-- results -->\n7\n<!-- /results -->"
    ) == {
        "2",
        "4",
        "5.5",
    }


def test_the_list_of_modules_is_whole():
    text = (ROOT / "docs" / "package.md").read_text()
    listed = re.findall(r"^ {2,4}(\w+) {2,}", text, re.MULTILINE)
    folders = re.findall(r"^  (\w+)/ ", text, re.MULTILINE)
    files = [path for path in (ROOT / "vitlab").rglob("*.py") if not path.stem.startswith("__")]
    assert sorted(listed) == sorted(path.stem for path in files)
    assert sorted(folders) == sorted({path.parent.name for path in files} - {"vitlab"})
