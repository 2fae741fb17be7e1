"""Turn scores into boolean masks by exact counts, on tensors alone, without a model.

Scores are ranked over all tensors together, by layer, by group or by row; as whole tiles; or as
N:M. Everywhere True means that a weight stays, and the smallest scores go. Of equal scores the
first in memory goes first. Counts are therefore exact; a comparison with a threshold alone cannot
give that.

Public: drop_in_rows, dropped, keep_largest, n_of_m, remaining.
"""

import torch

from vitlab import names

_SAMPLE = 1 << 18  # about how many scores are drawn to bracket the threshold
_CHUNK = 1 << 18  # scores looked at together: a piece and its comparisons stay in the cache


def keep_largest(scores, *, sparsity=None, count=None, per="global", floor=0, tile=None):
    """Return masks that drop an exact number of the smallest scores.

    scores: a float tensor, or {name: float tensor}. Only their order matters; infinities are
        allowed.
    sparsity: share to drop, in [0, 1); of n scores round(sparsity * n) go. Give this or `count`.
    count: number of scores to drop.
    per: the sets that are ranked, each of which loses that share or number. "global" ranks all
        tensors together, "layer" each tensor, "row" each row along the last dimension. A dict
        {name: label}, such as the role of each layer, ranks all tensors of one label together.
    floor: how many scores at least stay in each tensor, or in each row with per="row". A tensor
        with fewer keeps all of them. Other tensors of the set then lose more: the total remains
        exact.
    tile: drops whole tiles, by the sums of their scores. sparsity, count, floor and rows then count
        tiles. A number b cuts the last two dimensions into squares of b x b. A pair (height, width)
        cuts them into rectangles, where None is all of a dimension: (1, None) is whole rows.

    Returns bool tensors in the structure of scores.
    Raises ValueError for scores with NaN (naming them), and for names without a label.
    Raises ValueError for a sparsity outside [0, 1), and for a cut that leaves nothing of a set.
    Raises ValueError for a floor that the count does not allow, and for tiles that do not fill a
    tensor.
    """
    named = scores if isinstance(scores, dict) else {"scores": scores}
    tiles = {}
    if tile is not None:
        tiles = {name: _in_tiles(name, score, tile) for name, score in named.items()}
        named = {name: tiled.sum((-3, -1)) for name, tiled in tiles.items()}
    _check(named)
    masks = dict.fromkeys(named)  # in the order of scores
    for group in _grouped(named, per):
        masks |= _drop(group, sparsity, count, floor, by_row=per == "row")
    for name, tiled in tiles.items():
        # From [..., m / height, n / width] back to [..., m, n].
        whole = masks[name][..., None, :, None].expand_as(tiled)
        masks[name] = whole.flatten(-4, -3).flatten(-2)
    return masks if isinstance(scores, dict) else masks["scores"]


def n_of_m(score, n, m):
    """Return the mask that keeps the n largest of each m neighbours along the last dimension.

    score: float tensor.
    n, m: ints with 0 < n < m; 2 and 4 for 2:4 sparsity.

    Returns a bool tensor of the shape of score.
    Raises ValueError unless 0 < n < m and m divides the last dimension.
    """
    if not 0 < n < m or score.shape[-1] % m:
        raise ValueError(f"need 0 < n < m and m to divide {score.shape[-1]}; got n={n}, m={m}")
    keep = keep_largest(score.reshape(-1, m), count=m - n, per="row")
    return keep.view(score.shape)


def dropped(keep):
    """Return the indices that go, {key: list}, without the keys that lose nothing.

    keep: {key: bool tensor [units]}, True stays.
    """
    return {
        key: (~mask).nonzero().flatten().tolist() for key, mask in keep.items() if not mask.all()
    }


def remaining(alive, drop):
    """Return what is left of `alive` after one more cut: {key: list of indices into the whole}.

    alive: {key: list of indices into the whole}, what was left before this cut.
    drop: {key: positions in that list}, as shrink.remove takes them for a model that was cut
        before.
    """
    left = {}
    for key, indices in alive.items():
        left[key] = [index for place, index in enumerate(indices) if place not in drop.get(key, ())]
    return left


def _in_tiles(name, score, tile):
    """Return a view [..., m / height, height, n / width, width] of a tensor [..., m, n]."""
    try:
        height, width = (tile, tile) if isinstance(tile, int) else tile
        m, n = score.shape[-2:]
        strips = score.detach().unflatten(-1, (-1, n if width is None else width))
        return strips.unflatten(-3, (-1, m if height is None else height))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"tiles of {tile} do not fill {name} of shape {tuple(score.shape)}: "
            "give divisors of its sides"
        ) from error


def drop_in_rows(score, count):
    """Return the mask that drops the count smallest of each row along the last dimension.

    score: float tensor [..., size]. count: 0 to size. Of equal scores the first ones go.
    """
    score = score.detach()
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    # This takes a third of the time of a stable sort.
    threshold = score.kthvalue(count, dim=-1, keepdim=True).values
    keep = score >= threshold
    tied = score == threshold
    # Of the scores equal to the threshold so many have to go, and the first ones do.
    surplus = keep.sum(-1, keepdim=True) - (score.shape[-1] - count)
    return keep & ~(tied & (tied.cumsum(-1) <= surplus))


def _check(scores):
    """Raise ValueError for {name: scores} with NaN, without floats or of several precisions."""
    dtypes = {score.dtype for score in scores.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(
            "scores must be floats of one dtype; got "
            f"{ {name: score.dtype for name, score in scores.items()} }"
        )
    for name, score in scores.items():
        # A sum shows NaN in one read. Infinities can make NaN, too: then look closer.
        if any(piece.sum().isnan() and piece.isnan().any() for piece in _pieces(score)):
            raise ValueError(
                f"scores of {name} contain NaN, which has no rank: look for it in the loss, "
                "the weights or the images, or for an overflow in low precision"
            )


def _grouped(scores, per):
    """Return a list of {name: score}, one for each set that is ranked together."""
    if per == "global":
        per = dict.fromkeys(scores)
    elif per in ("layer", "row"):
        per = dict(zip(scores, scores, strict=True))
    elif not isinstance(per, dict):
        raise ValueError(f'per must be "global", "layer", "row" or {{name: label}}; got {per!r}')
    groups = {}
    for name, score in scores.items():
        names.check("name in per", name, per)
        groups.setdefault(per[name], {})[name] = score
    return groups.values()


def _drop(scores, sparsity, count, floor, by_row):
    """Return {name: mask} for scores that are ranked together, or for the rows of one tensor."""
    sizes = {name: score.shape[-1] if by_row else score.numel() for name, score in scores.items()}
    floors = {name: min(floor, size) for name, size in sizes.items()}
    total = sum(sizes.values())
    protected = sum(floors.values())
    if (sparsity is None) == (count is None):
        raise ValueError(f"give either sparsity or count; got {sparsity} and {count}")
    if count is None:
        if not 0 <= sparsity < 1:
            raise ValueError(
                "sparsity is a share in [0, 1), not a percentage, and 1 removes everything; "
                f"got {sparsity}"
            )
        count = round(sparsity * total)
    if not 0 <= count < total:
        raise ValueError(f"cannot drop {count} of {total} scores: at least one must stay")
    if total - count < protected:
        raise ValueError(
            f"dropping {count} of {total} leaves {total - count}, but a floor of {floor} keeps "
            f"{protected} in {', '.join(scores)}: lower the sparsity or the floor"
        )
    if by_row:
        return {name: drop_in_rows(score, count) for name, score in scores.items()}
    return _drop_above_floors(scores, count, floors)


def _drop_above_floors(scores, count, floors):
    """Return {name: mask} that drops count of all scores and keeps floors[name] of each tensor.

    A tensor that would fall below its floor gets exactly the floor and leaves the competition. The
    others lose more then, which can only push further ones to their floor. The result is therefore
    the best choice, and no score is copied.
    """
    at_floor = {}
    free = dict(scores)
    while True:
        keep = _drop_smallest(free, count)
        short = [name for name in free if keep[name].count_nonzero() < floors[name]]
        if not short:
            return at_floor | keep
        del keep  # frees a byte for each score
        for name in short:
            number = scores[name].numel() - floors[name]
            at_floor |= _drop_smallest({name: free.pop(name)}, number)
            count -= number


def _drop_smallest(scores, count):
    """Return {name: mask} that drops exactly count of the smallest scores, without copying them."""
    threshold, ties = _find_threshold(scores.values(), count)
    masks = {}
    for name, score in scores.items():
        mask = masks[name] = (score.detach() >= threshold).contiguous()
        for piece, keep in zip(_pieces(score), _pieces(mask), strict=True):
            if ties:  # of the scores equal to the threshold, the first ones go
                first = (piece == threshold).nonzero()[:ties]
                keep[first] = False
                ties -= len(first)
    return masks


def _find_threshold(scores, count):
    """Return the value below which scores go, and how many of those equal to it go, too.

    A sorted sample brackets the threshold. One pass counts what lies below the bracket and collects
    what lies inside, where kthvalue is exact.
    """
    total = sum(score.numel() for score in scores)
    step = total // _SAMPLE | 1  # odd: shares no factor of two with a layer's width
    samples = [score.detach().flatten()[::step] for score in scores]
    samples.append(samples[0].new_tensor([-torch.inf, torch.inf]))
    sample = torch.cat(samples).sort().values
    place = count / total * len(sample)
    slack = 3 * len(sample) ** 0.5  # six standard deviations of a random sample's median
    while True:
        low = sample[max(0, int(place - slack))]
        high = sample[min(len(sample) - 1, int(place + slack))]
        below, inside = _collect(scores, low, high)
        if below <= count <= below + len(inside):
            # None go for a count of 0, or where all below the bracket are just enough.
            threshold = inside.kthvalue(max(1, count - below)).values
            smaller = below + int((inside < threshold).count_nonzero())
            return threshold, count - smaller
        # Luck decides about the time, never about the result: a bracket that missed is widened.
        slack *= 4


def _collect(scores, low, high):
    """Return how many scores are below low, and a tensor of those from low to high."""
    below = 0
    inside = []
    for piece in _pieces(*scores):
        reaches = piece >= low
        below += piece.numel() - int(reaches.count_nonzero())
        inside.append(piece[reaches.logical_and_(piece <= high)])
    return below, torch.cat(inside)


def _pieces(*tensors):
    """Yield flat views of the tensors' elements that fit into the cache."""
    for tensor in tensors:
        yield from tensor.detach().flatten().split(_CHUNK)
