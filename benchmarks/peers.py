"""Torch-Pruning, torch.nn.utils.prune and plain SVD beside vitlab: what an operation takes, what it leaves.

Torch-Pruning gets the help that it needs on timm's models: whole heads and neurons, global, half of each kind, residual
stream and classifier left out, one more ignored parameter in Swin, and afterwards the attributes and the table of
relative positions corrected by hand. `alone` shows what happens without. It can also cut all there is, residual stream
and stem included, down to a share of the MACs (for accuracy.py); in Swin patch merging then needs a rule of its own.
"""

import copy
import math
import time
import warnings

import torch
import torch_pruning
from common import LARGE, images_of, interleaved, model_of, publish, rows_of_ratios
from speed import COLUMNS, cut_in_half, factored_in_half
from timm.models.swin_transformer import PatchMerging
from torch.nn.utils import prune as torch_prune

from vitlab import models
from vitlab.evaluation import bench, cost, roofline
from vitlab.pruning import masks, pool, scores, shrink


def attentions(model):
    return [module for module in model.modules() if hasattr(module, "qkv")]


def torch_pruning_cut(model, ratio, importance, *, heads=None, everything=False, ranked="global"):
    """Torch-Pruning, helped, in place: this share of the heads and of the neurons, at least one head a block.

    heads: share of the heads, if another one. everything: of the residual stream's channels and of the stem's filters,
    too. ranked: all together ("global"), or groups of one structure among themselves ("isomorphic").
    """
    num_heads, dims, table = {}, {}, "relative_position_bias_table"
    left_out = [model.get_classifier()]
    for name, module in model.named_modules():
        if hasattr(module, "qkv"):
            left_out += [] if everything else [module.proj]
            num_heads[module.qkv] = module.num_heads
            dims[module.proj] = module.proj.in_features // module.num_heads
            left_out += [getattr(module, table)] if hasattr(module, table) else []
        elif not everything and (name.endswith(("fc2", "reduction")) or is_stem(name, module)):
            left_out.append(module)
    options = {
        "pruning_ratio": ratio,
        "head_pruning_ratio": ratio if heads is None else heads,
        "prune_num_heads": True,
    }
    kept = {layer: 1 - 1 / count for layer, count in num_heads.items()}
    position = getattr(model, "pos_embed", None)
    with warnings.catch_warnings(action="ignore"):
        pruner = torch_pruning.pruner.BasePruner(
            model, images_of(model, 1), importance=importance, ignored_layers=left_out, num_heads=num_heads,
            prune_head_dims=False, max_pruning_ratio=max(kept.values()), global_pruning=True,
            isomorphic=ranked == "isomorphic",
            unwrapped_parameters=None if position is None else [(position, 2)],
            customized_pruners={PatchMerging: Merging()}, in_channel_groups={}, out_channel_groups={}, **options,
        )  # fmt: skip
        gone = {}
        for group in pruner.step(interactive=True):
            for dependency, indices in group:
                layer = dependency.target.module
                if layer in dims and pruner.DG.is_in_channel_pruning_fn(dependency.handler):
                    gone[layer] = {index // dims[layer] for index in indices}
            group.prune()
    for module in attentions(model):
        module.num_heads = pruner.num_heads[module.qkv]
        if module.num_heads == 0:
            raise RuntimeError("every head of a block was removed")
        module.attn_dim, module.head_dim = (
            module.proj.in_features,
            module.proj.in_features // module.num_heads,
        )
        if hasattr(module, table) and module.proj in gone:
            old = getattr(module, table).data
            keep = [i for i in range(old.shape[1]) if i not in gone[module.proj]]
            setattr(module, table, torch.nn.Parameter(old[:, keep].clone()))
    widths = list(models.view(model).units(["width"]).values())
    model.embed_dim, model.num_features, model.head_hidden_size = widths[0], widths[-1], widths[-1]
    return model


def is_stem(name, module):
    return name.startswith("patch_embed.") and isinstance(module, torch.nn.Conv2d)


class Merging(torch_pruning.BasePruningFunc):
    """Torch-Pruning's rule for Swin's patch merging, which sees four tokens side by side: alone it cuts one of them."""

    def get_in_channels(self, layer):
        return layer.reduction.in_features // 4

    def get_out_channels(self, layer):
        return layer.reduction.out_features

    def prune_in_channels(self, layer, idxs):
        size = self.get_in_channels(layer)
        indices = [token * size + index for token in range(4) for index in idxs]
        torch_pruning.prune_layernorm_out_channels(layer.norm, indices)
        torch_pruning.prune_linear_in_channels(layer.reduction, indices)
        return layer

    def prune_out_channels(self, layer, idxs):
        torch_pruning.prune_linear_out_channels(layer.reduction, idxs)
        return layer


class Floored:
    """A Torch-Pruning importance, infinite for the best units of each place, so many as pool.FLOORS says.

    Its own max_pruning_ratio is looked at between steps, and one step of a global ranking may empty a layer, or take
    its last head. sizes: (units that may go, units) of each place seen; heads go by a ratio of their own: (0, units).
    """

    def __init__(self, importance, model):
        self.importance, self.sizes = importance, []
        self.heads = {module.proj: module.num_heads for module in attentions(model)}
        self.stem = set(model.patch_embed.modules())

    def __call__(self, group):
        found, root = self.importance(group), group[0].dep.target.module
        if root in self.heads and group[0].dep.handler == torch_pruning.prune_linear_in_channels:
            found = found.view(self.heads[root], -1)
            found[found.mean(1).argmax()] = math.inf
            self.sizes.append((0, found.shape[1]))
            return found.flatten()
        layers = {dependency.target.module for dependency, _ in group}
        weighted = {
            layer
            for layer in layers
            if isinstance(layer, torch.nn.Module) and list(layer.parameters())
        }
        floor = pool.FLOORS["filters" if weighted <= self.stem else "width"]
        found[found.topk(floor).indices] = math.inf
        self.sizes.append((len(found) - floor, len(found)))
        return found

    def most(self, ranked):
        """The largest ratio that leaves these."""
        if ranked != "global":
            return min(some / whole for some, whole in self.sizes if some)
        return sum(some for some, _ in self.sizes) / sum(whole for _, whole in self.sizes)


def torch_pruning_to(dense, share, importance, *, gradients=None, ranked="global"):
    """Torch-Pruning's cut of dense nearest to this share of its MACs, and words for its ratios, found by bisection.

    One ratio for everything, heads included as far as one stays in each block; where a head is too coarse a step, the
    heads stay at the last ratio above and the others go on alone. gradients: of dense's parameters, for Taylor.
    Raises ValueError for a share below its floor.
    """
    counts, whole, tried = [module.num_heads for module in attentions(dense)], cost.macs(dense), []
    stay = len(counts) / sum(counts)  # one of each block

    def left(ratio, heads):
        model, heads = copy.deepcopy(dense), min(heads, 1 - stay - 1e-6)
        for parameter, gradient in zip(
            model.parameters(), gradients or (), strict=gradients is not None
        ):
            parameter.grad = gradient.clone()
        floored = Floored(importance, model)
        torch_pruning_cut(model, ratio, floored, heads=heads, everything=True, ranked=ranked)
        model.zero_grad()
        tried.append(
            (cost.macs(model) / whole, model, f"ratio {ratio:.4f}, of heads {heads:.4f}", floored)
        )
        return tried[-1][0]

    left(0.5, 0.5)
    most = tried[-1][-1].most(ranked) - 1e-3
    if (floor := left(most, most)) > share:
        raise ValueError(
            f"Torch-Pruning cannot reach {share:g} x MACs: {floor:.3f} stays at its highest ratio"
        )
    low = 0.0
    for tied in (True, False):
        high, heads = most, low
        for _ in range(12):
            ratio = (low + high) / 2
            kept = left(ratio, ratio if tied else heads)
            low, high = (ratio, high) if kept > share else (low, ratio)
            if abs(kept / share - 1) <= 1e-3:
                break
        best = min(tried, key=lambda each: abs(each[0] - share))
        if abs(best[0] / share - 1) <= 0.01:
            break
    return best[1:3]


IMPORTANCE = {
    "magnitude": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=1),
    "Taylor": lambda: torch_pruning.importance.GroupTaylorImportance(),
}


def vitlab_cut(model, share=0.5):
    """Half of all heads and half of all neurons, each kind globally by magnitude, at least one of each a block."""
    drop = {}
    for kind in ("heads", "neurons"):
        found = scores.units(model, criteria=["magnitude"], kinds=[kind])["magnitude"]
        keep = masks.keep_largest(found, sparsity=share, floor=1)
        drop |= {key: indices for key, indices in masks.dropped(keep).items() if len(indices)}
    return shrink.remove(model, drop)


SETTINGS = {
    "vitlab": "masks.keep_largest by kind, sparsity 0.5, floor 1; shrink.remove",
    "Torch-Pruning": "global, pruning_ratio and head_pruning_ratio 0.5, one head stays; then corrected by hand",
}


def removal(rounds):
    """Scores by magnitude and half of all heads and neurons out of the model, in seconds; the scores by gradients have
    their gradients given. With the share of the MACs that is left, or why none is: a cut that fails has no time."""
    rows = []
    for case in ("ViT-B", "Swin-T"):
        model = model_of(case)
        whole = cost.macs(model)

        def with_gradients(model=model):
            own = copy.deepcopy(model)
            for parameter in own.parameters():
                parameter.grad = 1e-3 * torch.randn_like(parameter)
            return own

        calls, found = {"vitlab": (lambda m=model: m, vitlab_cut)}, {}
        for name, make in IMPORTANCE.items():
            calls[f"Torch-Pruning, {name}"] = (
                with_gradients,
                lambda m, make=make: torch_pruning_cut(m, 0.5, make()),
            )
        for name, (prepare, cut) in calls.items():
            try:
                found[name] = {"macs_share": cost.macs(cut(prepare())) / whole, "outcome": "runs"}
            except Exception as error:  # whatever a peer raises is the result
                found[name] = {"outcome": f"{type(error).__name__}: {error}".splitlines()[0]}
        timed = {name: call for name, call in calls.items() if "macs_share" in found[name]}
        times = {
            row["what"]: row
            for row in rows_of_ratios(
                f"remove half of {case}", interleaved(timed, rounds), "vitlab"
            )
        }
        for name, result in found.items():
            line = times.get(name, {"case": f"remove half of {case}", "what": name})
            rows.append(line | result | {"settings": SETTINGS[name.partition(",")[0]]})
    publish("removal", rows)


def alone(rounds):
    """Torch-Pruning as its example for timm's ViT has it, on Swin too: what comes out, or why nothing does."""
    rows = []
    for case in LARGE:
        model, row = (
            model_of(case),
            {"case": case, "what": "Torch-Pruning, nothing corrected by hand"},
        )
        images, before = images_of(model, 1), cost.macs(model)
        num_heads = {module.qkv: module.num_heads for module in attentions(model)}
        try:
            with warnings.catch_warnings(action="ignore"):
                pruner = torch_pruning.pruner.BasePruner(
                    model, images, importance=IMPORTANCE["magnitude"](), global_pruning=False, pruning_ratio=0.5,
                    ignored_layers=[model.get_classifier()], num_heads=num_heads,
                )  # fmt: skip
                pruner.step()
            for module in attentions(model):
                module.num_heads = pruner.num_heads[module.qkv]
                module.attn_dim = module.qkv.out_features // 3
                module.head_dim = module.attn_dim // module.num_heads
            model(images)
            row["outcome"] = (
                f"runs with {cost._torch(model.eval(), images) / before:.3f} of the MACs"
            )
        except Exception as error:  # whatever a peer raises is the result
            row["outcome"] = f"{type(error).__name__}: {error}".splitlines()[0]
        rows.append(row)
    publish("alone", rows)


def at_half_the_macs(case):
    """Torch-Pruning's cut nearest to half the MACs, the ratio found by bisection."""
    low, high, best = 0.1, 0.95, None
    for _ in range(9):
        ratio, model = (low + high) / 2, model_of(case)
        try:
            torch_pruning_cut(model, ratio, IMPORTANCE["magnitude"]())
            share = cost.macs(model) / cost.macs(model_of(case))
        except RuntimeError:
            share = 0.0
        low, high = (ratio, high) if share > 0.5 else (low, ratio)
        if share and (best is None or abs(share - 0.5) < best[0]):
            best = abs(share - 0.5), ratio, model
    return best[2], best[1]


def masked_by_torch(model):
    """Half of all linear weights by torch.nn.utils.prune, made permanent."""
    model = copy.deepcopy(model)
    pairs = [(layer, "weight") for layer in models.view(model).linears().values()]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=0.5)
    for layer, name in pairs:
        torch_prune.remove(layer, name)
    return model


def results(rounds):
    """What is left at half: MACs, parameters, bytes and time of each tool's model, in batches of 8."""
    rows = []
    for case in LARGE:
        begun, dense = time.perf_counter(), model_of(case)
        made = {"dense": dense, "torch.nn.utils.prune, half the weights": masked_by_torch(dense)}
        made["plain SVD, half of each layer"] = factored_in_half(dense)
        made["vitlab, half the MACs"] = cut_in_half(dense)
        made["Torch-Pruning, half the MACs"], ratio = at_half_the_macs(case)
        print(
            f"{case}: Torch-Pruning at ratio {ratio:.3f}; made in {math.ceil(time.perf_counter() - begun)} s"
        )
        table = roofline.bounds(made, bench.latency(made, batch=8, repeats=rounds)).assign(
            case=case
        )
        table["macs"] = table.model.map({name: cost.macs(model) for name, model in made.items()})
        table["params"] = table.model.map(
            {name: cost.params(model) for name, model in made.items()}
        )
        table["bytes_disk"] = table.model.map(
            {name: cost.bytes_disk(model) for name, model in made.items()}
        )
        rows += table.to_dict("records")
    publish("results", rows, shown=["case", "model", "macs", "params", "bytes_disk", *COLUMNS[4:]])


CASES = {each.__name__: each for each in (removal, alone, results)}
