"""Masks on a model: put on, held through training, reported; from rows and units to parameters; schedules.

A mask is a bool tensor of its parameter's shape, True where the weight stays, under the parameter's name.
Models are never wrapped: their parameters keep their names and dead weights are plain zeros.
"""

import pandas as pd
import torch

from . import models
from .masks import keep_largest, tile_size, tile_sums, whole_tiles

UNITS = ("heads", "neurons", "qk", "v", "rows")


def parameters_of(model, keep):
    """{name: parameter} for the names in keep. Raises ValueError naming what is unknown or does not fit."""
    known = dict(model.named_parameters())
    for name, mask in keep.items():
        if name not in known:
            raise ValueError(f"no parameter {name!r} in this model{models.nearest(name, known)}")
        if mask.dtype != torch.bool or mask.shape != known[name].shape:
            raise ValueError(
                f"the mask of {name} must be bool of shape {tuple(known[name].shape)}; "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
    return {name: known[name] for name in keep}


@torch.no_grad()
def apply(model, keep):
    """Zero the weights where keep is False, in place.

    keep: {parameter name: bool tensor of its shape}. Raises ValueError for an unknown name, a wrong shape,
    and for masks that drop nothing or everything.
    """
    parameters = parameters_of(model, keep)
    total = sum(mask.numel() for mask in keep.values())
    kept = sum(int(mask.count_nonzero()) for mask in keep.values())
    if kept in (0, total):
        raise ValueError(
            f"the masks keep {kept} of {total} weights: a cut of {'nothing' if kept else 'everything'} is a "
            "mistake; check the sparsity and the layers that were chosen"
        )
    for name, parameter in parameters.items():
        parameter.masked_fill_(~keep[name].to(parameter.device), 0)


def sparsity(model, keep):
    """Share of zeros, in [0, 1], among all entries of the parameters that keep names; counted, so exact."""
    parameters = parameters_of(model, keep).values()
    total = sum(parameter.numel() for parameter in parameters)
    return (total - sum(int(parameter.count_nonzero()) for parameter in parameters)) / total


class Holder:
    """Keeps dead weights at zero through training, whatever the optimizer, momentum and weight decay do.

    Masking gradients is not enough: moments from before the cut move dead weights for many steps. Creating a
    Holder zeroes the dead weights and their optimizer moments; call `step` after each optimizer step and
    `check` at the end of an epoch. model, keep: as for `apply`, on the device they train on. optimizer: any
    of torch.optim, or accelerate's wrapper of one; its state tensors of a parameter's shape are the moments.
    """

    def __init__(self, model, keep, optimizer):
        apply(model, keep)
        self.parameters = parameters_of(model, keep)
        self.alive = {name: keep[name].to(p.device) for name, p in self.parameters.items()}
        # Floats, for one fused kernel a device: multiplying by bools would fall back to a kernel for each
        # tensor.
        self.factors = [self.alive[name].to(p.dtype) for name, p in self.parameters.items()]
        for name, parameter in self.parameters.items():
            for moment in optimizer.state.get(parameter, {}).values():
                if torch.is_tensor(moment) and moment.shape == parameter.shape:
                    moment.masked_fill_(~self.alive[name].to(moment.device), 0)

    @torch.no_grad()
    def step(self, *copies):
        """Zero the dead weights again, in the model and in copies of it (an EMA with the same names)."""
        for parameters in (self.parameters, *(parameters_of(copy, self.alive) for copy in copies)):
            torch._foreach_mul_(list(parameters.values()), self.factors)

    def check(self, *copies):
        """Raise RuntimeError, naming the parameter, if a dead weight of the model or a copy is not zero."""
        for parameters in (self.parameters, *(parameters_of(copy, self.alive) for copy in copies)):
            for name, parameter in parameters.items():
                wrong = int(parameter[~self.alive[name]].count_nonzero())
                if wrong:
                    raise RuntimeError(
                        f"{wrong} pruned weights of {name} are not zero: call Holder.step after every optimizer step"
                    )


def rows_to_masks(model, rows):
    """Parameter masks for whole rows (output features, filters): a row takes its bias with it.

    rows: {layer name: bool [rows], True stays} for linear layers and convolutions. A masked fc1 row that kept
    its bias would still emit GELU(b); likewise a filter whose batch norm kept its shift, so weight and bias
    of a batch norm that follows a convolution inside the same nn.Sequential are masked too (elsewhere it is
    not looked for). Returns {parameter name: bool tensor}. Raises ValueError for an unknown layer or a wrong
    number of rows.
    """
    masks = {}
    for layer, keep in rows.items():
        names = [layer] + ([norm] if (norm := models.norm_after(model, layer)) else [])
        for name in names:
            parameters = own_parameters(model, name)
            count = len(parameters["weight"])
            if keep.dtype != torch.bool or keep.shape != (count,):
                raise ValueError(
                    f"{layer} needs a bool mask of its {count} rows; got {keep.dtype} of shape {tuple(keep.shape)}"
                )
            for part, parameter in parameters.items():
                column = keep.to(parameter.device).view(-1, *[1] * (parameter.dim() - 1))
                masks[f"{name}.{part}"] = column.expand_as(parameter).clone()
    return masks


def own_parameters(model, layer):
    """{"weight": ..., "bias": ...} of a layer by name. Raises ValueError if there is no such plain layer."""
    modules = dict(model.named_modules())
    if layer not in modules:
        raise ValueError(f"no layer {layer!r} in this model{models.nearest(layer, modules)}")
    found = dict(modules[layer].named_parameters(recurse=False))
    if set(found) not in ({"weight"}, {"weight", "bias"}):
        raise ValueError(
            f"{layer} ({type(modules[layer]).__name__}) is not one weight and a bias; only linear layers and "
            "convolutions that were not factored have rows to mask"
        )
    return found


def units_to_masks(model, drop):
    """Parameter masks for dropped units, so that the masked model equals the one with the units removed.

    drop: {(block name, kind): indices} or {(layer name, "rows"): indices}, kind one of
      heads    a head's rows and biases of q, k and v, and its columns of proj
      neurons  a neuron's row and bias of fc1 and its column of fc2
      qk       dimension d of the queries and keys of head h, counted as h * size + d with the size that one head
               has of them: its row and bias of q and its row and bias of k
      v        dimension d of the values of head h, counted likewise: its row and bias of v and its column of proj
    Returns {parameter name: bool tensor}. Raises ValueError for unknown units or indices out of range.
    """
    view, masks = models.view(model), {}
    for (name, kind), indices in drop.items():
        if kind not in UNITS:
            raise ValueError(f"unknown kind of unit {kind!r}{models.nearest(kind, UNITS)}")
        if kind == "rows":
            keep = kept(indices, len(own_parameters(model, name)["weight"]), name=f"rows of {name}")
            parts = rows_to_masks(model, {name: keep})
        elif kind == "neurons":
            keep = kept(indices, view.block(name).neurons, name=f"neurons of {name}")
            parts = rows_to_masks(model, {f"{name}.mlp.fc1": keep})
            parts |= columns_to_mask(model, f"{name}.mlp.fc2", keep)
        elif kind == "qk" and view.block(name).normalises_queries:
            raise ValueError(f"{name}: queries and keys are normalised together; mask v, or whole heads")
        else:
            queries, values = attention_kept(view.block(name), kind, indices)
            parts = rows_to_masks(model, {f"{name}.attn.qkv": torch.cat([queries, queries, values])})
            if kind != "qk":
                parts |= columns_to_mask(model, f"{name}.attn.proj", values)
        for parameter, mask in parts.items():
            masks[parameter] = masks[parameter] & mask if parameter in masks else mask
    return masks


def attention_kept(block, kind, indices):
    """Bool [heads * size] of the query (and key) and of the value dimensions that stay without these heads, qk or v."""
    # heads may have fewer dimensions of queries than of values
    queries, values = block.num_heads * block.qk_dim, block.num_heads * block.head_dim
    if kind == "heads":
        keep = kept(indices, block.num_heads, name=f"heads of {block.name}")
        return tuple(keep.repeat_interleave(size // block.num_heads) for size in (queries, values))
    keep = kept(indices, queries if kind == "qk" else values, name=f"{kind} dimensions of {block.name}")
    return (keep, keep.new_ones(values)) if kind == "qk" else (keep.new_ones(queries), keep)


def kept(indices, count, *, name):
    """Bool [count], False at indices. Raises ValueError for an index out of range."""
    indices = torch.as_tensor(indices, dtype=torch.long)
    if ((indices < 0) | (indices >= count)).any():
        there = f"are 0 to {count - 1}" if count else "are all gone"
        raise ValueError(f"{name} {there}; got {indices.tolist()}")
    keep = torch.ones(count, dtype=torch.bool)
    keep[indices] = False
    return keep


def columns_to_mask(model, layer, keep):
    """{weight name: mask} for whole columns (inputs) of a linear layer. keep: bool [columns]."""
    weight = own_parameters(model, layer)["weight"]
    return {f"{layer}.weight": keep.to(weight.device).expand_as(weight).clone()}


def cubic_schedule(step, total, *, final, initial=0.0):
    """Sparsity to have after `step` of `total` steps: final + (initial - final) * (1 - step / total)**3.

    Fast while many weights are superfluous, slow near the end (Zhu & Gupta 2017, equation 1). Shares in [0,
    1); initial at and before step 0, final at and after total: the tail that trains with a frozen mask.
    """
    if not 0 <= initial <= final < 1:
        raise ValueError(f"need shares 0 <= initial <= final < 1, not percentages; got {initial} and {final}")
    if total < 1:
        raise ValueError(f"total must be at least one step; got {total}")
    left = 1 - min(max(step / total, 0), 1)
    return final + (initial - final) * left**3


def shares(kind, steps, *, final, initial=0.0):
    """Shares to have cut after each of a number of steps, a rising list that ends with final exactly.

    kind: "cubic" (cubic_schedule, which begins from initial), "iterative": each step cuts the same share of what the
    one before left (Han et al. 2015), or "one-shot": all at once, whatever the number of steps. Shares in [0, 1).
    Raises ValueError for an unknown kind and for what cubic_schedule refuses.
    """
    kinds = ("one-shot", "cubic", "iterative")
    if kind not in kinds:
        raise ValueError(f"unknown kind of schedule {kind!r}{models.nearest(kind, kinds)}")
    last = cubic_schedule(steps, steps, final=final, initial=initial)  # final, or the error that is due
    if kind == "one-shot":
        before = []
    elif kind == "cubic":
        before = [cubic_schedule(step, steps, final=final, initial=initial) for step in range(1, steps)]
    else:
        left = (1 - final) / (1 - initial)
        before = [1 - (1 - initial) * left ** (step / steps) for step in range(1, steps)]
    return [*before, last]


@torch.no_grad()
def further(model, scores, **options):
    """Masks of masks.keep_largest(scores, **options) in which what is zero in the model goes first: dead stays dead.

    scores: {parameter name: tensor of its shape}, such as new ones for a model that was cut before; the budget
    counts the weights that are dead already; with tile, those of tiles that are zero throughout. Raises ValueError
    for scores that do not fit the model, for a budget that would bring dead weights back, and what keep_largest
    raises.
    """
    parameters = parameters_of(model, {name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()})
    dead = {name: (parameter == 0).to(scores[name].device) for name, parameter in parameters.items()}
    if (tile := options.get("tile")) is not None:  # one zero does not make a dead tile
        for name, mask in dead.items():
            size = tile_size(name, mask, tile)
            dead[name] = whole_tiles(tile_sums((~mask).float(), *size) == 0, *size)
    keep = keep_largest({n: score.masked_fill(dead[n], -torch.inf) for n, score in scores.items()}, **options)
    back = {name: int((mask & dead[name]).count_nonzero()) for name, mask in keep.items()}
    if any(back.values()):
        raise ValueError(
            f"{sum(back.values())} of {sum(int(d.count_nonzero()) for d in dead.values())} weights that are zero "
            f"would come back, first in {next(n for n in back if back[n])}: ask for a higher sparsity than before"
        )
    return keep


def further_rows(model, scores, *, left, floor=1):
    """Rows to remove so that `left` are computed in all, those of the lowest scores: {(layer, "rows"): indices}.

    scores: {layer: [rows]}, as from scores.rows of this very model; rows that were removed before, of which zeros
    stand in their place, count as gone. left: how many rows stay over all these layers. floor: how many at least stay
    in each. For shrink.remove. Raises ValueError for a left that leaves nothing to remove, for scores that do not fit
    and what keep_largest raises.
    """
    living = {}
    for name, score in scores.items():
        layer = model.get_submodule(name)
        if len(score) != layer.out_features:
            raise ValueError(f"{name} has {layer.out_features} rows; got {len(score)} scores of another model")
        living[name] = layer.rows if hasattr(layer, "rows") else torch.arange(len(score), device=score.device)
    found = {name: score[living[name]] for name, score in scores.items()}
    total = sum(map(len, found.values()))
    if left >= total:
        raise ValueError(f"{total} rows are left already; ask for fewer than {left}")
    keep = keep_largest(found, count=total - left, floor=floor)
    gone = {(name, "rows"): living[name][~mask].tolist() for name, mask in keep.items()}
    return {key: indices for key, indices in gone.items() if indices}


@torch.no_grad()
def histogram(stages, keep, *, by="role", bins=81):
    """How the weights are distributed before and after: a frame of stage, role, left, right, count, survivors, zeros
    and threshold.

    stages: {name: model}, the unpruned one first, such as unpruned, pruned and finetuned. keep: masks; the weights (no
    biases) that they name are counted, by role of their layer and for "all", or by="layer", with a column block too
    (None outside of blocks). left, right: edges of a bin, the same everywhere, as far out as the largest |w|. count:
    weights in it that are not zero. survivors: those of them that keep says stay. zeros: exact zeros of that stage and
    role. threshold: the |w| up to which magnitude, over all of them together, would cut as many of the first stage.
    Raises ValueError for another by.
    """
    if by not in ("role", "layer"):
        raise ValueError(f'by must be "role" or "layer"; got {by!r}')
    view = models.view(next(iter(stages.values())))
    names = {}
    for name in keep:
        if name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            block = view.block_of(layer)
            key = (view.role(layer), layer, block and block.name) if by == "layer" else (view.role(layer),)
            names.setdefault(key, []).append(name)
    groups = names if by == "layer" else {**names, ("all",): sum(names.values(), [])}
    whole = {name: parameters_of(model, keep) for name, model in stages.items()}
    limit = max(float(p.abs().max()) for parameters in whole.values() for p in parameters.values())
    edges = torch.linspace(-limit, limit, bins + 1)
    threshold = _magnitude_threshold(next(iter(whole.values())), keep, sum(names.values(), []))
    frames = []
    for key, own in groups.items():
        alive = torch.cat([keep[name].flatten().cpu() for name in own])
        for stage, parameters in whole.items():
            flat = torch.cat([parameters[name].float().flatten().cpu() for name in own])
            counted = {"count": flat != 0, "survivors": (flat != 0) & alive}
            counted = {name: torch.histc(flat[which], bins, -limit, limit).long() for name, which in counted.items()}
            frame = pd.DataFrame({"left": edges[:-1], "right": edges[1:]} | counted)
            about = {"stage": stage} | dict(zip(("role", "layer", "block"), key, strict=False))
            frames.append(frame.assign(**about, zeros=int((flat == 0).sum()), threshold=threshold))
    first = ["stage", "role", *(["layer", "block"] if by == "layer" else [])]
    return pd.concat(frames, ignore_index=True)[[*first, "left", "right", "count", "survivors", "zeros", "threshold"]]


def _magnitude_threshold(parameters, keep, names):
    """The largest |w| that goes if as many of these weights as keep drops are cut by magnitude alone; 0 for none."""
    count = sum(int((~keep[name]).count_nonzero()) for name in names)
    size = torch.cat([parameters[name].float().abs().flatten().cpu() for name in names])
    return size.kthvalue(count).values.numpy() if count else 0.0


def unit_table(scores, alive):
    """Units with their scores and whether they are left: a frame of block, kind, unit, score and kept.

    scores: {(block, kind): tensor} of the whole model. alive: {(block, kind): indices of those left}, as
    masks.remaining tells them. Raises ValueError for a unit that has no score.
    """
    rows = []
    for key, own in scores.items():
        if set(alive[key]) - set(range(len(own))):
            raise ValueError(f"{key[1]} of {key[0]} are 0 to {len(own) - 1}; got {sorted(alive[key])}")
        rows += [(*key, unit, score, unit in alive[key]) for unit, score in enumerate(own.tolist())]
    return pd.DataFrame(rows, columns=["block", "kind", "unit", "score", "kept"])
