"""train: masks hold, a killed run resumes bit-equal, distillation's closed form, cuts in steps, errors."""

import copy
import gc
import os
import random
import signal
import subprocess
import sys
import time
from unittest.mock import MagicMock

import pandas as pd
import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType

from vitlab import models
from vitlab.evaluation import evaluate
from vitlab.models import _layers
from vitlab.pruning import masks, prune, scores, shrink
from vitlab.studies import settings
from vitlab.training import _resume, train


class Blobs:
    """Images of one colour a class under noise: learnt in seconds. Stands in for a data.Split."""

    def __init__(self, n=96, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % 3
        self.x = (
            0.3 * torch.randn(n, 3, 16, 16, generator=generator)
            + torch.eye(3)[self.labels][:, :, None, None]
        )

    identity = "blobs"
    mean, std = (0.0,) * 3, (1.0,) * 3

    def __len__(self):
        return len(self.labels)

    def batches(
        self,
        batch_size,
        *,
        device="cpu",
        augment=False,
        shuffle=False,
        seed=0,
        epoch=0,
        drop_last=False,
    ):
        order = torch.arange(len(self))
        if shuffle:
            order = torch.randperm(
                len(self), generator=torch.Generator().manual_seed(1000 * seed + epoch)
            )
        for part in order.split(batch_size):
            if len(part) == batch_size or not drop_last:
                yield self.x[part].to(device), self.labels[part].to(device)


RECIPE = dict(lr=2e-3, batch_size=32, warmup_epochs=0.5, precision="float32")


def half_of(model):
    return {
        f"{name}.weight": torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(3))
        > 0.5
        for name, layer in models.view(model).linears().items()
    }


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_it_learns_and_tells_its_history(model):
    history = train.fit(model, Blobs(), Blobs(seed=1), dict(epochs=4, **RECIPE))
    assert history.epoch.tolist() == [1, 2, 3, 4]
    assert (
        history.val_top1.iloc[-1] > 90
        and history.train_loss.iloc[-1] < 0.6 * history.train_loss.iloc[0]
    )
    assert (
        (history.images_per_s > 0).all() and (history.resident_mb > 50).all() and not model.training
    )


@pytest.mark.parametrize("precision", ["float32", "bf16", "auto"])
def test_its_history_tells_the_precision(vit, precision):
    history = train.fit(vit, Blobs(), Blobs(seed=1), RECIPE | {"epochs": 1, "precision": precision})
    assert history.precision.tolist() == [
        evaluate.precision_on("cpu") if precision == "auto" else precision
    ]


def test_epochs_are_logged_to_the_loggers_that_are_named(vit, tmp_path, monkeypatch):
    images, recipe = (Blobs(), Blobs(seed=1)), RECIPE | {"epochs": 1}
    monkeypatch.delenv("VITLAB_LOG", raising=False)
    train.fit(vit, *images, recipe, folder=tmp_path / "a")
    assert not list(tmp_path.rglob("*tfevents*")), "nothing is logged unless it is asked for"
    pytest.importorskip("tensorboard")
    for number, name in enumerate(["1", "tensorboard"]):
        monkeypatch.setenv("VITLAB_LOG", name)
        train.fit(vit, *images, recipe, folder=tmp_path / name)
        assert len(list(tmp_path.rglob("*tfevents*"))) == number + 1
    monkeypatch.setenv("VITLAB_LOG", "tensorbord")
    with pytest.raises(ValueError, match="'tensorbord', did you mean 'tensorboard'"):
        train.fit(vit, *images, recipe, folder=tmp_path / "b")
    monkeypatch.setenv("VITLAB_LOG", "tensorboard,aim")
    with pytest.raises(ModuleNotFoundError, match="aim is missing: pip install aim"):
        train.fit(vit, *images, recipe, folder=tmp_path / "b")


def test_the_command_line_knows_the_loggers_of_accelerate():
    assert {*settings.LOGGERS} == {*LoggerType.list()} - {"all"}


def test_wandb_and_mlflow_get_each_epoch_of_a_run_that_is_called_after_it(
    vit, tmp_path, monkeypatch
):
    # Stand-ins, which need no network: accelerate calls them as it calls the real ones.
    wandb, mlflow = MagicMock(), MagicMock()
    mlflow.search_experiments.return_value = []
    there = [LoggerType.WANDB, LoggerType.MLFLOW]
    monkeypatch.setattr(tracking, "_available_trackers", there)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setenv("VITLAB_LOG", "wandb,mlflow")
    folder = tmp_path / "demo" / "vit" / "seed0" / "training"
    history = train.fit(vit, Blobs(), Blobs(seed=1), RECIPE | {"epochs": 2}, folder=folder)
    wandb.init.assert_called_once_with(project="vitlab", name="demo/vit/seed0/dense")
    assert mlflow.start_run.call_args.kwargs["run_name"] == "demo/vit/seed0/dense"
    for calls in (wandb.init().log.call_args_list, mlflow.log_metrics.call_args_list):
        assert [call.kwargs["step"] for call in calls] == [1, 2]
        assert [call.args[0]["val_top1"] for call in calls] == history.val_top1.tolist()
    wandb.init().finish.assert_called_once()
    mlflow.end_run.assert_called_once()


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_masks_hold_through_momentum_decay_and_averaging(model, ema):
    keep = half_of(model)
    recipe = dict(epochs=2, ema=ema, weight_decay=0.5, **RECIPE)
    history = train.fit(model, Blobs(), Blobs(seed=1), recipe, masks=keep)
    expected = sum(int((~m).sum()) for m in keep.values()) / sum(m.numel() for m in keep.values())
    assert (
        history.sparsity.tolist() == [expected, expected]
        and prune.sparsity(model, keep) == expected
    )
    for name, parameter in model.named_parameters():
        if name in keep:
            assert not parameter[~keep[name]].any() and parameter[keep[name]].all()


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("keep_best", [True, False])
def test_the_weights_that_are_kept_are_masked_too(vit, monkeypatch, ema, keep_best):
    seen = []  # the models that were validated, the first the best

    def accuracy(model, images, **options):
        seen.append(copy.deepcopy(model.state_dict()))
        return right(model, images, **options)._replace(top1=90.0 - len(seen))

    right = evaluate.accuracy
    monkeypatch.setattr(evaluate, "accuracy", accuracy)
    keep = half_of(vit)
    recipe = dict(epochs=3, ema=ema, keep_best=keep_best, **RECIPE)
    train.fit(vit, Blobs(), Blobs(seed=1), recipe, masks=keep)
    assert all(not state[name][~mask].any() for state in seen for name, mask in keep.items())
    kept = seen[0 if keep_best else -1]
    assert all(torch.equal(kept[name], tensor) for name, tensor in vit.state_dict().items())
    assert not torch.equal(seen[0]["head.weight"], seen[-1]["head.weight"])


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("support", _layers.SUPPORTS)
def test_sparse_parts_are_trained_on_their_support(vit, support, rank, ema):
    generator = torch.Generator().manual_seed(0)
    for name, layer in models.view(vit).linears(["qkv", "fc1"]).items():
        m, n = layer.weight.shape
        mask = {
            "entries": torch.rand(m, n, generator=generator),
            "rows": torch.rand(m, 1, generator=generator),
        }
        mask = (mask.get(support, torch.rand(n, generator=generator)) > 0.7).expand(m, n)
        u, v = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
        parts = dict(sparse=layer.weight.detach(), mask=mask, support=support, bias=layer.bias)
        vit.set_submodule(name, _layers.low_rank_sparse(0.1 * u, 0.1 * v, **parts))
    found = {
        name: layer
        for name, layer in vit.named_modules()
        if isinstance(layer, _layers.LowRankSparseLinear)
    }
    before = {
        name: (layer.support_mask.clone(), layer.sparse_weight.detach())
        for name, layer in found.items()
    }
    train.fit(vit, Blobs(), Blobs(seed=1), dict(epochs=2, ema=ema, weight_decay=0.5, **RECIPE))
    assert len(before) == 4
    for name, (mask, values) in before.items():
        assert found[name].support_mask.equal(mask) and not found[name].sparse_weight[~mask].any()
        assert (found[name].sparse_weight != values)[mask].float().mean() > 0.9  # it was trained
        if support == "entries":  # what is stored, too: it is counted as non-zero
            assert not found[name].sparse[~mask].any()


@pytest.mark.parametrize("ema", [0.2, 0.9999])
def test_averages_warm_up_so_that_a_short_training_forgets_its_start(vit, monkeypatch, ema):
    steps = []
    update = train.AveragedModel.update_parameters

    def recorded(self, model):
        steps.append(copy.deepcopy(model.state_dict()))
        update(self, model)

    monkeypatch.setattr(train.AveragedModel, "update_parameters", recorded)
    recipe = dict(epochs=6, ema=ema, keep_best=False, **RECIPE)
    history = train.fit(vit, Blobs(), Blobs(seed=1), recipe)
    assert history.val_top1.iloc[-1] > 90  # without the warm-up the model of the first step stays
    name = "head.weight"
    expected = steps[0][name]
    for n, weights in enumerate(steps[1:], 1):  # timm's own words: min(decay, (1 + n) / (10 + n))
        expected = expected.lerp(weights[name], 1 - min(ema, (1 + n) / (10 + n)))
    assert torch.equal(vit.state_dict()[name], expected)


def test_averaging_leaves_whole_numbers_alone(swin):
    """Swin's windows look up their position bias by index, which 0.9 * i + 0.1 * i would round down."""
    history = train.fit(
        swin, Blobs(), Blobs(seed=1), dict(epochs=4, ema=0.9, keep_best=False, **RECIPE)
    )
    result = evaluate.accuracy(swin, Blobs(seed=1))
    assert history.val_loss.iloc[-1] == pytest.approx(
        result.loss, rel=1e-5
    )  # what was validated is what is kept
    assert swin.patch_embed.steps[2].num_batches_tracked == 12


def test_a_second_call_is_bit_equal_and_another_seed_is_not(vit):
    runs = []
    for seed in (0, 0, 1):
        runs.append(copy.deepcopy(vit))
        train.fit(runs[-1], Blobs(), Blobs(seed=1), dict(epochs=1, seed=seed, **RECIPE))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from conftest import toy
from test_train import Blobs, RECIPE, half_of
from vitlab import train
model = toy("conv_vit", embed_dim=32, depth=2, num_heads=4, drop_path_rate=0.1)
print("begins", flush=True)
recipe = dict(epochs=12, ema=0.9, **RECIPE)
train.fit(model, Blobs(320), Blobs(seed=1), recipe, masks=half_of(model), folder={folder!r})
"""


@pytest.mark.long
def test_a_run_killed_for_real_three_times_goes_on_to_the_same_result(tmp_path):
    from conftest import toy

    whole, killed = (
        toy("conv_vit", embed_dim=32, depth=2, num_heads=4, drop_path_rate=0.1) for _ in range(2)
    )
    recipe, keep = dict(epochs=12, ema=0.9, **RECIPE), half_of(whole)
    begun = time.time()
    expected = train.fit(whole, Blobs(320), Blobs(seed=1), recipe, masks=keep)
    took, draw, done = time.time() - begun, random.Random(), [0]

    script = SCRIPT.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    state = tmp_path / "dense.state.pt"
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        time.sleep(
            draw.uniform(0, took / 3)
        )  # in a step, in a validation, while the state is written
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done.append(len(torch.load(state, weights_only=True)["history"]) if state.exists() else 0)
    assert done == sorted(done)

    history = train.fit(killed, Blobs(320), Blobs(seed=1), recipe, masks=keep, folder=tmp_path)
    assert same(whole, killed)
    columns = ["epoch", "train_loss", "train_top1", "val_loss", "val_top1", "lr", "sparsity"]
    pd.testing.assert_frame_equal(history[columns], expected[columns])


def test_a_damaged_state_costs_one_epoch_and_a_second_process_is_refused(
    vit, tmp_path, capsys, monkeypatch
):
    start, trained = copy.deepcopy(vit.state_dict()), []
    recipe, options = dict(epochs=3, **RECIPE), dict(folder=tmp_path, log=tmp_path / "board")
    expected = train.fit(vit, Blobs(), Blobs(seed=1), recipe, **options)
    assert list((tmp_path / "board").rglob("*tfevents*"))
    state = tmp_path / "dense.state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    vit.load_state_dict(start)
    schedule = train._schedule
    monkeypatch.setattr(
        train, "_schedule", lambda step, *rest: trained.append(step) or schedule(step, *rest)
    )
    again = train.fit(vit, Blobs(), Blobs(seed=1), recipe, **options)
    assert trained == [6, 7, 8] and again.train_loss.equals(
        expected.train_loss
    )  # of 3 steps an epoch the last
    said = capsys.readouterr().out
    assert "dense.state.pt cannot be read" in said
    assert "dense: taken from an earlier run (2 of 3 epochs, val " in said
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / ".dense.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    other.stdout.readline()
    with pytest.raises(
        RuntimeError, match="the training of dense in .* is under way in another process"
    ):
        train.fit(vit, Blobs(), Blobs(seed=1), recipe, **options)
    other.communicate(b"go")
    vit.load_state_dict(start)
    assert train.fit(vit, Blobs(), Blobs(seed=1), recipe, **options).train_loss.equals(
        expected.train_loss
    )


HOLDS = """
import sys
from vitlab import files
with files.lock(sys.argv[1], "a training"):
    print("holds", flush=True)
    sys.stdin.readline()
"""


def test_a_state_of_other_settings_or_a_damaged_one_is_not_used(vit, tmp_path, capsys):
    first = train.fit(vit, Blobs(), Blobs(seed=1), dict(epochs=1, **RECIPE), folder=tmp_path)
    again = train.fit(
        vit, Blobs(), Blobs(seed=1), dict(epochs=1, **RECIPE), folder=tmp_path
    )  # weights differ by now
    assert not first.train_loss.equals(again.train_loss)
    (tmp_path / "dense.state.pt").write_bytes(b"half a file")
    train.fit(vit, Blobs(), Blobs(seed=1), dict(epochs=1, **RECIPE), folder=tmp_path)
    assert "cannot be read" in capsys.readouterr().out


def test_distillation_from_itself_leaves_the_model_alone(vit):
    teacher = copy.deepcopy(vit)
    recipe = RECIPE | dict(
        epochs=1, lr=1e-8
    )  # AdamW would make steps of size lr out of rounding errors
    # Batch norm statistics move in train mode whatever the loss is; frozen, the distance to itself is zero.
    for module in vit.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module
    history = train.fit(
        vit, Blobs(), Blobs(seed=1), recipe, distil=train.Distillation(teacher, share=1.0)
    )
    assert history.train_loss.iloc[0] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_of_distillation_by_hand(vit, swin, share, temperature):
    split, distil = Blobs(32), train.Distillation(swin, share, temperature)
    x, y = next(split.batches(32))
    with torch.no_grad():
        student, teacher = copy.deepcopy(vit).train()(x).double(), swin(x).double()
    target = torch.nn.functional.one_hot(y, 3) * 0.9 + 0.1 / 3  # smoothed labels
    hard = -(target * student.log_softmax(1)).sum(1).mean()
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    soft = (p * (p.log() - q.log())).sum(1).mean()
    expected = (1 - share) * hard + share * temperature**2 * soft
    history = train.fit(
        vit, split, Blobs(seed=1), dict(epochs=1, **RECIPE), distil=distil
    )  # one step, one batch
    assert history.train_loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_teacher_at_high_temperature_keeps_its_weight(vit, swin):
    """Why T**2: gradients of the softened loss shrink with it (Hinton et al. 2015, section 2)."""
    x, losses = Blobs(32).x, []
    for temperature in (50.0, 100.0):
        model = copy.deepcopy(vit)
        distil = train.Distillation(swin, share=1.0, temperature=temperature)
        history = train.fit(model, Blobs(32), Blobs(), dict(epochs=1, **RECIPE), distil=distil)
        losses.append(history.train_loss.item())
    with torch.no_grad():
        distance = copy.deepcopy(vit).train()(x) - swin(x)
    limit = (
        0.5 * distance.sub(distance.mean(1, keepdim=True)).square().mean()
    )  # in the limit, matched logits
    assert losses == pytest.approx([limit.item()] * 2, rel=0.05)


def test_a_state_of_another_teacher_is_not_used(vit):
    other = copy.deepcopy(vit)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    keys = {_resume.fingerprint({}, vit, None, teacher) for teacher in (None, vit, other)}
    assert len(keys) == 3 and _resume.fingerprint({}, vit, None, copy.deepcopy(vit)) in keys


def at_random(model, share):
    """The worst case for masks that may only grow: scores that know nothing of the step before."""
    names = [f"{name}.weight" for name in models.view(model).linears()]
    saliency = {name: torch.rand(model.get_parameter(name).shape) for name in names}
    return model, prune.keep_more_zero(model, saliency, sparsity=share)


def neurons(model, share):
    """A smaller model: share of the 64 neurons a block is gone, by magnitude."""
    units = {
        k: v
        for k, v in scores.units(model, criteria="magnitude")["magnitude"].items()
        if k[1] == "neurons"
    }
    keep = {
        key: masks.keep_largest(score, count=len(score) - round((1 - share) * 64))
        for key, score in units.items()
    }
    return shrink.remove(model, masks.dropped(keep)), None


def test_masks_grow_by_the_schedule_and_the_dead_stay_dead(model):
    found, shares = [], prune.shares("cubic", 3, final=0.8)

    def cut(model, share):
        for name, mask in (found[-1] if found else {}).items():
            assert model.get_parameter(name).eq(0).equal(~mask)
        found.append(at_random(model, share)[1])
        return model, found[-1]

    recipe, options = dict(epochs=1, ema=0.5, **RECIPE), dict(shares=shares, tail_epochs=2)
    same_model, keep, history = train.in_steps(
        model, cut, Blobs(), Blobs(seed=1), recipe, **options
    )
    total = sum(mask.numel() for mask in keep.values())
    expected = [round(share * total) / total for share in shares]
    assert same_model is model and keep is found[-1] and history.epoch.tolist() == [1, 2, 3, 4]
    assert history.step.tolist() == [1, 2, 3, 3] and history.share.tolist() == [*shares, 0.8]
    assert history.sparsity.tolist() == [*expected, expected[-1]]
    assert prune.sparsity(model, keep) == expected[-1] and history.params.nunique() == 1
    for before, after in zip(found, found[1:], strict=False):
        assert not any((after[name] & ~before[name]).any() for name in after)
    for name, mask in keep.items():
        assert not model.get_parameter(name)[~mask].any()


def test_a_model_shrinks_step_by_step(model):
    before = sum(parameter.numel() for parameter in model.parameters())
    sizes = [block.neurons for block in models.view(model).blocks]
    shares = [0.25, 0.5]

    def cut(model, share):
        pairs = zip(models.view(model).blocks, sizes, strict=True)
        drop = {
            (block.name, "neurons"): range(block.neurons - round((1 - share) * n))
            for block, n in pairs
        }
        return shrink.remove(model, drop), None

    recipe = dict(epochs=1, **RECIPE)
    small, keep, history = train.in_steps(model, cut, Blobs(), Blobs(), recipe, shares=shares)
    assert keep is None and before > history.params[0] > history.params[1]
    assert [block.neurons for block in models.view(small).blocks] == [n // 2 for n in sizes]
    assert history.params.iloc[-1] == sum(parameter.numel() for parameter in small.parameters())
    assert (
        small is not model and sum(parameter.numel() for parameter in model.parameters()) == before
    )


class Stop(Exception):
    pass


def test_mixed_labels_sum_to_one_and_are_those_of_the_mixed_images(vit):
    x = (
        torch.arange(8.0)[:, None, None, None]
        .expand(8, 3, 16, 16)
        .contiguous(memory_format=torch.channels_last)
    )
    y, state = torch.arange(8) % 3, torch.get_rng_state()  # neighbours differ
    for alphas in ((0.8, 0.0), (0.0, 1.0), (0.4, 1.0)):
        recipe, found = train.Recipe(epochs=2, lr=1e-3, mixup=alphas[0], cutmix=alphas[1]), []

        def mix(x, y, seeds, recipe=recipe):
            return train._mix(x, y, recipe, vit.num_classes, seeds)

        for step in range(20):
            mixed, shares = mix(x, y, (1, 2, step))
            assert (
                shares.shape == (8, 3)
                and torch.allclose(shares.sum(1), torch.ones(8))
                and shares.min() >= 0
            )
            own = shares[torch.arange(8), y]
            expected = own * x[:, 0, 0, 0] + (1 - own) * x[:, 0, 0, 0].roll(1)
            assert torch.allclose(mixed.mean((1, 2, 3)), expected, atol=1e-4)
            assert mixed.is_contiguous(memory_format=torch.channels_last)
            found.append((own[1].item(), len(mixed[1].unique())))
            assert all(map(torch.equal, mix(x, y, (1, 2, step)), (mixed, shares)))
        assert len(set(found)) > 10
        kinds = {
            values for share, values in found if 0.1 < share < 0.9
        }  # one value: mixed; two: cut
        assert kinds == ({1, 2} if all(alphas) else {1} if alphas[0] else {2})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)])
def test_the_loss_of_mixed_labels_by_hand(vit, alphas):
    split = Blobs(32)
    recipe = dict(epochs=1, mixup=alphas[0], cutmix=alphas[1], **RECIPE)  # one step, one batch
    x, y = next(split.batches(32, shuffle=True))
    x, shares = train._mix(x, y, train.Recipe(**recipe), vit.num_classes, (0, 0, 0))
    with torch.no_grad():
        logits = copy.deepcopy(vit).train()(x)
    expected = -((shares * 0.9 + 0.1 / 3) * logits.log_softmax(1)).sum(1).mean()  # smoothed, too
    history = train.fit(vit, split, Blobs(seed=1), recipe)
    assert history.train_loss.item() == pytest.approx(expected.item(), rel=1e-4)
    right = (logits.argmax(1) == shares.argmax(1)).float().mean()
    assert history.train_top1.item() == pytest.approx(100 * right.item())


def test_a_stopped_run_with_mixing_goes_on_to_the_same_result(tmp_path, monkeypatch):
    from conftest import toy

    whole, stopped, plain = (
        toy("conv_vit", embed_dim=32, depth=2, num_heads=4, drop_path_rate=0.1) for _ in range(3)
    )
    start, recipe = (
        copy.deepcopy(stopped.state_dict()),
        dict(epochs=3, mixup=0.8, cutmix=1.0, **RECIPE),
    )
    expected = train.fit(whole, Blobs(), Blobs(seed=1), recipe)
    right, calls = evaluate.accuracy, []

    def accuracy(*arguments, **named):
        calls.append(len(calls))
        if len(calls) == 3:  # in the third epoch
            raise Stop
        return right(*arguments, **named)

    monkeypatch.setattr(evaluate, "accuracy", accuracy)
    with pytest.raises(Stop):
        train.fit(stopped, Blobs(), Blobs(seed=1), recipe, folder=tmp_path)
    stopped.load_state_dict(start)
    history = train.fit(stopped, Blobs(), Blobs(seed=1), recipe, folder=tmp_path)
    assert (
        len(calls) == 4 and same(whole, stopped) and history.train_loss.equals(expected.train_loss)
    )
    train.fit(plain, Blobs(), Blobs(seed=1), recipe | {"mixup": 0.0, "cutmix": 0.0})
    assert not same(whole, plain)


def test_without_mixing_nothing_is_drawn_for_it(vit, monkeypatch):
    monkeypatch.setattr(train, "_mix", lambda *batch: pytest.fail(f"drew with {batch}"))
    train.fit(vit, Blobs(), Blobs(seed=1), dict(epochs=1, mixup=0, cutmix=0.0, **RECIPE))


def test_training_needs_the_same_memory_whatever_ran_before(vit):
    def peak(batch_size):
        recipe = RECIPE | {"epochs": 2, "batch_size": batch_size}
        return train.fit(
            copy.deepcopy(vit), Blobs(1024), Blobs(seed=1), recipe
        ).training_mb.tolist()

    small, large, again = peak(128), peak(1024), peak(128)
    assert max(small + again) < 1.2 * min(small + again) + 10 and min(large) > 2 * max(
        small + again
    ), (small, large)


def test_a_finished_training_holds_nothing_that_waits_for_the_garbage_collector(vit, tmp_path):
    def tensors():
        return {id(each) for each in gc.get_objects() if issubclass(type(each), torch.Tensor)}

    teacher = train.Distillation(copy.deepcopy(vit).eval())
    recipe = RECIPE | dict(epochs=1, ema=0.5, precision="bf16")
    how = {"distil": teacher, "masks": half_of(vit), "folder": tmp_path}
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        model = copy.deepcopy(vit)
        train.fit(model, Blobs(), Blobs(seed=1), recipe, **how)
        # gradients belong to the model
        own = {id(each) for weight in model.parameters() for each in (weight, weight.grad)}
        own |= {id(each) for each in model.buffers()}
        assert tensors() - before <= own
    finally:
        gc.enable()


@pytest.mark.parametrize("cut", [at_random, neurons])
def test_steps_go_on_after_a_stop_to_the_same_result(vit, tmp_path, monkeypatch, cut):
    start, calls = copy.deepcopy(vit.state_dict()), []
    recipe, shares = dict(epochs=2, seed=5, **RECIPE), [0.25, 0.5, 0.75]
    whole, _, expected = train.in_steps(
        copy.deepcopy(vit), cut, Blobs(), Blobs(seed=1), recipe, shares=shares
    )

    right = evaluate.accuracy

    def accuracy(*arguments, **named):
        calls.append(len(calls))
        if (
            len(calls) == 4
        ):  # after the training of the second step's second epoch, before its state is saved
            raise Stop
        return right(*arguments, **named)

    monkeypatch.setattr(evaluate, "accuracy", accuracy)
    with pytest.raises(Stop):
        train.in_steps(vit, cut, Blobs(), Blobs(seed=1), recipe, shares=shares, folder=tmp_path)
    vit.load_state_dict(start)
    again, _, history = train.in_steps(
        vit, cut, Blobs(), Blobs(seed=1), recipe, shares=shares, folder=tmp_path
    )
    assert len(calls) == 4 + 3  # three epochs of six were done already
    assert same(whole, again)
    columns = [
        "stage",
        "epoch",
        "step",
        "share",
        "params",
        "train_loss",
        "val_loss",
        "lr",
        "sparsity",
    ]
    pd.testing.assert_frame_equal(history[columns], expected[columns])


def test_every_step_draws_other_images(vit):
    class Spy(Blobs):
        def batches(self, *arguments, **named):
            if named.get("shuffle"):
                seen.append((named["seed"], named["epoch"]))
            yield from super().batches(*arguments, **named)

    seen = []
    for seed in (0, 1):
        model = copy.deepcopy(vit)
        recipe = dict(epochs=1, seed=seed, **RECIPE)
        train.in_steps(model, at_random, Spy(), Blobs(), recipe, shares=[0.2, 0.4])
    assert len(set(seen)) == 4


def test_steps_that_make_no_sense_are_refused(vit):
    def steps(cut, shares):
        train.in_steps(vit, cut, Blobs(), Blobs(), dict(epochs=1, **RECIPE), shares=shares)

    for shares in ([], [0.5, 0.5], [0.5, 0.2], [0, 0.5], [0.5, 1], [20, 40]):
        with pytest.raises(ValueError, match="shares must rise, above 0 and below 1"):
            steps(at_random, shares)
    with pytest.raises(ValueError, match="the first cut, of 0.5, changed nothing"):
        steps(lambda model, share: (model, None), [0.5])
    (name, keep), (other, rest) = list(half_of(vit).items())[:2]
    for second in (
        {name: ~keep},
        {other: rest},
        None,
    ):  # other weights die, or those are not masked any more
        turns = iter([{name: keep}, second])
        with pytest.raises(ValueError, match=f"brings dead weights of {name} back"):
            steps(lambda model, share, turns=turns: (model, next(turns)), [0.3, 0.5])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(epochs=-1), "epochs\n.*greater than or equal to 0"),
        (dict(epochs=0), "epochs: 0 takes the model's weights as they are, and its head is new"),
        (dict(epochs=2, warmup_epochs=2), "warmup_epochs < epochs"),
        (dict(epochs=2, ema=1.0), "ema\n.*less than 1"),
        (dict(epochs=2, label_smoothing=10), "label_smoothing\n.*less than 1"),
        (dict(epochs=2, mixup=-0.1), "mixup\n.*greater than or equal to 0"),
        (dict(epochs=2, batch_size=0), "batch_size\n.*greater than 0"),
        (dict(epochs=2, images=0), "images\n.*greater than 0"),
    ],
)
def test_settings_out_of_range_are_an_error(vit, wrong, said):
    with pytest.raises(ValueError, match=said):
        train.fit(vit, Blobs(), Blobs(seed=1), RECIPE | wrong)


def test_no_epochs_take_given_weights_as_they_are(vit):
    before = copy.deepcopy(vit.state_dict())
    vit.is_head_new = False  # as of weights
    history = train.fit(vit, Blobs(), Blobs(seed=1), RECIPE | {"epochs": 0, "warmup_epochs": 3.0})
    measured = evaluate.accuracy(vit, Blobs(seed=1), precision="float32")
    assert history[["epoch", "val_top1", "seconds"]].values.tolist() == [[0, measured.top1, 0]]
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert vit.normalise and not vit.training


@pytest.mark.parametrize("share", [-0.1, 50])
def test_a_teachers_share_is_no_percentage(vit, share):
    with pytest.raises(ValueError, match=r"share lies in \[0, 1\]"):
        train.Distillation(vit, share)


def test_divergence_is_said(vit):
    with pytest.raises(FloatingPointError, match="use a lower lr"):
        train.fit(vit, Blobs(), Blobs(), RECIPE | {"epochs": 3, "lr": 1e30, "clip_norm": 0.0})


def test_schedule_rises_to_the_peak_and_falls_to_zero():
    rates = [train._schedule(step, 100, 10) for step in range(100)]
    assert (
        rates[:11] == sorted(rates[:11])
        and rates[10] == 1
        and rates[10:] == sorted(rates[10:], reverse=True)
    )
    assert 0 < rates[99] < 1e-3
