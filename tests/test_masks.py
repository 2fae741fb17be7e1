"""Laws of the masks: counts are exact, ranks are those of a stable sort, floors hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitlab import masks


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
    monkeypatch.setattr(masks, "SAMPLE", 32)
    monkeypatch.setattr(masks, "CHUNK", 50)


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


@pytest.mark.parametrize("fill", [torch.rand, torch.zeros, coarse, lambda *s: -torch.rand(*s).round(decimals=2)])
@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 0.77, 0.999])
def test_bracket_is_exact(small_pieces, fill, sparsity):
    score = fill(37, 53)
    keep = masks.keep_largest(score, sparsity=sparsity)
    assert keep.equal(reference(score, round(sparsity * score.numel())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float(small_pieces, dtype):
    score = torch.rand(500).to(dtype)
    assert masks.keep_largest(score, count=200).equal(reference(score, 200))


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
    scores = {str(i): torch.randint(levels, (n,), generator=generator).float() for i, n in enumerate(sizes)}
    joined = torch.cat(list(scores.values()))
    count = min(int(share * joined.numel()), joined.numel() - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "SAMPLE", 16)
        patch.setattr(masks, "CHUNK", 20)
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
    assert masks.keep_largest(scores, count=1, per="layer")["b"].tolist() == [[True, True], [False, True]]
    assert masks.keep_largest(scores["b"], count=1, per="row").tolist() == [[False, True], [False, True]]
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


def test_transposed_scores_keep_their_own_order():
    score = coarse(6, 9).T
    assert masks.keep_largest(score, sparsity=0.5).equal(reference(score, 27))
    assert masks.keep_largest(score, count=2, per="row").equal(masks.keep_largest(score.clone(), count=2, per="row"))


@pytest.mark.parametrize("count", [0, 5, 9, 13])
@pytest.mark.parametrize("fill", [torch.rand, torch.zeros, coarse])
def test_floor_protects_the_best_of_each_tensor(count, fill):
    # The first tensors are the weakest; the second has fewer than the floor. 13 is the most that can go.
    scores = {str(i): i + fill(n) for i, n in enumerate([4, 1, 6, 3, 8])}
    keep = masks.keep_largest(scores, count=count, floor=2)
    protected = [torch.where(reference(score, max(len(score) - 2, 0)), torch.inf, score) for score in scores.values()]
    assert torch.cat(list(keep.values())).equal(reference(torch.cat(protected), count))


def test_floor_by_hand():
    scores = {"weak": torch.tensor([0.1, 0.3, 0.2]), "strong": torch.tensor([1.0, 4.0, 2.0, 3.0])}
    keep = masks.keep_largest(scores, count=4, floor=1)
    assert keep["weak"].tolist() == [False, True, False]
    assert keep["strong"].tolist() == [False, True, False, True]
    assert not masks.keep_largest(scores, count=4)["weak"].any()  # without a floor the weak layer is emptied
    with pytest.raises(ValueError, match="floor of 3 in each of 2 tensors keeps 6"):
        masks.keep_largest(scores, count=2, floor=3)
    with pytest.raises(ValueError, match="rows of weak keep 1 of 3, below the floor of 2"):
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
    with pytest.raises(ValueError, match='"global", "layer" or "row"'):
        masks.keep_largest(score, count=1, per="block")
    with pytest.raises(ValueError, match="floats of one dtype"):
        masks.keep_largest({"a": score, "b": score.double()}, count=1)
