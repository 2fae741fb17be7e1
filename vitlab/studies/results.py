"""Gather the results of all runs as one table, and compare them with published ones.

Public: KEY, WORDS, compare, gather, main, read_study.
"""

import argparse
import json
import sys

import pandas as pd

from vitlab import files
from vitlab.studies import settings
from vitlab.studies.runs import IDENTITY, LOG, ROW, study_label, with_first_columns

# -- results: the rows of all runs

# What tells one row of a seed from another.
KEY = ["model", "notebook", "method", "criterion", "form", "schedule", "target_kind", "target"]
KEY += ["stage"]
WORDS = {"labels": str}  # columns that read_csv would misread: `true` is a word there
_PLACE = ["model", "seed", "notebook"]  # what tells by which notebook of which run a row was saved


def read_study(name, *, override=None):
    """Return all that the runs of a study have saved, over models and seeds.

    name, override: as in `study`.
    Returns Values with the frames `results` and `history`; `tables`, frames by name; and `kept`,
    a list of what was not saved here and comes from the study's folder of figures, as in a fresh
    clone.
    Raises FileNotFoundError if there are no results yet.
    """
    values = settings.study(name, override=override)
    label = study_label(values.name, override)
    runs = files.root() / "runs" / label
    figures = files.repository() / "figures" / label  # an overridden study is never published
    tables = {path.stem for path in [*_saved(runs, "table-*"), *figures.glob("table-*.csv")]}
    stems = ["results-*", "history-*", *sorted(tables)]
    saved = {stem: _from_runs(runs, stem) for stem in stems}
    published = {stem: _from_figures(figures, stem, values) for stem in stems}
    changed = _changed_models(saved["results-*"], published["results-*"])
    frames, names = {}, []
    for stem in stems:
        frame, names_of_published = _merged(stem, saved[stem], published[stem], changed)
        frames[stem.removeprefix("table-")] = frame
        names += names_of_published
    results = frames.pop("results-*")
    history = frames.pop("history-*")
    if results.empty:
        raise FileNotFoundError(f"no results in {runs}; run the study: make study STUDY={name}")
    return settings.Values(
        results=_without_stale_timings(results),
        history=history,
        tables=settings.Values((name, frame) for name, frame in frames.items() if len(frame)),
        kept=list(dict.fromkeys(names)),
    )


def _saved(runs, stem):
    """Return the CSV files of this stem in a study's folder of runs, sorted by path."""
    return sorted([*runs.glob(f"{stem}.csv"), *runs.glob(f"*/seed*/{stem}.csv")])


def _from_runs(runs, stem):
    """Return the rows that the runs of this data root saved: all of them count."""
    frames = []
    for path in _saved(runs, stem):
        frame = pd.read_csv(path, dtype=WORDS)
        if stem.endswith("-*"):
            frame.insert(len(IDENTITY), "notebook", path.stem.partition("-")[2])
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _from_figures(figures, stem, values):
    """Return the published rows that count: those of today's models, seeds and notebooks."""
    file = figures / f"{stem.removesuffix('-*')}.csv"
    if not file.is_file():
        return pd.DataFrame()
    rows = pd.read_csv(file, dtype=WORDS)
    counts = rows.model.isin(values.models) & rows.seed.isin(values.seeds)
    counts |= rows.model.isna()  # tables of the study as a whole
    if stem.endswith("-*"):
        counts &= rows.reindex(columns=["notebook"]).notebook.isin(settings.USES)
    return rows[counts]


def _merged(stem, saved, published, changed):
    """Return all saved rows with the published rows for which nothing was saved, and their names.

    A published row wins only where its model, seed and notebook saved nothing here. It is left out
    where the dense model of its run is another one here. Timings are compared by method, too, as
    6_efficiency times what several notebooks left.
    """
    taken = set(_keys(saved))
    missing = [key not in taken and key[:2] not in changed for key in _keys(published)]
    published = published[missing]
    names = []
    for model, seed, notebook, _ in _keys(published):
        names.append(f"{model} seed {seed} {notebook or stem}")
    parts = [rows for rows in (saved, published) if len(rows)]
    rows = pd.concat(parts or [saved], ignore_index=True)
    order = [column for column in _PLACE if column in rows]
    if order:
        rows = rows.sort_values(order, kind="stable", ignore_index=True)
    return rows, names


def _keys(rows):
    """Return (model, seed, notebook, method of a timing) of each row, "" for what it has not."""
    keys = rows.reindex(columns=[*_PLACE, "method"]).astype(object)
    keys["method"] = keys.method.where(keys.notebook == "6_efficiency")
    return list(keys.where(keys.notna(), "").itertuples(index=False, name=None))


def _without_stale_timings(results):
    """Return results without timings of methods that no other notebook makes any more."""
    methods = results.set_index(["model", "seed", "method"]).index
    timed = results.notebook == "6_efficiency"
    return results[~timed | methods.isin(methods[~timed])].reset_index(drop=True)


def _changed_models(saved, published):
    """Return {(model, seed)} whose dense model was saved here as another one than published."""
    if saved.empty or published.empty:
        return set()
    dense = saved[saved.notebook == "1_train"]
    both = dense.merge(published, on=_PLACE, suffixes=("", "_before"))
    # 0.05 % of top-1: another processor rounds otherwise
    same_top1 = (both.top1 - both.top1_before).abs() < 0.05
    changed = both[both.params.ne(both.params_before) | ~same_top1]
    return set(zip(changed.model, changed.seed, strict=True))


def gather(name=None, *, every=False):
    """Return rows of all runs of this data root as one frame, overridden ones too.

    Each run keeps a log. Every save of rows adds them to it, with their notebook and all values of
    the study that the notebook uses.
    name: str, a study; None for all.
    every: bool, whether to return rows, too, that later saves of the same notebook replaced;
    `save` tells one save from another.
    Columns: folder, notebook, save, those of ROW, all others, and parameters (JSON).
    A line that was cut short, by a full disk for instance, is left out, and a message says so.
    Raises FileNotFoundError if there are no rows.
    """
    runs = files.root() / "runs"
    rows = []
    for path in sorted(runs.rglob(LOG)):
        folder = path.parent.relative_to(runs)
        if name in (None, folder.parts[0].partition("+")[0]):
            rows += [{"folder": folder.as_posix(), **row} for row in _read_log(path)]
    if not rows:
        words = f"no rows of {name or 'any study'} under {runs}"
        raise FileNotFoundError(f"{words}; run a study: make study STUDY=demo")
    frame = pd.DataFrame(rows)
    if not every:
        last = frame.groupby(["folder", "notebook"]).save.transform("last")
        frame = frame[frame.save == last].reset_index(drop=True)
    parameters = frame.pop("parameters")
    return with_first_columns(frame, ["folder", "notebook", "save", *ROW]).assign(
        parameters=parameters
    )


def _read_log(path):
    """Return the rows of a run's log, and say which lines are none."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            row["parameters"] = json.dumps(row["parameters"])
        except (ValueError, KeyError, TypeError):
            files.log(f"line {number} of {path} is no row, perhaps cut short; left out")
        else:
            rows.append(row)
    return rows


def compare(again, kept):
    """Return rows that were made again beside the published ones.

    again, kept: rows as `read_study` gives them, or those of figures/<study>/results.csv. Those of
    6_efficiency are left out, as timings belong to their machine.
    Returns one line for each row of the models and seeds that both have. Its columns are seed, KEY,
    top1 and macs, top1_kept and macs_kept (missing where only one table has such a row),
    spread: points of top-1 that the kept row's seeds span, at least 1, and
    agrees: both rows are there, top-1 is within the spread, and MACs are within 1 %.
    Budgets promise that 1 %.
    Raises ValueError where no row is in both.
    """
    key = ["seed", *(name for name in KEY if name in again and name in kept)]
    again = _comparable(again, key)
    kept = _comparable(kept, key)
    top1_by_cut = kept.groupby(key[1:], dropna=False).top1
    spans = top1_by_cut.transform("max") - top1_by_cut.transform("min")
    # at least a point: other threads and processors round otherwise
    kept = kept.assign(spread=spans.clip(lower=1))
    kept = kept.merge(again[["model", "seed"]].drop_duplicates())
    both = again.merge(kept, on=key, suffixes=("", "_kept"), how="outer")
    if both.dropna(subset=["top1", "top1_kept"]).empty:
        raise ValueError(
            "no row stands in both tables: they are of other models, seeds or values of the study"
        )
    near_top1 = (both.top1 - both.top1_kept).abs() <= both.spread
    near_macs = (both.macs / both.macs_kept - 1).abs() <= 0.01
    return both.assign(agrees=near_top1 & near_macs)


def _comparable(rows, key):
    """Return the measured rows with key, top1 and macs, in types that both tables share."""
    rows = rows[rows.top1.notna() & (rows.notebook != "6_efficiency")]
    # A column without entries would be one of numbers, and match no column of text.
    types = dict.fromkeys(key[1:], object) | {"target": float}
    return rows.astype(types)[[*key, "top1", "macs"]]


def main(arguments=None):
    """Print rows of `gather` as CSV, or whether those of a study agree with the published ones.

    `python -m vitlab results [STUDY] [--every | --compare]`
    Returns the exit status: 0, or 1 without rows or where some do not agree.
    """
    description = "Rows of all runs as one CSV table."
    parser = argparse.ArgumentParser("python -m vitlab results", description=description)
    parser.add_argument("study", nargs="?", help="of this study alone")
    parser.add_argument("--every", action="store_true", help="rows, too, that were replaced since")
    parser.add_argument(
        "--compare", action="store_true", help="set them beside figures/STUDY/results.csv instead"
    )
    options = parser.parse_args(arguments)
    if options.compare and not options.study:
        parser.error("--compare needs a study")
    try:
        if options.compare:
            return _print_comparison(settings.study(options.study).name)
        print(gather(options.study, every=options.every).to_csv(index=False), end="")
    except (FileNotFoundError, ValueError) as error:
        print(f"vitlab results: {error}", file=sys.stderr)
        return 1
    return 0


def _print_comparison(name):
    """Print the rows of a study beside the published ones. Return 0 if all agree, else 1."""
    rows = gather(name)
    kept = pd.read_csv(files.repository() / "figures" / name / "results.csv")
    compared = compare(rows[rows.override.isna()], kept)
    columns = ["model", "seed", "method", "form", "target", "stage", "top1", "top1_kept"]
    columns += ["spread", "agrees"]
    print(compared[columns].to_string(index=False, float_format="{:.2f}".format, na_rep=""))
    print(
        f"Of {len(compared)} rows {compared.agrees.sum()} agree, "
        f"{compared.top1.isna().sum()} were not made again, "
        f"{compared.top1_kept.isna().sum()} are not published (figures/{name})."
    )
    return int(not compared.agrees.all())
