"""Torch-Pruning, torch.nn.utils.prune and plain SVD beside vitlab: what an operation takes, what it leaves.

Torch-Pruning gets the help that it needs on timm's models: whole heads and neurons, global, half of each kind, residual
stream and classifier left out, one more ignored parameter in Swin, and afterwards the attributes and the table of
relative positions corrected by hand. `alone` shows what happens without.
"""

import copy
import math
import time
import warnings

import torch
import torch_pruning
from common import LARGE, images_of, interleaved, model_of, publish, told
from speed import COLUMNS, cut_in_half, factored_in_half
from torch.nn.utils import prune as torch_prune

from vitlab import bench, cost, masks, models, scores, shrink


def attentions(model):
    return [module for module in model.modules() if hasattr(module, "qkv")]


def torch_pruning_cut(model, ratio, importance):
    """Torch-Pruning, helped, in place: this share of the heads and of the neurons, at least one head a block."""
    num_heads, dims, table = {}, {}, "relative_position_bias_table"
    left_out = [model.get_classifier()]
    for name, module in model.named_modules():
        if hasattr(module, "qkv"):
            left_out.append(module.proj)
            num_heads[module.qkv] = module.num_heads
            dims[module.proj] = module.proj.in_features // module.num_heads
            left_out += [getattr(module, table)] if hasattr(module, table) else []
        elif name.endswith(("fc2", "reduction", "patch_embed.proj")):
            left_out.append(module)
    options = {"global_pruning": True, "pruning_ratio": ratio, "head_pruning_ratio": ratio, "prune_num_heads": True}
    kept = {layer: 1 - 1 / count for layer, count in num_heads.items()}
    with warnings.catch_warnings(action="ignore"):
        pruner = torch_pruning.pruner.BasePruner(
            model, images_of(model, 1), importance=importance, ignored_layers=left_out, num_heads=num_heads,
            prune_head_dims=False, max_pruning_ratio=max(kept.values()), **options,
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
        module.attn_dim, module.head_dim = module.proj.in_features, module.proj.in_features // module.num_heads
        if hasattr(module, table) and module.proj in gone:
            old = getattr(module, table).data
            keep = [i for i in range(old.shape[1]) if i not in gone[module.proj]]
            setattr(module, table, torch.nn.Parameter(old[:, keep].clone()))
    return model


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


def removal(rounds):
    """Scores by magnitude and half of all heads and neurons out of the model, in seconds; the scores by gradients have
    their gradients given."""
    rows = []
    for case in ("ViT-B", "Swin-T"):
        model = model_of(case)

        def with_gradients(model=model):
            own = copy.deepcopy(model)
            for parameter in own.parameters():
                parameter.grad = 1e-3 * torch.randn_like(parameter)
            return own

        calls = {"vitlab": lambda m=model: None if vitlab_cut(m) else None}
        for name, make in IMPORTANCE.items():
            calls[f"Torch-Pruning, {name}"] = with_gradients, lambda m, make=make: cut_or_say(m, make())
        rows += told(f"remove half of {case}", interleaved(calls, rounds), "vitlab")
    publish("removal", rows)


def cut_or_say(model, importance):
    try:
        torch_pruning_cut(model, 0.5, importance)
    except RuntimeError as error:  # its time is that of the whole cut all the same
        print(f"Torch-Pruning: {error}")


def alone(rounds):
    """Torch-Pruning as its example for timm's ViT has it, on Swin too: what comes out, or why nothing does."""
    rows = []
    for case in LARGE:
        model, row = model_of(case), {"case": case, "what": "Torch-Pruning, nothing corrected by hand"}
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
            row["outcome"] = f"runs with {cost._torch(model.eval(), images) / before:.3f} of the MACs"
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
        print(f"{case}: Torch-Pruning at ratio {ratio:.3f}; made in {math.ceil(time.perf_counter() - begun)} s")
        table = bench.bounds(made, bench.latency(made, batch=8, repeats=rounds)).assign(case=case)
        table["macs"] = table.model.map({name: cost.macs(model) for name, model in made.items()})
        table["params"] = table.model.map({n: sum(p.numel() for p in m.parameters()) for n, m in made.items()})
        table["bytes_disk"] = table.model.map({name: cost.bytes_disk(model) for name, model in made.items()})
        rows += table.to_dict("records")
    publish("results", rows, shown=["case", "model", "macs", "params", "bytes_disk", *COLUMNS[4:]])


CASES = {each.__name__: each for each in (removal, alone, results)}
