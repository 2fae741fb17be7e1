"""Fit the head of a model alone, on features that the frozen rest computes once.

Public: STRENGTHS, features, fit.
"""

from collections import ChainMap

import torch
from torch.nn.functional import cross_entropy, linear

from vitlab import files, parallel
from vitlab.evaluation import evaluate
from vitlab.models import anatomy

# Strengths of the L2 penalty that are tried, from strong to weak: each fit starts from the last.
STRENGTHS = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
_ITERATIONS = 200  # of LBFGS, at most, for each strength


def fit(model, train, val, *, precision="auto"):
    """Replace each classifier layer of model by the logistic regression on its inputs.

    The regression is multinomial, with an L2 penalty on the weights of standardised features. Its
    strength is the one of STRENGTHS that is most often right on val; of equals the one with the
    lower loss.

    model: with the classes of train; only its classifier changes, in place
    train, val: data.Split, in evaluation transforms
    precision: of the features, a word of `evaluate.precision_on`
    Returns a dict of loss, right (the sum of right answers, on train) and strength; a model with
    two classifiers, such as a distilled DeiT, gives those of the last.
    Raises ValueError for a model without a classifier.
    """
    names = anatomy.classifier_names(model)
    if not names:
        raise ValueError("the head cannot be fitted: the model has none, num_classes is 0")
    seen, labels = features(model, train, names, precision=precision)
    held_out, val_labels = features(model, val, names, precision=precision)
    for name in names:
        scale, shift = _standardising(seen[name])
        x, unseen = ((part[name] - shift) / scale for part in (seen, held_out))
        best = {"rank": (-1,)}
        for strength, weight, bias in _path(x, labels, model.num_classes):
            loss, right = _judged(linear(unseen, weight, bias), val_labels)
            files.log(f"{name}, strength {strength:g}: val {100 * right / len(val):.1f} %")
            if (right, -loss) > best["rank"]:
                found = {"strength": strength, "weight": weight, "bias": bias}
                best = {"rank": (right, -loss), **found}
        loss, right = _judged(linear(x, best["weight"], best["bias"]), labels)
        _put(model.get_submodule(name), best["weight"], best["bias"], scale, shift)
    parallel.broadcast_weights(model)
    return {"loss": loss, "right": right, "strength": best["strength"]}


@torch.no_grad()
def features(model, images, names, *, batch_size=256, precision="auto"):
    """Return the inputs of some layers over a split, and the labels, on the model's device.

    model: runs in evaluation mode, which is restored afterwards
    images: data.Split
    names: of layers that see one vector an image, such as classifiers
    batch_size: images of one forward pass
    precision: a word of `evaluate.precision_on`
    Returns {name: float32 [N, C]} and int64 [N].
    """
    device = evaluate.device_of(model)
    found, labels, last = {}, [], {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: last.update({name: inputs[0].float()})
        )
        for name in names
    ]
    was_training = model.training
    model.eval()
    try:
        with evaluate.autocast(device, precision):
            for number, (x, y) in enumerate(images.batches(batch_size, device=device)):
                labels.append(y)
                if number % parallel.world_size() == parallel.rank():
                    model(x)
                    found[number] = dict(last)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    found = ChainMap(*parallel.gather(found))  # several processes share out the batches
    whole = {name: torch.cat([found[number][name] for number in sorted(found)]) for name in names}
    return {name: x.to(device) for name, x in whole.items()}, torch.cat(labels)


def _standardising(x):
    """Return the deviation and the mean of features [N, C]; a constant one is left as it is."""
    scale, shift = torch.std_mean(x, 0, correction=0)
    return torch.where(scale > 1e-6, scale, 1.0), shift


def _path(x, labels, classes):
    """Yield (strength, weight [classes, C], bias [classes]) of the regression for each strength."""
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    for strength in STRENGTHS:
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe"
        )

        def closure(solver=solver, strength=strength):
            solver.zero_grad()
            loss = cross_entropy(linear(x, weight, bias), labels)
            loss = loss + strength / 2 * weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        yield strength, weight.detach().clone(), bias.detach().clone()


def _judged(logits, labels):
    """Return the mean cross entropy and the number of right answers, as numbers."""
    loss = cross_entropy(logits, labels).item()
    return loss, (logits.argmax(1) == labels).sum().item()


@torch.no_grad()
def _put(layer, weight, bias, scale, shift):
    """Write a regression on standardised features into a layer that sees them as they are."""
    weight = weight / scale
    layer.weight.copy_(weight)
    layer.bias.copy_(bias - weight @ shift)
