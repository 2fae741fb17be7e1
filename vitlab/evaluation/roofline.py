"""Say what bounds a model's speed on this machine: arithmetic, memory, or the number of calls.

The roofline model: Williams, Waterman and Patterson 2009.

Public: bounds.
"""

import functools
import math

import pandas as pd
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitlab.evaluation import bench, cost

_ZEROS = "unstructured zeros in dense tensors: no gain expected"
_ROWS = "zeros of whole rows in dense tensors: no gain until removed"
# operations that read and write nothing
_FREE = "_unsafe_view empty empty_like empty_strided new_empty".split()
_FREE = {getattr(torch.ops.aten, name) for name in _FREE}
_SIZES = (10**5, 10**6, 10**7, 10**8)  # bytes of one operation, to measure the memory's rate at


class _OpCounter(TorchDispatchMode):
    """Count the operations that run inside, and the bytes that they move.

    operations: how many there were
    bytes: of all tensors that each of them reads or writes
    """

    operations = 0
    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        # Views do not count, nor does memory that nothing is written to yet.
        if not function.is_view and function.overloadpacket not in _FREE:
            self.operations += 1
            for leaf in torch.utils._pytree.tree_leaves((arguments, options, result)):
                if isinstance(leaf, torch.Tensor):
                    self.bytes += leaf.nbytes
        return result


@functools.lru_cache
def _ceilings(device, precision):
    """Return what this machine can do at best, measured once in a process.

    device: "cpu" or "cuda"
    precision: "float32" or "bf16"
    Returns a dict of macs_per_s, bytes_per_s {bytes read and written: rate} and launch_s.
    """
    like = {"device": torch.device(device), "dtype": bench.PRECISIONS[precision]}
    sides = (2048, 4096, 8192) if device == "cuda" else (512, 1024, 2048)
    return {
        # The rate of the fastest square matrix product of three sizes.
        "macs_per_s": max(_macs_per_s(side, **like) for side in sides),
        # The rates of scaling a tensor, by its size: caches make small ones faster.
        "bytes_per_s": {size: _bytes_per_s(size, **like) for size in _SIZES},
        # The seconds of one small module, which are all call and no work.
        "launch_s": _launch_s(**like),
    }


def _macs_per_s(side, **like):
    x = torch.randn(side, side, **like)
    y = torch.randn(side, side, **like)
    # 1 x 1 convolution is the same product by another library: on some processors twice as fast
    conv = nn.Conv2d(side, side, 1, **like).to(memory_format=torch.channels_last)
    image = x.view(1, side, 32, -1).contiguous(memory_format=torch.channels_last)
    seconds = min(_least_seconds(torch.matmul, x, y), _least_seconds(conv, image))
    return side**3 / seconds


def _bytes_per_s(size, **like):
    x = torch.randn(size // (2 * like["dtype"].itemsize), **like)  # half is read
    y = torch.empty_like(x)  # half is written
    times = max(1, 10**7 // size)
    return size / _least_seconds(torch.mul, x, 2, out=y, times=times)


def _launch_s(**like):
    modules = [nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)]
    small = nn.Sequential(*modules).to(**like)
    x = torch.randn(1, 8, **like)
    return _least_seconds(small, x, times=100) / len(modules)


@torch.inference_mode()
def _least_seconds(function, x, *arguments, times=1, **options):
    """Return the seconds of a call on x, ..., in the fastest of eight rounds of so many calls."""
    call = functools.partial(function, x, *arguments, **options)
    call()
    rounds = [bench.milliseconds(call, x.device, times) for _ in range(8)]
    return min(rounds) / 1000 / times


def bounds(models, table):
    """Add to a table of latencies what bounds each result on this machine: a roofline.

    models: {name: model or Setting}
    table: the frame that `bench.latency` returned of the same models

    Returns table with these columns more:
        compute_ms, memory_ms, launch_ms: least time that each of these takes
        bound: the largest of them, "compute", "memory" or "launch"; in int8 nan, as all of these
        reached: the largest over the latency, 1 for a model as fast as the machine can be
        batch_macs, batch_bytes, operations: of one batch, run eagerly
        macs_per_s, bytes_per_s: the ceilings, measured once in a process
        promised: MACs of an image of the first model over those of the result's model
        achieved: speedup / promised
        achieved_here: speedup over the first model in the result's own runtime, precision and
            batch, over promised; nan where the table has no such result
        note: why no gain is expected, if so
    Raises TypeError as `cost.breakdown` does, KeyError for a model of the table that is not given.
    Raises IndexError for a table without results.
    """
    settings = bench.as_settings(models)
    macs_by_model = {}
    notes = {}
    for name, setting in settings.items():
        breakdown = cost.breakdown(setting.model)
        macs_by_model[name] = breakdown.macs.sum()
        has_zeros = breakdown.macs_ideal.sum() < 0.99 * macs_by_model[name]
        notes[name] = _note(setting.model) if has_zeros else ""
    macs = table.model.map(macs_by_model)
    promised = macs.iloc[0] / macs
    # Traffic is that of an eager run. It is an upper bound of what other runtimes move and call.
    measured = _measured(settings, table)
    measured.insert(0, "batch_macs", table.batch * macs)
    # torch does not tell what a processor can do in int8.
    measured[table.precision.str.startswith("int8")] = math.nan
    # No model can be faster than the slowest of the three.
    least = pd.DataFrame(
        {
            "compute": 1000 * measured.batch_macs / measured.macs_per_s,
            "memory": 1000 * measured.batch_bytes / measured.bytes_per_s,
            "launch": 1000 * measured.operations * measured.pop("launch_s"),
        }
    )
    times = least.add_suffix("_ms").assign(
        bound=least.dropna().idxmax(axis=1),
        reached=least.max(axis=1) / table.latency_ms,
    )
    return table.join([times, measured]).assign(
        promised=promised,
        achieved=table.speedup / promised,
        achieved_here=table.speedup / _speedup_of_dense(settings, table) / promised,
        note=table.model.map(notes),
    )


def _speedup_of_dense(settings, table):
    """Return the speedup of the first model in each result's batch, runtime and precision.

    Over it a result's speedup is what a cut brings there, apart from what the runtime does.
    """
    dense = settings[table.model.iloc[0]].model
    is_dense = [settings[name].model is dense for name in table.model]
    speedups = table.speedup.where(is_dense)
    ways = [table.batch, table.runtime, table.precision]
    return speedups.groupby(ways).transform("first")


def _measured(settings, table):
    """Return a frame of traffic and ceilings for each line of a table of latencies."""
    traffics = {}
    measured = []
    for result in table.itertuples():
        kind = "cpu" if result.device == "cpu" else "cuda"
        # Results of several runtimes share a run.
        precision = "float32" if result.precision.startswith("int8") else result.precision
        setting = bench.Setting(settings[result.model].model, precision=precision)
        run = setting, result.batch
        if run not in traffics:
            # Conversion comes first: it is no traffic of the batch.
            converted, images = bench.ready(setting, result.batch, torch.device(kind))
            with torch.no_grad(), _OpCounter() as traffics[run]:
                converted(images)
        traffic = traffics[run]
        # The memory's rate is that at the size of the mean operation.
        mean_bytes = traffic.bytes / traffic.operations
        nearest = min(_SIZES, key=lambda size: abs(math.log(size / mean_bytes)))
        best = _ceilings(kind, precision)
        measured.append(
            {
                "batch_bytes": traffic.bytes,
                "operations": traffic.operations,
                **best,
                "bytes_per_s": best["bytes_per_s"][nearest],
            }
        )
    return pd.DataFrame(measured, index=table.index)


def _note(model):
    """Return which zeros a model has, of which no gain is to be expected."""
    zeros = in_lines = 0
    for parameter in model.parameters():
        if parameter.ndim > 1:
            is_alive = parameter.flatten(1) != 0
            alive_rows = is_alive.any(1).sum()
            alive_columns = is_alive.any(0).sum()
            zeros += int((~is_alive).sum())
            in_lines += is_alive.numel() - int(alive_rows * alive_columns)
    # The zeros count as zeros of whole rows if 99 % of them lie in whole rows or columns.
    return _ROWS if in_lines >= 0.99 * zeros else _ZEROS
