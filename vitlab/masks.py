"""Scores to boolean masks by exact count: global, per layer, group or row, whole tiles, N:M. Tensors only.

Everywhere True stays, the smallest scores go, and of equal scores the first in memory goes first, so that
counts are exact (comparing with a threshold is not).
"""

import torch

SAMPLE = 1 << 18  # scores drawn to bracket the threshold; up to so many are ranked without a bracket
CHUNK = 1 << 18  # scores looked at together: a piece and its comparisons stay in the cache


def keep_largest(scores, *, sparsity=None, count=None, per="global", floor=0, tile=None):
    """Masks that drop an exact number of the smallest scores.

    scores: a tensor or {name: tensor}; only their order matters, infinities are allowed. Either sparsity, the
    share to drop in [0, 1), of which round(sparsity * n) is taken, or count, the number to drop. per: over
    what both are meant and scores are ranked: "global" (all tensors together), "layer" (each tensor), "row"
    (each row along the last dimension), or {name: label}, such as the role of each layer, for all tensors of
    one label together. floor: how many at least stay in each tensor (in each row with per="row"; all of a
    smaller one); the others of its group then lose more, so that the total remains exact. tile: whole tiles go,
    by the sums of their scores, and sparsity, count, floor and rows are of tiles. b cuts the last two
    dimensions into squares of b x b; (height, width) into rectangles, where None is all of that dimension:
    (1, None) is whole rows.

    Returns bool tensors in the structure of scores. Raises ValueError for NaN scores (named), a sparsity
    outside [0, 1), a cut that leaves nothing at all (of one layer or group), a floor that the count does not
    allow, names without a label, and tiles that do not fill a tensor.
    """
    named = scores if isinstance(scores, dict) else {"scores": scores}
    if tile is not None:
        sizes = {name: tile_size(name, score, tile) for name, score in named.items()}
        named = {name: tile_sums(score, *sizes[name]) for name, score in named.items()}
    check(named)
    masks = {}
    for group in grouped(named, per):
        if per == "row":
            masks |= drop_rowwise(group, sparsity, count, floor)
        else:
            total = sum(score.numel() for score in group.values())
            masks |= drop_globally(group, to_drop(total, sparsity, count), floor)
    masks = {name: masks[name] if tile is None else whole_tiles(masks[name], *sizes[name]) for name in named}
    return masks if isinstance(scores, dict) else masks["scores"]


def n_of_m(score, n, m):
    """Mask that keeps the n largest of each m neighbours along the last dimension (2:4 is n=2, m=4).

    Raises ValueError unless 0 < n < m and m divides the last dimension.
    """
    if not 0 < n < m or score.shape[-1] % m:
        raise ValueError(f"need 0 < n < m and m to divide {score.shape[-1]}; got n={n}, m={m}")
    check({"scores": score})
    return drop_in_rows(score.reshape(-1, m), m - n).view(score.shape)


def dropped(keep):
    """{key: list of indices that go} from {key: bool [units]}, without the keys that lose nothing."""
    return {key: (~mask).nonzero().flatten().tolist() for key, mask in keep.items() if not mask.all()}


def remaining(alive, drop):
    """{key: list of indices into the whole} of what is left of alive after one more cut.

    alive: {key: list}. drop: {key: positions in that list}, as shrink.remove takes them of a model that was cut before.
    """
    return {key: [i for place, i in enumerate(own) if place not in drop.get(key, ())] for key, own in alive.items()}


def to_drop(total, sparsity, count):
    """How many of total go: by a share in [0, 1) or by a count in [0, total), else ValueError."""
    if (sparsity is None) == (count is None):
        raise ValueError(f"give either sparsity or count; got {sparsity} and {count}")
    if count is None:
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"sparsity is a share in [0, 1), not a percentage, and 1 removes everything; got {sparsity}"
            )
        count = round(sparsity * total)
    if not 0 <= count < total:
        raise ValueError(f"cannot drop {count} of {total} scores: at least one must stay")
    return count


def grouped(scores, per):
    """{name: score} as a list of such, one for each set that is ranked together (see keep_largest)."""
    if per == "global":
        return [scores]
    if per in ("layer", "row"):
        return [{name: score} for name, score in scores.items()]
    if not isinstance(per, dict):
        raise ValueError(f'per must be "global", "layer", "row" or {{name: label}}; got {per!r}')
    missing = [name for name in scores if name not in per]
    if missing:
        raise ValueError(f"per has no label for {missing[0]!r} ({len(missing)} of {len(scores)} names lack one)")
    labels = dict.fromkeys(per[name] for name in scores)
    return [{name: score for name, score in scores.items() if per[name] == label} for label in labels]


def tile_size(name, score, tile):
    """(height, width) of the tiles of a tensor; ValueError if they do not fill its last two dimensions."""
    shape = tuple(score.shape[-2:])
    size = tuple(tile) if isinstance(tile, (tuple, list)) else (tile, tile)
    if len(size) == len(shape) == 2:
        size = tuple(own if side is None else side for side, own in zip(size, shape, strict=True))
        if all(side >= 1 and own % side == 0 for side, own in zip(size, shape, strict=True)):
            return size
    raise ValueError(f"tiles of {tile} do not fill {name} of shape {tuple(score.shape)}: give divisors of its sides")


def tile_sums(score, height, width):
    """[..., m / height, n / width] sums of the scores [..., m, n] in each tile."""
    return score.detach().unflatten(-1, (-1, width)).unflatten(-3, (-1, height)).sum((-3, -1))


def whole_tiles(mask, height, width):
    """The mask [..., m, n] of weights from the one [..., m / height, n / width] of tiles."""
    return mask.repeat_interleave(height, -2).repeat_interleave(width, -1)


def pieces(score):
    """Flat views of score that fit into the cache."""
    return score.detach().flatten().split(CHUNK)


def check(scores):
    """Raise ValueError for {name: scores} that hold NaN, no floats, or floats of several precisions."""
    if len({score.dtype for score in scores.values()}) > 1 or not all(map(torch.is_floating_point, scores.values())):
        raise ValueError(f"scores must be floats of one dtype; got { {n: s.dtype for n, s in scores.items()} }")
    for name, score in scores.items():
        for piece in pieces(score):
            # A sum finds out in one read; only if it is not finite, look closer.
            if not piece.sum().isfinite() and piece.isnan().any():
                raise ValueError(
                    f"scores of {name} contain NaN, which has no rank: look for it in the loss, the weights "
                    "or the images, or for an overflow in low precision"
                )


def drop_globally(scores, count, floor):
    """{name: mask} that drops count of all scores and keeps floor in each tensor (see keep_largest).

    Tensors that would fall below the floor get exactly the floor and leave the competition. The others lose
    more then, which can only push further ones to their floor: the end is the best choice, and nothing is
    copied.
    """
    floors = {name: min(floor, score.numel()) for name, score in scores.items()}
    total = sum(score.numel() for score in scores.values())
    if total - count < sum(floors.values()):
        raise ValueError(
            f"dropping {count} of {total} leaves {total - count}, but a floor of {floor} in each of "
            f"{len(scores)} tensors keeps {sum(floors.values())}: lower the sparsity or the floor"
        )
    fixed, free = {}, dict(scores)
    while True:
        keep = None  # frees the masks of the round before, a byte for each score
        gone = sum(scores[name].numel() - floors[name] for name in fixed)
        keep = dict(zip(free, drop_smallest(list(free.values()), count - gone), strict=True))
        short = [name for name in free if floor and int(keep[name].count_nonzero()) < floors[name]]
        if not short:
            return {name: fixed[name] if name in fixed else keep[name] for name in scores}
        for name in short:
            fixed[name] = drop_smallest([free.pop(name)], scores[name].numel() - floors[name])[0]


def drop_smallest(scores, count):
    """Masks over a list of tensors that drop exactly count of the smallest, without a copy of them."""
    if count == 0:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    threshold, ties, equal = find_threshold(scores, count)
    compare, ties = (torch.gt, 0) if ties == equal else (torch.ge, ties)
    masks = []
    for score in scores:
        mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
        for piece, out in zip(pieces(score), mask.flatten().split(CHUNK), strict=True):
            compare(piece, threshold, out=out)
            if ties:  # of the scores equal to the threshold, the first ones go
                tied = piece == threshold
                if tied.any():
                    first = tied.nonzero().flatten()[:ties]
                    out[first] = False
                    ties -= len(first)
        masks.append(mask)
    return masks


def find_threshold(scores, count):
    """The count-th smallest score, how many equal to it are among the count smallest, and how many are equal.

    A sorted random sample brackets the threshold; one pass counts what lies below the bracket and collects
    what lies strictly inside, where kthvalue is exact. Ends of the bracket are only counted, so that any
    number of ties costs no memory. Luck decides about the time, never about the result: a bracket that missed
    is widened.
    """
    total = sum(score.numel() for score in scores)
    sample = draw(scores, total).sort().values
    place, slack = count / total * len(sample), 5 * (len(sample) * count * (total - count)) ** 0.5 / total + 1
    while True:
        low, high = place - slack, place + slack
        low = sample[int(low)] if low >= 0 else sample.new_tensor(-torch.inf)
        high = sample[int(high)] if high < len(sample) else sample.new_tensor(torch.inf)
        below, inside = collect(scores, low, high)  # scores <= low, and those in (low, high)
        if below < count <= below + len(inside):
            threshold = inside.kthvalue(count - below).values
            under, equal = tally([inside], threshold)
            return threshold, count - below - under, equal
        threshold = low if count <= below else high
        under, equal = tally(scores, threshold)
        if under < count <= under + equal:
            return threshold, count - under, equal
        slack *= 4


def draw(scores, total):
    """A sample of up to SAMPLE scores in proportion to the sizes of tensors; all if there are no more."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for score in scores:
        flat = score.detach().flatten()
        if total > SAMPLE:
            chosen = torch.randint(max(1, flat.numel()), (flat.numel() * SAMPLE // total,), generator=generator)
            flat = flat[chosen.to(flat.device)]
        parts.append(flat)
    return torch.cat(parts)


def collect(scores, low, high):
    """How many scores are <= low, and a tensor of those strictly between low and high."""
    # One growing buffer: small tensors kept between large freed ones leave holes in the heap.
    below, used, store = 0, 0, low.new_empty(SAMPLE)
    for score in scores:
        for piece in pieces(score):
            above = piece > low
            below += piece.numel() - int(above.count_nonzero())
            found = piece[above.logical_and_(piece < high)]
            if used + len(found) > len(store):
                store = torch.cat([store, store.new_empty(max(len(store), len(found)))])
            store[used : used + len(found)] = found
            used += len(found)
    return below, store[:used]


def tally(scores, value):
    """How many scores are below value, and how many are equal to it."""
    below = equal = 0
    for score in scores:
        for piece in pieces(score):
            below += int((piece < value).count_nonzero())
            equal += int((piece == value).count_nonzero())
    return below, equal


def drop_rowwise(scores, sparsity, count, floor):
    """{name: mask} that drops the same number in each row along the last dimension (see keep_largest)."""
    masks = {}
    for name, score in scores.items():
        size = score.shape[-1]
        dropped = to_drop(size, sparsity, count)
        if size - dropped < min(floor, size):
            raise ValueError(f"rows of {name} keep {size - dropped} of {size}, below the floor of {floor}")
        masks[name] = drop_in_rows(score, dropped)
    return masks


def drop_in_rows(score, count):
    """Mask that drops the count smallest of each row along the last dimension; of equal ones the first go."""
    mask = torch.ones(score.shape, dtype=torch.bool, device=score.device)
    size, rows = score.shape[-1], max(1, CHUNK // score.shape[-1])
    parts = zip(score.detach().reshape(-1, size).split(rows), mask.view(-1, size).split(rows), strict=True)
    for part, out in parts if count else ():
        threshold = part.kthvalue(count, dim=-1, keepdim=True).values
        above, equal = part > threshold, part == threshold
        spare = size - above.sum(-1, keepdim=True) - equal.sum(-1, keepdim=True)  # smaller than it
        torch.logical_or(above, equal & (equal.cumsum(-1) > count - spare), out=out)
    return mask
