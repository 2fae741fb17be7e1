"""Tests of bench: structure, pairing, a process of its own. No time decides a test."""

import copy
import functools
import sys

import pandas as pd
import pytest
import torch

from vitlab import files, models
from vitlab.evaluation import bench, cost, roofline
from vitlab.models import checkpoint
from vitlab.pruning import factor, masks, prune, shrink


def test_one_row_per_model(vit, swin):
    swin.train()
    threads = torch.get_num_threads()
    table = bench.latency({"vit": vit, "swin": swin, "again": vit}, batch=2, repeats=4)
    assert table.model.tolist() == ["vit", "swin", "again"]
    assert (table[["rounds", "batch", "image_size", "threads"]] == [4, 2, 16, threads]).all(
        axis=None
    )
    assert (table.precision == "float32").all() and (table.device == "cpu").all()
    assert (table.latency_q1 <= table.latency_ms).all() and (
        table.latency_ms <= table.latency_q3
    ).all()
    assert (table.speedup_q1 <= table.speedup).all() and (table.speedup <= table.speedup_q3).all()
    assert table.image_ms.tolist() == (table.latency_ms / 2).tolist()
    assert (table.images_per_s * table.image_ms).tolist() == pytest.approx([1000] * 3)
    assert table.loc[0, ["speedup_q1", "speedup", "speedup_q3"]].tolist() == [1, 1, 1]
    assert swin.training and not vit.training  # timed in eval mode, left as they were


def test_in_bf16(vit):
    table = bench.latency({"vit": vit}, batch=2, repeats=1, precision="bf16")
    assert table.precision[0] == "bf16"
    assert next(vit.parameters()).dtype == torch.float32


def test_time_that_is_up_still_leaves_three_rounds(vit):
    assert bench.latency({"vit": vit}, batch=1, repeats=50, seconds=0).rounds.tolist() == [3]


def test_speedups_are_paired_within_rounds():
    # a slow spell hits both models of the second round: the ratio does not notice, medians of times would
    milliseconds = pd.DataFrame({"dense": [10.0, 80, 10], "small": [5.0, 40, 4]})
    table = bench._summary(milliseconds, 4).set_index("model")
    assert table.speedup.to_dict() == {"dense": 1, "small": 2}
    assert table.latency_ms.to_dict() == {"dense": 10, "small": 5}
    assert table.loc["small", ["speedup_q1", "speedup_q3"]].tolist() == [2, 2.25]
    assert table.images_per_s.to_dict() == {"dense": 400, "small": 800}


def test_models_take_turns_in_changing_order():
    order = []
    calls = {name: functools.partial(order.append, name) for name in "abc"}
    table = bench._rounds(calls, repeats=12, seconds=60, device=torch.device("cpu"))
    assert order[:6] == list("aabbcc")  # they warm up
    del order[:6]
    assert table.shape == (12, 3) and list(table) == ["a", "b", "c"] and len(order) == 36
    rounds = ["".join(order[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 3


def test_memory_in_processes_of_their_own(vit, tmp_path):
    checkpoint.save(vit, tmp_path)
    one, other = bench.memory_mb({"model": vit, "folder": tmp_path}, batch=4096).values()
    # the images and what the first convolution makes of them are held at once: 12.6 + 134.2 MB
    assert 146 < one < 1000 and abs(one - other) < 20


def test_memory_of_what_cannot_run(vit, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        bench.memory_mb({"nothing": tmp_path / "nothing"})
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho 1.5\necho 'Traceback\nRuntimeError: not enough memory' >&2; exit 1\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(
        RuntimeError,
        match='vitlab.evaluation.bench .*"batch": 9.* failed: RuntimeError: not enough memory',
    ):
        bench.memory_mb({"vit": vit}, batch=9)
    python.write_text("#!/bin/sh\necho 1.5\necho 2.5\n")
    titles = []
    monkeypatch.setattr(files, "progress", lambda lines, title, **_: titles.append(title) or lines)
    assert bench.memory_mb({"a": vit, "b": vit}) == {"a": 1.5, "b": 2.5}
    assert titles == ["measuring memory"]


def test_bad_input(vit):
    with pytest.raises(ValueError, match="no models to time"):
        bench.latency({})
    with pytest.raises(
        ValueError, match="unknown precision 'fp16', did you mean 'bf16'. Known are float32, bf16"
    ):
        bench.latency({"vit": vit}, precision="fp16")
    with pytest.raises(
        ValueError, match="unknown runtime 'jit'. Known are eager, compiled, onnxruntime"
    ):
        bench.Setting(vit, "jit")
    with pytest.raises(ValueError, match="onnxruntime has no bf16 on a CPU"):
        bench.Setting(vit, "onnxruntime", "bf16")
    with pytest.raises(ValueError, match="unknown precision 'int8'"):
        bench.Setting(vit, precision="int8")
    with pytest.raises(ValueError, match="int8 is calibrated by images: runtimes.settings makes"):
        bench.latency({"int8": bench.Setting(vit, "onnxruntime", "int8")})


def test_each_model_at_its_own_size():
    sizes = {16: models.create("conv_vit", num_classes=3, image_size=16, depth=1, embed_dim=32)}
    sizes[32] = models.create("conv_vit", num_classes=3, depth=1, embed_dim=32)
    table = bench.latency({str(size): model for size, model in sizes.items()}, batch=1, repeats=3)
    assert table.image_size.tolist() == [16, 32]


def test_settings_side_by_side(vit):
    settings = {"dense": vit, "half": bench.Setting(vit, precision="bf16")}
    settings["exported"] = bench.Setting(vit, "onnxruntime")
    table = bench.latency(settings, batch=[1, 3], repeats=3)
    assert table.model.tolist() == 2 * list(settings) and table.batch.tolist() == [1] * 3 + [3] * 3
    assert table.runtime.tolist() == 2 * ["eager", "eager", "onnxruntime"]
    assert table.precision.tolist() == 2 * ["float32", "bf16", "float32"]
    assert table.speedup[table.model == "dense"].tolist() == [1, 1]
    assert table.here.tolist() == [1] * 6  # all of them are the dense model, each in its own way
    assert (table.images_per_s * table.image_ms).tolist() == pytest.approx([1000] * 6)


@pytest.mark.long
def test_a_compiled_model(vit):
    table = bench.latency(
        {"dense": vit, "compiled": bench.Setting(vit, "compiled")}, batch=[1, 2], repeats=3
    )
    assert table.runtime.tolist() == 2 * ["eager", "compiled"]
    assert "_orig_mod" not in "".join(dict(vit.named_parameters()))  # a copy was compiled


def cut(model, kind):
    """Return a model of each kind that a cut leaves."""
    view = models.view(model)
    first, last, stem = view.blocks[0].name, view.blocks[-1].name, [name for name, _ in view.stem]
    if kind == "units":
        drop = {(first, "heads"): [1], (first, "neurons"): range(5), (stem[0], "filters"): [0, 3]}
        return shrink.remove(
            model, drop | {(last, "block"): [0], (next(iter(view.units(["width"])))): [0, 2]}
        )
    if kind == "rows":
        return shrink.remove(model, {(name, "rows"): [0, 5] for name in view.linears(["proj"])})
    if kind == "ranks":
        return factor.factorise(model, dict.fromkeys([*view.linears(["fc1", "fc2"]), stem[-1]], 4))
    grams = {name: torch.eye(layer.in_features) for name, layer in view.linears(["fc1"]).items()}
    return factor.compress(
        model, ratio=0.5, support=kind, grams=grams, roles=["fc1"], multiple=1, rounds=1
    )[0]


KINDS = ["units", "ranks", "rows", "entries", "columns"]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_models_in_bf16(model, batch, kind):
    small = cut(model, kind)
    table = bench.latency(
        {"dense": model, kind: bench.Setting(small, precision="bf16")}, batch=2, repeats=1
    )
    assert table.precision.tolist() == ["float32", "bf16"]
    expected, logits = small(batch[0]), copy.deepcopy(small).bfloat16()(batch[0].bfloat16())
    torch.testing.assert_close(
        logits.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item()
    )


@pytest.mark.long
@pytest.mark.parametrize("name, precision", [("vit", "bf16"), ("swin", "float32")])
def test_cut_models_compiled(name, batch, precision, request):
    model, dtype = request.getfixturevalue(name), bench.PRECISIONS[precision]
    cpu = torch.device("cpu")
    torch._dynamo.utils.counters.clear()
    for kind in KINDS:
        small = cut(model, kind).to(dtype)
        compiled = bench.runnable(bench.Setting(small, "compiled", precision), cpu)
        with torch.inference_mode():
            for count in (1, 3, 6):
                images = batch[0][:count].to(dtype)
                expected, near = small(images), 1e-4 if precision == "float32" else 0.1
                difference = (compiled(images) - expected).abs().max() / expected.abs().max()
                assert difference < near
    # each once for one image and once for any number: none has fallen back to running eagerly
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * len(KINDS)


def test_traffic_by_hand():
    layer, x = torch.nn.Linear(3, 5), torch.randn(2, 3)
    with torch.no_grad(), roofline._OpCounter() as traffic:
        torch.relu(layer(x)).view(10)
    # the product reads x, weight and bias and writes [2, 5]; relu reads and writes it; the view is free
    assert traffic.operations == 2
    assert traffic.bytes == 4 * (6 + 15 + 5 + 10) + 4 * (10 + 10)
    with torch.no_grad(), roofline._OpCounter() as traffic:
        torch.empty_like(torch.ops.aten._unsafe_view(x, [6])).copy_(torch.empty(6).new_empty(6))
    assert (traffic.operations, traffic.bytes) == (
        1,
        4 * (6 + 6 + 6),
    )  # the copy: two arguments and what comes back


def whole_numbers(model, images):
    """Bytes of indices, the same in every precision: that max pooling writes, and of Swin's position tables."""
    written = []
    pools = [module for module in model.modules() if isinstance(module, torch.nn.MaxPool2d)]
    hooks = [
        pool.register_forward_hook(lambda _, args, out: written.append(8 * out.numel()))
        for pool in pools
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    read = [
        8 * each.numel()
        for name, each in model.named_buffers()
        if name.endswith("relative_position_index")
    ]
    return sum(written + read)


def test_bounds_in_bf16_count_the_batch_and_not_its_conversion(model, batch, monkeypatch):
    rates = {"float32": 1e9, "bf16": 4e9}
    ceilings = {
        precision: {
            "macs_per_s": rate,
            "launch_s": 1e-6,
            "bytes_per_s": dict.fromkeys(roofline._SIZES, rate),
        }
        for precision, rate in rates.items()
    }
    monkeypatch.setattr(roofline, "_ceilings", lambda device, precision: ceilings[precision])
    half = shrink.remove(model, {(models.view(model).blocks[0].name, "neurons"): range(20)})
    named, rows = {}, []
    for name, each in {"dense": model, "half": half}.items():
        for precision in rates:
            named[f"{name} {precision}"] = bench.Setting(each, precision=precision)
            rows.append({"model": f"{name} {precision}", "precision": precision})
    times = pd.DataFrame(rows).assign(
        latency_ms=[8, 2, 4, 1.6], speedup=[1, 4, 2, 5], batch=6, threads=1
    )
    table = roofline.bounds(named, times.assign(runtime="eager", device="cpu")).set_index("model")
    for name, each in {"dense": model, "half": half}.items():
        full, short = table.loc[f"{name} float32"], table.loc[f"{name} bf16"]
        assert full.operations == short.operations
        assert 2 * short.batch_bytes == full.batch_bytes + whole_numbers(each, batch[0])
        assert (
            full.compute_ms
            == pytest.approx(4 * short.compute_ms)
            == pytest.approx(6 * cost.macs(each) / 1e6)
        )
        assert short.memory_ms == pytest.approx(short.batch_bytes / 4e6)
    promised = cost.macs(model) / cost.macs(half)
    assert table.achieved.tolist() == pytest.approx([1, 4, 2 / promised, 5 / promised])
    assert table.achieved_here.tolist() == pytest.approx(
        [1, 1, 2 / promised, 1.25 / promised]
    )  # beside dense bf16


def test_nothing_is_achieved_beside_a_dense_model_that_was_not_timed_so(vit, monkeypatch):
    ceilings = {
        "macs_per_s": 1e9,
        "launch_s": 1e-6,
        "bytes_per_s": dict.fromkeys(roofline._SIZES, 2e9),
    }
    monkeypatch.setattr(roofline, "_ceilings", lambda *_: ceilings)
    half = shrink.remove(vit, {("blocks.0", "neurons"): range(20)})
    named = {"dense": vit, "exported": bench.Setting(half, "onnxruntime")}
    times = pd.DataFrame(
        {"model": list(named), "latency_ms": 4.0, "speedup": [1, 1.5], "batch": 2, "threads": 1}
    )
    times = times.assign(runtime=["eager", "onnxruntime"], precision="float32", device="cpu")
    table = roofline.bounds(named, times)
    assert table.achieved_here[0] == 1 and pd.isna(table.achieved_here[1]) and table.achieved[1] > 0


def test_int8_has_a_promise_but_no_ceiling(vit, monkeypatch):
    ceilings = {
        "macs_per_s": 1e9,
        "launch_s": 1e-6,
        "bytes_per_s": dict.fromkeys(roofline._SIZES, 2e9),
    }
    monkeypatch.setattr(roofline, "_ceilings", lambda *_: ceilings)
    half = shrink.remove(vit, {("blocks.0", "neurons"): range(20)})
    named = {"dense": vit, "int8": bench.Setting(half, "openvino", "int8")}
    times = pd.DataFrame({"model": list(named), "latency_ms": 4.0, "speedup": [1, 3], "batch": 2})
    times = times.assign(threads=1, runtime=["eager", "openvino"], precision=["float32", "int8"])
    table = roofline.bounds(named, times.assign(device="cpu")).set_index("model")
    assert table[["bound", "reached", "macs_per_s"]].isna().all(axis=1).tolist() == [False, True]
    assert table.promised["int8"] == cost.macs(vit) / cost.macs(half)
    assert table.achieved["int8"] == pytest.approx(3 / table.promised["int8"])


def test_notes_tell_whole_rows_from_other_zeros(model):
    linears = models.view(model).linears(["qkv", "fc1"])
    rows = {name: torch.arange(layer.out_features) % 2 == 0 for name, layer in linears.items()}
    keep = prune.rows_to_masks(model, rows)
    prune.apply(model, keep)
    assert roofline._note(model) == "zeros of whole rows in dense tensors: no gain until removed"
    with torch.no_grad():
        for layer in linears.values():
            layer.weight[:, ::2] = 0  # columns, as masked neurons leave them in fc2
    assert roofline._note(model) == roofline._ROWS
    with torch.no_grad():
        for layer in linears.values():
            layer.weight[::4, 1::4] = 0
    assert roofline._note(model) == roofline._ZEROS


def test_bounds_by_hand(vit, monkeypatch):
    weights = {f"{name}.weight": layer.weight for name, layer in models.view(vit).linears().items()}
    half = shrink.remove(
        vit, {("blocks.0", "neurons"): range(20), ("blocks.1", "neurons"): range(20)}
    )
    keep = masks.keep_largest(
        {name: weight.detach().abs() for name, weight in weights.items()}, sparsity=0.5
    )
    masked = copy.deepcopy(vit)
    prune.apply(masked, keep)
    ceilings = {
        "macs_per_s": 1e9,
        "launch_s": 1e-6,
        "bytes_per_s": dict.fromkeys(roofline._SIZES, 2e9),
    }
    monkeypatch.setattr(roofline, "_ceilings", lambda *_: ceilings)
    named = {"dense": vit, "masked": masked, "half": half}
    times = pd.DataFrame(
        {"model": list(named), "latency_ms": 4.0, "speedup": [1, 1, 1.5], "batch": 2}
    )
    times = times.assign(threads=1, runtime="eager", precision="float32", device="cpu")
    table = roofline.bounds(named, times).set_index("model")
    macs = {name: cost.macs(model) for name, model in named.items()}
    assert table.batch_macs.to_dict() == {name: 2 * count for name, count in macs.items()}
    assert table.compute_ms.tolist() == pytest.approx([2 * count / 1e6 for count in macs.values()])
    assert table.memory_ms.tolist() == pytest.approx((table.batch_bytes / 2e6).tolist())
    assert table.launch_ms.tolist() == pytest.approx((table.operations / 1e3).tolist())
    least = table[["compute_ms", "memory_ms", "launch_ms"]]
    assert table.bound.tolist() == least.idxmax(axis=1).str.removesuffix("_ms").tolist()
    assert table.reached.tolist() == pytest.approx((least.max(axis=1) / 4).tolist())
    assert table.promised.tolist() == pytest.approx([1, 1, macs["dense"] / macs["half"]])
    assert table.achieved["half"] == pytest.approx(1.5 * macs["half"] / macs["dense"])
    assert table.achieved_here.tolist() == table.achieved.tolist()
    assert table.note.tolist() == ["", "unstructured zeros in dense tensors: no gain expected", ""]


def test_ceilings_are_measured_once():
    ceilings = roofline._ceilings("cpu", "float32")
    assert ceilings["macs_per_s"] > 0 and ceilings["launch_s"] > 0
    assert list(ceilings["bytes_per_s"]) == list(roofline._SIZES)
    assert roofline._ceilings("cpu", "float32") is ceilings


def test_rank_speed_covers_every_layer(any_model):
    table = bench.rank_speed(any_model, batch=2, repeats=1)
    assert set(table.layer) <= set(models.view(any_model).matrices)
    assert (table["rank"] < table.break_even).all() and (table.speedup > 0).all()
    for name, rows in table.groupby("layer"):
        m, n = any_model.get_submodule(name).weight.flatten(1).shape
        assert (rows.break_even == m * n / (m + n)).all()
        assert rows.promised.tolist() == pytest.approx((m * n / (rows["rank"] * (m + n))).tolist())
    assert not any(layer._forward_pre_hooks for layer in any_model.modules())


def test_rank_speed_of_a_model_without_plain_layers(vit):
    thin = factor.factorise(vit, dict.fromkeys(models.view(vit).matrices, 2))
    with pytest.raises(ValueError, match="nothing to factor"):
        bench.rank_speed(thin)


def test_break_even_ends_at_the_first_rank_that_is_no_faster():
    columns = {
        "layer": list("aaabbb"),
        "rank": [8, 16, 24, 24, 8, 16],
        "speedup_q1": [2, 1.1, 0.9, 1.2, 0.9, 1.5],
    }
    assert bench.break_even(pd.DataFrame(columns)) == {"a": 16, "b": 0}


def test_times_of_layers_add_up_to_the_model(any_model):
    table = cost.breakdown(any_model)
    hooks = sum(len(layer._forward_hooks) for layer in any_model.modules())
    times = bench.layer_times(any_model, table, batch=2)
    assert times.shape == (len(table),) and (times >= 0).all()
    named = set(dict(any_model.named_modules()))
    assert (times[[layer in named for layer in table.layer]] > 0).all() or "position" in set(
        table.role
    )
    assert sum(len(layer._forward_hooks) for layer in any_model.modules()) == hooks
