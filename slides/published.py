"""Read the published tables of a study, and write numbers as people read them. No torch, no drawing.

Public: Absent, BUDGETS, COSTS, Published, SOLVED, TRAINED, distinct, listed, millions, model_name,
number, part_of, share, signed.
"""

from pathlib import Path

import pandas as pd

from vitlab import files, names
from vitlab.report import tables
from vitlab.report.tables import model_name, number, rounding, seeds_of

PARTS = {0.25: "a quarter of the", 0.5: "half the", 0.75: "three quarters of the"}
BUDGETS = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "latency": "measured time"}
COSTS = BUDGETS | {"bytes_disk": "bytes on disk"}
SOLVED = ["folded", "compensated", "reconstructed"]  # stages without training
TRAINED = ["finetuned", "distilled"]


class Absent(Exception):
    """Say that something cannot be shown; the message names what is missing."""


def signed(value, digits=1):
    """Write a change with its sign, "+" too."""
    return number(value, digits, "+")


def share(value):
    """Write a share in [0, 1] as a percentage of three digits."""
    return f"{rounding(100 * value):.3g}\u00a0%"


def millions(value):
    """Write a count in millions: two digits after the point below ten millions, else one."""
    digits = 2 if value < 1e7 else 1
    return number(value / 1e6, digits)


def part_of(target, kind):
    """Return words such as "half the MACs" and "60 % of the bytes".

    target: the share, in [0, 1]. kind: a key of COSTS.
    """
    part = PARTS.get(target, f"{share(target)} of the")
    return f"{part} {COSTS[kind]}"


def distinct(results, column):
    """Return what a column holds, as strings, once each and in order; ["unknown"] where it is empty."""
    if column not in results:
        return ["unknown"]
    values = results[column].dropna()
    values = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return list(dict.fromkeys(values)) or ["unknown"]


def listed(results, column):
    """Return what a column holds as one string, with commas."""
    return ", ".join(distinct(results, column))


def mean_over_seeds(frame, keys):
    """Return means over seeds in the frame's order, and `seeds`: over how many, where it is known."""
    groups = frame.groupby(keys, sort=False, dropna=False)
    means = groups.mean(numeric_only=True)
    if "seed" in frame:
        means = means.assign(seeds=groups.seed.nunique())
    return means.reset_index()


class Published:
    """Read the tables and pictures of one study, a folder such as figures/cifar10-small.

    results: every published result. untimed: those without a latency, one for each model measured.
    models: names of the models that were cut. dense: the dense models' results, means over seeds, by model.

    Raises FileNotFoundError for a folder without tables of a study, with the commands that make them.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "results.csv").is_file():
            raise FileNotFoundError(_how_to_make(self.folder))
        self.results = self.read("results")
        if "stage" not in self.results:  # those of benchmarks
            raise FileNotFoundError(_how_to_make(self.folder))
        self.untimed = self.results[self.results.latency_ms.isna()]
        is_dense = self.untimed.stage.isin(tables.DENSE_STAGES)
        cut = self.untimed[~is_dense & self.untimed.top1.notna()]
        dense = self.untimed[self.untimed.stage == "dense"]
        self.dense = dense.groupby("model").mean(numeric_only=True)
        self.models = [model for model in dict.fromkeys(cut.model) if model in self.dense.index]

    def read(self, name, model=None):
        """Return the table of a file, or the part of it that belongs to one model.

        name: of the file, without ".csv". model: a model of the study, or None for all.
        Raises Absent where there is no such file, or nothing in it.
        """
        path = self.folder / f"{name}.csv"
        if not path.is_file():
            raise Absent(f"{path.name} is missing")
        frame = pd.read_csv(path)
        if model is not None:
            frame = frame[frame.model == model].reset_index(drop=True)
        if frame.empty:
            raise Absent(f"{path.name} has nothing of {model}")
        return frame

    def picture(self, name):
        """Return the path of a picture, NAME.png. Raises Absent where there is none."""
        path = self.folder / f"{name}.png"
        if not path.is_file():
            raise Absent(f"{path.name} is missing")
        return path

    def pictures(self, name):
        """Return {model's name: path} of a picture NAME-MODEL.png, the ViT first. Raises Absent for none."""
        paths = {model: self.folder / f"{name}-{model}.png" for model in reversed(self.models)}
        found = {model_name(model): path for model, path in paths.items() if path.is_file()}
        if not found:
            raise Absent(f"{name}-{self.models[-1]}.png is missing")
        return found

    def budgets(self):
        """Return (model, target_kind, target) of all budgets below 1, the mildest first."""
        budgets = self.untimed[
            self.untimed.target_kind.isin([*BUDGETS]) & self.untimed.top1.notna()
        ]
        budgets = budgets[budgets.model.isin(self.models) & (budgets.target < 1)]
        budgets = budgets[["model", "target_kind", "target"]].drop_duplicates()
        rank = {model: place for place, model in enumerate(self.models)}
        budgets = budgets.sort_values("model", key=lambda names: names.map(rank), kind="stable")
        budgets = budgets.sort_values("target", ascending=False, kind="stable")
        return list(budgets.itertuples(index=False, name=None))

    def source(self, files, results=None, *, tables=()):
        """Say where something comes from: files, data, seeds, split, machines, commits and date.

        files: names of the files it was read from. results: the published results that it shows (None: all).
        tables: the frames shown beside them; the seeds are those of the tables where there are some.
        """
        results = self.results if results is None else results
        results = results.sort_values("date", kind="stable")
        frames = [frame for frame in tables if "seed" in frame] or [results]
        seeds = max(map(seeds_of, frames), key=len)
        averaged = "means over seeds" if "," in seeds else "seed"
        commits = distinct(results, "commit")
        if len(commits) > 3:
            commits = [f"{commits[0]} … {commits[-1]} ({len(commits)} in all)"]
        date = distinct(results, "date")[-1][:10]
        return (
            f"Source: {', '.join(files)}. Study {self.folder.name}, {listed(results, 'data')}, "
            f"{averaged} {seeds}, split {listed(results, 'split_seed')}; {listed(results, 'device')}; "
            f"commit {', '.join(commits)}; {date}."
        )


def _how_to_make(folder):
    """Return the words of the error for a folder without results."""
    name = folder.name
    others = sorted(path.parent.name for path in folder.parent.glob("*/dense.csv"))
    return (
        f"{folder} has no tables of a study{names.nearest(name, others)} It leaves them at its end: "
        f"{files.how_to_run(name)}, or, where its runs are, vitlab run 7_report --study {name}. There are "
        f"tables of {', '.join(others) or 'none'}."
    )
