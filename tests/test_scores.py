"""Laws of the scores: gates equal brute force, weights their definitions, nothing stays on the model."""

import copy
import itertools

import pytest
import torch
from conftest import OTHERS, toy
from torch import nn
from torch.nn.functional import cross_entropy, normalize, pad

from vitlab import models
from vitlab.models import anatomy
from vitlab.pruning import _sweep, lowrank, masks, pool, scores, shrink

CHANNELS = ("qk", "v", "width")


def split(batch, size):
    return list(zip(batch[0].split(size), batch[1].split(size), strict=True))


def brute_force(model, batch, places, units, *, channels=None):
    """dL_b/dz [B, units] by autograd: one image at a time, an explicit gate of ones per unit, no folding.

    places: all (module, output?) that the gates multiply, on their first channels (None: all).
    """
    gates = torch.ones(units, requires_grad=True)

    def gated(x):
        z = gates.repeat_interleave((channels or x.shape[-1]) // units)
        return x * pad(z, (0, x.shape[-1] - len(z)), value=1)

    def hook(module, output):
        if output:
            return module.register_forward_hook(lambda _, arguments, result: gated(result))
        return module.register_forward_pre_hook(lambda _, arguments: gated(arguments[0]))

    handles = [hook(module, output) for module, output in places]
    found = []
    for x, y in split(batch, 1):
        found.append(torch.autograd.grad(cross_entropy(model(x), y), gates)[0])
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def assert_gates(found, key, gradients):
    mean = gradients.abs().mean(0)
    torch.testing.assert_close(found["taylor"][key], mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["michel"][key], mean / mean.norm(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found["fisher"][key], gradients.square().mean(0) / 2, rtol=1e-4, atol=1e-7
    )


FILTERS = {
    "patch_embed.steps.0": "patch_embed.steps.2",
    "patch_embed.steps.4": "patch_embed.steps.6",
}  # their norms


def record(model, batch, places):
    """{key: values [tokens, channels]} of {key: (module, output?)} in one plain forward pass."""
    values = {}

    def keep(key, x):
        values[key] = (x.movedim(1, -1) if key in FILTERS else x).detach().flatten(0, -2).double()

    handles = [
        module.register_forward_hook(
            lambda _, x, y, key=key, output=output: keep(key, y if output else x[0])
        )
        for key, (module, output) in places.items()
    ]
    model(batch[0])
    for handle in handles:
        handle.remove()
    return values


def test_unit_gates_equal_brute_force(model, batch):  # Swin: windows, shifted in every second block
    found = scores.units(model, split(batch, 4), criteria=["taylor", "michel", "fisher"])
    for block in models.view(model).blocks:
        for kind, layer, units in (
            ("heads", block.attn.proj, block.num_heads),
            ("neurons", block.mlp.fc2, block.neurons),
        ):
            assert_gates(
                found, (block.name, kind), brute_force(model, batch, [(layer, False)], units)
            )


def test_gates_of_head_dimensions_equal_brute_force(model, batch):
    found = scores.units(
        model, split(batch, 4), criteria=["taylor", "michel", "fisher"], kinds=["v", "qk"]
    )
    blocks = models.view(model).blocks
    assert list(found["fisher"]) == [(block.name, kind) for block in blocks for kind in ("qk", "v")]
    for block in blocks:
        size = block.num_heads * block.head_dim
        gradients = brute_force(model, batch, [(block.attn.qkv, True)], size, channels=size)
        assert_gates(found, (block.name, "qk"), gradients)
        assert_gates(
            found, (block.name, "v"), brute_force(model, batch, [(block.attn.proj, False)], size)
        )


def test_a_gate_on_keys_is_the_gate_on_queries(vit, batch):
    """q_d k_d is a product: why one score stands for the pair."""
    seen = []
    vit.blocks[1].attn.qkv.register_forward_hook(lambda _, x, y: seen.append(y) or y.retain_grad())
    cross_entropy(vit(batch[0]), batch[1], reduction="sum").backward()
    q, k, _ = (seen[0] * seen[0].grad).detach().sum(1).abs().mean(0).chunk(3)
    torch.testing.assert_close(k, q, rtol=1e-3, atol=1e-6)
    found = scores.units(vit.requires_grad_(False), [batch], criteria="taylor", kinds="qk")[
        "taylor"
    ]
    torch.testing.assert_close(found["blocks.1", "qk"], q, rtol=1e-4, atol=1e-6)


def writes(model, stage):
    """All places where a stage's residual stream is written to, behind LayerScale and window merging."""
    blocks = [
        model.get_submodule(block.name)
        for block in models.view(model).blocks
        if block.stage == stage
    ]
    ends = [(end, True) for block in blocks for end in (block.drop_path1, block.drop_path2)]
    return [(blocks[0], False), *ends], blocks[-1]


def test_width_gates_equal_brute_force(
    any_model, batch
):  # DeiT-3 has LayerScale, SwinV2 its norms last
    found = scores.units(
        any_model, split(batch, 4), criteria=["taylor", "michel", "fisher"], kinds=["width"]
    )
    assert list(found["taylor"]) == [(stage, "width") for stage in models.view(any_model).stages]
    for number, (key, score) in enumerate(found["taylor"].items()):
        assert_gates(
            found, key, brute_force(any_model, batch, writes(any_model, number)[0], len(score))
        )


def test_a_blocks_gate_is_on_both_that_it_writes(any_model, batch):
    view = models.view(any_model)
    found = scores.units(
        any_model, split(batch, 4), criteria=["taylor", "michel", "fisher"], kinds=["block"]
    )
    assert list(found["taylor"]) == [(block.name, "block") for block in view.blocks]
    for block in view.blocks:
        gradients = []
        for x, y in split(batch, 1):
            gate = torch.ones(1, requires_grad=True)
            handles = [
                module.register_forward_hook(lambda _, arguments, result, z=gate: z * result)
                for module in view.residual_writers(block)
            ]
            gradients.append(torch.autograd.grad(cross_entropy(any_model(x), y), gate)[0])
            for handle in handles:
                handle.remove()
        assert_gates(found, (block.name, "block"), torch.stack(gradients))


def test_directions_equal_brute_force(model, batch):
    """A gate on the last directions of a layer's weight together, one image at a time."""
    view = models.view(model)
    bases = {name: lowrank.svd(m.weight.detach().flatten(1), min(m.weight.flatten(1).shape)) for name, m in
             view.matrices.items()}  # fmt: skip
    found = scores.directions(model, split(batch, 4), bases)
    assert list(found) == list(bases)
    for name, layer in view.matrices.items():
        (u, v), whole = bases[name], layer.weight.detach().clone()
        for first in (0, len(v) // 2, len(v)):
            gradients = []
            for x, y in split(batch, 1):
                layer.weight.requires_grad_(True)
                by_weight = torch.autograd.grad(cross_entropy(model(x), y), layer.weight)[
                    0
                ].flatten(1)
                gradients.append((by_weight * (u[:, first:] @ v[first:])).sum())
            expected = torch.stack(gradients).double().square().mean() / 2
            torch.testing.assert_close(found[name][first], expected, rtol=1e-3, atol=1e-12)
        assert found[name].shape == (len(v) + 1,) and layer.weight.equal(whole)


def test_gates_of_filters_sit_behind_their_norm(model, batch):
    found = scores.units(
        model, split(batch, 4), criteria=["taylor", "michel", "fisher"], kinds=["filters"]
    )
    assert list(found["taylor"]) == [(name, "filters") for name in FILTERS]
    for name, norm in FILTERS.items():
        module = model.get_submodule(norm)
        gradients = []
        for x, y in split(batch, 1):
            gates = torch.ones(1, module.num_features, 1, 1, requires_grad=True)
            handle = module.register_forward_hook(
                lambda _, arguments, result, gates=gates: result * gates
            )
            gradients.append(torch.autograd.grad(cross_entropy(model(x), y), gates)[0].flatten())
            handle.remove()
        assert_gates(found, (name, "filters"), torch.stack(gradients))


def test_what_is_left_of_a_cut_model_is_scored(model, batch):
    """Attention without heads, an MLP without neurons and a block that is gone have no scores, the others do."""
    first, second = (block.name for block in models.view(model).blocks[:2])
    counts = models.view(model).units()
    gone = {
        (second, "neurons"): range(counts[second, "neurons"]),
        (first, "heads"): range(counts[first, "heads"]),
    }
    for drop in (gone, gone | {(first, "block"): [0]}):
        small = shrink.remove(model, drop)
        found = scores.units(
            small, [batch], criteria="fisher", kinds=["heads", "neurons", "v", "width"]
        )["fisher"]
        counts = models.view(small).units(["heads", "neurons", "v", "width"])
        assert {key: len(score) for key, score in found.items()} == counts
        assert (
            (second, "neurons") not in found
            and (first, "heads") not in found
            and (second, "heads") in found
        )


def test_row_gates_equal_brute_force(model, batch):
    found = scores.rows(model, split(batch, 4), criteria=["taylor", "michel", "fisher"])
    linears = models.view(model).linears()
    assert list(found["taylor"]) == list(found["fisher"]) == list(linears)
    for name, layer in linears.items():
        gradients = brute_force(model, batch, [(layer, True)], layer.out_features)
        torch.testing.assert_close(
            found["taylor"][name], gradients.abs().mean(0), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            found["fisher"][name], gradients.square().mean(0) / 2, rtol=1e-4, atol=1e-7
        )
        size = gradients.abs().mean(0)
        torch.testing.assert_close(found["michel"][name], size / size.norm(), rtol=1e-4, atol=1e-6)


def test_a_convolutions_rows_are_its_filters(vit, batch):
    name = "patch_embed.steps.0"
    found = scores.rows(vit, [batch], criteria=["magnitude", "gradient", "fisher"], layers=[name])
    layer = vit.get_submodule(name)
    assert {criterion: len(value[name]) for criterion, value in found.items()} == dict.fromkeys(
        found, 32
    )
    weight, bias = layer.weight, layer.bias
    assert bias is None
    torch.testing.assert_close(found["magnitude"][name], weight.flatten(1).norm(dim=1).detach())
    gates = torch.ones(1, 32, 1, 1, requires_grad=True)
    handle = layer.register_forward_hook(lambda _, arguments, result: result * gates)
    squares = 0
    for x, y in split(batch, 1):
        squares += torch.autograd.grad(cross_entropy(vit(x), y), gates)[0].flatten().square()
    handle.remove()
    torch.testing.assert_close(found["fisher"][name], squares / 6 / 2, rtol=1e-4, atol=1e-7)


def test_gate_and_forward_scores_do_not_depend_on_batches(model, batch):
    wanted = dict(
        weights=["wanda", "obs"], rows=["taylor", "fisher", "variance"], kinds=anatomy.UNITS
    )
    wanted["units"] = ["taylor", "michel", "fisher", "variance"]
    whole, *others = (
        scores.measure(model, b, **wanted)
        for b in ([batch], split(batch, 1), split(batch, 4)[::-1])
    )
    for other in others:
        for group, criteria in whole.items():
            for criterion, tensors in criteria.items():
                for key, value in tensors.items():
                    torch.testing.assert_close(
                        value, other[group][criterion][key], rtol=1e-3, atol=1e-6
                    )


def test_weight_scores_equal_their_definitions(model, batch):
    batches = split(
        batch, 4
    )  # 4 and 2 images: the gradient of each batch's mean loss counts the same
    found = scores.weights(model, batches, criteria=scores.WEIGHTS)
    names = [f"{layer}.weight" for layer in models.view(model).linears()]
    parameters = [model.get_parameter(name) for name in names]
    gradients = [torch.autograd.grad(cross_entropy(model(x), y), parameters) for x, y in batches]
    for criterion in scores.WEIGHTS:
        assert list(found[criterion]) == names  # no bias, and the classifier is protected
    sizes = torch.tensor([4, 2]).view(-1, 1, 1)
    assert sum(value.sum() for value in found["snip"].values()).item() == pytest.approx(1)
    scale = sum(
        (p * sum(g) / 2).abs().sum() for p, *g in zip(parameters, *gradients, strict=True)
    ).detach()
    for name, w, *g in zip(names, parameters, *gradients, strict=True):
        w, g = w.detach(), torch.stack(g)
        expected = {
            "magnitude": w.abs(),
            "gradient": g.abs().mean(0),
            "taylor": (w * g).abs().mean(0),
            "fisher": (w * g).square().mean(0),
            "obd": (sizes * (w * g).square()).mean(0) / 2,
            "snip": (w * g.mean(0)).abs() / scale,
        }
        for criterion, value in expected.items():
            torch.testing.assert_close(found[criterion][name], value, rtol=1e-4, atol=1e-8)


def test_obd_with_labels_of_the_model_is_the_gauss_newton_diagonal_in_the_mean():
    # The mean over all pairs of labels, each as likely as the model has it, is what drawing them estimates. By hand,
    # the Hessian of a linear classifier's cross-entropy by w_ij is the mean of p_i (1 - p_i) x_j^2.
    model, x = OneLayer(), torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    p = model(x).detach().softmax(-1)
    mean = 0
    for labels in itertools.product(range(2), repeat=2):
        chance = p[0, labels[0]] * p[1, labels[1]]
        batch = [(x, torch.tensor(labels))]
        mean += (
            chance
            * scores.weights(model, batch, criteria="obd", parameters=["layer.weight"])["obd"][
                "layer.weight"
            ]
        )
    hessian = (p * (1 - p)).T @ x.square() / 2
    torch.testing.assert_close(mean, hessian * model.layer.weight.detach().square() / 2)


class Pair(nn.Module):
    """A number x becomes the features (3 x, 4 x), and there is no classifier."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 2, bias=False)
        self.layer.weight.data = torch.tensor([[3.0], [4.0]])

    def forward_features(self, x):
        return self.layer(x)

    def forward_head(self, x, pre_logits):
        return x

    def get_classifier(self):
        return nn.Identity()


@pytest.mark.parametrize("seed", [0, 7])
def test_without_labels_by_hand(seed):
    # f = (3, 4), f / |f| = (0.6, 0.8). A gate on one of both turns f / |f| at a right angle to
    # itself: by (I - (f / |f|) (f / |f|)^T) (3, 0) / 5 = (0.384, -0.288), or the opposite for (0, 4).
    batches = [(torch.ones(1, 1), None)]
    found = scores.rows(
        Pair(), batches, criteria=["taylor", "fisher"], layers="layer", labels="none", seed=seed
    )
    r = torch.randn(1, 2, generator=torch.Generator().manual_seed(seed))
    slope = (r * torch.tensor([0.384, -0.288])).sum()
    torch.testing.assert_close(found["taylor"]["layer"], slope.abs().expand(2))
    torch.testing.assert_close(found["fisher"]["layer"], (slope**2 / 2).expand(2))
    many = [(torch.ones(2000, 1), None)]
    found = scores.rows(Pair(), many, criteria="fisher", layers="layer", labels="none", seed=seed)
    expected = torch.full((2,), (0.384**2 + 0.288**2) / 2)
    torch.testing.assert_close(found["fisher"]["layer"], expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_without_labels_squares_are_those_of_the_features_jacobian(name, classes, batch, request):
    """In the mean over what is drawn, which differs from image to image and batch to batch."""
    model = request.getfixturevalue(name).requires_grad_(False)
    model.reset_classifier(classes)
    batches = 8 * [(batch[0].repeat(60, 1, 1, 1), None)]
    place = models.view(model).blocks[-1].attn.proj
    heads = models.view(model).blocks[-1].num_heads
    found = scores.units(model, batches, criteria="fisher", kinds="heads", labels="none")

    def features(gates):
        gated = gates.repeat_interleave(place.in_features // heads)
        handle = place.register_forward_pre_hook(lambda _, arguments: arguments[0] * gated)
        units = normalize(anatomy.features(model, batch[0]), dim=1)
        handle.remove()
        return units

    jacobian = torch.autograd.functional.jacobian(features, torch.ones(heads))  # [B, n, heads]
    expected = jacobian.square().sum(1).mean(0) / 2
    key = models.view(model).blocks[-1].name, "heads"
    torch.testing.assert_close(found["fisher"][key], expected, rtol=0.15, atol=0)


def test_without_labels_no_label_is_looked_at(model, batch):
    x, y = batch
    for call in (
        lambda y, **seed: scores.units(model, [(x, y)], criteria="fisher", labels="none", **seed)[
            "fisher"
        ],
        lambda y, **seed: scores.gradient_grams(model, [(x, y)], labels="none", **seed),
    ):
        found, other, drawn_anew = call(y), call(y + 100), call(y, seed=1)
        assert all(torch.equal(found[key], other[key]) for key in found)
        assert not any(torch.equal(found[key], drawn_anew[key]) for key in found)


def test_without_labels_nothing_is_said_about_a_classifier(vit, batch):
    for call in (
        lambda: scores.rows(vit, [batch], criteria="fisher", layers="head", labels="none"),
        lambda: scores.gradient_grams(vit, [batch], layers=["head"], labels="none"),
        lambda: scores.weights(
            vit, [batch], criteria="obd", parameters="head.weight", labels="none"
        ),
    ):
        with pytest.raises(ValueError, match='labels="none" is a loss of what head reads'):
            call()
    found = scores.rows(vit, [batch], criteria="variance", layers="head", labels="none")
    assert (found["variance"]["head"] > 0).all()  # needs no loss


def test_change_is_half_the_squared_distance_of_normalised_features(model, batch):
    assert scores.change(model, model, [batch]) == pytest.approx(0, abs=1e-6)
    block = models.view(model).blocks[0]
    cut = shrink.remove(model, {(block.name, "neurons"): range(block.neurons // 2)})
    before, after = (normalize(anatomy.features(each, batch[0]), dim=1) for each in (model, cut))
    distance = (before - after).square().sum(1).mean().item()
    assert scores.change(model, cut, split(batch, 4)) == pytest.approx(distance / 2, rel=1e-4)
    reversed_one = copy.deepcopy(model)
    last = getattr(reversed_one, "fc_norm", reversed_one.norm)  # features follow it, linearly
    for parameter in last.parameters():
        parameter.data.neg_()
    assert scores.change(model, reversed_one, [batch]) == pytest.approx(2)
    narrow = shrink.remove(model, {(models.view(model).stages[-1], "width"): range(8)})
    with pytest.raises(ValueError, match="features of .* channels have no change"):
        scores.change(model, narrow, [batch])
    with pytest.raises(ValueError, match="no batches"):
        scores.change(model, model, [])


def test_wanda_is_weight_times_the_norm_of_its_input(model, batch):
    found = scores.weights(model, split(batch, 4), criteria="wanda")["wanda"]
    linears = models.view(model).linears()
    inputs = record(model, batch, {name: (layer, False) for name, layer in linears.items()})
    for name, layer in linears.items():
        expected = layer.weight.detach().abs() * inputs[name].norm(dim=0).float()
        torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=1e-4, atol=1e-6)
    keep = masks.keep_largest(found, sparsity=0.5, per="row")
    assert all((~mask).sum(1).eq(mask.shape[1] // 2).all() for mask in keep.values())


def test_obs_is_half_of_what_the_output_loses_when_one_weight_goes(model, batch):
    grams = scores.grams(model, [batch])
    found = scores.weights(model, criteria="obs", grams=grams, damping=0.01)["obs"]
    same = scores.weights(model, split(batch, 4), criteria="obs", damping=0.01)["obs"]
    for name, gram in grams.items():
        weight = model.get_submodule(name).weight.detach()
        gram, j = lowrank.damped(gram, 0.01), 5
        others = torch.arange(len(gram)) != j
        solved = (
            weight.double().clone()
        )  # the row's best without weight j, by least squares on the others
        solved[:, j] = 0
        solved[:, others] += weight[:, j : j + 1] * torch.linalg.solve(
            gram[others][:, others], gram[others, j]
        )
        rise = ((weight - solved) @ gram * (weight - solved)).sum(1)
        torch.testing.assert_close(
            found[f"{name}.weight"][:, j], (rise / 2).float(), rtol=1e-4, atol=1e-9
        )
        torch.testing.assert_close(
            same[f"{name}.weight"], found[f"{name}.weight"], rtol=1e-2, atol=1e-7
        )


def test_variances_equal_their_definition(model, batch):
    view = models.view(model)
    found = scores.measure(
        model, split(batch, 4), rows=["variance"], units=["variance"], kinds=anatomy.UNITS
    )
    places = {name: (layer, True) for name, layer in view.linears().items()}
    for block in view.blocks:
        places |= {
            (block.name, "in", "proj"): (block.attn.proj, False),
            (block.name, "in", "fc2"): (block.mlp.fc2, False),
        }
        places["stage", block.stage] = (
            model.get_submodule(block.name),
            True,
        )  # the stage's last block stays
    places |= {name: (model.get_submodule(norm), True) for name, norm in FILTERS.items()}
    variance = {
        key: x.var(0, correction=0).float() for key, x in record(model, batch, places).items()
    }
    expected = {}
    for block in view.blocks:
        v = variance[block.name, "in", "proj"]
        expected[block.name, "heads"] = v.view(block.num_heads, -1).sum(1)
        expected[block.name, "neurons"] = variance[block.name, "in", "fc2"]
        expected[block.name, "qk"] = variance[f"{block.name}.attn.qkv"][: len(v)]
        expected[block.name, "v"] = v
        expected[f"stages.{block.stage}", "width"] = variance["stage", block.stage]
        expected[block.name, "block"] = variance[f"{block.name}.mlp.fc2"].sum(0, keepdim=True)
    for name in FILTERS:
        expected[name, "filters"] = variance[name]
    assert set(found["units"]["variance"]) == set(expected)
    for key, value in found["units"]["variance"].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
    for name, value in found["rows"]["variance"].items():
        torch.testing.assert_close(value, variance[name], rtol=1e-4, atol=1e-6)


def test_variance_of_a_convolution_is_per_filter(vit, batch):
    name = "patch_embed.steps.0"
    found = scores.rows(vit, split(batch, 4), criteria="variance", layers=[name])["variance"][name]
    output = vit.get_submodule(name)(batch[0]).detach()
    torch.testing.assert_close(found, output.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-6)


def test_variance_survives_a_large_mean():
    x = 1e4 + torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    moments = _sweep.Moments()
    for part in x.split(70):
        moments.add("x", part)
    torch.testing.assert_close(
        moments.variance["x"].double(), x.double().var(0, correction=0), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(moments.norm("x"), x.norm(dim=0))


@pytest.mark.parametrize("n", [1, 255, 256, 257, 700])
def test_the_half_of_a_gram_that_is_computed_tells_the_other(n):
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(40, n, generator=generator), torch.rand(40, 1, generator=generator)
    found = _sweep.gram(weights * x, x)
    torch.testing.assert_close(found, x.T @ (weights * x), rtol=1e-4, atol=1e-4)
    assert torch.equal(found, found.T)


def test_one_pass_measures_all_and_each_as_if_alone(model, batch):
    batches, passes = split(batch, 4), []
    handle = model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    found = scores.measure(
        model,
        batches,
        weights=scores.WEIGHTS,
        rows=scores.ROWS,
        units=scores.UNITS,
        kinds=anatomy.UNITS[:4],
    )
    assert passes == [True, True]
    alone = {
        "weights": {c: scores.weights(model, batches, criteria=c)[c] for c in scores.WEIGHTS},
        "rows": {c: scores.rows(model, batches, criteria=c)[c] for c in scores.ROWS},
        "units": {
            c: scores.units(model, batches, criteria=c, kinds=anatomy.UNITS[:4])[c]
            for c in scores.UNITS
        },
    }
    handle.remove()
    assert list(found) == [*alone, "directions"] and not found["directions"]
    for group, criteria in alone.items():
        assert list(found[group]) == list(criteria)
        for criterion, tensors in criteria.items():
            assert list(found[group][criterion]) == list(tensors)
            assert all(found[group][criterion][key].equal(value) for key, value in tensors.items())


def test_without_gradients_there_is_no_graph(model, batch):
    passes = []
    model.register_forward_hook(
        lambda _, x, y: passes.append((torch.is_grad_enabled(), y.requires_grad))
    )
    wanted = dict(
        weights=["magnitude", "wanda", "obs"], rows="variance", units=["random", "variance"]
    )
    found = scores.measure(model, split(batch, 4), kinds=anatomy.UNITS, **wanted)
    assert passes == [(False, False)] * 2
    assert [list(criteria) for criteria in found.values()] == [
        ["magnitude", "wanda", "obs"],
        ["variance"],
        ["random", "variance"],
        [],
    ]
    scores.measure(model, weights=["random"], units=["magnitude"])
    assert len(passes) == 2  # and some need no data
    assert scores.measure(model, rows="random")["weights"] == {}


def test_row_magnitude_and_gradient_equal_their_definitions(model, batch):
    batches = split(batch, 4)
    found = scores.rows(model, batches, criteria=["magnitude", "gradient", "fisher"])
    for name, layer in models.view(model).linears().items():
        own = list(layer.parameters())  # weight and, but for Swin's merging, bias
        gradients = [torch.autograd.grad(cross_entropy(model(x), y), own) for x, y in batches]
        mean = [
            torch.stack(g).abs().mean(0).view(layer.out_features, -1)
            for g in zip(*gradients, strict=True)
        ]
        torch.testing.assert_close(
            found["gradient"][name], torch.cat(mean, 1).mean(1), rtol=1e-4, atol=1e-8
        )
        rows = torch.cat([p.detach().view(layer.out_features, -1) for p in own], 1)
        torch.testing.assert_close(found["magnitude"][name], rows.norm(dim=1))


def test_unit_magnitude_counts_all_that_goes(model):
    found = scores.units(model, criteria="magnitude")["magnitude"]
    for block in models.view(model).blocks:
        heads, size = block.num_heads, block.head_dim
        qkv, proj, fc1, fc2 = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
        gone = [
            slice(part * heads * size + size, part * heads * size + 2 * size) for part in range(3)
        ]  # head 1
        parts = (
            [qkv.weight[s] for s in gone]
            + [qkv.bias[s] for s in gone]
            + [proj.weight[:, size : 2 * size]]
        )
        norm = torch.cat([part.flatten() for part in parts]).norm()
        torch.testing.assert_close(found[block.name, "heads"][1], norm.detach())
        norm = torch.cat([fc1.weight[5], fc1.bias[5:6], fc2.weight[:, 5]]).norm()
        torch.testing.assert_close(found[block.name, "neurons"][5], norm.detach())


def test_magnitudes_of_head_dimensions_add_up_to_heads(model):
    found = scores.units(model, criteria="magnitude", kinds=["heads", "qk", "v"])["magnitude"]
    for block in models.view(model).blocks:
        qk, v = (
            found[block.name, kind].square().view(block.num_heads, -1).sum(1)
            for kind in ("qk", "v")
        )
        torch.testing.assert_close((qk + v).sqrt(), found[block.name, "heads"])
        size, d = block.num_heads * block.head_dim, block.head_dim + 2  # dimension 2 of head 1
        weight, bias, proj = block.attn.qkv.weight, block.attn.qkv.bias, block.attn.proj.weight
        norm = torch.cat(
            [weight[d], weight[size + d], bias[d : d + 1], bias[size + d : size + d + 1]]
        ).norm()
        torch.testing.assert_close(found[block.name, "qk"][d], norm.detach())
        norm = torch.cat(
            [weight[2 * size + d], bias[2 * size + d : 2 * size + d + 1], proj[:, d]]
        ).norm()
        torch.testing.assert_close(found[block.name, "v"][d], norm.detach())


def test_magnitudes_count_the_biases_that_swinv2_keeps_beside_qkv(batch):
    model = toy(**OTHERS["swinv2"])
    found = scores.units(model, criteria="magnitude", kinds=["heads", "v"])["magnitude"]
    for block in models.view(model).blocks:
        attn, size = block.attn, block.num_heads * block.head_dim
        assert attn.qkv.bias is None and attn.q_bias.count_nonzero() and attn.v_bias.count_nonzero()
        q, k, v = attn.qkv.weight.detach().square().sum(1).view(3, size)
        q, v = q + attn.q_bias.detach().square(), v + attn.v_bias.detach().square()
        column = attn.proj.weight.detach().square().sum(0)
        torch.testing.assert_close(found[block.name, "v"], (v + column).sqrt())
        heads = (q + k + v + column).view(block.num_heads, -1).sum(1)
        torch.testing.assert_close(found[block.name, "heads"], heads.sqrt())


class OneLayer(nn.Module):
    """logits = W x + b with numbers small enough to differentiate by hand."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        self.layer.bias.data.zero_()

    def forward(self, x):
        return self.layer(x)


def test_one_layer_by_hand():
    # x = (1, 1): logits (1, -1), p = (s, 1 - s). Label 0: dL/dlogits = (s - 1, 1 - s). Label 1: (s, -s).
    # dL/dW = dL/dlogits x^T, and a gate on row r has dL/dz_r = logit_r * dL/dlogit_r.
    batch = torch.ones(2, 2), torch.tensor([0, 1])
    s = 1 / (1 + torch.tensor(-2.0).exp())
    single = [(batch[0][:1], batch[1][:1]), (batch[0][1:], batch[1][1:])]
    found = scores.weights(
        OneLayer(), single, criteria=["gradient", "taylor", "fisher"], parameters=["layer.weight"]
    )
    mean, square = ((1 - s) + s) / 2, ((1 - s) ** 2 + s**2) / 2
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(found["gradient"]["layer.weight"], mean.expand(2, 2).clone())
    torch.testing.assert_close(found["taylor"]["layer.weight"], mean * weight)
    torch.testing.assert_close(found["fisher"]["layer.weight"], square * weight)
    # In one batch the gradients of both images are averaged first: ((s - 1) + s) / 2.
    found = scores.weights(OneLayer(), [batch], criteria="gradient", parameters=["layer.weight"])
    torch.testing.assert_close(found["gradient"]["layer.weight"], (s - 0.5).expand(2, 2).clone())
    # Gates are per image whatever the batch.
    found = scores.rows(
        OneLayer(), [batch], criteria=["taylor", "fisher", "gradient"], layers=["layer"]
    )
    torch.testing.assert_close(found["taylor"]["layer"], mean.expand(2).clone())
    torch.testing.assert_close(found["fisher"]["layer"], (square / 2).expand(2).clone())
    torch.testing.assert_close(found["gradient"]["layer"], (s - 0.5).expand(2).clone())
    found = scores.grams(
        OneLayer(), [(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), None)], layers=["layer"], affine=True
    )
    assert found["layer"].tolist() == [[5, 1, 2], [1, 2, 1], [2, 1, 1]]


def test_grams_equal_their_definition(model, batch):
    found = scores.grams(model, split(batch, 4))
    linears = models.view(model).linears()
    inputs = record(model, batch, {name: (layer, False) for name, layer in linears.items()})
    affine = scores.grams(model, [batch], affine=True)
    assert list(found) == list(linears)
    for name, x in inputs.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(affine[name][-1, :-1], x.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(affine[name][:-1, :-1], found[name], rtol=1e-4, atol=1e-5)
        assert affine[name][-1, -1] == 1


def with_class_token():
    """A ViT of 16 patches that reads its class token."""
    return toy("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=3, patch_size=4)


def test_weights_count_positions_as_often_in_grams(batch):
    """A position of weight 3 counts as three do."""
    vit = with_class_token()
    name = "blocks.0.mlp.fc1"
    weights = torch.ones(17, dtype=torch.float64)
    weights[0] = 3
    found = scores.grams(vit, split(batch, 4), layers=[name], weights={name: weights})[name]
    x = record(vit, batch, {name: (vit.get_submodule(name), False)})[name]
    x = x.view(-1, 17, x.shape[-1])
    x = torch.cat([x, x[:, :1], x[:, :1]], 1).flatten(0, 1)
    torch.testing.assert_close(found, (x.T @ x / len(x)).double(), rtol=1e-4, atol=1e-5)


def test_grams_of_some_positions_are_near_those_of_all(batch):
    """And equal them where all are looked at; the class token is never left out."""
    vit = with_class_token()
    name = "blocks.1.mlp.fc1"
    weights = torch.ones(17, dtype=torch.float64)
    weights[0] = 5
    how = {"layers": [name], "affine": True, "weights": {name: weights}}
    images = split(batch, 4)
    whole = scores.grams(vit, images, **how)[name]
    assert scores.grams(vit, images, tokens=17, **how)[name].equal(whole)
    some = scores.grams(vit, images, tokens=9, **how)[name]
    assert some[-1, -1].item() == pytest.approx(1) and not some.equal(whole)
    assert (some - whole).norm() < 0.3 * whole.norm()
    weights[1:] = 0  # the class token alone: nothing is left to chance
    only = scores.grams(vit, images, **how)[name]
    torch.testing.assert_close(scores.grams(vit, images, tokens=2, **how)[name], only)


def test_one_pass_gives_units_and_directions(model, batch):
    """Together they are what they are apart."""
    grams = scores.grams(model, [batch])
    layers = models.view(model).linears()
    bases = {name: pool.basis(layer, grams[name]) for name, layer in layers.items()}
    found = scores.measure(model, [batch], units=["fisher"], bases=bases)
    apart = scores.directions(model, [batch], bases)
    for name, rises in apart.items():
        torch.testing.assert_close(found["directions"][name], rises)
    for key, each in scores.units(model, [batch], criteria=["fisher"])["fisher"].items():
        torch.testing.assert_close(found["units"]["fisher"][key], each)


def test_positions_weigh_as_much_as_their_gradients(batch):
    """The class token has its own, patches share theirs, and behind the last attention is none."""
    vit = with_class_token()
    x, y = batch
    found = scores.position_weights(vit, split(batch, 4), floor=0.2)
    layer = vit.blocks[0].mlp.fc2
    outputs = []
    handle = layer.register_forward_hook(lambda *args: outputs.append(args[-1]))
    loss = torch.nn.functional.cross_entropy(vit.eval()(x), y, reduction="sum")
    handle.remove()
    [gradient] = torch.autograd.grad(loss, outputs)
    energy = gradient.double().square().sum((0, 2))
    energy[1:] = energy[1:].mean()
    expected = 0.2 + 0.8 * energy / energy.mean()
    torch.testing.assert_close(found["blocks.0.mlp.fc2"], expected, rtol=1e-4, atol=1e-6)
    last = found[f"blocks.{len(vit.blocks) - 1}.mlp.fc2"]
    assert last[1:].tolist() == [0.2] * 16 and last.mean().item() == pytest.approx(1)


def test_models_without_tokens_before_the_patches_have_no_weights(swin, batch):
    assert scores.position_weights(swin, [batch]) == {}


def test_a_convolution_has_the_gram_of_its_patches(model, batch):
    """W H W^T is then the second moment of what it gives, whatever its stride and padding."""
    stem = dict(models.view(model).stem)
    found, close = (
        scores.grams(model, split(batch, 4), layers=list(stem)),
        {"rtol": 1e-4, "atol": 1e-5},
    )
    for name, conv in stem.items():
        seen = []
        handle = conv.register_forward_hook(
            lambda _, arguments, y, seen=seen: seen.append(y.detach())
        )
        model(batch[0])
        handle.remove()
        y = seen[0].movedim(1, -1).flatten(0, -2).double()
        weight = conv.weight.detach().flatten(1).double()
        bias = 0 if conv.bias is None else conv.bias.detach()
        torch.testing.assert_close(
            weight @ found[name] @ weight.T, (y - bias).T @ (y - bias) / len(y), **close
        )
    with pytest.raises(ValueError, match="no patches of"):
        _sweep.patches(torch.zeros(1, 4, 3, 3), nn.Conv2d(4, 4, 3, groups=2))


def test_gradient_grams_equal_their_definition(model, batch):
    """One image at a time, the gradient by a zero that is added to the output."""
    names = [*dict(models.view(model).stem), *models.view(model).linears()]
    found = scores.gradient_grams(model, split(batch, 4), layers=names)
    expected = dict.fromkeys(names, 0)
    for x, y in split(batch, 1):
        added, handles = {}, []

        def add(module, _, output, added=added):
            added[module] = torch.zeros_like(output, requires_grad=True)
            return output + added[module]

        for name in names:
            handles.append(model.get_submodule(name).register_forward_hook(add))
        cross_entropy(model(x), y).backward()
        for handle in handles:
            handle.remove()
        for name in names:
            g = added[model.get_submodule(name)].grad.double()
            g = (
                g.movedim(1, -1).flatten(0, -2)
                if name in dict(models.view(model).stem)
                else g.flatten(0, -2)
            )
            expected[name] = expected[name] + g.T @ g / len(batch[0])
    assert list(found) == names
    for name, matrix in expected.items():
        torch.testing.assert_close(found[name], matrix, rtol=1e-3, atol=1e-9)


def test_the_model_is_left_as_it_was(model, batch):
    model.train()
    view = models.view(model)
    view.blocks[0].mlp.eval()  # a mode that a plain train() would not put back
    frozen = view.blocks[1].attn.qkv.weight.requires_grad_(False)
    kept = view.blocks[0].attn.proj.weight
    kept.grad = torch.ones_like(kept)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]

    def unchanged():
        hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
        hooks += [h for p in model.parameters() for h in p._post_accumulate_grad_hooks or ()]
        gradients = [p for p in model.parameters() if p.grad is not None]
        assert not hooks
        assert [module.training for module in model.modules()] == modes
        assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
        assert len(gradients) == 1 and gradients[0] is kept and (kept.grad == 1).all()
        assert all(before[name].equal(value) for name, value in model.state_dict().items())

    with torch.no_grad():  # as a caller may have it
        scores.weights(model, [batch], criteria=scores.WEIGHTS)
        scores.rows(model, [batch], criteria=scores.ROWS)
        scores.units(model, [batch], criteria=scores.UNITS)
        scores.units(model, [batch], criteria=["taylor", "variance"], kinds=anatomy.UNITS)
    scores.grams(model, [batch])
    scores.loss(model, [batch])
    unchanged()
    for call in (scores.weights, scores.rows, scores.units):
        with pytest.raises(ValueError, match="loss of calibration batch 1 is nan"):
            call(model, [batch, (batch[0] * torch.nan, batch[1])], criteria=["taylor"])
        unchanged()


def test_loss_is_the_mean_over_images(model, batch):
    with torch.no_grad():
        expected = cross_entropy(model(batch[0]), batch[1]).item()
    assert scores.loss(model, split(batch, 4)) == pytest.approx(expected, rel=1e-5)


def test_calibration_far_below_held_out_is_a_warning(vit, batch):
    with torch.no_grad():
        fitted = batch[0], vit(batch[0]).argmax(1)
        wrong = batch[0], vit(batch[0]).argmin(1)
    with pytest.warns(UserWarning, match='fits its calibration images.*labels="model"'):
        losses = scores.check_calibration(vit, [fitted], [wrong])
    assert losses == (scores.loss(vit, [fitted]), scores.loss(vit, [wrong]))
    assert (
        scores.check_calibration(vit, [wrong], [fitted]) == losses[::-1]
    )  # a warning would be an error here


def test_random_needs_a_seed_and_no_data(model):
    for call in (scores.weights, scores.rows, scores.units):
        first, again, other = (call(model, criteria="random", seed=s)["random"] for s in (0, 0, 1))
        assert all(first[key].equal(again[key]) for key in first)
        assert not any(first[key].equal(other[key]) for key in first)
        assert all(value.min() >= 0 and value.max() < 1 for value in first.values())


def test_labels_of_the_model(vit, batch):
    drawn = [
        scores.units(vit, [batch], criteria="fisher", labels="model", seed=s)["fisher"]
        for s in (0, 0, 1)
    ]
    key = ("blocks.0", "heads")
    assert drawn[0][key].equal(drawn[1][key])
    assert not drawn[0][key].equal(drawn[2][key])
    # A model that is sure of its prediction draws just that.
    vit.head.weight.data.zero_()
    vit.head.bias.data = torch.tensor([0.0, 90.0, 0.0])
    sure = scores.weights(
        vit, [batch], criteria="gradient", labels="model", parameters=["head.bias"]
    )
    true = scores.weights(
        vit, [(batch[0], torch.ones(6).long())], criteria="gradient", parameters=["head.bias"]
    )
    assert sure["gradient"]["head.bias"].equal(true["gradient"]["head.bias"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_are_float32_or_better(vit, batch, dtype):
    batches = [(batch[0].to(dtype), batch[1])]
    vit = vit.to(dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    found = scores.measure(
        vit, batches, weights=scores.WEIGHTS[1:], rows=scores.ROWS[1:], units=scores.UNITS[1:]
    )
    assert found.pop("directions") == {}
    found["width"] = scores.units(vit, batches, criteria=["fisher", "variance"], kinds=CHANNELS)
    for criteria in found.values():
        assert {value.dtype for tensors in criteria.values() for value in tensors.values()} == {
            wanted
        }


def test_scores_in_single_precision_are_those_in_double(model, batch):
    wanted = dict(weights=scores.WEIGHTS, rows=scores.ROWS, units=scores.UNITS)
    single = scores.measure(model, [batch], **wanted)
    double = scores.measure(
        copy.deepcopy(model).double(), [(batch[0].double(), batch[1])], **wanted
    )
    for group, criteria in double.items():
        for criterion, tensors in criteria.items():
            for key, score in tensors.items() if criterion != "random" else ():
                error = (single[group][criterion][key].double() - score).abs().max()
                assert error < 1e-3 * score.abs().max(), (group, criterion, key)


def test_bf16_sums_many_small_parts():
    """A bf16 sum stops growing at 256 equal terms; ours must not."""
    model = OneLayer().to(torch.bfloat16)
    image = [(torch.ones(1, 2).to(torch.bfloat16), torch.tensor([0]))]
    wanted = dict(criteria=["taylor", "fisher"], layers=["layer"])
    one, many = scores.rows(model, image, **wanted), scores.rows(model, 600 * image, **wanted)
    for criterion, score in one.items():
        torch.testing.assert_close(many[criterion]["layer"], score["layer"], rtol=1e-4, atol=0)


def test_errors_name_what_is_wrong(vit, batch):
    for call in (scores.weights, scores.rows, scores.units):
        with pytest.raises(ValueError, match="unknown criterion 'tailor', did you mean 'taylor'"):
            call(vit, [batch], criteria=["tailor"])
        with pytest.raises(
            ValueError, match="unknown kind of labels 'models', did you mean 'model'"
        ):
            call(vit, [batch], criteria=["taylor"], labels="models")
        for empty in (None, [], iter([])):
            with pytest.raises(ValueError, match="no batches"):
                call(vit, empty, criteria=["taylor"])
    with pytest.raises(ValueError, match="no batches"):
        scores.grams(vit, [])
    with pytest.raises(ValueError, match="parameter 'blocks.0.attn.qvk.weight', did you mean"):
        scores.weights(vit, criteria="magnitude", parameters=["blocks.0.attn.qvk.weight"])
    with pytest.raises(
        ValueError, match="convolution 'blocks.0.mlp.fc3', did you mean 'blocks.0.mlp.fc"
    ):
        scores.rows(vit, criteria="magnitude", layers=["blocks.0.mlp.fc3"])
    vit.blocks[1].mlp.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match="magnitude scores of blocks.1.mlp.fc1.weight are not finite"
    ):
        scores.weights(vit, criteria="magnitude")
    with pytest.raises(ValueError, match="gram scores of blocks.1.mlp.fc2 are not finite"):
        scores.grams(vit, [batch])


def test_errors_of_criteria_and_kinds_name_what_is_wrong(vit, batch):
    with pytest.raises(ValueError, match="nothing to measure"):
        scores.measure(vit, [batch])
    with pytest.raises(ValueError, match="unknown kind of unit 'head', did you mean 'heads'"):
        scores.units(vit, [batch], criteria="taylor", kinds=["head"])
    with pytest.raises(ValueError, match='width has no "magnitude"'):
        scores.units(vit, criteria="magnitude", kinds=["heads", "width"])
    with pytest.raises(ValueError, match="blocks.0 normalises queries and keys"):
        normed = toy("conv_vit", embed_dim=32, depth=1, num_heads=4, qk_norm=True)
        scores.units(normed, [batch], criteria="taylor", kinds=["qk"])
    assert (
        len(scores.units(normed, [batch], criteria="taylor", kinds=["v", "width"])["taylor"]) == 2
    )
    for criterion in ("wanda", "obs"):
        for name in ("patch_embed.steps.0.weight", "blocks.0.attn.qkv.bias"):
            with pytest.raises(ValueError, match=f"linear layers, {name} is none"):
                scores.weights(vit, [batch], criteria=criterion, parameters=[name])
    grams = scores.grams(vit, [batch], affine=True)
    with pytest.raises(
        ValueError, match=r"gram of blocks.0.attn.qkv is \[33, 33\], not \[32, 32\]"
    ):
        scores.weights(vit, criteria="obs", grams=grams)
    with pytest.raises(ValueError, match="'blocks.0.attn.qkv', did you mean 'blocks.1.attn.qkv'"):
        scores.weights(vit, criteria="obs", grams={"blocks.1.attn.qkv": grams["blocks.1.attn.qkv"]})
    with pytest.raises(ValueError, match="qkv.weight has no inverse with damping 0"):
        dead = {name: torch.zeros(len(gram) - 1, len(gram) - 1) for name, gram in grams.items()}
        scores.weights(vit, criteria="obs", grams=dead, damping=0)
    with pytest.raises(ValueError, match="no batches"):
        scores.loss(vit, [])


def test_answers_are_as_far_as_by_hand(vit, batch):
    images, _ = batch
    other = copy.deepcopy(vit)
    with torch.no_grad():
        other.head.bias += torch.linspace(0, 1, len(other.head.bias))
        told, said = (model.eval()(images).log_softmax(1) for model in (vit, other))
    whole = scores.Answers(vit, split(batch, 2))
    assert whole.distance(vit) == pytest.approx(0, abs=1e-6)
    by_hand = (told.exp() * (told - said)).sum(1).mean().item()
    assert whole.distance(other) == pytest.approx(by_hand, rel=1e-4)
    vit.reset_classifier(0)
    features = scores.Answers(vit, [batch])
    assert features.distance(vit) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="batches"):
        scores.Answers(vit, [])
