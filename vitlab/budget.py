"""Budget: which heads and neurons go for a target of MACs, by predicted loss per MAC saved."""

from dataclasses import dataclass

import pandas as pd

from . import cost

FLOORS = {"heads": 1, "neurons": 8}


@dataclass(frozen=True)
class Plan:
    """What would go, before any weight is touched.

    drop: {(block, kind): indices}, for shrink.remove. table: one line per block and kind: units, dropped, predicted
    (sum of the scores that go), macs_saved. share: MACs that stay, as a share of the model's.
    """

    drop: dict
    table: pd.DataFrame
    share: float


def plan(model, unit_scores, *, macs, kinds=("heads", "neurons"), multiple=8, image_size=None):
    """Plan that cuts the model's MACs to the share `macs` with the least predicted loss.

    unit_scores: {(block, kind): tensor} of one criterion, best in loss units ("fisher"), so that heads and neurons
    compete in one currency: score per MAC saved, smallest first (METHODS: scores in loss units need no
    normalisation, only cost). macs: share to keep, in (0, 1). kinds: what may go. multiple: neurons go in groups of
    so many (the weakest of a block together), so that widths stay friendly to the kernels. At least one head and
    8 neurons stay in every block. A head's or neuron's MACs do not change while others go, as the width of the
    residual stream stays: no re-ranking is needed.

    The result is at most the target and misses it by less than the cheapest candidate left.
    Raises ValueError for a share outside (0, 1), an unknown kind, or a target below what these kinds can reach,
    naming the floor.
    """
    if not 0 < macs < 1:
        raise ValueError(f"macs is the share to keep, in (0, 1); got {macs}")
    if unknown := set(kinds) - set(FLOORS):
        raise ValueError(f"unknown kinds {sorted(unknown)}; known are {', '.join(FLOORS)}")
    table = cost.breakdown(model, image_size=image_size)
    total, unit_macs = int(table.macs.sum()), _unit_macs(table)
    candidates, units = [], {}
    for (block, kind), score in unit_scores.items():
        if kind not in kinds:
            continue
        units[block, kind] = len(score)
        size = multiple if kind == "neurons" else 1
        saved = unit_macs[block, kind] / len(score)
        order = score.argsort(stable=True)
        for group in order[: len(score) - FLOORS[kind]].split(size):
            if len(group) == size:
                loss = score[group].sum().item()
                candidates.append((loss / (saved * size), block, kind, group.tolist(), loss, saved * size))
    floor = 1 - sum(c[-1] for c in candidates) / total
    if macs < floor:
        raise ValueError(
            f"{' and '.join(kinds)} alone cannot reach {macs:g} x MACs: {floor:.3f} stays when all but the floor "
            "is gone; allow more kinds or ask for more MACs"
        )
    return _choose(sorted(candidates, key=lambda c: c[0]), units, total=total, need=(1 - macs) * total)


def _unit_macs(table):
    """{(block, kind): MACs of all its heads, or of all its neurons, together}."""
    kind = table.role.map(
        {"qkv": "heads", "qk": "heads", "av": "heads", "proj": "heads"} | dict.fromkeys(("fc1", "fc2"), "neurons")
    )
    return table.groupby(["block", kind]).macs.sum().to_dict()


def _choose(candidates, units, *, total, need):
    """Take candidates in order until the need is met; then give back those that it is met without."""
    taken, saved = [], 0.0
    for candidate in candidates:
        if saved >= need:
            break
        taken.append(candidate)
        saved += candidate[-1]
    for candidate in reversed(taken[:-1]):  # the last one may have overshot: return what is no longer needed
        if saved - candidate[-1] >= need:
            taken.remove(candidate)
            saved -= candidate[-1]
    drop, lines = {}, []
    for (block, kind), count in units.items():
        own = [c for c in taken if c[1:3] == (block, kind)]
        indices = sorted(index for c in own for index in c[3])
        if indices:
            drop[block, kind] = indices
        lines.append((block, kind, count, len(indices), sum(c[4] for c in own), round(sum(c[5] for c in own))))
    columns = ["block", "kind", "units", "dropped", "predicted", "macs_saved"]
    return Plan(drop, pd.DataFrame(lines, columns=columns), 1 - saved / total)
