"""The head alone, and rates by layer: what moves and what does not, on every architecture, cut and masked."""

import copy
import re

import pytest
import torch
from conftest import OTHERS, toy
from test_every import SMALLER, STORED
from test_train import RECIPE, Blobs, half_of, same
from timm.optim import create_optimizer_v2
from torch.nn.functional import cross_entropy, linear

from vitlab import models
from vitlab.evaluation import evaluate
from vitlab.models import anatomy
from vitlab.pruning import prune, shrink
from vitlab.training import _resume, train

ALONE = RECIPE | {"epochs": 0, "head": True}


def test_only_the_head_changes_and_it_learns(any_model):
    before = copy.deepcopy(any_model.state_dict())
    history = train.fit(any_model, Blobs(), Blobs(seed=1), ALONE)
    changed = {name for name, old in before.items() if not any_model.state_dict()[name].equal(old)}
    heads = anatomy.classifier_names(any_model)
    assert changed == {f"{name}.{part}" for name in heads for part in ("weight", "bias")}
    result = evaluate.accuracy(any_model, Blobs(seed=1))
    assert history.epoch.tolist() == [0] and history.val_top1.tolist() == [result.top1]
    assert result.top1 > 90 and history.strength.item() in evaluate.STRENGTHS


def test_the_head_is_the_logistic_regression_by_hand(vit):
    [history] = train.fit(vit, Blobs(), Blobs(seed=1), ALONE).to_dict("records")
    seen, labels = evaluate.features(vit, Blobs())
    assert torch.allclose(vit.head(seen), vit(Blobs().x), atol=1e-5)
    scale = seen.double().std(0)
    weight, bias = (part.detach().double().requires_grad_() for part in vit.head.parameters())
    loss = cross_entropy(linear(seen.double(), weight, bias), labels)
    assert history["train_loss"] == pytest.approx(loss.item(), rel=1e-3)
    (loss + history["strength"] / 2 * (weight * scale).square().sum()).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-3  # no gradient at the optimum


def test_masks_and_averages_hold_for_the_head_alone(vit):
    keep = half_of(vit) | {"head.weight": torch.arange(32) % 2 == torch.zeros(3, 1)}
    recipe = ALONE | {"epochs": 1, "ema": 0.5}
    history = train.fit(vit, Blobs(), Blobs(seed=1), recipe, masks=keep)
    assert history.epoch.tolist() == [0, 1] and history.lr[0] == 0
    assert not any(vit.get_parameter(name)[~mask].any() for name, mask in keep.items())


def test_the_log_calls_it_no_epoch(vit, tmp_path, capsys):
    for _ in range(2):
        train.fit(copy.deepcopy(vit), Blobs(), Blobs(seed=1), ALONE, folder=tmp_path)
    first, *_, again = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"dense: the head alone is fitted, val [\d.]+ %, \d+ s", first)
    assert re.fullmatch(r"dense: taken from an earlier run \(the head alone, val .*\)", again)


def test_a_stopped_run_does_not_compute_features_twice(vit, tmp_path, monkeypatch):
    whole, start = copy.deepcopy(vit), copy.deepcopy(vit.state_dict())
    recipe = ALONE | {"epochs": 2}
    expected = train.fit(whole, Blobs(), Blobs(seed=1), recipe)
    steps = train.Training._steps

    def stopped(self, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return steps(self, epoch)

    monkeypatch.setattr(train.Training, "_steps", stopped)
    with pytest.raises(KeyboardInterrupt):
        train.fit(vit, Blobs(), Blobs(seed=1), recipe, folder=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(
        evaluate, "features", lambda *_, **options: pytest.fail("computed them again")
    )
    vit.load_state_dict(start)
    history = train.fit(vit, Blobs(), Blobs(seed=1), recipe, folder=tmp_path)
    assert same(whole, vit) and history.train_loss.equals(expected.train_loss)


def test_a_model_without_a_head_is_refused(vit):
    vit.reset_classifier(0)
    with pytest.raises(ValueError, match="the model has 0 classes, the images"):
        train.fit(vit, Blobs(), Blobs(), ALONE)


def rates(model, decay):
    """{parameter: its share of the rate} of what `fit` gives the optimizer."""
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = [
        (names[id(parameter)], group["lr_scale"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(pairs) == len(dict(pairs)) == len(names)  # each parameter once
    return dict(pairs)


CASES = [(name, None) for name in ("vit", "swin", *OTHERS)]
CASES += [("vit", "pool"), ("swin", "pool"), ("registers", "ranks"), ("swinv2", "ranks")]
CASES += [("vit", "svd+iht"), ("swin", "no block in the last block")]


@pytest.mark.parametrize(("architecture", "change"), CASES)
def test_rates_fall_from_the_head_to_the_stem(architecture, change, batch, request):
    model = toy(**OTHERS[architecture]) if architecture in OTHERS else None
    model = model or request.getfixturevalue(architecture)
    if change:
        model = (SMALLER | STORED)[change](model, batch)
    found = rates(model, 0.5)
    assert {found[f"{name}.weight"] for name in anatomy.classifier_names(model)} == {1.0}
    blocks = [block.name for block in models.view(model).blocks]
    stages = [{rate for name, rate in found.items() if name.startswith(f"{b}.")} for b in blocks]
    stages = [stage for stage in stages if stage]  # a block that is gone has no parameters
    assert all(len(stage) == 1 for stage in stages)
    ordered = [stage.pop() for stage in stages]
    assert all(low == high / 2 for low, high in zip(ordered, ordered[1:], strict=False))
    assert {r for n, r in found.items() if n.startswith("patch_embed.")} == {ordered[0] / 2}


@pytest.mark.parametrize("masked", [False, True])
def test_each_step_moves_a_layer_by_its_share(model, masked):
    """The first step of AdamW without weight decay is the rate, whatever the gradient."""
    before, keep = copy.deepcopy(model), half_of(model) if masked else None
    if masked:
        prune.apply(before, keep)
    recipe = dict(epochs=1, lr=1e-3, weight_decay=0.0, layer_decay=0.5, warmup_epochs=0.0)
    train.fit(model, Blobs(32), Blobs(), recipe | {"precision": "float32"}, masks=keep)
    shares = rates(model, 0.5)
    old = dict(before.named_parameters())
    for name, new in model.named_parameters():
        moved = (new - old[name]).abs().max().item()
        assert moved == pytest.approx(1e-3 * shares[name], rel=0.02), name


def test_without_them_trainings_and_their_states_are_the_same(vit, monkeypatch):
    settings = []
    monkeypatch.setattr(
        _resume, "fingerprint", lambda found, *rest: settings.append(found) or str(found)
    )
    other = copy.deepcopy(vit)
    train.fit(vit, Blobs(), Blobs(seed=1), RECIPE | {"epochs": 1})
    train.fit(other, Blobs(), Blobs(seed=1), RECIPE | {"epochs": 1, "layer_decay": 1.0})
    assert same(vit, other) and settings[0] == settings[1]
    assert not {"layer_decay", "head"} & settings[0].keys()
    train.fit(other, Blobs(), Blobs(seed=1), RECIPE | {"epochs": 1, "layer_decay": 0.5})
    assert settings[2]["layer_decay"] == 0.5


def test_a_cut_model_trains_on_with_rates_by_layer(swin):
    small = shrink.remove(swin, {("layers.0.blocks.1", "block"): range(1)})
    recipe = RECIPE | {"epochs": 2, "layer_decay": 0.7}
    history = train.fit(small, Blobs(), Blobs(seed=1), recipe)
    assert history.val_top1.iloc[-1] > 60


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_a_decay_is_a_share(vit, decay):
    with pytest.raises(ValueError, match="layer_decay"):
        train.fit(vit, Blobs(), Blobs(), RECIPE | {"epochs": 1, "layer_decay": decay})
