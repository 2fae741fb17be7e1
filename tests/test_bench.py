"""Benchmarks: structure, pairing and a process of its own. Times themselves are never asserted."""

import subprocess

import pandas as pd
import pytest
import torch

from vitlab import bench, checkpoint, models


def test_one_row_per_model(vit, swin):
    swin.train()
    threads = torch.get_num_threads()
    table = bench.latency({"vit": vit, "swin": swin, "again": vit}, batch=2, repeats=4, warmup=1)
    assert table.model.tolist() == ["vit", "swin", "again"]
    assert (table[["rounds", "batch", "image_size", "threads"]] == [4, 2, 16, threads]).all(axis=None)
    assert (table.precision == "float32").all() and (table.device == "cpu").all()
    assert (table.latency_q1 <= table.latency_ms).all() and (table.latency_ms <= table.latency_q3).all()
    assert (table.speedup_q1 <= table.speedup).all() and (table.speedup <= table.speedup_q3).all()
    assert table.image_ms.tolist() == (table.latency_ms / 2).tolist()
    assert (table.images_per_s * table.image_ms).tolist() == pytest.approx([1000] * 3)
    assert table.loc[0, ["speedup_q1", "speedup", "speedup_q3"]].tolist() == [1, 1, 1]
    assert swin.training and not vit.training  # timed in eval mode, left as they were


def test_in_bf16_and_with_other_threads(vit):
    table = bench.latency({"vit": vit}, batch=2, repeats=1, warmup=0, precision="bf16", threads=2)
    assert (table.precision[0], table.threads[0]) == ("bf16", 2)
    assert torch.get_num_threads() == 1
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


def test_models_take_turns_in_changing_order(vit, monkeypatch):
    seen, milliseconds = [], bench._milliseconds
    monkeypatch.setattr(bench, "_milliseconds", lambda m, x, d: seen.append(m) or milliseconds(m, x, d))
    runs = {name: (torch.nn.Identity(), torch.zeros(1)) for name in "abc"}
    bench._rounds(runs, repeats=12, seconds=60, warmup=0, device=torch.device("cpu"))
    names = {id(model): name for name, (model, _) in runs.items()}
    rounds = ["".join(names[id(model)] for model in seen[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 3


def test_memory_in_processes_of_their_own(vit, tmp_path):
    checkpoint.save(vit, tmp_path)
    one, other = bench.memory_mb({"model": vit, "folder": tmp_path}, batch=4096, threads=1).values()
    # the images and what the first convolution makes of them are held at once: 12.6 + 134.2 MB
    assert 146 < one < 1000 and abs(one - other) < 20


def test_memory_of_what_cannot_run(vit, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        bench.memory_mb(tmp_path / "nothing")
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: not enough memory")
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: failed)
    with pytest.raises(RuntimeError, match="vitlab.bench .*--batch=9 .*failed: RuntimeError: not enough memory"):
        bench.memory_mb(vit, batch=9)


def test_bad_input(vit):
    with pytest.raises(ValueError, match="no models to time"):
        bench.latency({})
    with pytest.raises(ValueError, match="unknown precision 'fp16'; known are float32, bf16"):
        bench.latency({"vit": vit}, precision="fp16")
    with pytest.raises(ValueError, match="built for 16 x 16 pixels and cannot run at 32"):
        bench.latency({"vit": vit}, image_size=32)


def test_each_model_at_its_own_size():
    sizes = {16: models.create("conv_vit", num_classes=3, image_size=16, depth=1, embed_dim=32)}
    sizes[32] = models.create("conv_vit", num_classes=3, depth=1, embed_dim=32)
    table = bench.latency({str(size): model for size, model in sizes.items()}, batch=1, repeats=3)
    assert table.image_size.tolist() == [16, 32]
