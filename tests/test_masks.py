"""Laws of the masks: counts are exact, ranks are those of a stable sort, floors hold, memory is bounded."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitlab.evaluation import memory
from vitlab.pruning import masks


def reference(score, count):
    """The definition: a stable sort of all scores, the first `count` go."""
    keep = torch.ones(score.numel(), dtype=torch.bool)
    keep[score.flatten().argsort(stable=True)[:count]] = False
    return keep.view_as(score)


def coarse(*shape):  # many ties
    return torch.randint(0, 4, shape).float()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def small_pieces(monkeypatch):
    """Force toys through the path of millions of scores: a sample, a bracket, many pieces."""
    monkeypatch.setattr(masks, "_SAMPLE", 32)
    monkeypatch.setattr(masks, "_CHUNK", 50)


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 8), (2, 3, 4)])
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("fill", [torch.rand, torch.zeros, coarse])  # zeros: every score is a tie
def test_drops_exactly_the_asked_share(shape, sparsity, fill):
    score = fill(*shape)
    count = round(sparsity * score.numel())
    if count == score.numel():
        with pytest.raises(ValueError, match="at least one must stay"):
            masks.keep_largest(score, sparsity=sparsity)
    else:
        assert masks.keep_largest(score, sparsity=sparsity).equal(reference(score, count))


@pytest.mark.parametrize(
    "fill", [torch.rand, torch.zeros, coarse, lambda *s: -torch.rand(*s).round(decimals=2)]
)
@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 0.77, 0.999])
def test_bracket_is_exact(small_pieces, fill, sparsity):
    score = fill(37, 53)
    keep = masks.keep_largest(score, sparsity=sparsity)
    assert keep.equal(reference(score, round(sparsity * score.numel())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float(small_pieces, dtype):
    score = torch.rand(500).to(dtype)
    assert masks.keep_largest(score, count=200).equal(reference(score, 200))


def test_a_tensor_without_scores_has_an_empty_mask(small_pieces):
    score = torch.rand(400)
    keep = masks.keep_largest({"none": torch.rand(0), "all": score}, count=100)
    assert keep["all"].equal(reference(score, 100)) and keep["none"].shape == (0,)


def test_infinities_have_their_place(small_pieces):
    score = torch.rand(400)
    score[::3], score[1::3] = torch.inf, -torch.inf
    for count in (1, 100, 150, 300, 399):
        assert masks.keep_largest(score, count=count).equal(reference(score, count))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    levels=st.integers(1, 200),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 99),
)
def test_dict_is_ranked_as_if_concatenated(sizes, levels, share, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {
        str(i): torch.randint(levels, (n,), generator=generator).float()
        for i, n in enumerate(sizes)
    }
    joined = torch.cat(list(scores.values()))
    count = min(int(share * joined.numel()), joined.numel() - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_SAMPLE", 16)
        patch.setattr(masks, "_CHUNK", 20)
        keep = masks.keep_largest(scores, count=count)
    assert torch.cat(list(keep.values())).equal(reference(joined, count))
    assert list(keep) == list(scores)


def test_by_hand():
    scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([[1.0, 5.0], [0.0, 4.0]])}
    keep = masks.keep_largest(scores, count=3)  # 0, then the two ones
    assert keep["a"].tolist() == [True, False, True]
    assert keep["b"].tolist() == [[False, True], [False, True]]
    assert masks.keep_largest(scores, count=2)["b"].tolist() == [
        [True, True],
        [False, True],
    ]  # a's one is first
    assert masks.keep_largest(scores, count=1, per="layer")["b"].tolist() == [
        [True, True],
        [False, True],
    ]
    assert masks.keep_largest(scores["b"], count=1, per="row").tolist() == [
        [False, True],
        [False, True],
    ]
    assert masks.dropped({"a": keep["a"], "b": torch.tensor([True])}) == {"a": [1]}


@pytest.mark.parametrize("per", ["layer", "row"])
@pytest.mark.parametrize("fill", [torch.rand, torch.zeros, coarse])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8])
def test_layers_and_rows_are_ranked_apart(per, fill, sparsity):
    scores = {"a": fill(6, 10), "b": fill(3, 4, 7)}
    keep = masks.keep_largest(scores, sparsity=sparsity, per=per)
    for name, score in scores.items():
        groups = [score] if per == "layer" else score.flatten(0, -2)
        found = [keep[name]] if per == "layer" else keep[name].flatten(0, -2)
        for group, mask in zip(groups, found, strict=True):
            assert mask.equal(reference(group, round(sparsity * group.numel())))


@pytest.mark.parametrize("fill", [torch.rand, torch.zeros, coarse])
@pytest.mark.parametrize("asked", [{"sparsity": 0.5}, {"count": 7}, {"count": 0}])
def test_a_group_is_ranked_as_if_it_were_alone(fill, asked):
    scores = {"a": fill(6, 10), "b": fill(3, 4), "c": fill(5)}
    keep = masks.keep_largest(
        scores, per={"c": "x", "b": "y", "a": "x", "elsewhere": "z"}, floor=1, **asked
    )
    first = masks.keep_largest({name: scores[name] for name in ("a", "c")}, floor=1, **asked)
    second = masks.keep_largest({"b": scores["b"]}, floor=1, **asked)
    assert list(keep) == ["a", "b", "c"] and all(
        mask.equal((first | second)[name]) for name, mask in keep.items()
    )
    for per, labels in (
        ("global", [0, 0, 0]),
        ("layer", [0, 1, 2]),
    ):  # the ends: one group, each its own
        keep = masks.keep_largest(scores, per=dict(zip(scores, labels, strict=True)), sparsity=0.3)
        known = masks.keep_largest(scores, per=per, sparsity=0.3)
        assert all(keep[name].equal(known[name]) for name in scores)


def test_every_score_needs_a_group():
    with pytest.raises(ValueError, match="unknown name in per 'b'"):
        masks.keep_largest({"a": torch.rand(4), "b": torch.rand(4)}, per={"a": 0}, count=1)


@pytest.mark.parametrize("fill", [torch.rand, torch.zeros, coarse])
@pytest.mark.parametrize("per", ["global", "layer", "row"])
@pytest.mark.parametrize(
    "tile", [(1, 1), (2, 2), (1, 4), (3, 1), (1, None), (None, 2), (None, None)]
)
def test_tiles_go_whole_and_in_exact_number(fill, per, tile):
    scores, sums = {"a": fill(6, 8), "b": fill(2, 12, 4)}, {}
    for name, score in scores.items():
        h, w = (
            own if side is None else side for side, own in zip(tile, score.shape[-2:], strict=True)
        )
        rows = [
            torch.stack([part.sum((-2, -1)) for part in band.split(w, -1)], -1)
            for band in score.split(h, -2)
        ]
        sums[name] = torch.stack(rows, -2)
    if (
        min(own.shape[-1] if per == "row" else own.numel() for own in sums.values()) == 1
        and per != "global"
    ):
        with pytest.raises(
            ValueError, match="at least one must stay"
        ):  # of a layer or row that is one tile
            masks.keep_largest(scores, count=1, per=per, tile=tile)
        return
    expected = masks.keep_largest(sums, count=1, per=per)
    for name, mask in masks.keep_largest(scores, count=1, per=per, tile=tile).items():
        h, w = (
            own // tiles for own, tiles in zip(mask.shape[-2:], sums[name].shape[-2:], strict=True)
        )
        assert mask.equal(
            torch.kron(expected[name].byte(), torch.ones(h, w, dtype=torch.uint8)).bool()
        )


def test_tiles_by_hand():
    score = torch.tensor(
        [[1.0, 2.0, 0.0, 9.0], [3.0, 4.0, 0.0, 0.0], [5.0, 0.0, 1.0, 1.0], [0.0, 5.0, 1.0, 1.0]]
    )
    keep = masks.keep_largest(score, sparsity=0.5, tile=2)  # sums 10 and 9, 10 and 4
    assert keep.tolist() == [[True, True, False, False]] * 4
    assert keep.equal(masks.keep_largest(score, sparsity=0.5, tile=(2, 2)))
    assert (
        masks.keep_largest(score, count=2, tile=2, floor=2).sum() == 8
    )  # counts and floors are of tiles
    rows = masks.keep_largest(
        score, count=1, tile=(1, None)
    )  # sums 12, 7, 8, 7: of the two sevens the first
    assert (~rows).nonzero()[:, 0].tolist() == [1] * 4


@pytest.mark.parametrize("tile", [5, 0, -2, (2, 3), (2, 2, 2), (2,)])
def test_tiles_must_fill_the_matrix(tile):
    with pytest.raises(ValueError, match=r"do not fill w of shape \(6, 8\): give divisors"):
        masks.keep_largest({"w": torch.rand(6, 8)}, count=1, tile=tile)


def test_only_matrices_have_tiles():
    with pytest.raises(ValueError, match=r"do not fill scores of shape \(6,\)"):
        masks.keep_largest(torch.rand(6), count=1, tile=2)


def test_transposed_scores_keep_their_own_order():
    score = coarse(6, 9).T
    assert masks.keep_largest(score, sparsity=0.5).equal(reference(score, 27))
    assert masks.keep_largest(score, count=2, per="row").equal(
        masks.keep_largest(score.clone(), count=2, per="row")
    )


@pytest.mark.parametrize("count", [0, 5, 9, 13])
@pytest.mark.parametrize("fill", [torch.rand, torch.zeros, coarse])
def test_floor_protects_the_best_of_each_tensor(count, fill):
    # The first tensors are the weakest; the second has fewer than the floor. 13 is the most that can go.
    scores = {str(i): i + fill(n) for i, n in enumerate([4, 1, 6, 3, 8])}
    keep = masks.keep_largest(scores, count=count, floor=2)
    protected = [
        torch.where(reference(score, max(len(score) - 2, 0)), torch.inf, score)
        for score in scores.values()
    ]
    assert torch.cat(list(keep.values())).equal(reference(torch.cat(protected), count))


def test_floor_by_hand():
    scores = {"weak": torch.tensor([0.1, 0.3, 0.2]), "strong": torch.tensor([1.0, 4.0, 2.0, 3.0])}
    keep = masks.keep_largest(scores, count=4, floor=1)
    assert keep["weak"].tolist() == [False, True, False]
    assert keep["strong"].tolist() == [False, True, False, True]
    assert not masks.keep_largest(scores, count=4)[
        "weak"
    ].any()  # without a floor the weak layer is emptied
    with pytest.raises(
        ValueError, match="dropping 2 of 7 leaves 5, but a floor of 3 keeps 6 in weak, strong"
    ):
        masks.keep_largest(scores, count=2, floor=3)
    with pytest.raises(
        ValueError, match="dropping 2 of 3 leaves 1, but a floor of 2 keeps 2 in weak"
    ):
        masks.keep_largest(scores, count=2, per="row", floor=2)


@pytest.mark.parametrize("fill", [torch.rand, torch.zeros])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (1, 8)])
def test_n_of_m(fill, n, m):
    score = fill(3, 5, 16)
    keep = masks.n_of_m(score, n, m)
    assert keep.shape == score.shape
    assert (keep.view(-1, m).sum(1) == n).all()
    assert (
        score.view(-1, m)[~keep.view(-1, m)]
        .view(-1, m - n)
        .amax(1)
        .le(score.view(-1, m)[keep.view(-1, m)].view(-1, n).amin(1))
        .all()
    )


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (2, 3)])
def test_n_of_m_refuses(n, m):
    with pytest.raises(ValueError, match="m to divide 16"):
        masks.n_of_m(torch.rand(4, 16), n, m)


def test_nan_is_named():
    scores = {"first": torch.rand(5), "second": torch.tensor([1.0, torch.nan])}
    for per in ("global", "layer", "row"):
        with pytest.raises(ValueError, match="scores of second contain NaN"):
            masks.keep_largest(scores, sparsity=0.1, per=per)


@pytest.mark.parametrize("sparsity", [1, 1.0, 50, -0.1, float("nan")])
def test_sparsity_is_a_share(sparsity):
    with pytest.raises(ValueError, match="share in .*not a percentage"):
        masks.keep_largest(torch.rand(9), sparsity=sparsity)


def test_other_errors_say_what_is_allowed():
    score = torch.rand(4)
    for wrong in ({}, {"sparsity": 0.5, "count": 2}):
        with pytest.raises(ValueError, match="either sparsity or count"):
            masks.keep_largest(score, **wrong)
    for count in (-1, 4):
        with pytest.raises(ValueError, match=f"cannot drop {count} of 4"):
            masks.keep_largest(score, count=count)
    with pytest.raises(ValueError, match='"global", "layer", "row" or {name: label}'):
        masks.keep_largest(score, count=1, per="block")
    with pytest.raises(ValueError, match="floats of one dtype"):
        masks.keep_largest({"a": score, "b": score.double()}, count=1)


@pytest.mark.long
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the peak of memory cannot be reset here",
)
@pytest.mark.parametrize(
    "floor", [0, 5_000_000]
)  # of the tensors that hold nothing but small scores, many times
def test_a_global_threshold_over_300_million_scores_takes_no_copy_of_them(floor):
    scores = {str(i): torch.rand(250, 100_000).add_(i > 5) for i in range(12)}
    masks.keep_largest({"a": torch.rand(1 << 20)}, sparsity=0.5)  # what torch sets up once

    memory.reset_peak_memory()
    before = memory.own_memory_mb("cpu", peak=True)
    keep = masks.keep_largest(scores, sparsity=0.6, floor=floor)
    grown = memory.own_memory_mb("cpu", peak=True) - before
    assert sum(int((~mask).sum()) for mask in keep.values()) == 180_000_000
    # MB; masks take 300, a copy of the scores would take 1,200. A tensor that the floor holds up is ranked for itself.
    assert grown - 300 < (150 if floor else 40)
