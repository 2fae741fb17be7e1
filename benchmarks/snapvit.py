"""SnapViT (Simoncini et al. 2025), LAMP and SNIP magnitude, run from SnapViT's public code.

The environment variable SNAPVIT names a clone of github.com/WalterSimoncini/SnapViT. Its code needs
scipy, scikit-learn and pypop7, which may lie in that folder, too: pip install --no-deps --target.

Settings are those of its jobs/ga/dino-sparsegpt.sh, but for the images: those that all methods here
get. Crops are cut out of images as they are stored. Heads and neurons go in the proportion of its own
table, 15 points fewer of the heads than of the neurons, until the share of the MACs is met.
"""

import importlib
import io
import os
import sys
import types
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from vitlab import models
from vitlab.evaluation import cost
from vitlab.models import anatomy
from vitlab.pruning import shrink

EVALUATIONS = 50  # of its evolution strategy
COMPONENTS = 192  # of the features' PCA
NEURONS, HEADS = (0.15, 0.35, 0.55, 0.65), (0.0, 0.2, 0.4, 0.5)  # shares cut, seen by the strategy
LEAST = {"min_hidden_dim_keep_ratio": 0.05, "min_head_keep_ratio": 0.2}  # of each block
LESS = 0.15  # so much less of the heads goes than of the neurons


def folder():
    """Return the clone that SNAPVIT names. Raises FileNotFoundError without one."""
    path = os.environ.get("SNAPVIT")
    if not path or not Path(path, "src", "models", "prunable").is_dir():
        raise FileNotFoundError(
            f"SNAPVIT is {path or 'not set'}: name a clone of github.com/WalterSimoncini/SnapViT"
        )
    return path


def load(module):
    """Import a module of SnapViT's code."""
    if folder() not in sys.path:
        sys.path.append(folder())
    # It imports both without calling them on the way that is taken here.
    for name in ("open_clip", "numba"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = stand_in = types.ModuleType(name)
            stand_in.create_model_from_pretrained = None
            stand_in.jit = lambda *_, **__: lambda function: function
    return importlib.import_module(module)


def prepared(dense):
    """Return a copy of a ViT without head as SnapViT's load_model leaves one, frozen but for two layers.

    Its attention is SnapViT's, which today's timm calls with one more argument.
    """
    modules = load("src.utils.modules")

    class Attention(modules.DynamicHeadsAttention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(x)

    model = anatomy.copied(dense)
    for block in model.blocks:
        block.attn = Attention.from_timm_attn(block.attn)
    model.head = modules.OptionalLinear(model.head)
    model.to(next(dense.parameters()).device).eval()
    layers = [
        f"blocks.{i}.{name}" for i in range(len(model.blocks)) for name in ("mlp.fc1", "attn.qkv")
    ]
    load("src.utils.models").freeze_model(model, exclusions=layers)
    return model


class Views(Dataset):
    """Its crops of the images of a data.Split."""

    def __init__(self, split, transform):
        self.images, self.labels, self.transform = split.images, split.labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.transform(Image.fromarray(self.images[number])), self.labels[number]


@contextmanager
def quiet():
    """Let its code neither draw bars nor print."""
    for name in ("src.utils.models", "src.models.prunable.dino.gradients"):
        load(name).tqdm = lambda items, **_: items
    with redirect_stdout(io.StringIO()):
        yield


def prunable(dense, word="sparse-gpt-dino"):
    """Return one of SnapViT's prunable models without gradients, by its word, and its crops."""
    with quiet():
        kind = load("src.models.enums").PrunableModelType(word)
        device = next(dense.parameters()).device
        make = load("src.models.prunable").load_prunable_model
        return make(kind, prepared(dense), None, device, **LEAST)


def with_gradients(dense, split, seed):
    """Return SnapViT's prunable model with its self-supervised gradients.

    split: the calibration images. seed: of the crops.
    """
    torch.manual_seed(seed)
    model, crops = prunable(dense)
    with quiet():
        model.estimate_pruning_weights(DataLoader(Views(split, crops), batch_size=16))
    return model


def ranked(model, dense, batches, seed, *, evaluations=EVALUATIONS):
    """Return the weights of blocks and heads that SnapViT's evolution strategy finds.

    model: as from `with_gradients`. batches: the calibration images as (x, y) on its device.
    """
    device = next(dense.parameters()).device
    images = sum(len(x) for x, _ in batches)
    blocks, heads = len(model.blocks), model.default_num_heads
    slope = np.linspace(1.2, 0.8, blocks)
    with quiet():
        fitness = load("src.utils.ga.fitness").build_fitness_function(
            model=model,
            teacher=anatomy.copied(dense).to(device).eval(),
            pruning_data_loader=None,
            eval_data_loader=batches,
            device=device,
            pruning_function=candidates,
            loss_types=[load("src.utils.ga.loss").GALossType.COSINE_SIMILARITY],
            num_pca_components=min(COMPONENTS, images),
            estimate_pruning_weights=False,
        )
        weights, _, _ = load("src.utils.ga").optimize_function_ga(
            type_=load("src.utils.ga.enums").GAOptimizerType.XNES,
            fitness_function=fitness,
            ndim_problem=blocks + heads * blocks,
            max_function_evaluations=evaluations,
            seed=42 + seed,
            starting_point=np.concatenate([slope, slope.repeat(heads)]),
        )
    return torch.tensor(weights).abs().to(device)


def candidates(model, solution):
    """Return the models that its strategy compares, of one solution."""
    weights = torch.tensor(solution.astype(np.float32)).abs()
    pruned = []
    for neurons, heads in zip(NEURONS, HEADS, strict=True):
        pruned.append(load("src.utils.models").deepcopy_model(model))
        pruned[-1].prune(None, neurons, heads, weights, estimate_pruning_weights=False)
    return pruned


def ratios(dense, share):
    """Return the shares of neurons and heads that go for a share of the MACs, and the MACs left."""
    block = models.view(dense).blocks[0]
    table = cost.breakdown(dense)
    by_role = table.groupby("role").macs.sum()
    mlp = by_role[["fc1", "fc2"]].sum()
    attention = by_role[["qkv", "proj", "qk", "av"]].sum()
    blocks = len(models.view(dense).blocks)
    best = None
    for step in range(1, 1000):
        neurons = step / 1000
        heads = max(0, round(neurons - LESS, 6))
        gone = int(block.neurons * neurons * blocks) / (block.neurons * blocks) * mlp
        gone += int(block.num_heads * heads * blocks) / (block.num_heads * blocks) * attention
        miss = abs(1 - gone / table.macs.sum() - share)
        if best is None or miss < best[0]:
            best = miss, neurons, heads
    return best[1:]


def cut(dense, model, share, weights=None, *, batches=None):
    """Return dense without what SnapViT's model ranks lowest, as a model of vitlab, and words.

    model: one of its prunable models, whose gradients are there; it stays as it is.
    weights: of blocks and heads; None for ones. batches: for its correction; None for none.
    """
    neurons, heads = ratios(dense, share)
    if weights is None:
        weights = torch.ones(len(model.blocks) * (1 + model.default_num_heads))
    pruned = load("src.utils.models").deepcopy_model(model)
    options = {"apply_correction": True, "correction_data_loader": batches} if batches else {}
    with quiet():
        pruned.prune(None, neurons, heads, weights, estimate_pruning_weights=False, **options)
    words = f"{neurons:.3f} of the neurons, {heads:.3f} of the heads"
    return as_ours(dense, pruned.model), words


@torch.no_grad()
def as_ours(dense, pruned):
    """Return dense with the shapes and the weights of SnapViT's pruned model."""
    drop = {}
    for block, inside in zip(models.view(dense).blocks, pruned.blocks, strict=True):
        neurons, heads = inside.mlp.fc1.weight.shape[0], inside.attn.num_heads
        drop[block.name, "neurons"] = range(neurons, block.neurons)
        drop[block.name, "heads"] = range(heads, block.num_heads)
    small = shrink.remove(dense, {key: list(gone) for key, gone in drop.items() if len(gone)})
    # Of attention and MLPs without any units no weights are left but a bias.
    weights = pruned.state_dict()
    small.load_state_dict({name: weights[name] for name in small.state_dict()})
    return small
