"""Gather the results of all runs as one table, and compare them with published ones.

Public: read, show.
"""

import json
import sys

import pandas as pd

from vitlab import files
from vitlab.studies import settings
from vitlab.studies.runs import _COLUMNS, IDENTITY, LOG, open_run, study_label, with_first_columns

# What tells one result of a seed from another.
_KEY = [
    "model",
    "notebook",
    "method",
    "criterion",
    "form",
    "schedule",
    "target_kind",
    "target",
    "stage",
]
_WORDS = {"labels": str}  # columns that read_csv would misread: `true` is a word there
# What tells by which notebook of which run a result was saved.
_PLACE = ["model", "seed", "notebook"]


def read(name, *, override=None):
    """Return all that the runs of a study have saved, over models and seeds.

    name, override: as in `settings.study`.
    Returns Values of
        results, history: frames
        tables: frames by name
        from_figures: list of what was not saved here, as in a fresh clone, and comes from the
            study's folder of figures
        changes: list of what the study's values were when results were saved, and are now
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
    frames = {}
    names = []
    for stem in stems:
        frame, names_of_published = _merged(stem, saved[stem], published[stem], changed)
        frames[stem.removeprefix("table-")] = frame
        names += names_of_published
    results = frames.pop("results-*")
    history = frames.pop("history-*")
    if results.empty:
        raise FileNotFoundError(f"no results in {runs}; run the study: {files.how_to_run(name)}")
    return settings.Values(
        results=_without_stale_timings(results),
        history=history,
        tables=settings.Values((name, frame) for name, frame in frames.items() if len(frame)),
        from_figures=list(dict.fromkeys(names)),
        changes=_changes_since(name, values.models, runs, override),
    )


def _changes_since(name, models, folder, override):
    """Return a line for each value that was another one when the runs in folder saved results."""
    lines = []
    for log in sorted(folder.glob(f"*/seed*/{LOG}")):
        model, seed = log.parts[-3], int(log.parts[-2].removeprefix("seed"))
        if model in models:
            run = open_run(name, model, seed, override)
            lines += [line.strip() for step in settings.USES for line in run.changes(step)]
    return list(dict.fromkeys(lines))


def _saved(runs, stem):
    """Return the CSV files of this stem in a study's folder of runs, sorted by path."""
    return sorted([*runs.glob(f"{stem}.csv"), *runs.glob(f"*/seed*/{stem}.csv")])


def _from_runs(runs, stem):
    """Return the results that the runs of this data root saved: all of them count."""
    frames = []
    for path in _saved(runs, stem):
        frame = pd.read_csv(path, dtype=_WORDS)
        if stem.endswith("-*"):
            frame.insert(len(IDENTITY), "notebook", path.stem.partition("-")[2])
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _from_figures(figures, stem, values):
    """Return the published results that count: those of today's models, seeds and notebooks."""
    file = figures / f"{stem.removesuffix('-*')}.csv"
    if not file.is_file():
        return pd.DataFrame()
    results = pd.read_csv(file, dtype=_WORDS)
    counts = results.model.isin(values.models) & results.seed.isin(values.seeds)
    counts |= results.model.isna()  # tables of the study as a whole
    if stem.endswith("-*"):
        counts &= results.reindex(columns=["notebook"]).notebook.isin(settings.USES)
    return results[counts]


def _merged(stem, saved, published, changed):
    """Return all saved results with the published ones that none of them replaces, and their names.

    A published result wins only where its model, seed and notebook saved nothing here. It is left
    out where the dense model of its run is another one here.
    """
    taken = set(_keys(saved))
    missing = [key not in taken and key[:2] not in changed for key in _keys(published)]
    published = published[missing]
    names = []
    for model, seed, notebook, _ in _keys(published):
        names.append(f"{model} seed {seed} {notebook or stem}")
    parts = [frame for frame in (saved, published) if len(frame)]
    results = pd.concat(parts or [saved], ignore_index=True)
    order = [column for column in _PLACE if column in results]
    if order:
        results = results.sort_values(order, kind="stable", ignore_index=True)
    return results, names


def _keys(results):
    """Return (model, seed, notebook, method of a timing) of each result, "" for what it has not."""
    keys = results.reindex(columns=[*_PLACE, "method"]).astype(object)
    # 6_efficiency times what several notebooks left, so that its results are compared by method.
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


def _gather(name=None):
    """Return the results of all runs of this data root as one frame, overridden ones too.

    Each run keeps a log. Every save of results adds them to it, with their notebook and all values
    of the study that the notebook uses. The last save of each notebook counts.
    name: str, a study; None for all.
    Columns: folder, notebook, save, those of `_COLUMNS`, all others, and parameters (JSON).
    A line that was cut short, by a full disk for instance, is left out, and a message says so.
    Raises FileNotFoundError if there are no results.
    """
    runs = files.root() / "runs"
    results = []
    for path in sorted(runs.rglob(LOG)):
        folder = path.parent.relative_to(runs)
        if name in (None, folder.parts[0].partition("+")[0]):
            results += [{"folder": folder.as_posix(), **result} for result in _read_log(path)]
    if not results:
        if name:
            settings.study(name)  # which knows the nearest name of a mistyped one
        words = f"no results of {name or 'any study'} under {runs}"
        raise FileNotFoundError(f"{words}; run a study: {files.how_to_run(name or 'demo')}")
    frame = pd.DataFrame(results)
    last = frame.groupby(["folder", "notebook"]).save.transform("last")
    frame = frame[frame.save == last].reset_index(drop=True)
    parameters = frame.pop("parameters")
    frame = with_first_columns(frame, ["folder", "notebook", "save", *_COLUMNS])
    return frame.assign(parameters=parameters)


def _read_log(path):
    """Return the results in a run's log, and say which lines are none."""
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            result = json.loads(line)
            result["parameters"] = json.dumps(result["parameters"])
        except (ValueError, KeyError, TypeError):
            files.log(f"line {number} of {path} is no result, perhaps cut short; left out")
        else:
            results.append(result)
    return results


def _compare(again, kept):
    """Return results that were made again beside the published ones.

    again, kept: results as `read` gives them, or those of figures/<study>/results.csv. Those of
        6_efficiency are left out, as timings belong to their machine.
    Returns one line for each result of the models and seeds that both have. Its columns:
        seed and those of `_KEY`
        top1, macs, top1_kept, macs_kept: missing where only one table has such a result
        spread: points of top-1 that the seeds of the published result span, at least 1
        agrees: whether both results are there, top-1 within the spread and MACs within 1 %, which
            budgets promise
    Raises ValueError where no result is in both.
    """
    key = ["seed", *(name for name in _KEY if name in again and name in kept)]
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
            "no result stands in both tables: they are of other models, seeds or study values"
        )
    near_top1 = (both.top1 - both.top1_kept).abs() <= both.spread
    near_macs = (both.macs / both.macs_kept - 1).abs() <= 0.01
    return both.assign(agrees=near_top1 & near_macs)


def _comparable(results, key):
    """Return the measured results with key, top1 and macs, in types that both tables share."""
    results = results[results.top1.notna() & (results.notebook != "6_efficiency")]
    # A column without entries would be one of numbers, and match no column of text.
    types = dict.fromkeys(key[1:], object) | {"target": float}
    return results.astype(types)[[*key, "top1", "macs"]]


def show(study=None, *, compare=False):
    """Print results of all runs as CSV, or whether a study's agree with the published ones.

    study: str, whose results; None for all.
    compare: bool, whether to set them beside figures/STUDY/results.csv instead.
    Returns the exit status: 0, or 1 without results or where some do not agree.
    """
    try:
        if compare:
            return _print_comparison(settings.study(study).name)
        print(_gather(study).to_csv(index=False), end="")
    except (FileNotFoundError, ValueError) as error:
        print(f"vitlab results: {error}", file=sys.stderr)
        return 1
    return 0


def _print_comparison(name):
    """Print the results of a study beside the published ones. Return 0 if all agree, else 1."""
    results = _gather(name)
    kept = pd.read_csv(files.repository() / "figures" / name / "results.csv")
    compared = _compare(results[results.override.isna()], kept)
    columns = [
        "model",
        "seed",
        "method",
        "form",
        "target",
        "stage",
        "top1",
        "top1_kept",
        "spread",
        "agrees",
    ]
    print(compared[columns].to_string(index=False, float_format="{:.2f}".format, na_rep=""))
    print(
        f"Of {len(compared)} results {compared.agrees.sum()} agree, "
        f"{compared.top1.isna().sum()} were not made again, "
        f"{compared.top1_kept.isna().sum()} are not published (figures/{name})."
    )
    return int(not compared.agrees.all())
