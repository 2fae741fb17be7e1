"""Targets other than MACs: parameters, bytes and time of the two committed CIFAR-10 models, asked for and met."""

from itertools import product

import torch
from accuracy import KINDS, MODELS, given_of
from common import publish

from vitlab.evaluation import bench, cost, evaluate, runtimes
from vitlab.pruning import pool

RUNTIMES = ("eager", "onnxruntime", "onnxruntime int8")
TARGETS, SHARES = ("params", "bytes", "latency"), (0.75, 0.5)
POOLS = {"pool": (*KINDS, "ranks"), "units": KINDS}
COLUMNS = [
    "model",
    "target",
    "kinds",
    "asked",
    "planned",
    "met",
    "met_q1",
    "met_q3",
    "macs",
    "params",
    "top1",
]


def targets(rounds):
    """Each share of each target, by the pool and by units alone, without training: what stays of it, and top-1.

    planned: the share that budget.plan says is kept. met: of the model as it is handed out, reconstructed; of latency
    (batches of 64) timed once more, all of a model interleaved, with quartiles.
    """
    rows = []
    for make in given_of(MODELS).values():
        rows += of_model(make(0), rounds)
        publish("targets", rows, shown=COLUMNS)


def of_model(given, rounds, *, batch=64):
    dense, rows, made = given.dense, [], {}
    most = bench.break_even(bench.rank_speed(dense, batch=batch))
    for what, share, (word, kinds) in product(TARGETS, SHARES, POOLS.items()):
        row = {"model": given.name, "target": what, "kinds": word, "asked": share}
        limits = {"most": most, "batch": batch} if what == "latency" else {}
        try:
            plan = given.known.plan(kinds=kinds, **limits, **{what: share})
        except pool.Unreachable as floor:
            rows.append(row | {"note": str(floor)})
            continue
        small = given.known.reconstruct(*given.known.cut(plan))
        made[len(rows)] = small
        row |= {
            "planned": plan.share,
            "met": share_of(small, dense, what),
            "macs": cost.macs(small) / cost.macs(dense),
        }
        row |= {
            "params": share_of(small, dense, "params"),
            "top1": evaluate.accuracy(small, given.images.test).top1,
        }
        rows.append(
            row
            | {"threads": torch.get_num_threads(), "batch": batch if what == "latency" else None}
        )
    timed = {"dense": dense} | {str(number): small for number, small in made.items()}
    times = bench.latency(timed, batch=batch, repeats=4 * rounds, seconds=600).set_index("model")
    for number in made:
        if rows[number]["target"] == "latency":
            own = times.loc[str(number)]
            rows[number] |= {
                "met": 1 / own.speedup,
                "met_q1": 1 / own.speedup_q3,
                "met_q3": 1 / own.speedup_q1,
            }
    return rows


def latency(rounds):
    """Half of the dense model's time, asked for in a runtime, and what the reconstructed model takes there.

    Timed in each runtime, that was asked for and the others. Batches of 32. Top-1 is of torch and float32.
    """
    rows = []
    for make in given_of(MODELS).values():
        given = make(0)
        made = {"dense": given.dense}
        for runtime in RUNTIMES:
            kinds = POOLS["pool"]
            options = {"kinds": kinds, "latency": 0.5, "runtime": runtime, "batch": 32}
            plan = given.known.plan(**options)
            made[runtime] = given.known.reconstruct(*given.known.cut(plan))
            rows.append({"model": given.name, "asked in": runtime, "planned": plan.share})
            rows[-1]["macs"] = cost.macs(made[runtime]) / cost.macs(given.dense)
            rows[-1]["top1"] = evaluate.accuracy(made[runtime], given.images.test).top1
        ways = product(made.items(), RUNTIMES)
        timed = {(name, way): runtimes.timed(model, way) for (name, model), way in ways}
        times = bench.latency(timed, batch=32, repeats=4 * rounds, seconds=300)
        times = times.set_index("model")
        for row in rows[-len(RUNTIMES) :]:
            for way in RUNTIMES:
                own = times.loc[[(row["asked in"], way)]].iloc[0]
                ratios = {way: own.here, f"{way}_q1": own.here_q3, f"{way}_q3": own.here_q1}
                row |= {name: 1 / ratio for name, ratio in ratios.items()}
        publish("latency", rows)


def share_of(small, dense, what):
    """What small keeps of the dense model's parameters or bytes; None of what has to be timed."""
    counts = {
        "params": cost.params,
        "bytes": cost.bytes_memory,
    }
    return counts[what](small) / counts[what](dense) if what in counts else None


CASES = {"targets": targets, "latency": latency}
