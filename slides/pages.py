"""Write results of studies into README.md and other pages, between their marks. No torch.

`python slides/pages.py README.md` writes what the tables of figures/ say between `<!-- results -->` or
`<!-- results of STUDY -->` and `<!-- /results -->`, and the sentence and picture of the front page between
`<!-- claim -->` and `<!-- /claim -->`.

Public: ZEROS, backbone_sentence, claims, family_of, fill, filled, headline, hero, main, peer_sentence, pool,
pool_picture, results.
"""

import argparse
import contextlib
import math
import os
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import published

from vitlab import files
from vitlab.report import drawings, plots, tables

STUDIES = ("cifar10-small", "caltech101-small")  # of the front page
LABELS = {  # method and form: what was done, in the order of a table
    "dense": "",
    "unstructured masked": "{share} of the weights masked",
    "unstructured, one-shot masked": "{share} of the weights masked at once",
    "unstructured, iterative masked": "{share} of the weights masked in equal steps",
    "unstructured, cubic masked": "{share} of the weights masked in smaller and smaller steps",
    "unstructured, magnitude masked": "{share} of the weights masked by magnitude",
    "unstructured, random masked": "{share} of the weights masked at random",
    "structured masked": "{share} of the rows masked",
    "structured removed": "{share} of the rows removed",
    "structured, iterative removed": "{share} of the rows removed in equal steps",
    "structured, cubic removed": "{share} of the rows removed in smaller and smaller steps",
    "structured, magnitude masked": "{share} of the rows masked by magnitude",
    "structured, random masked": "{share} of the rows masked at random",
    "heads+svd factored": "{share}: heads, SVD",
    "heads+svd, random factored": "{share}: random heads and directions",
    "heads+iht masked": "{share}: heads, IHT",
    "heads+threshold masked": "{share}: heads, SVD, small entries to zero",
    "heads+svd+iht entries masked": "{share}: heads, SVD + IHT on weights",
    "heads+svd+iht columns factored": "{share}: heads, SVD + IHT on columns",
    "units removed": "{part}: heads, neurons, filters, width",
    "pool removed": "{part}: heads, neurons, filters, width in one pool",  # where no rank was cut
    "heads+neurons removed": "{part}: heads, neurons",
    "width removed": "{part}: width",
    "random removed": "{part}: as many random units of each place",
    "svd factored": "{part}: SVD, the same share of each layer",
    "ranks factored": "{part}: ranks by loss per MAC",
    "pool+ranks factored": "{part}: units, then ranks",
    "pool factored": "{part}: units and ranks in one pool",
}
FRONT = [  # cuts and stages of the front page
    "dense dense",
    "unstructured masked finetuned",
    "structured removed finetuned",
    "heads+svd+iht entries masked finetuned",
    "pool factored reconstructed",
]
# Sentences above a table. In braces: the name of the model, or method, form and target of a cut and one of its numbers.
FRONT_CLAIMS = [  # of the first model
    "**Nine tenths of the weights zeroed** by sensitivity: "
    "nothing is trained, and the {model} keeps {unstructured masked 0.9 top1} top-1.",
    "**Nine tenths zeroed by magnitude**, for comparison: "
    "the {model} keeps {unstructured, magnitude masked 0.9 top1}.",
    "**Zeros save no time**: with nine tenths of its weights zeroed, "
    "the {model} is at most {unstructured masked 0.9 speedup, most} times as fast as dense.",
    "**Removed rows save some**: without nine tenths of its rows, "
    "the {model} is at least {structured removed 0.9 speedup, least} times as fast as dense.",
]
ZEROS = (  # of every model, on slides, too
    "**Zeros save no time**: with 90\u00a0% of the weights zeroed, "
    "{unstructured masked 0.9 speedup} times as fast as dense."
)
CLAIMS = [  # of every model
    "**Half of the MACs**, nothing trained: {pool factored 0.5 reconstructed} points of top-1, "
    "when units and ranks leave from one pool.",
    "**A quarter of the MACs**, nothing trained: {pool factored 0.25 reconstructed} points.",
    "**90\u00a0% of the weights zeroed** by sensitivity, nothing trained: {unstructured masked 0.9 top1} "
    "top-1 is left.",
    "**90\u00a0% by magnitude**, for comparison: {unstructured, magnitude masked 0.9 top1}.",
    ZEROS,
    "**90\u00a0% of the rows removed** save some: {structured removed 0.9 speedup} times as fast.",
    "**A quarter by random units**, for comparison: {random removed 0.25 reconstructed} points.",
    "**40\u00a0% of heads and of each layer's weights** by SVD + IHT on weights, fine-tuned: "
    "{heads+svd+iht entries masked 0.4 finetuned} points.",
    "**Half of the MACs, ranks alone**: {ranks factored 0.5 reconstructed} points.",
    "**Half of the MACs, units alone** (heads, neurons, filters, channels): "
    "{units removed 0.5 reconstructed} points.",
    "**A quarter of the MACs, ranks alone**: {ranks factored 0.25 reconstructed} points.",
    "**A quarter of the MACs, units alone**: {units removed 0.25 reconstructed} points.",
    "**A quarter of the MACs by the pool, right after the cut**: {pool factored 0.25 top1} top-1.",
    "**The same, reconstructed without labels**: {pool factored 0.25 top1, reconstructed}.",
    "**A quarter of the MACs by units, right after the cut**: {units removed 0.25 top1} top-1.",
    "**The same, reconstructed without labels**: {units removed 0.25 top1, reconstructed}.",
    "**90\u00a0% of the weights zeroed at random**: {unstructured, random masked 0.9 top1} top-1.",
    "**90\u00a0% of the weights zeroed, fine-tuned**: {unstructured masked 0.9 finetuned} points.",
    "**90\u00a0% zeros on disk**: {unstructured masked 0.9 bytes_disk} of the dense model's bytes.",
    "**Half of the weights zeroed, fine-tuned**: {unstructured masked 0.5 finetuned} points.",
    "**Half of the rows removed, fine-tuned**: {structured removed 0.5 finetuned} points, "
    "with {structured removed 0.5 macs} of the MACs.",
    "**90\u00a0% of the rows removed, fine-tuned**: {structured removed 0.9 finetuned} points, "
    "with {structured removed 0.9 macs} of the MACs.",
    "**40\u00a0% of heads and weights by SVD + IHT on weights** leave "
    "{heads+svd+iht entries masked 0.4 macs} of the MACs.",
    "**40\u00a0% of heads and weights by SVD alone, fine-tuned**: "
    "{heads+svd factored 0.4 finetuned} points, with {heads+svd factored 0.4 macs} of the MACs.",
    "**One kind alone, to 0.9 of the MACs**, raises the loss by {ranks alone 0.9 rise} nats (ranks).",
    "**Neurons alone, to 0.9**: {neurons alone 0.9 rise} nats.",
    "**Heads alone, to 0.9**: {heads alone 0.9 rise} nats.",
    "**Channels alone, to 0.9**: {width alone 0.9 rise} nats.",
    "**Filters of the stem alone, to 0.9**: {filters alone 0.9 rise} nats.",
]
BACKBONE_DATA = "Caltech-101"  # images of the real ViT's benchmark that pages and slides show
MARKS = re.compile(r"(<!-- (claim|results)(?: of ([\w-]+))? -->\n).*?(<!-- /\2 -->)", re.DOTALL)


# -- sentences


def claims(study, front=False):
    """Return the claims as lines of Markdown; those of cuts that were not run are left out.

    front: whether they have the first model's numbers only. Else they have those of all models.
    """
    lines = []
    for sentence in FRONT_CLAIMS if front else CLAIMS:
        with contextlib.suppress(published.Absent):
            lines.append(f"- {filled(study, sentence, front)}")
    return lines


def filled(study, sentence, front=False):
    """Return a claim with its numbers, of the first model or of all. Raises Absent for a cut that was not run."""
    models = sorted(study.models, reverse=True)
    write = partial(_of_first_model if front else _of_all_models, study, models)
    return re.sub(r"\{(.+?)\}", lambda place: write(place[1]), sentence)


def _of_first_model(study, models, place):
    """Return what stands for a place in braces: the first model's name, or one of its numbers."""
    if place == "model":
        return family_of(models[0])
    return _value(study, models[0], *_parts(place))


def _of_all_models(study, models, place):
    """Return one number of each model with its name, such as "ViT −1.8, Swin −2.7"."""
    return ", ".join(
        f"{family_of(model)} {_value(study, model, *_parts(place))}" for model in models
    )


def _parts(place):
    """Return method, form, target and quantity of a place in braces."""
    method, form, target, quantity = re.fullmatch(r"(.+) (\w+) ([\d.]+) (.+)", place).groups()
    return method, form, float(target), quantity


def _value(study, model, method, form, target, quantity):
    """Return one number of a cut of one model as it is written; means over the seeds of the cut.

    quantity: "top1", "top1, STAGE", "macs", "bytes_disk", "speedup", "rise" or a stage.
        A speedup is the range over seeds, "speedup, least" and "speedup, most" are its ends.
        A stage gives the change of top-1, in points against dense models of the same seeds.
        MACs and bytes are shares of the dense model's.
        The rise is of the loss in the audit, in nats.
    Raises Absent where the cut was not run.
    """
    quantity, _, stage = quantity.partition(", ")
    if quantity == "rise":
        audit = study.read("table-audit", model)
        audit = audit[
            audit.criterion.eq("fisher") & audit.kind.eq(method) & audit.target.eq(target)
        ]
        return published.signed(_present(audit, "measured", model, method).mean(), 3)
    cuts = study.read("efficiency" if quantity == "speedup" else "summary", model)
    in_macs = ~cuts.target_kind.isin(published.BUDGETS.keys() - {"macs"})
    cuts = cuts[cuts.method.eq(method) & cuts.form.eq(form) & cuts.target.eq(target) & in_macs]
    if quantity in tables.STAGES:
        changes = _present(cuts, quantity, model, method) - cuts.dense
        return published.signed(changes.mean())
    if quantity in ("macs", "bytes_disk"):
        left = _present(cuts, quantity, model, method).mean() / study.dense.loc[model, quantity]
        return published.share(round(left, 2))
    values = _present(cuts, (stage or "cut") if quantity == "top1" else quantity, model, method)
    least, most = values.min(), values.max()
    # Speeds of several seeds are of different machines: their range, not their mean.
    digits = 1
    if quantity == "speedup":  # outward, so that "at least" and "at most" hold
        digits = 2
        least = math.floor(100 * least + 1e-9) / 100
        most = math.ceil(100 * most - 1e-9) / 100
    ends = dict.fromkeys(published.number(end, digits) for end in (least, most))
    if quantity == "speedup" and stage:
        return [*ends][-1 if stage == "most" else 0]
    return " to ".join(ends) + ("\u00a0%" if quantity == "top1" else "")


def _present(cuts, column, model, method):
    """Return the values of a column that are there. Raises Absent where none is."""
    values = cuts[column].dropna() if column in cuts else cuts.target.head(0)
    if values.empty:
        raise published.Absent(f"{model} has no {column} of {method}")
    return values


def family_of(model):
    """Return ViT for vit-transfer."""
    return published.model_name(model).partition("-")[0]


# -- the table


def _lines(study, front):
    """Return the results that a table shows, in its order, with `words` for each line: one a model, seed and line.

    Weights, rows and layers show their largest share cut, budgets all.
    front: whether only FRONT and budgets up to a half are shown.
    """
    results = study.untimed[study.untimed.model.isin(study.models) & study.untimed.top1.notna()]
    is_budget = results.target_kind.isin([*published.BUDGETS])
    highest = results.groupby("target_kind").target.transform("max")
    # The control has no kind of target where it was trained like masked models.
    is_shown = results.target.eq(highest) | results.target_kind.isna()
    is_budget_shown = results.target <= 0.5 if front else results.target < 1
    results = results[np.where(is_budget, is_budget_shown, is_shown)]
    cut = results.method.where(results.method == "dense", results.method + " " + results.form)
    results = results.assign(cut=cut)[cut.isin([*LABELS])]
    if front:
        results = results[(results.cut + " " + results.stage).isin(FRONT)]
    orders = {
        "target_kind": ["sparsity", "ratio", *published.BUDGETS],
        "cut": [*LABELS],
        "stage": [*tables.STAGES],
    }
    for name, order in orders.items():
        results[name] = pd.Categorical(results[name], order)
    order = ["target_kind", "target", "cut", "stage"]
    ascending = [True, False, True, True]
    results = results.sort_values(order, ascending=ascending, na_position="first")
    results = results.assign(words=[_words(result) for result in results.itertuples()])
    return results.drop_duplicates(["model", "seed", "words"])


def _words(result):
    """Return what was done to a model, and its stage."""
    part = ""
    if result.target_kind in published.BUDGETS:
        part = published.part_of(result.target, result.target_kind)
    done = LABELS[result.cut].format(share=published.share(result.target), part=part)
    return f"{done}, {tables.STAGES[result.stage]}".removeprefix(", ")


def _columns(results, front):
    """Return {model: its name in a table}, ViT first: the family where it has one model, else the full name.

    front: whether each family shows one model only. That is the one with the most lines;
        among equals, the one that starts from given weights.
    """
    models = sorted(set(results.model), reverse=True)
    if front:
        models = _one_of_eachfamily(models, results)
    families = [family_of(model) for model in models]
    names = {}
    for model, family in zip(models, families, strict=True):
        is_only = families.count(family) == 1
        names[model] = family if is_only else published.model_name(model)
    return names


def _one_of_eachfamily(models, results):
    """Return one model of each family, in their order."""
    with_weights = results[results.weights.notna()] if "weights" in results else results.head(0)
    given = set(with_weights.model)
    lines = results.groupby("model").words.nunique()
    best = {}
    for model in models:
        rank = (lines[model], model in given)
        family = family_of(model)
        if family not in best or rank > best[family][0]:
            best[family] = (rank, model)
    return [model for _, model in best.values()]


def _spread(top1):
    """Write the mean over seeds, with half of the range where there are several."""
    mean = published.number(top1.mean())
    if len(top1) == 1:
        return mean
    return f"{mean}±{published.number((top1.max() - top1.min()) / 2)}"


def _mean_millions(counts):
    """Write the mean over seeds of a count, in millions."""
    return published.millions(counts.mean())


def _seed_note(lines):
    """Return what ± means, if a line has it, and of which seed the lines without it are."""
    seeds_of_line = lines.groupby(["model", "words"]).seed.agg(
        lambda seeds: tuple(sorted(set(seeds)))
    )
    counts = set(seeds_of_line.map(len))
    if max(counts) == 1:
        return []
    note = "±: half the range over seeds"
    several = sorted(counts - {1})
    if len(several) > 1:
        note += f", in some lines of {' or '.join(map(str, several[:-1]))}"
    alone = sorted({seeds[0] for seeds in seeds_of_line if len(seeds) == 1})
    if alone:
        note += f"; without ±: seed {' or '.join(map(str, alone))}"
    return [f"{note}."]


# -- pages


def _table(studies, lines, names, costs):
    """Return the table: a line for each cut; top-1 of each model of all studies, then costs of the first study's."""
    columns = {}
    for study in studies:
        prefix = f"{_data(study)} " if len(studies) > 1 else ""
        columns |= _column_of_each_model(
            lines[study], names[study], "top1", _spread, prefix, "top-1 (%)"
        )
    first = studies[0]
    for measure, header in costs.items():
        columns |= _column_of_each_model(
            lines[first], names[first], measure, _mean_millions, "", header
        )
    order = pd.concat(lines.values()).words.unique()
    return pd.DataFrame(columns).reindex(order).fillna("")


def _column_of_each_model(lines, names, measure, write, prefix, header):
    """Return {header: cells by words} of one measure of every model."""
    columns = {}
    for model, name in names.items():
        cells = lines[lines.model == model].groupby("words")[measure].agg(write)
        columns[f"{prefix}{name} {header}"] = cells
    return columns


def _data(study):
    """Return the name of a study's images, without what stands in brackets behind it."""
    return published.listed(study.results, "data").split(" (")[0]


def _origin(study, lines, names, link):
    """Return the sentences on where the lines of a study come from, and on the weights that they start from."""
    dense = lines[lines.stage == "dense"]
    source = study.source(["results.csv"], lines)
    source = source.replace("results.csv", f"[results.csv]({link}/results.csv)")
    sentences = [
        f"{source} {dense.total.max():,.0f} test images; "
        f"torch {published.listed(lines, 'torch')}, timm {published.listed(lines, 'timm')}."
    ]
    apart = tables.timed_apart(study.results[study.results.model.isin([*names])])
    if len(apart):
        methods = ", ".join(map(tables.method_words, dict.fromkeys(apart.method)))
        sentences.append(
            "Times in efficiency.md are of earlier cuts to the same targets, with other parameters than "
            f"those of this table, for: {methods}."
        )
    given = dense[dense.weights.notna()] if "weights" in dense else dense.head(0)
    if len(given):
        starters = [names[model] for model in dict.fromkeys(given.model)]
        who = _data(study) if len(starters) == len(names) else " and ".join(starters)
        sentences.append(f"{who} starts from the weights in {Path(given.weights.iloc[0]).parent}.")
    return sentences


def results(folders, *, page, front=False):
    """Return the results of studies in Markdown: claims of the first, a table, where it comes from.

    folders: of published tables, one a study.
    page: the folder from which links go.
    front: whether to show the few lines of the front page only, without where they come from.
    Raises FileNotFoundError for a folder without results.csv.
    """
    studies = [published.Published(folder) for folder in folders]
    first = studies[0]
    names, lines, links = {}, {}, {}
    for study in studies:
        every = _lines(study, front)
        names[study] = _columns(every, front)
        lines[study] = every[every.model.isin(names[study])]
        links[study] = Path(os.path.relpath(study.folder, page)).as_posix()
    sentences = []
    for study in [] if front else studies:
        sentences += _origin(study, lines[study], names[study], links[study])
    if len(studies) > 1:
        sentences.append(f"MACs are those of the {_data(first)} models.")
    sentences.append("Changes are taken before rounding.")
    sentences += _seed_note(pd.concat(lines.values()))
    costs = {"macs": "MACs (M)"} if front else {"macs": "MACs (M)", "nonzero": "non-zero (M)"}
    text = _markdown(_table(studies, lines, names, costs)) + "\n\n" + "\n".join(sentences)
    if found := claims(first, front):
        text = f"Found on {_data(first)}:\n\n" + "\n".join(found) + f"\n\n{text}"
    return text


def headline(study, *, page):
    """Return what half of the MACs cost the models of a study, and the picture of the front page.

    study: a Published. page: the folder from which links go.
    """
    changes = {
        family_of(model): _value(study, model, "pool", "factored", 0.5, "reconstructed")
        for model in sorted(study.models, reverse=True)
    }
    by_family = " and ".join(f"{change} ({family})" for family, change in changes.items())
    sizes = study.dense.params[sorted(study.models, reverse=True)] / 1e6
    said = (
        f"Cut a small ViT or Swin ({' and '.join(f'{size:.1f}' for size in sizes)} M parameters) to half "
        "of its multiply-accumulates (MACs), without training: "
        f"top-1, the share of {_data(study)}'s test images it gets right, changes by {by_family} points."
    )
    parts = [said, _front_picture(page), backbone_sentence(page)]
    return "\n\n".join(part for part in parts if part)


def backbone_sentence(page):
    """Return what half of its MACs cost a real pretrained ViT; "" where there is no benchmark.

    page: the folder from which links go.
    """
    bench = files.repository() / "figures" / "bench"
    if not (bench / "foundation.csv").is_file():
        return ""
    _, top1 = backbone_cuts(bench / "foundation.csv")
    ours, dense = top1[0.5]["vitlab, pool"], top1[1.0]["dense"]
    peers = peers_of(top1[0.5])
    # Those of one tool are named once.
    _, *others = dict.fromkeys(name.partition(",")[0] for name in peers.index)
    link = Path(os.path.relpath(bench, page)).as_posix()
    return (
        "DINOv2's pretrained ViT-S/14, cut to half of its MACs without labels or training: a linear "
        f"classifier then fitted to its features, with labels, has {published.number(ours)} % of "
        f"Caltech-101's test images right, {published.number(dense)} % before the cut. Its best peer, "
        f"{peers.index[0]}, leaves {published.number(peers.iloc[0])} %; "
        f"{', '.join(others[:-1])} and {others[-1]} leave less "
        f"([table]({link}/foundation.md), [picture]({link}/foundation.png))."
    )


def backbone_cuts(file):
    """Return rows of foundation.csv, nothing trained, and the top-1 of a probe fitted anew, method by budget."""
    rows = pd.read_csv(file)
    rows = rows[(rows.data == BACKBONE_DATA) & (rows.stage == "cut") & (rows.outcome == "runs")]
    return rows, rows.groupby(["method", "budget"]).probe_anew.median().unstack()


def peers_of(top1):
    """Return the top-1 of others' methods, the best first, without controls."""
    own = ("dense", "vitlab")
    peers = [name for name in top1.index if not (name.startswith(own) or tables.is_control(name))]
    return top1[peers].dropna().sort_values(ascending=False)


def _markdown(table):
    """Write a table in Markdown, numbers at the right."""
    header = ["", *table]
    rule = ["---", *["---:"] * len(table.columns)]
    lines = [header, rule, *table.reset_index().itertuples(index=False)]
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def _front_picture(page):
    """Return the picture of the front page, with its sentence; "" where there is no benchmark."""
    bench = files.repository() / "figures" / "bench" / "accuracy.csv"
    if not bench.is_file():
        return ""
    link = Path(os.path.relpath(bench.parents[1] / "hero.png", page)).as_posix()
    words = peer_sentence(_hero_lines(bench))
    return (
        f'<img src="{link}" alt="{words}" width="480">'  # the first command is on the first screen
    )


def peer_sentence(lines):
    """Say what is lost at the smallest share, beside Torch-Pruning.

    lines: means over seeds of what tables.peers returns.
    """
    least = lines[lines.share == lines.share.min()]
    lost = least.pivot_table(index="model", columns="name", values="lost", sort=False)[[*PEERS]]
    part = published.part_of(lines.share.min(), "macs")
    if len(lost) == 1:
        ours, tuned, cut = map(published.number, lost.iloc[0])
        return (
            f"With {part} one {lost.index[0]} loses {ours} points of top-1, nothing trained; "
            f"Torch-Pruning’s best loses {tuned} after fine-tuning and {cut} without"
        )
    ours, tuned = (
        ", ".join(
            f"{family_of(model.split()[-1])} {published.signed(-value)}"
            for model, value in lost[name].items()
        )
        for name in PEERS[:2]
    )
    return (
        f"Beside Torch-Pruning, {part}, of one model each: {ours} points of top-1, nothing trained; "
        f"its best, fine-tuned: {tuned}"
    )


PEERS = ("vitlab, nothing trained", "Torch-Pruning, fine-tuned", "Torch-Pruning, as cut")
HERO = "small ViT"  # the model of the front page's picture


def _hero_lines(bench):
    """Return the means over seeds of the front page's picture."""
    lines = tables.peers(pd.read_csv(bench))
    lines = lines[lines.model == HERO]
    return published.mean_over_seeds(lines, ["model", "name", "tool", "share"])


def hero(folder):
    """Draw the front page's picture, hero.png and hero.svg, from bench/accuracy.csv of a folder."""
    bench = folder / "bench" / "accuracy.csv"
    lines = tables.peers(pd.read_csv(bench))
    seeds = ", ".join(map(str, sorted(lines.seed.unique())))
    caption = (
        f"CIFAR-10 (JPEG), {HERO}; means and ranges over seeds {seeds}, which draw calibration images and the order of "
        "fine-tuning, of one dense model. Torch-Pruning by the setting that is best on test at each share. "
        "Numbers: bench/accuracy.md."
    )
    drawn = plots.peers(lines, models=[HERO])
    plots.save(drawn, folder / "hero", caption=caption, title=peer_sentence(_hero_lines(bench)))


def pool(folder):
    """Draw how the pool works, pool.png and pool.svg of a folder, and return the path of the first."""
    plots.save(drawings.pool(), folder / "pool")
    return folder / "pool.png"


def pool_picture():
    """Return the path of the drawing of the pool, which is drawn where there is none."""
    folder = files.repository() / "figures"
    picture = folder / "pool.png"
    return picture if picture.is_file() else pool(folder)


def fill(text, *, page):
    """Return the text of a page with the results between its marks written anew.

    text: of the page. page: the folder that it lies in, from which links go.
    Raises FileNotFoundError for a study without published results.
    """
    figures = files.repository() / "figures"

    def block(mark):
        begin, what, study, end = mark.groups()
        folders = [figures / name for name in ([study] if study else STUDIES)]
        if what == "claim":
            words = headline(published.Published(folders[0]), page=page)
        else:
            words = results(folders, page=page, front=not study)
        return f"{begin}{words}\n{end}"

    return MARKS.sub(block, text)


def main(arguments=None):
    """Write results into the pages that the command line names; return its exit status."""
    parser = argparse.ArgumentParser(
        "python slides/pages.py", description="Write results of studies into pages."
    )
    parser.add_argument(
        "pages", nargs="+", type=Path, help="pages in Markdown with marks, such as README.md"
    )
    names = parser.parse_args(arguments).pages
    if any(page.resolve() == files.repository() / "README.md" for page in names):
        hero(files.repository() / "figures")
        pool(files.repository() / "figures")
    for page in names:
        try:
            text = fill(page.read_text(), page=page.resolve().parent)
        except FileNotFoundError as error:
            print(f"pages: {error}", file=sys.stderr)
            return 1
        files.write_atomic(page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
