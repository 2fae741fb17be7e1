"""Low rank and sparse fits: optimal where an optimum is known, falling objectives where it is not."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitlab.models import _layers
from vitlab.pruning import lowrank, scores

SHAPES = [(1, 5), (5, 1), (6, 6), (24, 10), (10, 24)]


def problem(m, n, *, tokens=200, seed=0):
    """A weight and the gram of correlated inputs of very different sizes, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    inputs = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64)
    inputs = inputs @ mixing * torch.logspace(-1, 1, n, dtype=torch.float64)
    return weight, inputs.T @ inputs / tokens


def falls(history):
    return all(after <= before for before, after in zip(history, history[1:], strict=False))


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("share", [0.2, 0.5, 1])
def test_svd_is_torchs_optimum(m, n, share):
    weight, _ = problem(m, n)
    rank = max(1, round(share * min(m, n)))
    u, v = lowrank.svd(weight, rank)
    assert u.shape == (m, rank) and v.shape == (rank, n) and u.dtype == weight.dtype
    cut = torch.linalg.svdvals(weight.double())[rank:].square().sum().item()
    assert lowrank.objective(weight, u @ v) == pytest.approx(
        cut, rel=1e-6, abs=1e-10 * weight.square().sum().item()
    )
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))  # sqrt(sigma) on either side
    assert falls(u.norm(dim=0).tolist())


@pytest.mark.parametrize("m, n", [(48, 40), (40, 48)])
@pytest.mark.parametrize("fall", [0, 1, 3, 6])  # decades from the first singular value to the last
@pytest.mark.parametrize("size", [1e-18, 1, 1e18])
def test_single_precision_serves_only_where_it_costs_nothing(m, n, fall, size):
    left, right = (torch.linalg.qr(torch.randn(k, 40, dtype=torch.float64)).Q for k in (m, n))
    weight = (left * torch.logspace(0, -fall, 40, dtype=torch.float64) @ right.T * size).float()
    cut = torch.linalg.svdvals(weight.double())[20:].square().sum().item()
    factors = lowrank._truncate(weight.double(), 20, None, (None, None), is_single=True)
    assert cut == pytest.approx(
        lowrank.objective(weight.double(), torch.matmul(*factors)), rel=1e-7
    )


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("share", [0.2, 0.5, 1])
def test_whitened_svd_loses_the_singular_values_it_cuts(m, n, share):
    weight, gram = problem(m, n)
    rank = max(1, round(share * min(m, n)))
    u, v = lowrank.svd(weight.double(), rank, gram=gram)
    half = torch.linalg.cholesky(gram)
    cut = torch.linalg.svdvals(weight.double() @ half)[rank:].square().sum().item()
    total = lowrank.objective(weight, torch.zeros_like(weight), gram)
    assert lowrank.objective(weight.double(), u @ v, gram) == pytest.approx(
        cut, rel=1e-6, abs=1e-8 * total
    )
    plain = lowrank.objective(weight, torch.matmul(*lowrank.svd(weight, rank)), gram)
    assert cut <= plain + 1e-6 * total


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("share", [0.2, 0.5, 1])
def test_errors_count_by_the_gradients_of_their_outputs(m, n, share):
    weight, gram = problem(m, n)
    weight = weight.double()
    _, gradient = problem(m, m, seed=1)
    rank = max(1, round(share * min(m, n)))
    felt = lowrank.damped(gradient, lowrank._FEW_GRADIENTS)  # R R^T
    root = torch.linalg.cholesky(felt)

    def lost(u, v):
        return lowrank.objective(root.T @ weight, root.T @ (u @ v), gram)

    u, v = lowrank.svd(weight, rank, gram=gram, gradient=gradient)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))
    cut = torch.linalg.svdvals(root.T @ weight @ torch.linalg.cholesky(gram))[rank:]
    total = lost(0 * u, v)
    assert lost(u, v) == pytest.approx(cut.square().sum().item(), rel=1e-6, abs=1e-8 * total)
    assert lost(u, v) <= lost(*lowrank.svd(weight, rank, gram=gram)) + 1e-8 * total
    alike = lowrank.svd(weight, rank, gram=gram, gradient=3 * torch.eye(m))
    torch.testing.assert_close(
        torch.matmul(*alike), torch.matmul(*lowrank.svd(weight, rank, gram=gram))
    )


def test_the_output_that_the_loss_feels_stays_by_hand():
    weight = torch.diag(torch.tensor([3.0, 2.0]))
    u, v = lowrank.svd(weight, 1, gradient=torch.diag(torch.tensor([1.0, 100.0])))
    # 1 * 3^2 is less than 100 * 2^2.
    torch.testing.assert_close(u @ v, torch.diag(torch.tensor([0.0, 2.0])), rtol=0, atol=1e-6)
    u, v = lowrank.svd(weight, 1, gradient=torch.zeros(2, 2))  # nothing tells: as without
    torch.testing.assert_close(u @ v, torch.diag(torch.tensor([3.0, 0.0])), rtol=0, atol=1e-6)


@pytest.mark.parametrize("m, n", [(24, 10), (10, 24)])
def test_whitened_svd_with_fewer_tokens_than_inputs(m, n):
    weight, gram = problem(m, n, tokens=5)
    u, v = lowrank.svd(weight, 5, gram=gram)  # rank 5 holds all that was seen
    assert lowrank.objective(weight, u @ v, gram) < 1e-6 * lowrank.objective(
        weight, 0 * weight, gram
    )
    assert (u @ v).isfinite().all() and (u @ v).norm() < 100 * weight.norm()


def test_zero_weight_and_zero_gram_stay_finite():
    zeros, weight = torch.zeros(6, 4), problem(6, 4)[0]
    for fitted in (lowrank.svd(zeros, 2), lowrank.svd(weight, 2, gram=torch.zeros(4, 4))):
        assert all(part.isfinite().all() for part in fitted)
    fit = lowrank.iht(weight, torch.zeros(4, 4), 5)
    assert fit.weight.isfinite().all() and fit.mask.sum() == 5 and fit.objectives[-1] == 0


def output_error(weight, fit, inputs):
    """The objective as the layer sees it, from inputs [tokens, n], without their gram: it cannot be below zero."""
    approximation = fit.u.double() @ fit.v.double() + fit.sparse.double()
    return ((weight.double() - approximation) @ inputs.T).square().sum().item() / len(inputs)


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("m, n", [(24, 10), (10, 24)])
@pytest.mark.parametrize(
    "support, share",
    [("entries", 0.3), ("entries", 0.7), ("columns", 0.3), ("rows", 0.3), ("1:2", 0.5)],
)
def test_fits_of_few_tokens_lose_what_they_say(m, n, tokens, support, share):
    """Many directions cost nothing then, and are not to be followed: an objective of 0.0 once stood for 1e27."""
    count = round(share * {"rows": m, "columns": n}.get(support, m * n))
    for seed in range(4):
        weight, gram = problem(m, n, tokens=tokens, seed=seed)
        values, vectors = torch.linalg.eigh(gram)
        inputs = (
            vectors * (len(gram) * values.clamp_min(0)).sqrt()
        ).T  # as many as columns, with the same gram
        weight, whole = weight.double(), lowrank.objective(weight, 0 * weight, gram)
        for fit in (
            lowrank.iht(weight, gram, count, support=support),
            lowrank.low_rank_plus_sparse(weight, gram, 2, count, support=support),
        ):
            lost = output_error(weight, fit, inputs)
            assert falls(fit.objectives) and fit.objectives[-1] >= 0
            assert lost == pytest.approx(fit.objectives[-1], rel=1e-6, abs=1e-6 * whole)
            assert fit.mask.sum() == count * {"rows": n, "columns": m}.get(support, 1)
            assert fit.sparse.abs().max() < 1e5 * weight.abs().max()
        kept = lowrank.refit(weight, gram, fit.mask)
        before = lowrank.objective(weight, weight * fit.mask, gram)
        assert (
            lowrank.objective(weight, kept, gram) <= before
            and kept.abs().max() < 1e5 * weight.abs().max()
        )


def test_conjugate_gradients_stop_where_no_token_showed_anything():
    gram = torch.ones(
        3, 3
    )  # one token: its unit diagonal makes all entries 1, and two directions cost nothing
    mask = torch.ones(1, 3, dtype=torch.bool)
    for residual in ([1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0 + 1e-6]):
        found = lowrank._conjugate_gradients(torch.tensor([residual]), mask, gram, steps=20)
        assert found.abs().max() <= 1
        torch.testing.assert_close(
            found @ gram, torch.tensor([residual]).mean().expand(1, 3)
        )  # what can be reached


def test_an_objective_that_rounding_makes_negative_is_no_zero():
    gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double() + torch.tensor(
        [[0.0, 0.0], [0.0, -1e-15]]
    )
    flat = torch.tensor([[1.0, 1.0]]).double()
    assert 0 < lowrank.objective(flat, 0 * flat, gram) < 1e-14
    assert lowrank.objective(1e20 * flat, 0 * flat, gram) > 1e20
    assert lowrank.objective(0 * flat, 0 * flat, gram) == 0


def test_a_gram_of_few_tokens_keeps_rank_and_count():
    weight, gram = problem(
        24, 10, tokens=2
    )  # sparse alone loses nothing here: rank has nothing to gain
    fit = lowrank.low_rank_plus_sparse(weight, gram, 3, 150)
    assert fit.u.shape == (24, 3) and fit.mask.sum() == 150
    assert falls(fit.objectives) and fit.objectives[-1] >= 0


def test_a_weight_of_low_rank_still_has_its_count():
    weight = torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 6))
    fit = lowrank.low_rank_plus_sparse(weight, problem(6, 5)[1], 2, 4)
    assert fit.mask.sum() == 4 and fit.u.shape == (6, 2)
    torch.testing.assert_close(fit.weight, weight, rtol=1e-4, atol=1e-4)


def test_ranks():
    assert _layers.break_even_rank(128, 128) == 64
    assert _layers.break_even_rank(384, 128) == 96  # qkv: 75 % of the full rank
    assert lowrank.rank_for(128, 128, 0.5) == 32
    assert lowrank.rank_for(128, 128, 0.49) == 24  # 31 rounded down to a multiple of 8
    assert lowrank.rank_for(128, 128, 0.49, multiple=1) == 31
    assert lowrank.rank_for(24, 24, 0.5) == 6  # below one multiple
    assert lowrank.rank_for(128, 128, 0) == lowrank.rank_for(4, 4, 0.1) == 0
    assert lowrank.rank_for(128, 128, 1, multiple=1) == 63  # the break-even rank saves nothing
    with pytest.raises(ValueError, match="not a percentage; got 50"):
        lowrank.rank_for(128, 128, 50)


@pytest.mark.parametrize("support, total", [("entries", 60), ("rows", 5), ("columns", 12)])
@pytest.mark.parametrize(
    "fill", [torch.rand, torch.zeros, lambda *shape: torch.rand(shape).round(decimals=1)]
)
def test_supports_are_exact_and_hold_the_largest(support, total, fill):
    score = fill(5, 12)
    groups = {"entries": score.flatten(), "rows": score.sum(1), "columns": score.sum(0)}[support]
    for count in (1, total // 2, total - 1, total):
        mask = lowrank._support_mask(score, count, support=support)
        assert mask.shape == (5, 12) and mask.sum() == count * 60 // total
        chosen = {"entries": mask.flatten(), "rows": mask.all(1), "columns": mask.all(0)}[support]
        assert chosen.sum() == count
        if count < total:
            assert groups[chosen].min() >= groups[~chosen].max()


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    levels=st.integers(1, 4),  # few: many ties
    seed=st.integers(0, 2**16),
    place=st.floats(0, 1),
    support=st.sampled_from(["entries", "rows", "columns"]),
)
def test_supports_hold_as_many_as_were_asked_for(shape, levels, seed, place, support):
    m, n = shape
    score = torch.randint(levels, (m, n), generator=torch.Generator().manual_seed(seed)).double()
    total, price = {"entries": (m * n, 1), "rows": (m, n), "columns": (n, m)}[support]
    count = max(1, round(place * total))
    mask = lowrank._support_mask(score, count, support=support)
    assert mask.sum() == count * price
    if count < total:
        sums = {"entries": score.flatten(), "rows": score.sum(1), "columns": score.sum(0)}[support]
        chosen = {"entries": mask.flatten(), "rows": mask.all(1), "columns": mask.all(0)}[support]
        assert sums[chosen].min() >= sums[~chosen].max()
    with pytest.raises(ValueError, match=f"got {total + 1}"):
        lowrank._support_mask(score, total + 1, support=support)


def test_ties_keep_the_last_in_memory():
    mask = lowrank._support_mask(torch.ones(2, 3), 2)
    assert mask.tolist() == [[False, False, False], [False, True, True]]


def test_project_by_hand():
    weight = torch.tensor([[3.0, -4.0], [0.0, 4.5]])
    assert lowrank.project(weight, 2).tolist() == [[0, -4], [0, 4.5]]
    assert lowrank.project(weight, 1, support="rows").tolist() == [[3, -4], [0, 0]]
    assert lowrank.project(weight, 1, support="columns").tolist() == [[0, -4], [0, 4.5]]


@pytest.mark.parametrize("m, n", [(24, 10), (10, 24), (16, 16)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("support", ["entries", "columns"])
def test_iht_falls_strictly_below_magnitude_pruning(m, n, share, support):
    weight, gram = problem(m, n)
    count = max(1, round(share * (m * n if support == "entries" else n)))
    fit = lowrank.iht(weight, gram, count, support=support)
    magnitude = lowrank.objective(weight, lowrank.project(weight, count, support=support), gram)
    assert fit.objectives[0] == pytest.approx(magnitude)
    assert falls(fit.objectives) and fit.objectives[-1] < 0.999 * fit.objectives[0]
    assert len(fit.objectives) > 3 or count == 1  # more than one step, but where one column is all
    assert lowrank.objective(weight, fit.weight, gram) == pytest.approx(
        fit.objectives[-1], rel=1e-3
    )
    assert fit.mask.sum() == count * (1 if support == "entries" else m)
    assert fit.sparse[~fit.mask].count_nonzero() == 0


@pytest.mark.parametrize("count", [1, 5, 23])
def test_iht_on_rows_is_the_best_choice_of_rows(count):
    weight, gram = problem(24, 10)
    fit = lowrank.iht(weight, gram, count, support="rows")
    energy = (weight.double() @ gram * weight).sum(1).sort().values
    assert fit.objectives[-1] == pytest.approx(energy[: 24 - count].sum().item())
    assert fit.mask.sum() == 10 * count and torch.equal(fit.weight[fit.mask], weight[fit.mask])
    assert falls(fit.objectives)


@pytest.mark.parametrize("support", ["2:4", "1:4", "3:6"])
def test_patterns_hold_in_every_group_and_fits_of_them_fall(support):
    n, m = lowrank.neighbours(support)
    weight, gram = problem(9, 24)
    count = 9 * 24 * n // m
    alone = lowrank.iht(weight, gram, count, support=support)
    both = lowrank.low_rank_plus_sparse(weight, gram, 2, count, support=support)
    for fit in (alone, both):
        assert (fit.mask.view(9, -1, m).sum(-1) == n).all() and (fit.sparse[~fit.mask] == 0).all()
        assert falls(fit.objectives)
        assert lowrank.objective(weight, fit.weight, gram) == pytest.approx(
            fit.objectives[-1], rel=1e-6
        )
    magnitude = lowrank.objective(weight, lowrank.project(weight, count, support=support), gram)
    assert (
        both.objectives[-1] < alone.objectives[-1] < magnitude == pytest.approx(alone.objectives[0])
    )
    with pytest.raises(ValueError, match=f"{support} of a .* is a count of {count}; got 5"):
        lowrank._support_mask(weight, 5, support=support)


def test_iht_finds_the_best_support_of_one_row_by_brute_force():
    weight, gram = problem(1, 8)
    fit = lowrank.iht(weight, gram, 3)

    def least(kept):
        kept = list(kept)
        solved = torch.zeros(1, 8, dtype=torch.float64)
        solved[:, kept] = torch.linalg.solve(
            gram[kept][:, kept], (weight.double() @ gram)[:, kept].T
        ).T
        return lowrank.objective(weight, solved, gram)

    values = sorted(least(kept) for kept in torch.combinations(torch.arange(8), 3).tolist())
    assert (
        values[0] * (1 - 1e-6) <= fit.objectives[-1] <= values[5]
    )  # among the best tenth of the 56


@pytest.mark.parametrize("scale", [1, 0.01])
@pytest.mark.parametrize("count", [1, 100, 239])
def test_iht_without_activations_is_magnitude_pruning(scale, count):
    weight, _ = problem(10, 24)
    fit = lowrank.iht(weight, scale * torch.eye(24), count)
    assert torch.equal(fit.weight, lowrank.project(weight, count))
    assert fit.objectives[-1] == fit.objectives[0]


def normalised(weight, gram, count, *, steps=100):
    """Normalised IHT as Blumensath and Davies (2010) write it, then least squares on its support: the objective."""
    weight = weight.double()
    mask = lowrank._support_mask(weight.square(), count)
    x = weight * mask
    for _ in range(steps):
        gradient = (weight - x) @ gram
        on = gradient * mask
        length = on.square().sum() / ((on @ gram) * on).sum().clamp_min(1e-300)
        while True:
            ahead = x + length * gradient
            new = lowrank._support_mask(ahead.square(), count)
            change = ahead * new - x
            curvature = ((change @ gram) * change).sum()
            if torch.equal(new, mask) or length <= 0.99 * change.square().sum() / curvature:
                break
            length /= 1.5
        x, mask = ahead * new, new
    return lowrank.objective(weight, lowrank.refit(weight, gram, mask, steps=200), gram)


def test_iht_ends_where_normalised_iht_does():
    """Of random matrices, that is, each in one of many minima; on the layers of models it ends far below."""
    ratios = []
    for m, n, share in product((10, 16, 24), (10, 24), (0.1, 0.3, 0.5, 0.7)):
        weight, gram = problem(m, n)
        scale, count = gram.diagonal().sqrt(), round(share * m * n)  # where iht works, too
        fair = normalised(weight * scale, gram / scale / scale[:, None], count)
        ratios.append(lowrank.iht(weight, gram, count).objectives[-1] / fair)
    assert torch.tensor(ratios).log().mean().exp() < 1.1 and max(ratios) < 3


def test_iht_under_a_diagonal_gram_ranks_by_weight_times_input():
    weight, gram = problem(10, 24)
    diagonal = torch.diag(gram.diagonal())
    fit = lowrank.iht(weight, diagonal, 50)
    score = weight.double().square() * gram.diagonal()
    assert torch.equal(fit.mask, lowrank._support_mask(score, 50))
    torch.testing.assert_close(fit.weight, weight * fit.mask)


def test_iht_keeping_all_is_the_weight():
    weight, gram = problem(10, 24)
    for support, count in (("entries", 240), ("rows", 10), ("columns", 24)):
        fit = lowrank.iht(weight, gram, count, support=support)
        assert torch.equal(fit.weight, weight) and fit.objectives[-1] == 0


@pytest.mark.parametrize("m, n", [(24, 10), (10, 24)])
@pytest.mark.parametrize("support, count", [("entries", 60), ("rows", 3), ("columns", 3)])
def test_low_rank_plus_sparse_never_rises_and_beats_its_halves(m, n, support, count):
    weight, gram = problem(m, n)
    fit = lowrank.low_rank_plus_sparse(weight, gram, 2, count, support=support)
    assert falls(fit.objectives) and len(fit.objectives) > 3
    assert fit.u.shape == (m, 2) and fit.v.shape == (2, n)
    assert fit.mask.sum() == count * {"entries": 1, "rows": n, "columns": m}[support]
    assert fit.sparse[~fit.mask].count_nonzero() == 0
    assert lowrank.objective(weight, fit.weight, gram) == pytest.approx(
        fit.objectives[-1], rel=1e-3
    )
    low = lowrank.objective(weight, torch.matmul(*lowrank.svd(weight, 2, gram=gram)), gram)
    assert fit.objectives[-1] < min(
        low, lowrank.iht(weight, gram, count, support=support).objectives[-1]
    )


def test_low_rank_plus_sparse_recovers_what_is_both():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    spikes = torch.randperm(600, generator=generator)[:20]
    weight.view(-1)[spikes] += 50
    fit = lowrank.low_rank_plus_sparse(weight, torch.eye(30), 2, 20)
    assert fit.objectives[-1] < 1e-6 * weight.square().sum()
    assert fit.mask.view(-1)[spikes].all()


def obs_mask(weight, gram, count):
    """Return the mask of the count entries with the highest score "obs", Optimal Brain Surgeon, of a layer."""
    layer = torch.nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight.data = weight
    model, name = torch.nn.Sequential(layer), "0.weight"
    found = scores.weights(model, criteria=["obs"], parameters=[name], grams={"0": gram}, damping=0)
    return lowrank._support_mask(found["obs"][name], count)


def masked_problem(m, n, share, *, seed=0):
    """A problem, its gram damped, and the mask of Optimal Brain Surgeon that keeps share of it."""
    weight, gram = problem(m, n, seed=seed)
    gram = lowrank.damped(gram, 0.01)
    return weight, gram, obs_mask(weight, gram, max(1, round(share * m * n)))


def sparsegpt(weight, gram, mask):
    """The update as Frantar and Alistarh (2023) write it, by the Cholesky factor of the inverse."""
    weight = weight.double().clone()
    factor = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    for j in range(weight.shape[1]):
        error = weight[:, j] * ~mask[:, j] / factor[j, j]
        weight[:, j:] -= error[:, None] * factor[j, j:]
    return weight * mask


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1])
def test_obs_update_is_sparsegpts_and_refit_is_least_squares(m, n, share):
    weight, gram, mask = masked_problem(m, n, share)
    assert mask.sum() == max(1, round(share * m * n))
    updated, refitted = (
        lowrank.obs_update(weight, gram, mask),
        lowrank.refit(weight, gram, mask, steps=200),
    )
    torch.testing.assert_close(updated, sparsegpt(weight, gram, mask).float(), rtol=1e-4, atol=1e-4)
    assert updated.dtype == refitted.dtype == weight.dtype
    assert updated[~mask].count_nonzero() == refitted[~mask].count_nonzero() == 0
    slope = (weight - refitted.double()) @ gram * mask
    assert slope.abs().max() < 1e-4 * (weight.double() @ gram).abs().max()
    after, between, before = (
        lowrank.objective(weight, w, gram) for w in (refitted, updated, weight * mask)
    )
    room = 1e-9 * lowrank.objective(weight, 0 * weight, gram)  # results are rounded to float32
    assert after <= between + room and after <= before + room
    assert between <= before + room  # no law, see below, but true of these


def test_refit_is_never_worse_than_its_start():
    weight, gram, mask = masked_problem(24, 10, 0.5)
    start = lowrank.obs_update(weight.double(), gram, mask)
    values = [lowrank.objective(weight, start, gram)]
    for steps in (0, 1, 5, 50):
        fitted = lowrank.refit(weight.double(), gram, mask, start=start, steps=steps)
        values.append(lowrank.objective(weight, fitted, gram))
    assert falls(values) and values[0] == values[1] and values[-1] < 0.99 * values[0]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_without_correlations_nothing_takes_over(share):
    weight, _ = problem(10, 24)
    mask = obs_mask(weight, torch.eye(24), round(share * 240))
    assert torch.equal(mask, weight.abs() >= weight.abs().flatten().sort().values[-mask.sum()])
    for gram in (torch.eye(24), 3 * torch.eye(24)):
        assert torch.equal(lowrank.obs_update(weight, gram, mask), weight * mask)
        assert torch.equal(lowrank.refit(weight, gram, mask), weight * mask)


def test_obs_update_is_exact_where_what_goes_comes_first_and_idle_where_it_comes_last():
    weight, gram = problem(10, 24)
    gram, late = lowrank.damped(gram, 0.01), (torch.arange(24) >= 9).expand(10, 24)
    exact = lowrank.refit(weight, gram, late, steps=200)
    torch.testing.assert_close(lowrank.obs_update(weight, gram, late), exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(lowrank.obs_update(weight, gram, ~late), weight * ~late)


def test_obs_by_hand():
    weight, gram = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    first, last = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    # The inverse is [[4, -1], [-1, 2]] / 7: costs are 1 * 7 / 4 and 4 * 7 / 2.
    assert torch.equal(obs_mask(weight, gram, 1), last)
    for w in (lowrank.obs_update(weight, gram, last), lowrank.refit(weight, gram, last)):
        torch.testing.assert_close(w, torch.tensor([[0, 2 + 1 * 1 / 4]]))  # w_2 += w_1 h_12 / h_22
        assert lowrank.objective(weight, w, gram) == pytest.approx(7 / 4)
    assert torch.equal(lowrank.obs_update(weight, gram, first), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(
        lowrank.refit(weight, gram, first), torch.tensor([[1 + 2 * 1 / 2, 0]])
    )


def test_obs_update_may_lose_more_than_plain_masking():
    # D R for D = (1, d, 1) is (1, 1 + d, -3 d): plain masking has d = 0, the update d = -1, least squares d = -0.1.
    root = torch.tensor([[1.0, 1.0, -1.0], [0.0, 1.0, -3.0], [0.0, 0.0, 1.0]])
    weight, gram, mask = torch.ones(1, 3), root @ root.T, torch.tensor([[False, True, False]])
    updated, refitted = lowrank.obs_update(weight, gram, mask), lowrank.refit(weight, gram, mask)
    values = [lowrank.objective(weight, w, gram) for w in (weight * mask, updated, refitted)]
    assert values == pytest.approx([2, 10, 1.9])


def test_obs_scores_drop_the_one_weight_that_costs_least_by_brute_force():
    weight, gram, mask = masked_problem(3, 5, 14 / 15)

    def cost(index):
        keep = torch.ones(15, dtype=torch.bool).scatter(0, torch.tensor(index), False).view(3, 5)
        return lowrank.objective(weight, lowrank.refit(weight, gram, keep, steps=200), gram)

    assert (~mask).flatten().nonzero().tolist() == [[min(range(15), key=cost)]]
    assert obs_mask(weight, gram, 15).all()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_obs_scores_lose_less_than_magnitude(share):
    weight, gram, mask = masked_problem(24, 10, share)
    magnitude = lowrank._support_mask(weight.abs(), int(mask.sum()))
    losses = [
        lowrank.objective(weight, lowrank.refit(weight, gram, m), gram) for m in (mask, magnitude)
    ]
    assert losses[0] < losses[1]


def test_errors_of_a_fixed_support_say_what_is_allowed():
    weight, gram, mask = masked_problem(10, 24, 0.5)
    for call in (lowrank.obs_update, lowrank.refit):
        with pytest.raises(ValueError, match="without, it is weight"):
            call(weight, None, mask)
        for wrong in (mask.float(), mask[:5], mask & False):
            with pytest.raises(
                ValueError, match=r"must be bool \[10, 24\] and keep something; got one of torch"
            ):
                call(weight, gram, wrong)
    singular = problem(10, 24, tokens=5)[1]
    singular[:, 0] = singular[0] = 0
    with pytest.raises(ValueError, match="no inverse.*see lowrank.damped"):
        lowrank.obs_update(weight, singular, mask)
    with pytest.raises(ValueError, match=r"start must be \[10, 24\]"):
        lowrank.refit(weight, gram, mask, start=weight[:5])


def test_thresholding_the_product_destroys_its_rank():
    weight, _ = problem(10, 24)
    product = lowrank.threshold_product(weight, 3, 60)
    assert product.count_nonzero() == 60
    assert torch.linalg.matrix_rank(product) > 3
    assert lowrank.objective(weight, product) > lowrank.objective(
        weight, lowrank.project(weight, 60)
    )


def test_regression_is_least_squares():
    weight, gram = problem(10, 24, tokens=500)
    columns = torch.tensor([0, 3, 4, 9, 20])
    transfer = lowrank.regression(gram, columns)
    assert torch.equal(transfer[columns], torch.eye(5, dtype=torch.float64))
    best = lowrank.objective(
        weight, weight.double() @ transfer @ torch.eye(24).double()[columns], gram
    )
    kept = weight.double() * torch.eye(24)[columns].sum(0)
    assert best < lowrank.objective(weight, kept, gram)
    gradient = (
        weight.double() - weight.double() @ transfer @ torch.eye(24).double()[columns]
    ) @ gram
    assert gradient[:, columns].abs().max() < 1e-6 * gradient.abs().max()


def test_damping_by_hand():
    gram = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    damped = lowrank.damped(gram, 0.5)
    assert damped.tolist() == [[3.5, 1], [1, 5.5]] and damped.dtype == torch.float64
    assert torch.equal(lowrank.damped(gram, 0), gram.double())


def test_objective_by_hand():
    weight = torch.tensor([[1.0, 2.0]])
    gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert lowrank.objective(weight, torch.zeros(1, 2)) == 5
    assert lowrank.objective(weight, torch.zeros(1, 2), gram) == 2 + 4 + 12


def test_errors_say_what_is_allowed():
    weight, gram = problem(10, 24)
    broken = weight.clone()
    broken[0, 0] = torch.nan
    for call in (
        lambda: lowrank.svd(broken, 2),
        lambda: lowrank.iht(broken, gram, 5),
        lambda: lowrank.low_rank_plus_sparse(broken, gram, 2, 5),
        lambda: lowrank.project(broken, 5),
        lambda: lowrank.iht(weight[0], gram, 5),
    ):
        with pytest.raises(ValueError, match="without NaN and inf"):
            call()
    with pytest.raises(ValueError, match="gram has NaN"):
        lowrank.svd(weight, 2, gram=gram * torch.nan)
    with pytest.raises(ValueError, match=r"gram must be \[24, 24\]"):
        lowrank.iht(weight, gram[:10, :10], 5)
    for rank in (0, 11):
        with pytest.raises(ValueError, match=r"in \[1, 10\]"):
            lowrank.svd(weight, rank)
        with pytest.raises(ValueError, match=r"in \[1, 10\]"):
            lowrank.low_rank_plus_sparse(weight, gram, rank, 5)
    with pytest.raises(ValueError, match=r"in \[1, 240\]; got 241"):
        lowrank.iht(weight, gram, 241)
    with pytest.raises(ValueError, match=r"in \[1, 240\]; got 0"):
        lowrank.iht(weight, gram, 0)
    with pytest.raises(ValueError, match="needs a gram"):
        lowrank.iht(weight, None, 5)
    with pytest.raises(ValueError, match="unknown support 'blocks'"):
        lowrank.iht(weight, gram, 5, support="blocks")
