"""Fit one matrix: low rank, sparse or both.

Low rank is by truncated and activation-whitened SVD, sparse by iterative hard thresholding or
Optimal Brain Surgeon.

Every fit serves one layer y = W x, W [m, n]. It is judged by what its output loses on the inputs of
calibration,

    objective(W, A, H) = tr[(W - A) H (W - A)^T],   H = gram [n, n] = mean of x x^T over tokens,

where H = None is the identity: the plain squared error. All functions take and give tensors. Sums
are float64, results have W's dtype.

Public: Fit, TINY, damped, iht, low_rank_plus_sparse, neighbours, objective, obs_update, project,
rank_for, refit, regression, solve, spectrum, svd, threshold_product.
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitlab import names
from vitlab.pruning import masks

TINY = 1e-37  # stands for zero in a divisor, in float32, too
_MOST_STEPS = 30  # of thresholding
# Damping of gradients: outputs that few images moved the loss by are not free to be wrong.
_FEW_GRADIENTS = 1e-2


# -- What a fit is, and what it loses


@dataclass(frozen=True)
class Fit:
    """Hold a fit of W, which is about u v + sparse, with sparse zero outside mask.

    u: [m, r].
    v: [r, n].
    sparse: [m, n].
    mask: [m, n], bool.
    objectives: the history, never rising. The first one is the start's, the last the result's.
    """

    u: Tensor
    v: Tensor
    sparse: Tensor
    mask: Tensor
    objectives: list

    @property
    def weight(self):
        """Return the matrix [m, n] that stands for W."""
        return self.u @ self.v + self.sparse

    def to(self, dtype):
        """Return the fit with tensors of a dtype."""
        u = self.u.to(dtype)
        v = self.v.to(dtype)
        sparse = self.sparse.to(dtype)
        return replace(self, u=u, v=v, sparse=sparse)


def objective(weight, approximation, gram=None):
    """Return tr[(W - A) H (W - A)^T], a float.

    weight, approximation: W and A, [m, n].
    gram: H [n, n]; None: the identity.

    Raises ValueError for wrong shapes and values that are not finite.
    """
    weight, gram = _checked(weight, gram)
    return _objective(weight - approximation.double(), gram)


def _objective(residual, gram, product=None):
    """Return tr[R H R^T]; product: R H, if it is known."""
    if gram is None:
        return residual.square().sum().item()
    product = residual @ gram if product is None else product
    value = (product * residual).sum().item()
    if value >= 0:
        return value
    # Rounding made it negative: return how far rounding reaches. 0 would say that all is well even
    # for a residual that is huge where gram is zero.
    size = residual.abs()
    reach = (size @ gram.abs() * size).sum().item()
    return torch.finfo(gram.dtype).eps * len(gram) * reach


def damped(gram, damping=1e-3):
    """Return gram with damping times the mean of its diagonal added to the diagonal, float64.

    This is for directions that few tokens showed: 1e-3 costs nothing with many tokens and helps
    with few.

    gram: [n, n].
    damping: a share of the diagonal's mean.
    """
    gram = gram.double().clone()
    diagonal = gram.diagonal()
    diagonal += damping * diagonal.mean()
    return gram


def solve(gram, right):
    """Return gram^-1 right, of a gram that should be positive definite; see `damped`."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    # Rounding may leave an eigenvalue below 0.
    return torch.linalg.solve(gram, right) if failed else torch.cholesky_solve(right, factor)


def regression(gram, columns):
    """Return transfer [n, k], float64, with which x is nearest to transfer x[columns].

    By least squares.

    gram: [n, n], the mean of x x^T. It must have an inverse: see `damped`.
    columns: k indices of the inputs that stay; these are themselves, exactly.
    """
    gram = gram.double()
    rows = gram[columns]
    others = torch.ones(len(gram), dtype=bool, device=gram.device)
    others[columns] = False
    transfer = gram.new_zeros(len(gram), len(columns))
    transfer[columns] = torch.eye(len(columns)).to(gram)
    transfer[others] = solve(rows[:, columns], rows[:, others]).T
    return transfer


def rank_for(m, n, share, *, multiple=8):
    """Return the largest rank r whose r (m + n) MACs stay within a share of m n.

    m, n: outputs and inputs of the layer.
    share: of the dense MACs, in [0, 1].
    multiple: the rank is rounded down to a multiple of it, unless it is below one.

    Returns an int below the break-even rank, 0 if the share allows none.
    Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(
            f"share is a share of the dense MACs in [0, 1], not a percentage; got {share}"
        )
    highest = (m * n - 1) // (m + n)  # at the break-even rank itself nothing is saved
    affordable = int(share * m * n / (m + n) + 1e-9)
    rank = min(affordable, highest)
    return rank // multiple * multiple or rank


def svd(weight, rank, *, gram=None, gradient=None):
    """Return the factors u [m, rank] and v [rank, n] of the best approximation of that rank.

    Without gram this is the truncated SVD (Eckart and Young 1936), sqrt(sigma) on either side. With
    gram = S S^T it is the SVD of W S, cut and multiplied by S^-1 (SVD-LLM, Wang et al. 2024; S by
    eigendecomposition). It then loses, by objective(W, u v, gram), the sum of the squared singular
    values that were cut. The smaller Gram matrix is decomposed, several times faster than
    torch.linalg.svd.

    With gradient = R R^T it is R^T W that is approximated, and u is multiplied by R^-T: what the
    loss feels of an error E, tr[R^T E H E^T R], is then the least. Half of it is what the loss
    rises by, to second order, where errors and gradients of different positions are independent
    (K-FAC, Martens and Grosse 2015).

    weight: W [m, n].
    rank: in [1, min(m, n)].
    gram: [n, n], or None.
    gradient: [m, m], of scores.gradient_grams, or None: all outputs count alike.

    Returns u and v with equal norms, the largest direction first.
    Raises ValueError for a rank outside [1, min(m, n)], wrong shapes and values that are not
    finite.
    """
    _check_rank(weight, rank)
    double, gram = _checked(weight, gram)
    is_single = gram is None and weight.dtype != torch.float64
    if gradient is not None:
        root, inverse = _roots(damped(gradient, _FEW_GRADIENTS).to(double))
        double = root.T @ double
    roots = _root(double, gram)
    u, v = _truncate(double, rank, gram, roots, is_single=is_single)
    if gradient is not None:
        u, v = _balanced(inverse.T @ u, v)
    return u.to(weight.dtype), v.to(weight.dtype)


def spectrum(weight, gram=None):
    """Return the singular values [min(m, n)] of W S, falling, float64.

    The sum of the squares from one on is what `svd` of that rank loses, objective(W, u v, gram).

    weight: W [m, n].
    gram: S S^T [n, n]; None for the singular values of W.

    Raises ValueError for wrong shapes and values that are not finite.
    """
    weight, gram = _checked(weight, gram)
    root, _ = _root(weight, gram)
    square, _ = _smaller_square(weight, gram, root)
    squares = torch.linalg.eigvalsh(square).flip(0)
    return squares.clamp_min(0).sqrt()


def threshold_product(weight, rank, count):
    """Return the count largest entries of the truncated SVD's product, a baseline of others.

    The result has no low rank any more and is no better a sparse matrix for it: dense cost, two
    losses.

    weight: W [m, n].
    rank: of the truncated SVD, in [1, min(m, n)].
    count: how many entries stay, in [1, m n].

    Raises ValueError for a rank or count out of range, wrong shapes and values that are not finite.
    """
    u, v = svd(weight, rank)
    return project(u @ v, count)


def _root(weight, gram, damping=1e-9):
    """Return S and S^-1 with S S^T = gram, or None and None if they are not needed.

    S is damped, so that directions that no token showed have an inverse.
    """
    if gram is None or len(weight) <= weight.shape[1]:
        return None, None
    return _roots(gram, damping)


def _roots(gram, damping=1e-9):
    """Return S and S^-1 with S S^T = gram, whose eigenvalues are raised to a share of the largest."""
    values, vectors = torch.linalg.eigh(gram)
    least = damping * values[-1].item() or 1.0  # 1 for a gram of zeros
    sigma = values.clamp_min(least).sqrt()
    return vectors * sigma, (vectors / sigma).T


def _times(matrix, other):
    """Return the product of two matrices, of which the second may be None for the identity."""
    return matrix if other is None else matrix @ other


def _smaller_square(weight, gram, root):
    """Return the smaller of (W S)(W S)^T = W gram W^T and (W S)^T (W S), and W S; root: S."""
    if len(weight) <= weight.shape[1]:
        return _times(weight, gram) @ weight.T, weight
    whitened = _times(weight, root)
    return whitened.T @ whitened, whitened


def _truncate(weight, rank, gram, roots, *, is_single=False):
    """Return u, v of the best approximation of that rank in the norm of gram.

    roots: as from _root. is_single: vectors in single precision will do.
    """
    root, inverse = roots
    square, whitened = _smaller_square(weight, gram, root)
    vectors = _leading(square, rank, is_single)
    if len(weight) <= weight.shape[1]:  # left vectors of W S: no inverse of S is needed
        u, v = vectors, vectors.T @ weight
    else:  # right ones
        u, v = whitened @ vectors, _times(vectors.T, inverse)
    u, v = _balanced(u, v)
    return u.flip(1), v.flip(0)  # the largest first


def _balanced(u, v):
    """Return u [m, r] and v [r, n] with equal norms of their parts, and the same product."""
    norms = u.norm(dim=0).clamp_min(1e-150)
    ratio = v.norm(dim=1) / norms
    ratio = ratio.clamp_min(1e-150).sqrt()
    return u * ratio, v / ratio[:, None]


def _leading(square, rank, is_single):
    """Return the eigenvectors [n, rank] of the largest eigenvalues, rising."""
    if is_single:
        # Half the time. It serves if what is cut outweighs the largest eigenvalue: what vectors
        # lose by rounding is of second order then, within 1e-6 of what is cut.
        scaled = square / square.diagonal().mean().clamp_min(1e-300)
        values, vectors = torch.linalg.eigh(scaled.float())
        if values[:-rank].sum() > values[-1]:
            return vectors[:, -rank:].double()
    return torch.linalg.eigh(square).eigenvectors[:, -rank:]


# -- Supports


def neighbours(support):
    """Return (n, m) of a support "n:m", n of each m neighbours in a row; None for other words."""
    match = re.fullmatch(r"(\d+):(\d+)", support)
    return match and (int(match[1]), int(match[2]))


def _support_mask(score, count, support="entries"):
    """Return the mask of the count entries, rows or columns whose score, summed, is largest.

    A support "2:4", or other such numbers, keeps the 2 largest of each 4 neighbours along a row.
    Count is then what that makes of all entries. The count is exact: among equals the first in
    memory goes first.

    Raises ValueError for an unknown support and a count beyond what there is.
    """
    if pattern := neighbours(support):
        mask = masks.n_of_m(score, *pattern)
        if count != mask.sum():
            raise ValueError(
                f"{support} of a {list(score.shape)} matrix is a count of {int(mask.sum())}; "
                f"got {count}"
            )
        return mask
    sums = {
        "entries": score,
        "rows": score.sum(1, keepdim=True),
        "columns": score.sum(0, keepdim=True),
    }
    names.check("support", support, sums)
    total = sums[support]
    most = total.numel()
    if not 1 <= count <= most:
        raise ValueError(
            f"count of {support} in a {list(score.shape)} matrix is in [1, {most}]; got {count}"
        )
    keep = masks.drop_in_rows(total.reshape(1, -1), most - count)
    return keep.view(total.shape).expand_as(score).clone()


def project(weight, count, *, support="entries"):
    """Return weight with only its largest entries, rows or columns: magnitude pruning.

    weight: [m, n].
    count: how many entries, rows or columns stay; of a pattern what it makes of all entries.
    support: "entries", "rows", "columns" or a pattern such as "2:4", the 2 largest of each 4
        neighbours along a row.

    Raises ValueError for an unknown support and a count beyond what there is.
    """
    double, _ = _checked(weight, None)
    return weight * _support_mask(double.square(), count, support)


# -- Sparse


def iht(weight, gram, count, *, support="entries"):
    """Fit a matrix with count entries, rows or columns by iterative hard thresholding.

    A = P_k(W) is magnitude pruning. Then A <- P_k(A + mu G), G = (W - A) gram (Blumensath and
    Davies 2009). The values on the support are then solved for by conjugate gradients (hard
    thresholding pursuit, Foucart 2011).

    weight: W [m, n].
    gram: [n, n] of activations.
    count: how many entries, rows or columns stay, at least 1; of a pattern what it makes of all
        entries.
    support: "entries", "rows", "columns" or a pattern such as "2:4", see `project`.

    Returns a Fit with empty u and v, whose objectives begin with magnitude pruning. Its end lies
    below that unless magnitude pruning is a fixed point, as it is for a gram like the identity.
    Raises ValueError for a missing gram, a wrong count or support, wrong shapes and values that are
    not finite.
    """
    double, gram = _checked(weight, gram, without="magnitude pruning: project")
    fit = _iht(double, gram, count, support, tolerance=1e-4)
    return fit.to(weight.dtype)


def _iht(weight, gram, count, support, *, tolerance, rank=0):
    """Return the Fit of `iht` in double precision, with u and v of a rank that are zero."""
    m, n = weight.shape
    u = weight.new_zeros(m, rank)
    v = weight.new_zeros(rank, n)
    mask = _support_mask(weight.square(), count, support)
    start = _objective(weight - weight * mask, gram)
    sparse, _ = _debiased(weight, weight * mask, mask, gram, start)
    fit = Fit(u, v, sparse, mask, [start])
    limits = {"steps": _MOST_STEPS, "tolerance": tolerance}
    fit = _pursue(weight, fit, gram, count, support, **limits)
    return _finished(weight, fit, gram)


def _finished(weight, fit, gram):
    """Return fit with the values on its support solved for."""
    target = weight - fit.u @ fit.v
    before = fit.objectives[-1]
    sparse, value = _debiased(target, fit.sparse, fit.mask, gram, before)
    return replace(fit, sparse=sparse, objectives=[*fit.objectives, value])


def _pursue(weight, fit, gram, count, support, *, steps=1, tolerance=0.0):
    """Return fit after steps of hard thresholding for what its low rank leaves of weight.

    steps: at most so many. tolerance: stop when a step gains a smaller share of the objective.
    """
    target = weight - fit.u @ fit.v
    if support == "rows":
        # Rows do not interact: those with most output energy are the best.
        mask = _support_mask(target @ gram * target, count, support)
        sparse = target * mask
        value = _objective(target - sparse, gram)
        if value > fit.objectives[-1]:
            return fit
        history = [*fit.objectives, value]
        return replace(fit, sparse=sparse, mask=mask, objectives=history)
    # In coordinates in which gram has a unit diagonal P_k ranks by |w| norm(x), and the largest
    # inputs do not hold back the step.
    scale = _scale(gram)
    gram = gram / scale / scale[:, None]
    target = target * scale
    now = fit.sparse * scale
    mask = fit.mask
    gradient = (target - now) @ gram
    history = [_objective(target - now, gram, gradient)]
    single = gram.float()  # corrections need no double precision, their sums do
    # Normalised IHT (Blumensath and Davies 2010) begins with ||G||^2 / tr(G gram G^T), G on the
    # support. That is much smaller here, so that steps exchange few entries. Begin with 8 and halve
    # until the objective falls.
    step = 8.0
    largest = gram.abs().sum(1).max()  # at least the largest eigenvalue
    least = 0.5 / largest.clamp_min(1).item()
    while step > least and len(history) <= steps:
        ahead = now + step * gradient
        support_ahead = _support_mask(ahead.square(), count, support)
        new = torch.where(mask, now, ahead) * support_ahead
        slope = (target - new) @ gram * support_ahead
        correction = _conjugate_gradients(slope.float(), support_ahead, single, steps=10)
        new = new + correction
        slope = (target - new) @ gram
        value = _objective(target - new, gram, slope)
        if value < history[-1]:
            now, mask, gradient = new, support_ahead, slope
            history.append(value)
            if value > (1 - tolerance) * history[-2]:
                break
        else:
            step /= 2
    # Between turns history[0] is the last objective again, up to rounding in other coordinates.
    new_values = history if steps > 1 else history[1:]
    falling = [value for value in new_values if value <= fit.objectives[-1]]
    sparse = now / scale
    return replace(fit, sparse=sparse, mask=mask, objectives=fit.objectives + falling)


def _scale(gram):
    """Return the root mean square of each input, [n], but not 0 for one that was never on."""
    square = gram.diagonal()
    least = 1e-12 * square.mean().clamp_min(1e-300)
    return square.clamp_min(least).sqrt()


def _debiased(target, sparse, mask, gram, value, *, steps=50):
    """Return the least squares on the support and its objective; sparse if that is no better.

    To stop after so many steps damps it.
    """
    scale = _scale(gram)
    residual = (target - sparse) @ gram / scale * mask
    unit = gram / scale / scale[:, None]
    correction = _conjugate_gradients(residual, mask, unit, steps=steps)
    solved = sparse + correction / scale
    after = _objective(target - solved, gram)
    return (solved, after) if after < value else (sparse, value)


def _conjugate_gradients(residual, mask, gram, *, steps):
    """Return what, added to x, brings residual = (target - x) gram to zero on mask.

    It minimises each row's quadratic, all rows at once. residual [m, n] is zero outside mask, gram
    has a unit diagonal.
    """
    correction = torch.zeros_like(residual)
    direction = residual
    # Curvature, for a direction of length 1, that rounding alone can make: none was shown by any
    # token.
    largest = gram.abs().sum(1).max()
    flat = 16 * torch.finfo(gram.dtype).eps * largest
    square = _squared_lengths(residual)
    size = square  # squared length of each row's direction
    is_going = square > 0
    for _ in range(steps):
        product = (direction @ gram).mul_(mask)
        curvature = torch.linalg.vecdot(direction, product)[:, None]
        # A row is done where its direction has no curvature beyond rounding: a step along it would
        # be endless.
        is_going = is_going & (curvature > flat * size)
        length = torch.where(is_going, square / curvature.clamp_min(TINY), 0)
        correction.addcmul_(length, direction)
        residual = torch.addcmul(residual, length, product, value=-1)
        previous, square = square, _squared_lengths(residual)
        ahead = square / previous.clamp_min(TINY)
        direction = torch.addcmul(residual, ahead, direction)
        size = square + ahead.square() * size
    return correction


def _squared_lengths(rows):
    """Return the squared length of each row, [m, 1]."""
    return torch.linalg.vecdot(rows, rows)[:, None]


# -- A given support


def obs_update(weight, gram, mask):
    """Return weight cut to mask by SparseGPT's update, column by column.

    Each column takes up what it can of those before.

    Frantar and Alistarh (2023): w_j goes, the columns after j adapt (Optimal Brain Surgeon), column
    j is then frozen. It is exact, as `refit`, where all that goes comes first. In general it is
    better than plain masking, but no bound holds. An early column may be moved to where a later cut
    costs more. `refit` with this as start is never worse.

    weight: W [m, n].
    gram: [n, n] of activations, with an inverse: see `damped`.
    mask: [m, n] bool, False for what goes.

    Raises ValueError for wrong shapes, a mask that keeps nothing, a gram without inverse.
    """
    double, gram, mask = _checked_support(weight, gram, mask)
    # gram = R R^T, R upper triangular: by a lower triangular factor of the flipped one.
    root, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
    if failed:
        raise ValueError(
            "gram has no inverse, as some inputs are zero or follow from others: see lowrank.damped"
        )
    root = root.flip(0, 1)
    # The objective is the squared length of D R, D = W - A. Its column j holds the columns of D up
    # to j only, and entries that stay are chosen to make it zero: one product a column.
    change = double * ~mask
    for j in range(len(gram)):
        column = root[:j, j]
        carried = change[:, :j] @ column / root[j, j]
        change[:, j] = torch.where(mask[:, j], -carried, change[:, j])
    return (double - change).to(weight.dtype)


def refit(weight, gram, mask, *, start=None, steps=50):
    """Return the matrix with the least objective: least squares on each row's support.

    By conjugate gradients; no inverse of gram is needed.

    weight: W [m, n].
    gram: [n, n] of activations.
    mask: [m, n] bool, True for the support; the result is zero elsewhere.
    start: [m, n] to begin with, which the result is never worse than. None: weight, plainly masked.
    steps: at most so many; to stop early damps what few tokens showed.

    Raises ValueError for wrong shapes and a mask that keeps nothing.
    """
    double, gram, mask = _checked_support(weight, gram, mask)
    start = double if start is None else start.detach().to(double)
    if start.shape != weight.shape:
        raise ValueError(f"start must be {list(weight.shape)}, as weight; got {list(start.shape)}")
    sparse = start * mask
    before = _objective(double - sparse, gram)
    solved, _ = _debiased(double, sparse, mask, gram, before, steps=steps)
    return solved.to(weight.dtype)


# -- Low rank plus sparse


def low_rank_plus_sparse(weight, gram, rank, count, *, support="entries", rounds=20):
    """Fit low rank plus sparse, in turns.

    L = whitened SVD_r(W - S), S = a step of iterative thresholding for W - L.

    As GoDec (Zhou and Tao 2011) and OATS (Zhang and Papyan 2025), but with all of gram where OATS
    has its diagonal. Thresholding alone is no projection then, so S moves by steps of `iht`.

    weight: W [m, n].
    gram: [n, n] of activations.
    rank: at least 1.
    count: at least 1, see `iht`.
    support: see `iht`.
    rounds: at most so many.

    Returns a Fit. Its objectives begin with those of the half that came first, either magnitude
    pruning and `iht` or the whitened SVD.
    Raises ValueError as `iht` and `svd` do.
    """
    _check_rank(weight, rank)
    double, gram = _checked(weight, gram, without="magnitude pruning: project")
    problem = gram, count, support
    roots = _root(double, gram)
    # Which half comes first decides where this ends: try both and keep the better one.
    sparse_first = _iht(double, *problem, tolerance=1e-3, rank=rank)
    u, v = _truncate(double, rank, gram, roots)
    rest = double - u @ v
    mask = _support_mask(rest.square(), count, support)
    history = [_objective(rest, gram)]
    rank_first = Fit(u, v, torch.zeros_like(rest), mask, history)
    starts = _pursue(double, rank_first, *problem), sparse_first
    # Where nothing is left to lose, an objective may rise by so much from rounding.
    rounding = 1e-12 * sparse_first.objectives[0]
    fits = [_alternate(double, fit, problem, roots, rounds, rounding) for fit in starts]
    best = min(fits, key=lambda fit: fit.objectives[-1])
    return best.to(weight.dtype)


def _alternate(weight, fit, problem, roots, rounds, rounding):
    """Return fit after turns of low rank and sparse, until a round gains less than a thousandth.

    problem: gram, count and support. roots: as from _root. rounding: of an objective.
    """
    gram, *_ = problem
    for _ in range(rounds):
        before = fit.objectives[-1]
        rest = weight - fit.sparse
        u, v = _truncate(rest, len(fit.v), gram, roots)
        value = _objective(rest - u @ v, gram)
        # A half-step that would raise the objective is not taken.
        if value <= before + rounding:
            history = [*fit.objectives, min(value, before)]
            fit = replace(fit, u=u, v=v, objectives=history)
        fit = _pursue(weight, fit, *problem)
        if fit.objectives[-1] > (1 - 1e-3) * before:
            break
    return _finished(weight, fit, gram)


# -- Checks


def _checked(weight, gram, *, without=None):
    """Return weight and gram as float64, or raise ValueError for what no layer has.

    without: what a fit would be without a gram, if it needs one.
    """
    # In double precision no sum of finite values overflows.
    if weight.ndim != 2 or not weight.sum(dtype=torch.float64).isfinite():
        raise ValueError(
            f"weight must be a matrix [m, n] without NaN and inf; got one of {list(weight.shape)}"
        )
    double = weight.detach().double()
    if gram is None:
        if without:
            raise ValueError(f"this fit needs a gram of activations; without, it is {without}")
        return double, None
    n = weight.shape[1]
    if gram.shape != (n, n):
        raise ValueError(
            f"gram must be [{n}, {n}] for a weight {list(weight.shape)}; got {list(gram.shape)}"
        )
    if not gram.isfinite().all():
        raise ValueError("gram has NaN or inf in it: the activations it was made from had, too")
    return double, gram.detach().to(double)


def _check_rank(weight, rank):
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"rank of a {list(weight.shape)} matrix is in [1, {min(weight.shape)}]; got {rank}"
        )


def _checked_support(weight, gram, mask):
    """Return weight and gram as float64 and mask on their device, or raise ValueError."""
    double, gram = _checked(weight, gram, without="weight * mask")
    fits = mask.dtype == torch.bool and mask.shape == weight.shape
    if not fits or not mask.any():
        raise ValueError(
            f"mask must be bool {list(weight.shape)} and keep something; got one of {mask.dtype} "
            f"{list(mask.shape)} that keeps {mask.count_nonzero()}"
        )
    return double, gram, mask.to(weight.device)
