"""Put masks on a model, keep them through training, and make them from rows, units and schedules.

A mask is a bool tensor of its parameter's shape, True where the weight stays. Masks are kept in a
dict under the names of their parameters. Models are never wrapped: their parameters keep their
names, and dead weights are plain zeros.

Public: MaskHolder, apply, keep_fewer_rows, keep_more_zero, masked, parameters_of, rows_to_masks,
shares, sparsity, units_to_masks.
"""

import torch

from vitlab import models, names
from vitlab.models import anatomy
from vitlab.pruning import masks

_UNITS = ("heads", "neurons", "qk", "v", "rows")


def masked(model, keep):
    """Return a copy of the model whose weights are zero where keep is False.

    model: any module; it stays as it is.
    keep: {parameter name: bool tensor of the parameter's shape}, True stays.

    Raises ValueError for an unknown name, a wrong shape, and for masks that drop nothing or
    everything.
    """
    model = anatomy.copied(model)
    apply(model, keep)
    return model


@torch.no_grad()
def apply(model, keep):
    """Zero the weights of the model where keep is False, in place.

    model: the model to cut.
    keep: {parameter name: bool tensor of the parameter's shape}, True stays.

    Raises ValueError for an unknown name, a wrong shape, and for masks that drop nothing or
    everything.
    """
    parameters = parameters_of(model, keep)
    total = sum(mask.numel() for mask in keep.values())
    left = sum(int(mask.count_nonzero()) for mask in keep.values())
    if left in (0, total):
        raise ValueError(
            f"the masks keep {left} of {total} weights: a cut of "
            f"{'nothing' if left else 'everything'} is a mistake; "
            "check the sparsity and the layers that were chosen"
        )
    for name, parameter in parameters.items():
        parameter.masked_fill_(~keep[name].to(parameter.device), 0)


def sparsity(model, keep):
    """Return the share of zeros, in [0, 1], among all entries of the parameters that keep names.

    Zeros are counted in the model, so the share is exact.

    model: masked or not.
    keep: masks as for `apply`, of at least one parameter.

    Raises ValueError for an unknown name and for a mask of another shape or dtype.
    """
    parameters = parameters_of(model, keep).values()
    total = sum(parameter.numel() for parameter in parameters)
    alive = sum(int(parameter.count_nonzero()) for parameter in parameters)
    return (total - alive) / total


class MaskHolder:
    """Hold dead weights at zero through training, with any optimizer, momentum and weight decay.

    Masking gradients is not enough: moments from before the cut move dead weights for many steps.
    Creating a MaskHolder zeroes the dead weights and their optimizer moments. Call `step` after
    each step of the optimizer and `check` at the end of an epoch.

    model: the model to train, on the device it trains on.
    keep: masks as for `apply`.
    optimizer: any of torch.optim, or accelerate's wrapper of one. The moments of a parameter are
        those tensors of its state that have its shape.

    Raises ValueError as `apply` does.
    """

    def __init__(self, model, keep, optimizer):
        apply(model, keep)
        self.model = model
        self.keep = keep
        # One fused kernel multiplies all tensors by floats. Bools would need a kernel for each.
        self.factors = []
        for name, parameter in parameters_of(model, keep).items():
            self.factors.append(keep[name].to(parameter))
            for moment in optimizer.state.get(parameter, {}).values():
                if torch.is_tensor(moment) and moment.shape == parameter.shape:
                    moment.masked_fill_(~keep[name].to(moment.device), 0)

    @torch.no_grad()
    def step(self, *copies):
        """Zero the dead weights again, in the model and in copies of it (an EMA with its names)."""
        for model in (self.model, *copies):
            parameters = parameters_of(model, self.keep)
            torch._foreach_mul_(list(parameters.values()), self.factors)

    def check(self, *copies):
        """Raise RuntimeError, naming the parameter, for a dead weight that is not zero.

        copies: copies of the model (an EMA with its names) that are checked, too.
        """
        for model in (self.model, *copies):
            for name, parameter in parameters_of(model, self.keep).items():
                dead = ~self.keep[name].to(parameter.device)
                wrong = int(parameter[dead].count_nonzero())
                if wrong:
                    raise RuntimeError(
                        f"{wrong} pruned weights of {name} are not zero: "
                        "call MaskHolder.step after every optimizer step"
                    )


def parameters_of(model, keep):
    """Return {name: parameter} of the model for the names in keep.

    model: any model.
    keep: {parameter name: bool tensor of the parameter's shape}.

    Raises ValueError naming what is unknown or does not fit.
    """
    anatomy.check_weights(model)
    parameters = dict(model.named_parameters())
    for name, mask in keep.items():
        names.check("parameter", name, parameters)
        shape = parameters[name].shape
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(
                f"the mask of {name} must be bool of shape {tuple(shape)}; "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
    return {name: parameters[name] for name in keep}


def rows_to_masks(model, rows):
    """Return the parameter masks of whole rows (output features, filters), biases included.

    A masked fc1 row that kept its bias would still emit GELU(b). The same holds for a filter whose
    batch norm kept its shift. Where a batch norm follows a convolution inside the same
    nn.Sequential, its weight and bias are masked, too. In other places none is looked for.

    model: a model, which stays as it is.
    rows: {layer name: bool [rows], True stays} of linear layers and convolutions.

    Returns {parameter name: bool tensor}.
    Raises ValueError for an unknown layer or a wrong number of rows.
    """
    masks = {}
    for layer, keep in rows.items():
        norm = anatomy.norm_after(model, layer)
        for name in [layer, norm] if norm else [layer]:
            parameters = _own_parameters(model, name)
            count = len(parameters["weight"])
            if keep.dtype != torch.bool or keep.shape != (count,):
                raise ValueError(
                    f"{layer} needs a bool mask of its {count} rows; "
                    f"got {keep.dtype} of shape {tuple(keep.shape)}"
                )
            for part, parameter in parameters.items():
                mask = torch.zeros_like(parameter, dtype=torch.bool)
                mask[keep.to(mask.device)] = True
                masks[f"{name}.{part}"] = mask
    return masks


def units_to_masks(model, drop):
    """Return the parameter masks of dropped units: the masked model equals the one without them.

    model: a ViT or Swin, which stays as it is.
    drop: {(block name, kind): indices} or {(layer name, "rows"): indices}. Kinds are
      heads    a head's rows and biases of q, k and v, and its columns of proj
      neurons  a neuron's row and bias of fc1, and its column of fc2
      qk       dimension d of the queries and keys of head h: its row and bias of q, and its row and
               bias of k. Its index is h * size + d, where size is the number of such dimensions of
               a head.
      v        dimension d of the values of head h: its row and bias of v, and its column of proj.
               Its index is h * size + d, where size is the number of value dimensions of a head.

    Returns {parameter name: bool tensor}.
    Raises ValueError for unknown units or indices out of range.
    """
    view = models.view(model)
    masks = {}
    for (name, kind), indices in drop.items():
        rows, columns = _lines_left(view, name, kind, indices)
        parts = rows_to_masks(model, rows)
        for parameter, keep in columns.items():
            weight = view.parameter(parameter)
            parts[parameter] = keep.to(weight.device).expand_as(weight)
        for parameter, mask in parts.items():
            masks[parameter] = mask & masks.get(parameter, mask)
    return masks


def _lines_left(view, name, kind, indices):
    """Return what stays without these units: {layer: bool [rows]}, {parameter: bool [columns]}."""
    if kind == "rows":
        count = len(_own_parameters(view.model, name)["weight"])
        return {name: _all_but(indices, count, f"rows of {name}")}, {}
    names.check("kind of unit", kind, _UNITS)
    block = view.block(name)
    if kind == "qk" and block.normalises_queries:
        raise ValueError(
            f"{name}: queries and keys are normalised together; mask v, or whole heads"
        )
    count = view.units([kind]).get((name, kind), 0)
    keep = _all_but(indices, count, f"{kind} of {name}")
    if kind == "neurons":
        return {f"{name}.mlp.fc1": keep}, {f"{name}.mlp.fc2.weight": keep}
    # A head may have fewer dimensions of queries than of values.
    queries = values = keep
    if kind == "heads":
        queries = keep.repeat_interleave(block.qk_dim)
        values = keep.repeat_interleave(block.head_dim)
    elif kind == "qk":
        values = keep.new_ones(block.num_heads * block.head_dim)
    else:
        queries = keep.new_ones(block.num_heads * block.qk_dim)
    # The keys of a dimension go with its queries.
    rows = {f"{name}.attn.qkv": torch.cat([queries, queries, values])}
    columns = {} if kind == "qk" else {f"{name}.attn.proj.weight": values}
    return rows, columns


def _own_parameters(model, layer):
    """Return {"weight": ..., "bias": ...} of a plain layer; ValueError if there is none."""
    modules = dict(model.named_modules())
    names.check("layer", layer, modules)
    parameters = dict(modules[layer].named_parameters(recurse=False))
    if "weight" not in parameters or parameters.keys() - {"weight", "bias"}:
        raise ValueError(
            f"{layer} ({type(modules[layer]).__name__}) is not one weight and a bias; only linear "
            "layers and convolutions that were not factored have rows to mask"
        )
    return parameters


def _all_but(indices, count, what):
    """Return bool [count], False at indices; ValueError, naming what, for an index out of range."""
    indices = [int(index) for index in indices]
    if not set(indices) <= set(range(count)):
        raise ValueError(f"there are {count} {what}, numbered from 0; got {indices}")
    keep = torch.ones(count, dtype=torch.bool)
    keep[indices] = False
    return keep


def shares(kind, steps, *, final, initial=0.0):
    """Return the shares to have cut after each step, a rising list that ends with final exactly.

    kind: one of
      cubic      final + (initial - final) * (1 - step / steps)**3 after `step` of `steps` steps:
                 fast while many weights are superfluous, slow near the end (Zhu and Gupta 2017,
                 equation 1)
      iterative  each step cuts the same share of what the step before left (Han et al. 2015)
      one-shot   all at once, whatever the number of steps
    steps: number of steps, at least 1.
    final, initial: shares in [0, 1), with initial <= final; initial was cut before the first step.

    Raises ValueError for an unknown kind, shares out of range, and less than one step.
    """
    names.check("kind of schedule", kind, ("one-shot", "cubic", "iterative"))
    if not 0 <= initial <= final < 1:
        raise ValueError(
            f"need shares 0 <= initial <= final < 1, not percentages; got {initial} and {final}"
        )
    if steps < 1:
        raise ValueError(f"a schedule has at least one step; got {steps}")
    if kind == "one-shot":
        return [final]
    times = [step / steps for step in range(1, steps)]
    if kind == "cubic":
        before = [final + (initial - final) * (1 - time) ** 3 for time in times]
    else:
        left = (1 - final) / (1 - initial)
        before = [1 - (1 - initial) * left**time for time in times]
    return [*before, final]


def keep_more_zero(model, scores, *, sparsity, per="global", floor=0):
    """Return masks in which the zeros of the model go first: dead weights stay dead.

    model: a model that was cut before by masks, or not; it stays as it is.
    scores: {parameter name: float tensor of its shape}, such as new scores of a model that was cut
        before.
    sparsity, per, floor: as for masks.keep_largest. The weights that are dead already count.

    Returns {parameter name: bool tensor}.
    Raises ValueError for scores that do not fit the model, for a sparsity that would bring dead
    weights back, and what masks.keep_largest raises.
    """
    shapes = {name: score.bool() for name, score in scores.items()}
    dead = {}
    ranked = {}
    for name, parameter in parameters_of(model, shapes).items():
        dead[name] = (parameter == 0).to(scores[name].device)
        ranked[name] = scores[name].masked_fill(dead[name], -torch.inf)
    keep = masks.keep_largest(ranked, sparsity=sparsity, per=per, floor=floor)
    revived = sum(int((mask & dead[name]).count_nonzero()) for name, mask in keep.items())
    if revived:
        raise ValueError(
            f"{revived} zero weights would come back: ask for a higher sparsity than before"
        )
    return keep


def keep_fewer_rows(model, scores, *, left, floor=1):
    """Return the rows of the lowest scores, {(layer, "rows"): indices}, for shrink.remove.

    model: linear layers may have lost rows before. Those count as gone: zeros stand in their place.
    scores: {layer: float tensor [rows]}, as from scores.rows of this very model.
    left: how many rows are computed afterwards, over all these layers.
    floor: how many rows at least stay in each layer.

    Raises ValueError for a `left` that leaves nothing to remove, for scores that do not fit, and
    what masks.keep_largest raises.
    """
    living = {}
    alive = {}
    for name, score in scores.items():
        layer = model.get_submodule(name)
        if len(score) != layer.out_features:
            raise ValueError(
                f"{name} has {layer.out_features} rows; got {len(score)} scores of another model"
            )
        every = torch.arange(len(score), device=score.device)
        living[name] = getattr(layer, "rows", every)
        alive[name] = score[living[name]]
    total = sum(map(len, alive.values()))
    if left >= total:
        raise ValueError(f"{total} rows are left already; ask for fewer than {left}")
    gone = masks.dropped(masks.keep_largest(alive, count=total - left, floor=floor))
    return {(name, "rows"): living[name][places].tolist() for name, places in gone.items()}
