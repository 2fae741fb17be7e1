"""The slides of a study: for each a title, pictures of all models, a table for the notes, and a source. No torch.

A title is a short sentence. Its numbers are those of the table.
"""

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pages
import pandas as pd
import published
from PIL import Image
from published import SOLVED, TRAINED, Absent, model_name, number, share, signed

from vitlab import files
from vitlab.report import drawings, plots, tables

LINES = 11  # of a table on one slide
HALF = (6.25, 5.0)  # inches of each of two pictures on a slide
WHOLE = (12.63, 5.2)  # inches of one picture
PIXELS = 200  # of a picture to an inch, as plots.save writes it
WEIGHTS = {"unstructured": "weights", "structured": "rows"}
two_digits = partial(number, digits=2)

# Columns of slides' tables: their header, and how a value is written.
COLUMNS = {
    "after": ("after the cut (%)", number),
    "block": ("block", str),
    "change": ("change (points)", signed),
    "criterion": ("score", str),
    "cut": ("right after the cut (%)", number),
    "epochs": ("epochs", "{:.0f}".format),
    "increase": ("loss (nats)", partial(signed, digits=3)),
    "kept": ("kept", share),
    "layer": ("layer", str),
    "least": ("least (times as fast)", number),
    "lost": ("change (points)", lambda lost: signed(-lost)),
    "macs": ("MACs (M)", published.millions),
    "mean_per_class": ("mean of classes (%)", number),
    "model": ("model", model_name),
    "most": ("most (times as fast)", number),
    "name": ("cut", str),
    "params": ("parameters (M)", published.millions),
    "promised": ("promised by the MACs", number),
    "ratio": ("share cut", share),
    "seeds": ("seeds", "{:.0f}".format),
    "share": ("share of MACs", share),
    "stage": ("stage", lambda stage: tables.STAGES.get(stage, stage)),
    "target": ("share cut or kept", share),
    "tool": ("tool", str),
    "top1": ("top-1 (%)", number),
    "trained": ("fine-tuned (%)", number),
    "trained_change": ("fine-tuned (points)", signed),
    "untrained": ("nothing trained (%)", number),
    "untrained_change": ("nothing trained (points)", signed),
    "val_top1": ("val top-1 (%)", number),
    "way": ("runtime", str),
}


@dataclass(frozen=True)
class Slide:
    """Hold one slide: a picture or two, else points of text, else a table.

    title: one sentence. pictures: {words above it: path of a .png, perhaps with an .svg beside it}.
    points: sentences. table: a frame of strings, in the notes where something else is shown.
    shows: what is on the pictures. note: what else to say. source: files, study, seeds, machines, commits.
    """

    title: str
    pictures: dict[str, Path] | None = None
    points: tuple[str, ...] = ()
    table: pd.DataFrame | None = None
    shows: str = ""
    note: str = ""
    source: str = ""


# -- tables


def columns_of(results, names):
    """Return a slide's table of some columns, as strings; columns without any value are left out.

    results: a frame. names: columns, with spaces between. `seeds` is left out where all lines have as many.
    """
    cells = {}
    for name in names.split():
        if name not in results or results[name].isna().all():
            continue
        if name == "seeds" and results.seeds.nunique() == 1:
            continue
        header, write = COLUMNS[name]
        cells[header] = ["" if pd.isna(value) else write(value) for value in results[name]]
    return pd.DataFrame(cells)


def comparable(results):
    """Return the results of the most seeds: means over fewer are not ranked with them; no controls.

    Where all are controls, they stay.
    """
    results = results[results.seeds == results.seeds.max()]
    chosen = results[~results.name.map(tables.is_control)]
    return results if chosen.empty else chosen


def summary(study, kinds):
    """Return lines of summary.csv of some kinds of target, with names, the best untrained and trained stage, changes.

    Columns besides: name, untrained, trained (best of the stages, %), untrained_change and trained_change
    (points against dense), share (MACs of dense), seeds.
    Raises Absent where there are none.
    """
    lines = study.read("summary")
    lines = lines.reindex(columns=lines.columns.union([*tables.STAGES, "macs"], sort=False))
    lines = lines[lines.target_kind.isin(kinds) & lines.model.isin(study.models)]
    if lines.empty:
        raise Absent(f"summary.csv has no target of {' or '.join(kinds)}")
    if "seeds" not in lines:
        lines = lines.assign(seeds=1)
    untrained = lines[["cut", *SOLVED]].max(axis=1)
    trained = lines[TRAINED].max(axis=1)
    return lines.assign(
        name=tables.series(lines),
        untrained=untrained,
        trained=trained,
        untrained_change=untrained - lines.dense,
        trained_change=trained - lines.dense,
        share=lines.macs / lines.model.map(study.dense.macs),
    )


def best_budgets(study):
    """Return the cut that loses least without training, of each model and share of a budget.

    All slides that speak of budgets speak of these, so that none answers a question in its own way.
    Returns a frame as `summary`'s, of targets of a half and below; and the kind of the budget.
    """
    lines = summary(study, [*published.BUDGETS])
    kind = lines.target_kind.iloc[0]
    lines = lines[(lines.target_kind == kind) & (lines.target <= 0.5)].dropna(subset="untrained")
    best = [
        comparable(own).sort_values("untrained", kind="stable").tail(1)
        for _, own in lines.groupby(["model", "target"], sort=False)
    ]
    if not best:
        raise Absent("summary.csv has no budget of a half or less")
    return pd.concat(best).sort_values(["target", "model"], ascending=False), kind


def _each(lines, write):
    """Return what `write` says of each line, with its model before it, as one text with commas."""
    lines = lines.sort_values("model", ascending=False, kind="stable")  # the ViT first
    return ", ".join(f"{pages.family_of(line.model)} {write(line)}" for line in lines.itertuples())


def _budget_words(lines, kind):
    """Return words such as "Half the MACs: ViT 0.0, Swin −0.3 points of top-1 (one pool)"."""
    parts = []
    for target, own in lines.groupby("target", sort=False):
        methods = own.name.unique()
        if len(methods) == 1:
            words = _each(own, lambda line: signed(line.untrained_change))
            words += f" points of top-1 ({methods[0]})"
        else:
            words = _each(own, lambda line: f"{signed(line.untrained_change)} ({line.name})")
            words = words.replace(" (", " points of top-1 (", 1)
        parts.append(f"{published.part_of(target, kind)}: {words}")
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


def _untrained_words(lines, kind):
    """Return `_budget_words`, and that nothing is trained."""
    return _budget_words(lines, kind).replace(": ", ", nothing trained: ", 1)


# -- one function a slide


def claim(study):
    """Say what the study found, in one sentence."""
    models = " and ".join(pages.family_of(model) for model in reversed(study.models))
    dense = study.dense.loc[study.models].reset_index()
    dense = _each(dense, lambda line: f"{number(line.top1)} %")
    points = [
        f"{published.listed(study.results, 'data')}: {models}, trained and cut in many ways.",
        f"Dense top-1: {dense}.",
        f"Seeds {tables.seeds_of(study.results)}.",
    ]
    try:
        best, kind = best_budgets(study)
    except Absent:
        return Slide(f"What pruning does to {models}", points=tuple(points))
    best = best[best.target == best.target.max()]
    return Slide(
        _untrained_words(best, kind).replace("Half the", "Half of the"),
        points=tuple(points),
        table=columns_of(best, "model name target untrained untrained_change seeds"),
    )


def what_is_cut(study):
    """Show what each cut does to a matrix."""
    model = study.models[-1]
    return Slide(
        "What is cut: single weights, rows, heads, neurons, ranks",
        {"": study.picture(f"cuts-{model}")},
        shows=f"What is left of one layer of the {model_name(model)}, weight by weight.",
        note="Zeros stay in the matrix and cost time; what is removed makes it smaller. "
        "IHT (iterative hard thresholding) chooses the weights that are added to few singular directions.",
    )


def sensitivity(study):
    """Show which layers the loss depends on."""
    lines = published.mean_over_seeds(study.read("table-curves"), ["model", "ratio", "layer"])
    lines = lines[(lines.ratio == lines.ratio.max()) & lines.model.isin(study.models)]
    lines = lines.sort_values("increase", ascending=False)
    worst = lines.drop_duplicates("model")
    words = _each(worst, lambda line: f"{line.layer} ({signed(line.increase, 3)} nats)")
    table = lines.groupby("model", sort=False).head(LINES // 2)
    return Slide(
        f"Where it hurts most: {words}",
        study.pictures("sensitivity"),
        table=columns_of(table, "model layer ratio increase"),
        shows=f"Rise of the loss when one layer alone loses {share(worst.ratio.max())} of its weights.",
    )


def criteria(study):
    """Show what each score keeps, before any training."""
    keys = ["model", "criterion", "method", "target"]
    lines = published.mean_over_seeds(study.read("table-criteria"), keys)
    lines = lines[(lines.method == "unstructured") & lines.model.isin(study.models)]
    if lines.empty:
        raise Absent("table-criteria.csv has no cuts of single weights")
    lines = lines[lines.target == lines.target.max()]
    ranked = lines.sort_values("val_top1", ascending=False)
    best = ranked.drop_duplicates("model")
    controls = lines[lines.criterion == "magnitude"]
    title = (
        f"{share(lines.target.max())} of the weights zeroed by sensitivity: "
        f"{_each(best, lambda line: number(line.val_top1))} % top-1"
    )
    if len(controls):
        title += f"; by magnitude {_each(controls, lambda line: number(line.val_top1))}"
    return Slide(
        title,
        study.pictures("criteria"),
        table=columns_of(ranked, "model criterion target val_top1"),
        shows="Top-1 on val right after the cut, by score: weights and rows.",
        note="Scores: Fisher and Taylor see gradients, magnitude the weights alone, random nothing.",
    )


def weights_and_rows(study):
    """Show what cuts of weights and rows cost, after fine-tuning."""
    lines = summary(study, ["sparsity"])
    lines = lines[lines.method.isin(WEIGHTS) & lines.finetuned.notna() & (lines.form == "masked")]
    if lines.empty:
        raise Absent("summary.csv has no fine-tuned cuts of weights and rows")
    lines = lines.assign(name=lines.method.map(WEIGHTS))
    most = lines[lines.target == lines.target.max()].sort_values("model", ascending=False)
    words = [
        f"of the {name} {_each(own, lambda line: signed(line.trained_change))} points"
        for name, own in most.groupby("name", sort=False)
    ]
    return Slide(
        f"Global pruning: {share(most.target.max())} cut by sensitivity, fine-tuned: {'; '.join(words)}",
        study.pictures("recovery"),
        table=columns_of(lines, "model name target cut trained trained_change seeds"),
        shows="Points of test top-1 lost, after the cut and after fine-tuning.",
        note="Masked models execute all MACs. Hollow marks between: least squares, without training.",
    )


def heads_svd_iht(study):
    """Show what heads, SVD and iterative hard thresholding cost."""
    lines = summary(study, ["ratio"])
    lines = lines[lines.trained.notna() & (lines.target == lines.target.max())]
    lines = lines.sort_values(["model", "seeds", "trained"], ascending=False, kind="stable")
    if lines.empty:
        raise Absent("summary.csv has no fine-tuned cuts of heads")
    best = pd.concat([comparable(own).head(1) for _, own in lines.groupby("model", sort=False)])
    words = _each(best, lambda line: f"{signed(line.trained_change)} points ({line.name})")
    table = lines.groupby("model", sort=False).head(LINES // 2)
    return Slide(
        f"Heads and layers: {share(best.target.max())} cut, fine-tuned: {words}",
        study.pictures("heads_svd_iht"),
        table=columns_of(table, "model name target cut trained trained_change share seeds"),
        shows="Points of test top-1 lost over the share cut of heads and of each layer, fine-tuned.",
        note="Share: MACs of the dense model. Random heads and directions are the control.",
    )


def budgets(study):
    """Show what half and a quarter of the cost leave, step by step."""
    best, kind = best_budgets(study)
    return Slide(
        _untrained_words(best, kind),
        study.pictures(f"ladder-{kind}"),
        table=columns_of(best, "model name target untrained untrained_change trained seeds"),
        shows="Points of test top-1 lost after each step of recovery; hollow: nothing trained.",
        note="The best of all methods by test top-1, which favours the lucky one a little.",
    )


def kept(study):
    """Show where the best budget was cut."""
    lines = study.read("table-kept")
    kinds = [kind for _, kind, target in study.budgets() if target == 0.5]
    if not kinds:
        raise Absent("no budget of a half")
    lines = lines[(lines.target == 0.5) & lines.model.isin(study.models)]
    first = lines.groupby("model")[["method", "seed"]].transform("first")
    lines = lines[(lines.method == first.method) & (lines.seed == first.seed)]  # as drawn
    lines = lines[lines.kept.notna()]
    lines = pd.concat([drawings.cut_kinds(own) for _, own in lines.groupby("model", sort=False)])
    lines = lines[lines["where"].str.contains("blocks")]
    means = lines.assign(kept=lines.kept / lines.whole)
    means = means.groupby(["model", "where"], sort=False).kept.mean().reset_index(name="kept")
    means = means.rename(columns={"where": "block"})
    most = means.sort_values("kept", kind="stable").drop_duplicates("model", keep="last")
    method = ", ".join(map(tables.method_words, lines.method.unique()))
    words = _each(most, lambda line: f"{line.block} ({share(line.kept)})")
    return Slide(
        f"At half the {published.COSTS[kinds[0]]}, {method} keeps most of: {words}",
        study.pictures(f"kept-{kinds[0]}-0.5"),
        table=columns_of(means.head(2 * LINES), "model block kept"),
        shows="Heads, neurons and ranks that stay, in percent of the dense model's; "
        f"seed {published.listed(lines, 'seed')}.",
        note="Kept: mean over what is drawn of a block: heads, neurons and ranks.",
    )


def trade_off(study):
    """Show all methods over the share of the cost."""
    best, kind = best_budgets(study)
    lines = summary(study, [kind])
    lines = lines[lines.target == best.target.min()].dropna(subset="untrained")
    lines = lines.sort_values(["model", "untrained"], ascending=False, kind="stable")
    deepest = best[best.target == best.target.min()]
    uniform = lines[lines.method == "svd"].sort_values("model", ascending=False)
    title = _budget_words(deepest, kind)
    if len(uniform):
        words = _each(uniform, lambda line: signed(line.untrained_change))
        title += f"; {uniform.name.iloc[0]}: {words}"
    return Slide(
        title,
        study.pictures("tradeoff"),
        table=columns_of(lines, "model name target untrained untrained_change trained seeds"),
        shows="Points of test top-1 lost over the share of MACs left; nothing trained where not said.",
    )


def peers(study):
    """Show what Torch-Pruning loses at the same share of the MACs."""
    file = study.folder.parent / "bench" / "accuracy.csv"
    if not (file.is_file() and published.listed(study.results, "data").startswith("CIFAR-10")):
        raise Absent("bench/accuracy.csv is of CIFAR-10, or missing")
    lines = tables.peers(pd.read_csv(file))
    seeds = ", ".join(map(str, sorted(lines.seed.unique())))
    lines = published.mean_over_seeds(lines, ["model", "name", "tool", "share"])
    return Slide(
        pages.peer_sentence(lines),
        {"": file.with_suffix(".png")},
        table=columns_of(
            lines.sort_values(["model", "share"], ascending=False),
            "model name tool share top1 lost",
        ),
        shows="Points of test top-1 lost over the share of MACs left. A benchmark of its own: of the dense models of "
        "seed 0, with other calibration images than the study.",
        note="Of Torch-Pruning the setting that is best on test at each share. It has nothing that solves "
        "layers anew without labels.",
        source=f"Source: bench/accuracy.csv, accuracy.png. Small models on CIFAR-10 (JPEG), seeds {seeds}.",
    )


def faster(study):
    """Show how much of what the MACs promise arrives, by runtime."""
    times = tables.like_for_like(study.read("table-runtimes"))
    times = times[(times.batch == times.batch.max()) & times.model.isin(study.models)]
    times = times[times.cut_speedup.notna() & (times.promised > 1.01)]
    keys = ["model", "checkpoint", "runtime", "precision"]
    groups = times.groupby(keys, sort=False)
    # Times compare within one run, so that several runs are a range.
    lines = groups.cut_speedup.agg(least="min", most="max").join(groups.promised.mean())
    lines = lines.reset_index()
    lines = lines.assign(
        name=lines.checkpoint.map(tables.checkpoint_words),
        way=lines.runtime + " " + lines.precision,
    )
    if lines.empty:
        raise Absent("table-runtimes.csv has no cut")
    smallest = lines[lines.promised > 0.99 * lines.groupby("model").promised.transform("max")]
    ends = smallest.groupby("model").agg(least=("least", "min"), most=("most", "max"))
    ends = ends.join(smallest.groupby("model").promised.max()).reset_index()
    words = _each(
        ends.sort_values("model", ascending=False),
        lambda line: (
            f"{number(line.least)} to {number(line.most)} times as fast "
            f"(promised: {number(line.promised)})"
        ),
    )
    part = published.part_of(round(1 / smallest.promised.max(), 2), "macs")
    return Slide(
        f"Really faster? With {part}, in the same runtime: {words}",
        study.pictures("speedup"),
        table=columns_of(lines, "model name way promised least most"),
        shows="Times as fast as dense in the same runtime; a mark is one run on one processor.",
        note=f"{_zeros(study)}{how_timed(study)}",
    )


def _zeros(study):
    """Return a sentence on what masked weights do not save; "" where they were not timed."""
    try:
        lines = study.read("efficiency")
    except Absent:
        return ""
    lines = lines[(lines.form == "masked") & (lines.target_kind == "sparsity")]
    lines = lines[lines.speedup.notna() & lines.method.isin(WEIGHTS)]
    if lines.empty:
        return ""
    least, most = number(lines.speedup.min()), number(lines.speedup.max())
    return f"Zeros in dense tensors: {least} to {most} times as fast as dense. "


def how_timed(study):
    """Say what the times are of."""
    results = study.results[study.results.latency_ms.notna()]
    results = results[results.batch == results.batch.max()]
    threads = " or ".join(published.distinct(results, "threads"))
    return (
        f"Batches of {results.batch.max():g} images, threads: {threads}; "
        "medians of ratios within rounds that time all models in turns."
    )


def conclusion(study):
    """Say what to take home, in the sentences of the talk, and how the numbers came about."""
    points = []
    for make in (budgets, peers, weights_and_rows, heads_svd_iht, faster):
        with contextlib.suppress(Absent):
            points.append(f"{make(study).title}.")
    zeros = _zeros(study).strip()
    points += [zeros] if zeros else []
    if not points:
        raise Absent("no slide has a finding")
    return Slide("What to take home", points=tuple(points), note=" ".join(method(study)))


def method(study):
    """Return sentences on how the numbers came about."""
    splits = study.read("table-data").drop_duplicates("split").set_index("split").images
    top1 = study.dense.top1.max() / 100
    error = two_digits(100 * (top1 * (1 - top1) / splits["test"]) ** 0.5)
    images = [f"{splits.get(split, 0):,}" for split in ("train", "val", "test")]
    versions = [f"{name} {published.listed(study.results, name)}" for name in ("torch", "timm")]
    return [
        f"Images (train, val, test): {', '.join(images)}.",
        f"A top-1 of {number(100 * top1)} % has a standard error of {error} points.",
        "Scores from training images, the best epoch by val; top-1 is on test.",
        "MACs of one image in closed form; masked models execute all.",
        f"{', '.join(versions)}.",
    ]


# -- all slides

# The talk in its order: the function, and the file that it reads.
TALK = [
    (claim, "results.csv"),
    (what_is_cut, "results.csv"),
    (sensitivity, "table-curves.csv"),
    (criteria, "table-criteria.csv"),
    (weights_and_rows, "summary.csv"),
    (heads_svd_iht, "summary.csv"),
    (budgets, "summary.csv"),
    (kept, "table-kept.csv"),
    (trade_off, "summary.csv"),
    (peers, "results.csv"),
    (faster, "table-runtimes.csv"),
    (conclusion, "summary.csv"),
]


def slides(folder, *, long=False):
    """Return the slides of a folder of tables and pictures.

    A slide for which something is missing is left out, and a line printed that says what.
    long: whether an appendix follows, with the tables of the talk and all other pictures.
    Raises FileNotFoundError where results.csv is missing.
    """
    study = published.Published(folder)
    made = []
    for make, file in TALK:
        try:
            slide = make(study)
            source = slide.source or source_of(study, slide, file)
        except Absent as reason:
            files.log(f"no slide {make.__name__}: {reason}")
            continue
        made.append(replace(slide, source=source))
    return [*made, *appendix(study, made)] if long else made


def appendix(study, talk):
    """Return slides with the tables of the talk, and with all other pictures of the folder."""
    made = []
    dense = published.mean_over_seeds(study.read("dense"), ["model", "stage", "epochs"])
    names = "model stage epochs top1 mean_per_class params macs seeds"
    shown = Slide("Dense models, and the same after more epochs", table=columns_of(dense, names))
    shown = replace(shown, source=source_of(study, shown, "dense.csv"))
    for slide in [shown, *talk]:
        if slide.table is None:
            continue
        for start in range(0, len(slide.table), LINES):
            part = slide.table.iloc[start : start + LINES].reset_index(drop=True)
            title = (
                slide.title if slide is shown else f"In numbers: {slide.title.partition(':')[0]}"
            )
            made.append(Slide(title, table=part, note=slide.note, source=slide.source))
    seen = {path for slide in talk for path in (slide.pictures or {}).values()}
    return [*made, *_other_pictures(study, seen)]


def _other_pictures(study, seen):
    """Return a slide for each kind of picture that the talk does not show; two models side by side where they fit."""
    kinds = {}
    for path in sorted(study.folder.glob("*.png"), reverse=True):
        for model in study.models:
            if path not in seen and path.stem.endswith(f"-{model}"):
                kinds.setdefault(path.stem.removesuffix(f"-{model}"), {})[model_name(model)] = path
    made = []
    for kind, pictures in sorted(kinds.items()):
        fits = all(
            wide <= HALF[0] and high <= HALF[1] for wide, high in map(inches, pictures.values())
        )
        groups = [pictures] if fits else [{name: path} for name, path in pictures.items()]
        words = max((name for name in plots.TITLES if kind.startswith(name)), key=len, default=kind)
        title = plots.TITLES.get(words, kind)
        if rest := kind.removeprefix(words).strip("-").split("-"):
            title += _of_target(*rest)
        for group in groups:
            name = f" ({next(iter(group))})" if len(group) == 1 else ""
            slide = Slide(title + name, group)
            made.append(replace(slide, source=source_of(study, slide, "results.csv")))
    return made


def _of_target(kind, target=None):
    """Return words such as ": half the MACs" for what stands in the name of a picture's file; else ""."""
    if kind not in published.BUDGETS or target is None:
        return ""
    return f": {published.part_of(float(target), kind)}"


def inches(picture):
    """Return width and height of a picture file."""
    with Image.open(picture) as image:
        return image.width / PIXELS, image.height / PIXELS


def source_of(study, slide, file):
    """Return the line that says where a slide comes from."""
    results = study.results[study.results.model.isin(study.models)]
    table = study.read(file.removesuffix(".csv"))
    names = [file, *(path.name for path in (slide.pictures or {}).values())]
    return study.source(names, results, tables=[table])
