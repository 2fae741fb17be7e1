"""Laws of the scores: gates equal brute force, weights their definitions, nothing stays on the model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from vitlab import models, scores


def split(batch, size):
    return list(zip(batch[0].split(size), batch[1].split(size), strict=True))


def brute_force(model, batch, layer, units, *, output=False):
    """dL_b/dz [B, units] by autograd: one image at a time, an explicit gate of ones per unit, no folding."""
    gates = torch.ones(units, requires_grad=True)

    def gated(x):
        return x * gates.repeat_interleave(x.shape[-1] // units)

    if output:
        handle = layer.register_forward_hook(lambda _, arguments, result: gated(result))
    else:
        handle = layer.register_forward_pre_hook(lambda _, arguments: gated(arguments[0]))
    found = []
    for x, y in split(batch, 1):
        found.append(torch.autograd.grad(cross_entropy(model(x), y), gates)[0])
    handle.remove()
    return torch.stack(found)


def test_unit_gates_equal_brute_force(model, batch):  # Swin: windows, shifted in every second block
    found = scores.units(model, split(batch, 4), criteria=["taylor", "michel", "fisher"])
    for block in models.view(model).blocks:
        for kind, layer, units in (
            ("heads", block.attn.proj, block.num_heads),
            ("neurons", block.mlp.fc2, block.neurons),
        ):
            gradients = brute_force(model, batch, layer, units)
            mean = gradients.abs().mean(0)
            key = (block.name, kind)
            torch.testing.assert_close(found["taylor"][key], mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found["michel"][key], mean / mean.norm(), rtol=1e-4, atol=1e-6)
            half_square = gradients.square().mean(0) / 2
            torch.testing.assert_close(found["fisher"][key], half_square, rtol=1e-4, atol=1e-7)


def test_row_gates_equal_brute_force(model, batch):
    found = scores.rows(model, split(batch, 4), criteria=["taylor", "fisher"])
    linears = models.view(model).linears()
    assert list(found["taylor"]) == list(found["fisher"]) == list(linears)
    for name, layer in linears.items():
        gradients = brute_force(model, batch, layer, layer.out_features, output=True)
        torch.testing.assert_close(found["taylor"][name], gradients.abs().mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["fisher"][name], gradients.square().mean(0) / 2, rtol=1e-4, atol=1e-7)


def test_a_convolutions_rows_are_its_filters(vit, batch):
    name = "patch_embed.steps.0"
    found = scores.rows(vit, [batch], criteria=["magnitude", "gradient", "fisher"], layers=[name])
    layer = vit.get_submodule(name)
    assert {criterion: len(value[name]) for criterion, value in found.items()} == dict.fromkeys(found, 32)
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


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_gate_scores_do_not_depend_on_batches(model, batch, criterion):
    whole = scores.units(model, [batch], criteria=[criterion])[criterion]
    halves = scores.units(model, split(batch, 3)[::-1], criteria=[criterion])[criterion]
    rows = scores.rows(model, [batch], criteria=criterion)[criterion]
    singles = scores.rows(model, split(batch, 1), criteria=criterion)[criterion]
    for a, b in ((whole, halves), (rows, singles)):
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-7)


def test_weight_scores_equal_their_definitions(model, batch):
    batches = split(batch, 4)  # 4 and 2 images: the gradient of each batch's mean loss counts the same
    found = scores.weights(model, batches, criteria=scores.WEIGHTS)
    names = [f"{layer}.weight" for layer in models.view(model).linears()]
    parameters = [model.get_parameter(name) for name in names]
    gradients = [torch.autograd.grad(cross_entropy(model(x), y), parameters) for x, y in batches]
    for criterion in scores.WEIGHTS:
        assert list(found[criterion]) == names  # no bias, and the classifier is protected
    for name, w, *g in zip(names, parameters, *gradients, strict=True):
        w, g = w.detach(), torch.stack(g)
        expected = {
            "magnitude": w.abs(),
            "gradient": g.abs().mean(0),
            "taylor": (w * g).abs().mean(0),
            "fisher": (w * g).square().mean(0),
        }
        for criterion, value in expected.items():
            torch.testing.assert_close(found[criterion][name], value, rtol=1e-4, atol=1e-8)


def test_row_magnitude_and_gradient_equal_their_definitions(model, batch):
    batches = split(batch, 4)
    found = scores.rows(model, batches, criteria=["magnitude", "gradient", "fisher"])
    for name, layer in models.view(model).linears().items():
        own = list(layer.parameters())  # weight and, but for Swin's merging, bias
        gradients = [torch.autograd.grad(cross_entropy(model(x), y), own) for x, y in batches]
        mean = [torch.stack(g).abs().mean(0).view(layer.out_features, -1) for g in zip(*gradients, strict=True)]
        torch.testing.assert_close(found["gradient"][name], torch.cat(mean, 1).mean(1), rtol=1e-4, atol=1e-8)
        rows = torch.cat([p.detach().view(layer.out_features, -1) for p in own], 1)
        torch.testing.assert_close(found["magnitude"][name], rows.norm(dim=1))


def test_unit_magnitude_counts_all_that_goes(model):
    found = scores.units(model, criteria="magnitude")["magnitude"]
    for block in models.view(model).blocks:
        heads, size = block.num_heads, block.head_dim
        qkv, proj, fc1, fc2 = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
        gone = [slice(part * heads * size + size, part * heads * size + 2 * size) for part in range(3)]  # head 1
        parts = [qkv.weight[s] for s in gone] + [qkv.bias[s] for s in gone] + [proj.weight[:, size : 2 * size]]
        norm = torch.cat([part.flatten() for part in parts]).norm()
        torch.testing.assert_close(found[block.name, "heads"][1], norm.detach())
        norm = torch.cat([fc1.weight[5], fc1.bias[5:6], fc2.weight[:, 5]]).norm()
        torch.testing.assert_close(found[block.name, "neurons"][5], norm.detach())


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
    found = scores.weights(OneLayer(), single, criteria=["gradient", "taylor", "fisher"], parameters=["layer.weight"])
    mean, square = ((1 - s) + s) / 2, ((1 - s) ** 2 + s**2) / 2
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(found["gradient"]["layer.weight"], mean.expand(2, 2).clone())
    torch.testing.assert_close(found["taylor"]["layer.weight"], mean * weight)
    torch.testing.assert_close(found["fisher"]["layer.weight"], square * weight)
    # In one batch the gradients of both images are averaged first: ((s - 1) + s) / 2.
    found = scores.weights(OneLayer(), [batch], criteria="gradient", parameters=["layer.weight"])
    torch.testing.assert_close(found["gradient"]["layer.weight"], (s - 0.5).expand(2, 2).clone())
    # Gates are per image whatever the batch.
    found = scores.rows(OneLayer(), [batch], criteria=["taylor", "fisher", "gradient"], layers=["layer"])
    torch.testing.assert_close(found["taylor"]["layer"], mean.expand(2).clone())
    torch.testing.assert_close(found["fisher"]["layer"], (square / 2).expand(2).clone())
    torch.testing.assert_close(found["gradient"]["layer"], (s - 0.5).expand(2).clone())
    found = scores.grams(OneLayer(), [(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), None)], layers=["layer"], affine=True)
    assert found["layer"].tolist() == [[5, 1, 2], [1, 2, 1], [2, 1, 1]]


def test_grams_equal_their_definition(model, batch):
    found = scores.grams(model, split(batch, 4))
    inputs = {}
    linears = models.view(model).linears()
    handles = [
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0].flatten(0, -2)}))
        for name, layer in linears.items()
    ]
    with torch.no_grad():
        model(batch[0])
    for handle in handles:
        handle.remove()
    affine = scores.grams(model, [batch], affine=True)
    assert list(found) == list(linears)
    for name, x in inputs.items():
        x = x.double()
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(affine[name][-1, :-1], x.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(affine[name][:-1, :-1], found[name], rtol=1e-4, atol=1e-5)
        assert affine[name][-1, -1] == 1


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


def test_random_needs_a_seed_and_no_data(model):
    for call in (scores.weights, scores.rows, scores.units):
        first, again, other = (call(model, criteria="random", seed=s)["random"] for s in (0, 0, 1))
        assert all(first[key].equal(again[key]) for key in first)
        assert not any(first[key].equal(other[key]) for key in first)
        assert all(value.min() >= 0 and value.max() < 1 for value in first.values())


def test_labels_of_the_model(vit, batch):
    drawn = [scores.units(vit, [batch], criteria="fisher", labels="model", seed=s)["fisher"] for s in (0, 0, 1)]
    key = ("blocks.0", "heads")
    assert drawn[0][key].equal(drawn[1][key])
    assert not drawn[0][key].equal(drawn[2][key])
    # A model that is sure of its prediction draws just that.
    vit.head.weight.data.zero_()
    vit.head.bias.data = torch.tensor([0.0, 90.0, 0.0])
    sure = scores.weights(vit, [batch], criteria="gradient", labels="model", parameters=["head.bias"])
    true = scores.weights(vit, [(batch[0], torch.ones(6).long())], criteria="gradient", parameters=["head.bias"])
    assert sure["gradient"]["head.bias"].equal(true["gradient"]["head.bias"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_are_float32_or_better(vit, batch, dtype):
    batches = [(batch[0].to(dtype), batch[1])]
    vit = vit.to(dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for found in (
        scores.weights(vit, batches, criteria=["magnitude", "gradient", "taylor", "fisher"]),
        scores.rows(vit, batches, criteria=["magnitude", "gradient", "taylor", "fisher"]),
        scores.units(vit, batches, criteria=["magnitude", "taylor", "michel", "fisher"]),
    ):
        assert {value.dtype for tensors in found.values() for value in tensors.values()} == {wanted}


def test_bf16_sums_many_small_parts(vit):
    """A bf16 sum stops growing at 256 equal terms; ours must not."""
    gates = scores.Gates(vit.to(torch.bfloat16), {"a": (1,)})
    for _ in range(3000):
        gates.add("a", torch.ones(1, 1))
    assert gates.absolute["a"] == gates.square["a"] == 3000


def test_errors_name_what_is_wrong(vit, batch):
    for call in (scores.weights, scores.rows, scores.units):
        with pytest.raises(ValueError, match="unknown criterion 'tailor', did you mean 'taylor'"):
            call(vit, [batch], criteria=["tailor"])
        with pytest.raises(ValueError, match="unknown kind of labels 'models', did you mean 'model'"):
            call(vit, [batch], criteria=["taylor"], labels="models")
        for empty in (None, [], iter([])):
            with pytest.raises(ValueError, match="no batches"):
                call(vit, empty, criteria=["taylor"])
    with pytest.raises(ValueError, match="no batches"):
        scores.grams(vit, [])
    with pytest.raises(ValueError, match="'blocks.0.attn.qvk.weight' in this model, did you mean"):
        scores.weights(vit, criteria="magnitude", parameters=["blocks.0.attn.qvk.weight"])
    with pytest.raises(ValueError, match="'blocks.0.mlp.fc3', did you mean 'blocks.0.mlp.fc"):
        scores.rows(vit, criteria="magnitude", layers=["blocks.0.mlp.fc3"])
    with pytest.raises(ValueError, match="steps.0 is a convolution"):
        scores.grams(vit, [batch], layers=["patch_embed.steps.0"])
    vit.blocks[1].mlp.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="magnitude scores of blocks.1.mlp.fc1.weight are not finite"):
        scores.weights(vit, criteria="magnitude")
    with pytest.raises(ValueError, match="gram scores of blocks.1.mlp.fc2 are not finite"):
        scores.grams(vit, [batch])
