"""One matrix made low rank (truncated and activation-whitened SVD), sparse (iterative hard thresholding, Optimal Brain
Surgeon) or both.

Every fit serves one layer y = W x, W [m, n], and is judged by what its output loses on the inputs seen,
    objective(W, A, H) = tr[(W - A) H (W - A)^T],   H = gram [n, n] = mean of x x^T over tokens
(H = None: the identity, the plain squared error). Tensors only; sums are float64, results have W's dtype.
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import masks

TINY = 1e-37  # stands for zero in a divisor, in float32, too


@dataclass(frozen=True)
class Fit:
    """What a fit found: W is about u v + sparse, with sparse zero outside mask.

    u [m, r], v [r, n], sparse [m, n], mask [m, n] bool. start: objective of magnitude pruning with the same
    count and support; objectives: history, never rising; the last one is the result's.
    """

    u: Tensor
    v: Tensor
    sparse: Tensor
    mask: Tensor
    start: float
    objectives: list

    @property
    def weight(self):
        return self.u @ self.v + self.sparse


def objective(weight, approximation, gram=None):
    """tr[(W - A) H (W - A)^T] for W, A [m, n] and H = gram [n, n] (None: identity), a float."""
    weight, gram = _checked(weight, gram)
    return _objective(weight - approximation.double(), gram)


def break_even_rank(m, n):
    """Rank below which two thin layers execute fewer MACs than one dense [m, n] layer: m n / (m + n), a float."""
    return m * n / (m + n)


def rank_for(m, n, share, *, multiple=8):
    """Largest rank whose r (m + n) MACs stay within share of m n; rounded down to a multiple, unless below one.

    share: of the dense MACs, in [0, 1]. Returns an int below the break-even rank, 0 if the share allows none.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is a share of the dense MACs in [0, 1], not a percentage; got {share}")
    rank = min(int(share * m * n / (m + n) + 1e-9), (m * n - 1) // (m + n))
    return rank - rank % multiple if rank >= multiple else rank


def svd(weight, rank, *, gram=None):
    """Factors u [m, rank] and v [rank, n] of the best approximation of that rank, equal norms in u and v.

    Without gram the truncated SVD (Eckart and Young 1936), sqrt(sigma) on either side. With gram = S S^T the
    SVD of W S, cut and multiplied by S^-1 (SVD-LLM, Wang et al. 2024; S by eigendecomposition), for which
    objective(W, u v, gram) is the sum of the squared singular values that were cut.
    By eigendecomposition of the smaller Gram matrix, several times faster than torch.linalg.svd.
    Raises ValueError for a rank outside [1, min(m, n)], wrong shapes and values that are not finite.
    """
    _check_rank(weight, rank)
    double, gram = _checked(weight, gram)
    single = gram is None and weight.dtype != torch.float64
    u, v = _truncate(double, rank, gram, _root(double, gram), single=single)
    return u.to(weight.dtype), v.to(weight.dtype)


def spectrum(weight, gram=None):
    """Singular values [min(m, n)] of W S, falling, float64; gram = S S^T, None for those of W.

    The sum of the squares from one on is what `svd` of that rank loses: objective(W, u v, gram).
    """
    weight, gram = _checked(weight, gram)
    seen = weight if gram is None else weight @ gram
    square = seen @ weight.T if len(weight) <= weight.shape[1] else None
    if square is None:
        root = _root(weight, gram)
        seen = weight if root is None else weight @ root[0]
        square = seen.T @ seen
    return torch.linalg.eigvalsh(square).flip(0).clamp_min(0).sqrt()


def neighbours(support):
    """(n, m) of a support "n:m", n of each m neighbours along a row; None for any other word."""
    found = re.fullmatch(r"(\d+):(\d+)", support)
    return found and (int(found[1]), int(found[2]))


def support_mask(score, count, *, support="entries"):
    """Mask [m, n] of the count entries, rows or columns whose score [m, n], summed, is largest.

    support "2:4", or other such numbers: the 2 largest of each 4 neighbours along a row, and count is what that makes
    of all entries. The count is exact: among equals the first in memory goes first. Raises ValueError for an unknown
    support and a count beyond what there is.
    """
    if pattern := neighbours(support):
        mask = masks.n_of_m(score, *pattern)
        if count != mask.sum():
            raise ValueError(f"{support} of a {list(score.shape)} matrix is a count of {int(mask.sum())}; got {count}")
        return mask
    sums = {"entries": torch.flatten, "rows": lambda x: x.sum(1), "columns": lambda x: x.sum(0)}
    if support not in sums:
        raise ValueError(f"unknown support {support!r}; supports are {', '.join(sums)} and patterns such as 2:4")
    total = sums[support](score)
    if not 0 <= count <= len(total):
        raise ValueError(f"count of {support} in a {list(score.shape)} matrix is in [0, {len(total)}]; got {count}")
    keep = masks.drop_in_rows(total[None], len(total) - count)[0]
    shape = {"entries": score.shape, "rows": (-1, 1), "columns": (1, -1)}[support]
    return keep.view(shape).expand_as(score).clone()


def project(weight, count, *, support="entries"):
    """weight with only its count largest entries, or rows or columns of largest norm: magnitude pruning."""
    weight_, _ = _checked(weight, None)
    return weight * support_mask(weight_.square(), count, support=support)


def iht(weight, gram, count, *, support="entries", steps=30, tolerance=1e-4):
    """A matrix with only count entries, rows, columns or a pattern, by iterative hard thresholding from activations.

    A = P_k(W), magnitude pruning; then A <- P_k(A + mu G), G = (W - A) gram (Blumensath and Davies 2009), and the
    values on the support then solved for by conjugate gradients (hard thresholding pursuit, Foucart 2011). It works in
    coordinates in which gram has a unit diagonal: P_k ranks by |w| norm(x) there, and the largest inputs do not hold
    back mu. mu is halved, from 8 in the first step, until the objective falls. Normalised IHT (2010) begins with mu =
    ||G||^2 / tr(G gram G^T), G on the support: much smaller here, so that steps exchange few entries. Whole rows do
    not interact, so their best support is known at once: the rows with most output energy.

    count, support: as for support_mask, at least 1. steps: at most so many. tolerance: stops when a step gains
    a smaller share of the objective. Returns a Fit with empty u and v, whose objectives begin with magnitude
    pruning. Its end lies below that unless magnitude pruning is a fixed point, as it is for a gram like the
    identity.
    """
    _check_sparse(weight, gram, count, support)
    double, gram = _checked(weight, gram)
    fit = _iht(double, gram, count, support=support, steps=steps, tolerance=tolerance)
    return _as(weight.dtype, fit)


def obs_mask(weight, gram, count):
    """Mask [m, n] of the count entries whose loss costs the output most, by Optimal Brain Surgeon, exact count.

    One entry w_ij alone, its row adapting, costs w_ij^2 / [gram^-1]_jj of the objective (Hassibi and Stork 1993): all
    are ranked at once. SparseGPT (Frantar and Alistarh 2023) ranks block by block of columns, updating between.
    Raises ValueError for a gram without inverse (see `damped`), a count below 1 or beyond the entries.
    """
    _check_sparse(weight, gram, count, "entries")
    double, gram = _checked(weight, gram)
    cost = double.square() / torch.cholesky_inverse(_cholesky(gram)).diagonal()
    return support_mask(cost, count)


def obs_update(weight, gram, mask):
    """weight cut to mask [m, n], columns in order, each taking up what it can of those before: SparseGPT's update.

    Frantar and Alistarh (2023): w_j goes, the columns after j adapt (Optimal Brain Surgeon), column j is then frozen.
    Here in one product a column: with gram = R R^T, R upper triangular, the objective is the squared length of D R,
    D = W - A, whose column j holds D's columns up to j only; entries that stay are chosen to make it zero.
    Exact, as `refit`, where all that goes comes first. In general better than plain masking, but no bound holds: an
    early column may be moved to where a later cut costs more. `refit` with this as start is never worse.
    Raises ValueError for wrong shapes, a mask that keeps nothing, a gram without inverse (see `damped`).
    """
    double, gram, mask = _checked_support(weight, gram, mask)
    root = _cholesky(gram.flip(0, 1)).flip(0, 1)
    change = double * ~mask
    for j in range(len(gram)):
        carried = change[:, :j] @ root[:j, j] / root[j, j]
        change[:, j] = torch.where(mask[:, j], -carried, change[:, j])
    return (double - change).to(weight.dtype)


def refit(weight, gram, mask, *, start=None, steps=50):
    """The matrix, zero outside mask [m, n], with the least objective: each row's least squares on its support.

    By conjugate gradients from start [m, n] (None: weight, plainly masked), which the result is never worse than;
    stopping after so many steps damps what few tokens showed. No inverse of gram is needed.
    Raises ValueError for wrong shapes and a mask that keeps nothing.
    """
    double, gram, mask = _checked_support(weight, gram, mask)
    if start is not None and start.shape != weight.shape:
        raise ValueError(f"start must be {list(weight.shape)}, as weight; got {list(start.shape)}")
    sparse = (double if start is None else start.detach().to(double)) * mask
    before = _objective(double - sparse, gram)
    return _debiased(double, sparse, mask, gram, before, steps=steps)[0].to(weight.dtype)


def low_rank_plus_sparse(weight, gram, rank, count, *, support="entries", rounds=20, tolerance=1e-3):
    """Low rank plus sparse, in turns: L = whitened SVD_r(W - S), S = a step of iterative thresholding for W - L.

    As GoDec (Zhou and Tao 2011) and OATS (Zhang and Papyan 2025), but with all of gram where OATS has its
    diagonal; thresholding alone is no projection then, so S moves by steps of `iht`. A half-step that would
    raise the objective is not taken. Which half comes first decides where this ends: both are tried and the
    better one kept.

    rank and count: at least 1 each; count and support as for support_mask. rounds: at most so many. tolerance:
    stops when a round gains a smaller share of the objective. Returns a Fit; objectives begin with those of
    the half that came first, either magnitude pruning and `iht` or the whitened SVD.
    """
    _check_sparse(weight, gram, count, support)
    _check_rank(weight, rank)
    double, gram = _checked(weight, gram)
    options = {"count": count, "support": support, "tolerance": tolerance}
    sparse_first = _iht(double, gram, steps=30, **options)
    root = _root(double, gram)
    u, v = _truncate(double, rank, gram, root)
    rest = double - u @ v
    mask = support_mask(rest.square(), count, support=support)
    rank_first = Fit(u, v, torch.zeros_like(rest), mask, sparse_first.start, [_objective(rest, gram)])
    sparse_first = replace(sparse_first, u=torch.zeros_like(u), v=torch.zeros_like(v))
    starts = (_sparse_step(double, rank_first, gram, **options), sparse_first)
    fits = [_alternate(double, fit, gram, root=root, rank=rank, rounds=rounds, **options) for fit in starts]
    return _as(weight.dtype, min(fits, key=lambda fit: fit.objectives[-1]))


def threshold_product(weight, rank, count):
    """The count largest entries of the truncated SVD's product [m, n]: a baseline seen in the wild.

    The result has no low rank any more and is no better a sparse matrix for it: dense cost, two losses.
    """
    u, v = svd(weight, rank)
    return project(u @ v, count)


def damped(gram, damping=1e-3):
    """gram [n, n] plus damping times the mean of its diagonal on the diagonal, float64.

    For directions that few tokens showed: 1e-3 costs nothing with many tokens and helps with few.
    """
    gram = gram.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def regression(gram, columns):
    """transfer [n, k], float64, with which x is nearest to transfer x[columns]; gram [n, n] = mean of x x^T.

    Least squares, so gram must have an inverse: see `damped`. The columns kept are themselves, exactly.
    """
    gram, columns = gram.double(), torch.as_tensor(columns, device=gram.device)
    transfer = torch.linalg.solve(gram[columns][:, columns], gram[columns]).T.contiguous()
    transfer[columns] = torch.eye(len(columns), dtype=gram.dtype, device=gram.device)
    return transfer


def _checked(weight, gram):
    """weight and gram as float64, or ValueError for shapes and values that no layer has."""
    if weight.ndim != 2 or not weight.sum(dtype=torch.float64).isfinite():  # in double precision no sum overflows
        raise ValueError(f"weight must be a matrix [m, n] without NaN and inf; got one of {list(weight.shape)}")
    n = weight.shape[1]
    if gram is None:
        return weight.detach().double(), None
    if gram.shape != (n, n):
        raise ValueError(f"gram must be [{n}, {n}] for a weight {list(weight.shape)}; got {list(gram.shape)}")
    if not gram.isfinite().all():
        raise ValueError("gram has NaN or inf in it: the activations it was made from had, too")
    return weight.detach().double(), gram.detach().to(weight.device, torch.float64)


def _check_sparse(weight, gram, count, support):
    if gram is None:
        raise ValueError("thresholding needs a gram of activations; without, it is magnitude pruning: project")
    if count < 1:
        raise ValueError(f"count must be at least 1 of the {support} of {list(weight.shape)}; got {count}")


def _checked_support(weight, gram, mask):
    """weight and gram as float64 and mask on their device, or ValueError for what makes no fixed support."""
    if gram is None:
        raise ValueError("weights that stay take over by a gram of activations; without, it is weight * mask")
    if mask.dtype != torch.bool or mask.shape != weight.shape or not mask.any():
        given = f"one of {mask.dtype} {list(mask.shape)} that keeps {mask.count_nonzero()}"
        raise ValueError(f"mask must be bool {list(weight.shape)} and keep something; got {given}")
    return *_checked(weight, gram), mask.to(weight.device)


def _cholesky(gram):
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise ValueError("gram has no inverse, as some inputs are zero or follow from others: see lowrank.damped")
    return factor


def _check_rank(weight, rank):
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank of a {list(weight.shape)} matrix is in [1, {min(weight.shape)}]; got {rank}")


def _as(dtype, fit):
    return replace(fit, u=fit.u.to(dtype), v=fit.v.to(dtype), sparse=fit.sparse.to(dtype))


def _objective(residual, gram, seen=None):
    """tr[R H R^T]; seen: R H, if it is known. Where rounding makes it negative, how far rounding reaches."""
    if gram is None:
        return residual.square().sum().item()
    value = ((residual @ gram if seen is None else seen) * residual).sum().item()
    if value >= 0:
        return value
    size = residual.abs()  # not 0: of a residual that is huge where gram is zero, that would say that all is well
    return torch.finfo(gram.dtype).eps * len(gram) * (size @ gram.abs() * size).sum().item()


def _root(weight, gram, damping=1e-9):
    """S and S^-T with S S^T = gram, damped so that directions never seen have an inverse; None if not needed."""
    if gram is None or len(weight) <= weight.shape[1]:
        return None
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(damping * values[-1].item() or 1.0)
    return vectors * values.sqrt(), vectors / values.sqrt()


def _truncate(weight, rank, gram, root, *, single=False):
    """u, v of the best approximation of that rank in the norm of gram, by the leading singular vectors of W S.

    single: vectors in single precision will do.
    """
    if len(weight) <= weight.shape[1]:  # left vectors: no inverse of S is needed
        seen = weight if gram is None else weight @ gram
        left = _leading(seen @ weight.T, rank, single)
        u, v = left, left.T @ weight
    else:
        seen = weight if root is None else weight @ root[0]
        right = _leading(seen.T @ seen, rank, single)
        u, v = seen @ right, right.T if root is None else right.T @ root[1].T
    ratio = (v.norm(dim=1) / u.norm(dim=0).clamp_min(1e-150)).clamp_min(1e-150).sqrt()
    return (u * ratio).flip(1), (v / ratio[:, None]).flip(0)  # largest first


def _leading(square, rank, single):
    """Eigenvectors [n, rank] of the largest eigenvalues of a symmetric matrix, rising.

    In single precision, in half the time, if asked and if what is cut outweighs the largest eigenvalue: what vectors
    lose by rounding is of second order then, within 1e-6 of what is cut.
    """
    if single:
        values, vectors = torch.linalg.eigh((square / square.diagonal().mean().clamp_min(1e-300)).float())
        if values[:-rank].sum() > values[-1]:
            return vectors[:, -rank:].double()
    return torch.linalg.eigh(square).eigenvectors[:, -rank:]


def _iht(weight, gram, count, *, support, steps, tolerance):
    mask = support_mask(weight.square(), count, support=support)
    start = _objective(weight - weight * mask, gram)
    sparse, value = _debiased(weight, weight * mask, mask, gram, start)
    options = {"count": count, "support": support, "steps": steps, "tolerance": tolerance}
    sparse, mask, history = _pursue(weight, sparse, mask, gram, **options)
    sparse, value = _debiased(weight, sparse, mask, gram, history[-1])
    empty = weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1])
    return Fit(*empty, sparse, mask, start, [start, *history, value])


def _alternate(weight, fit, gram, *, root, rank, rounds, tolerance, **options):
    """Turns of low rank and sparse from fit, until a round gains less than tolerance."""
    for _ in range(rounds):
        before = fit.objectives[-1]
        u, v = _truncate(weight - fit.sparse, rank, gram, root)
        value = _objective(weight - fit.sparse - u @ v, gram)
        if value <= before + 1e-12 * fit.start:  # up to rounding, where nothing is left to lose
            fit = replace(fit, u=u, v=v, objectives=[*fit.objectives, min(value, before)])
        fit = _sparse_step(weight, fit, gram, tolerance=tolerance, **options)
        if fit.objectives[-1] > (1 - tolerance) * before:
            break
    sparse, value = _debiased(weight - fit.u @ fit.v, fit.sparse, fit.mask, gram, fit.objectives[-1])
    return replace(fit, sparse=sparse, objectives=[*fit.objectives, value])


def _sparse_step(weight, fit, gram, **options):
    target = weight - fit.u @ fit.v
    sparse, mask, values = _pursue(target, fit.sparse, fit.mask, gram, steps=1, **options)
    # values[0] is the last objective again, up to rounding in other coordinates
    falling = [value for value in values[1:] if value <= fit.objectives[-1]]
    return replace(fit, sparse=sparse, mask=mask, objectives=[*fit.objectives, *falling])


def _pursue(target, sparse, mask, gram, *, count, support, steps, tolerance):
    """Hard thresholding pursuit of target from sparse on mask. Returns sparse, mask and falling objectives."""
    if support == "rows":
        best = support_mask(target @ gram * target, count, support=support)  # output energy of each row
        history = [_objective(target - part, gram) for part in (sparse, target * best)]
        return (target * best, best, history) if history[1] <= history[0] else (sparse, mask, history[:1])
    scale = _scale(gram)
    target, x, gram = target * scale, sparse * scale, gram / scale / scale[:, None]
    gradient, single = (target - x) @ gram, gram.float()  # corrections need no double precision, their sums do
    history = [_objective(target - x, gram, gradient)]
    step, least = 8.0, 0.5 / gram.abs().sum(1).max().clamp_min(1).item()  # 0.5 / its largest eigenvalue, or less
    for _ in range(steps):
        while step > least:
            ahead = x + step * gradient
            new = support_mask(ahead.square(), count, support=support)
            y = torch.where(mask, x, ahead) * new
            y = y + _conjugate_gradients(((target - y) @ gram * new).float(), new, single, steps=10)
            slope = (target - y) @ gram
            value = _objective(target - y, gram, slope)
            if value < history[-1]:
                break
            step /= 2
        else:
            break
        x, mask, gradient = y, new, slope
        history.append(value)
        if value > (1 - tolerance) * history[-2]:
            break
    return x / scale, mask, history


def _scale(gram):
    """Root mean square of each input, [n]; inputs that were never on count as very small."""
    square = gram.diagonal()
    return square.clamp_min(1e-12 * square.mean().clamp_min(1e-300)).sqrt()


def _conjugate_gradients(residual, mask, gram, *, steps):
    """Correction, zero outside mask, that brings residual = (target - x) gram to zero on mask.

    Minimises each row's quadratic, all rows at once. residual [m, n] is zero outside mask, gram has a unit diagonal.
    A row is done where its direction has no curvature beyond rounding: a step along it would be endless.
    """
    correction, residual, direction, product = torch.zeros_like(residual), residual.clone(), residual, residual.clone()
    square, flat = torch.linalg.vecdot(residual, residual)[:, None], _flat(gram)
    size, going = square, square > 0  # size: squared length of each row's direction
    for _ in range(steps):
        torch.mm(direction, gram, out=product).mul_(mask)
        curvature = torch.linalg.vecdot(direction, product)[:, None]
        going = going & (curvature > flat * size)
        length = torch.where(going, square / curvature.clamp_min(TINY), 0)
        correction.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        previous, square = square, torch.linalg.vecdot(residual, residual)[:, None]
        ahead = square / previous.clamp_min(TINY)
        direction, size = torch.addcmul(residual, ahead, direction), square + ahead.square() * size
    return correction


def _flat(gram):
    """Curvature, for a direction of length 1, that rounding alone can make: none was shown by any token."""
    return 16 * torch.finfo(gram.dtype).eps * gram.abs().sum(1).max()


def _debiased(target, sparse, mask, gram, value, *, steps=50):
    """Least squares on the support, damped by stopping after so many steps; sparse and its objective, never worse."""
    scale = _scale(gram)
    residual = (target - sparse) @ gram / scale * mask
    solved = sparse + _conjugate_gradients(residual, mask, gram / scale / scale[:, None], steps=steps) / scale
    after = _objective(target - solved, gram)
    return (solved, after) if after < value else (sparse, value)
