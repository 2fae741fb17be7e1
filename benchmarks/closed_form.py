"""Two peers that solve for what stays in closed form: CORP, and linear maps in the place of blocks."""

import torch
from torch import nn

from vitlab import models
from vitlab.evaluation import cost
from vitlab.models import anatomy
from vitlab.pruning import scores, shrink

RIDGE = 1e-3  # share of the mean diagonal of what is inverted


@torch.no_grad()
def corp(dense, batches, share):
    """Return dense after CORP (Zhang and Yang 2026, arXiv 2602.05243), and words for its settings.

    The same share of each block's neurons and of each head's query and key dimensions goes. Removed
    neurons are an affine function of those that stay, by ridge regression, which goes into fc2.
    Removed parts of the logits are an affine function of the products that stay, which goes into
    the queries. All is fitted to activations of the dense model, in one pass over the blocks.

    There is no public code. Its abstract says what is removed and how it is made up for, but not how
    it is ranked: here by the energy that is lost, E[h^2] of a neuron times the norm of its column of
    fc2, and E[q^2] E[k^2] of a dimension.
    """
    gone, neurons, sizes = _corp_sizes(dense, share)
    fc2 = [f"{block.name}.mlp.fc2" for block in models.view(dense).blocks]
    grams = scores.grams(dense, batches, layers=fc2, affine=True)
    means = {name: gram[-1, :-1] for name, gram in grams.items()}
    grams = {name: gram[:-1, :-1] for name, gram in grams.items()}
    drop, queries = {}, {}
    stream = [_stream_in(dense, x) for x, _ in batches]
    for block in models.view(dense).blocks:
        name = f"{block.name}.mlp.fc2"
        energy = grams[name].diagonal() * block.mlp.fc2.weight.double().square().sum(0)
        drop[block.name, "neurons"] = energy.argsort()[: block.neurons - neurons].sort().values
        inside = dense.get_submodule(block.name)
        q_grams, k_grams = _query_and_key_grams(inside, block, stream)
        stays = [_strongest(*pair, sizes) for pair in zip(q_grams, k_grams, strict=True)]
        kept = torch.cat([head * block.qk_dim + own for head, own in enumerate(stays)])
        everything = torch.arange(block.num_heads * block.qk_dim, device=kept.device)
        drop[block.name, "qk"] = everything[~torch.isin(everything, kept)]
        if sizes < block.qk_dim:
            queries[block.name] = [
                _logit_map(*each) for each in zip(q_grams, k_grams, stays, strict=True)
            ]
        stream = [inside(x) for x in stream]
    drop = {key: indices.cpu() for key, indices in drop.items() if len(indices)}
    small = shrink.remove(dense, drop, means=means, grams=grams, damping=RIDGE)
    for name, maps in queries.items():
        _fold(small.get_submodule(name).attn.qkv, maps)
    return small, f"{gone:.3f} of the neurons and of the query and key dimensions, ridge {RIDGE:g}"


def _corp_sizes(dense, share):
    """Return the share that goes, and the neurons and query dimensions that stay in each block."""
    table = cost.breakdown(dense)
    by_role = table.groupby("role").macs.sum()
    block = models.view(dense).blocks[0]
    values = block.head_dim / (2 * block.qk_dim + block.head_dim)  # of the rows of qkv
    best = None
    for step in range(1000):
        gone = step / 1000
        neurons = max(1, round(block.neurons * (1 - gone)))
        sizes = max(1, round(block.qk_dim * (1 - gone)))
        by_neurons = (1 - neurons / block.neurons) * (by_role["fc1"] + by_role["fc2"])
        by_sizes = (1 - sizes / block.qk_dim) * (by_role["qkv"] * (1 - values) + by_role["qk"])
        miss = abs(1 - (by_neurons + by_sizes) / table.macs.sum() - share)
        if best is None or miss < best[0]:
            best = miss, gone, neurons, sizes
    if best[0] > 0.02:
        raise ValueError(f"CORP cannot reach {share:g} x MACs: it misses it by {best[0]:.3f}")
    return best[1:]


def _stream_in(model, x):
    """Return what enters the first block of a ViT."""
    x = model._pos_embed(model.patch_embed(x))
    return model.norm_pre(model.patch_drop(x))


def _query_and_key_grams(inside, block, stream):
    """Return the grams of queries and of keys of all images, each a list over heads.

    Grams of queries [images, d+1, d+1] have a constant 1 last. Keys [images, d, d] are taken about
    their mean over an image: what all keys of a query share moves no attention.
    """
    grams = [], []
    for x in stream:
        # [images, tokens, 3, heads, d]
        rows = inside.attn.qkv(inside.norm1(x)).unflatten(-1, (3, block.num_heads, block.qk_dim))
        q, k = rows[:, :, 0], rows[:, :, 1]
        q = nn.functional.pad(q, (0, 1), value=1)
        k = k - k.mean(1, keepdim=True)
        for kept, each in zip(grams, (q, k), strict=True):
            kept.append(torch.einsum("nthd,nthe->hnde", each, each))
    return [list(torch.cat(parts, 1)) for parts in grams]


def _strongest(q_grams, k_grams, size):
    """Return the sorted numbers of the dimensions of a head with the most energy in the logits."""
    energy = q_grams.diagonal(dim1=1, dim2=2).mean(0)[:-1] * k_grams.diagonal(dim1=1, dim2=2).mean(
        0
    )
    return energy.argsort(descending=True)[:size].sort().values


def _logit_map(q_grams, k_grams, stays):
    """Return [r+1, r]: the logit of what goes is (q, 1) map k, of the q and k that stay."""
    size = len(k_grams[0])
    goes = torch.arange(size, device=stays.device)
    goes = goes[~torch.isin(goes, stays)]
    one = torch.tensor([size], device=stays.device)
    rows = torch.cat([stays, one])
    a, b = q_grams[:, rows][:, :, rows], k_grams[:, stays][:, :, stays]
    # Over all pairs of tokens of an image, products of queries and keys have the Kronecker product
    # of both grams as theirs.
    gram = (a.flatten(1).T @ b.flatten(1)).view(len(rows), len(rows), len(stays), len(stays))
    gram = gram.permute(0, 2, 1, 3).reshape(len(rows) * len(stays), -1).double()
    cross = torch.einsum("nad,nbd->ab", q_grams[:, rows][:, :, goes], k_grams[:, stays][:, :, goes])
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, cross.double().flatten()).view(len(rows), len(stays))


def _fold(qkv, maps):
    """Put what makes up for the logits into the queries' weight and bias, head by head."""
    size = maps[0].shape[1]
    for head, found in enumerate(maps):
        rows = slice(head * size, (head + 1) * size)
        transfer = torch.eye(size).to(found) + found[:-1].T
        qkv.weight[rows] = (transfer @ qkv.weight[rows].double()).to(qkv.weight)
        qkv.bias[rows] = (transfer @ qkv.bias[rows].double() + found[-1]).to(qkv.bias)


@torch.no_grad()
def linear_maps(dense, batches, share):
    """Return dense with blocks replaced by linear maps, its MACs, and words: which blocks.

    Transformer Blocks Approximation (Cannistraci et al., arXiv 2410.04941): a run of blocks becomes
    the least-squares map, with a bias, from what enters the first to what leaves the last. The runs
    are those whose maps leave the least of the variance, summed, among all of as many blocks.
    """
    sums = _stream_moments(dense, batches)
    table = cost.breakdown(dense)
    blocks = len(dense.blocks)
    width = dense.embed_dim
    block = table.macs[table.block == "blocks.0"].sum()
    tokens = dense.num_prefix_tokens + dense.patch_embed.num_patches
    fits = {(i, j): _fit(sums, i, j) for i in range(blocks) for j in range(i + 1, blocks + 1)}
    tries = []
    for count in range(1, blocks):
        runs = _best_runs({key: fit[2] for key, fit in fits.items()}, blocks, count)
        macs = table.macs.sum() - count * block + len(runs) * tokens * width**2
        tries.append((abs(macs / table.macs.sum() - share), int(macs), runs))
    _, macs, runs = min(tries)
    small = anatomy.copied(dense)
    for first, end in runs:
        weight, bias, _ = fits[first, end]
        layer = nn.Linear(width, width)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        small.blocks[first] = layer.to(next(dense.parameters()).device)
        for other in range(first + 1, end):
            small.blocks[other] = nn.Identity()
    small.eval()
    words = ", ".join(
        f"{first} to {end - 1}" if end > first + 1 else f"{first}" for first, end in runs
    )
    return small, macs, f"maps for blocks {words}"


def _stream_moments(dense, batches):
    """Return {(i, j): [w+1, w+1]}: products of the stream before block i with that before block j."""
    sums = {}
    for x, _ in batches:
        stream = [_stream_in(dense, x)]
        for block in dense.blocks:
            stream.append(block(stream[-1]))
        flat = [nn.functional.pad(part.flatten(0, 1), (0, 1), value=1) for part in stream]
        for i, before in enumerate(flat):
            for j in range(i, len(flat)):
                product = (before.T @ flat[j]).double()
                sums[i, j] = sums.get((i, j), 0) + product
    return sums


def _fit(sums, i, j):
    """Return weight and bias of the map from stream i to stream j, and the share it leaves."""
    gram, cross, target = sums[i, i], sums[i, j], sums[j, j]
    count = gram[-1, -1]
    mean, goal = gram[-1, :-1] / count, cross[-1, :-1] / count
    covariance = gram[:-1, :-1] / count - torch.outer(mean, mean)
    together = cross[:-1, :-1] / count - torch.outer(mean, goal)
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean())
    weight = torch.linalg.solve(covariance, together).T
    variance = (target.diagonal()[:-1] / count - goal.square()).sum()
    left = 1 - (weight * together.T).sum() / variance
    return weight, goal - weight @ mean, left.item()


def _best_runs(left, blocks, count):
    """Return the runs [(first, end)] of so many blocks altogether whose left add up to the least.

    left: {(first, end): share of the variance that a map leaves}.
    """
    best = {(0, 0): (0.0, [])}  # by (place, blocks replaced before it)
    for place in range(1, blocks + 1):
        for gone in range(min(place, count) + 1):
            ways = []
            if (place - 1, gone) in best:
                ways.append(best[place - 1, gone])
            for first in range(max(0, place - gone), place):
                total, runs = best.get((first, gone - place + first), (None, None))
                if total is not None:
                    ways.append((total + left[first, place], [*runs, (first, place)]))
            if ways:
                best[place, gone] = min(ways)
    return best[blocks, count][1]
