"""Several processes that train one model: which one this is, what they share out, and what they must agree on.

torchrun starts them and tells each in its environment which one it is; accelerate joins them. All run the same code on
the same images and draws, a notebook too: each takes its part of every batch, what must be the same everywhere is
computed by the first and sent to the others, and the first alone writes files. Without torchrun nothing here happens,
but for `in_turn`.
"""

import atexit
import contextlib
import functools
import os
import types
from datetime import timedelta

_alone = False  # inside what the first process does while the others wait


def rank():
    """Number of this process among those that torchrun started, from 0."""
    return int(os.environ.get("RANK", 0))


def count():
    """How many processes train together."""
    return 1 if _alone else int(os.environ.get("WORLD_SIZE", 1))


def is_first():
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def join():
    """Meet the other processes, at the first call; returns torch.distributed. Waits for them as long as it takes."""
    import torch
    from accelerate import PartialState

    # without cpu=True accelerate 1.15 takes processes without a GPU for one each, and shares no gradients
    PartialState(**({"timeout": timedelta(days=7), "cpu": not torch.accelerator.is_available()} if count() > 1 else {}))
    _leave_at_exit()
    return torch.distributed


@functools.cache
def _leave_at_exit():
    """End what `join` began before Python ends: gloo's threads that still run then abort the process, and torchrun
    takes all of them for failed."""
    import torch

    atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())


def wait():
    """Go on when all processes have come to this line: what the first wrote before is there then."""
    if count() > 1:
        join().barrier()


def gather(mine):
    """[what each process gave, in their order], in every process. mine: anything that pickle can send."""
    if count() == 1:
        return [mine]
    everyone = [None] * count()
    join().all_gather_object(everyone, _moved(mine, "cpu"))
    return everyone


def agree(model):
    """Give model in every process the weights and buffers that it has in the first, in place."""
    if count() > 1:
        for tensor in model.state_dict().values():
            join().broadcast(tensor, src=0)


def part(tensors):
    """This process' share of each tensor, consecutive rows. Their number must be a multiple of `count`."""
    if count() == 1:
        return tensors
    size = len(tensors[0]) // count()
    return tuple(tensor[rank() * size : (rank() + 1) * size] for tensor in tensors)


def mean(tensor):
    """tensor, averaged over the processes, in place."""
    if count() > 1:
        join().all_reduce(tensor)
        tensor /= count()
    return tensor


@contextlib.contextmanager
def in_turn(file):
    """Hold the lock of an open file, after whoever holds it now; the system frees it whatever happens to this process.
    Of any processes on this machine, not only those of torchrun."""
    if os.name == "posix":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    yield


def first_decides(function):
    """function, which the first process alone computes: the others wait for its result, or its error.

    For what chooses what is cut: the smallest difference, by rounding or by a clock, would give them other models.
    """

    @functools.wraps(function)
    def decided(*arguments, **options):
        if count() == 1:
            return function(*arguments, **options)
        import torch

        told = [None]
        if is_first():
            with _nobody_else():
                try:
                    told = [(_moved(function(*arguments, **options), "cpu"), None)]
                except Exception as error:
                    told = [(None, error)]
        join().broadcast_object_list(told, src=0)
        found, error = told[0]
        if error is not None:
            raise error
        devices = [each.device for each in arguments if torch.is_tensor(each)]
        models = [next(each.parameters()).device for each in arguments if isinstance(each, torch.nn.Module)]
        return _moved(found, [*models, *devices, "cpu"][0])

    return decided


@contextlib.contextmanager
def _nobody_else():
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def _moved(value, device):
    """value, a nest of dicts, lists and tuples, with its tensors on device."""
    if hasattr(value, "detach"):
        return value.detach().to(device)
    if isinstance(value, dict):
        return type(value)({key: _moved(each, device) for key, each in value.items()})
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_moved(each, device) for each in value)
    return value


@contextlib.contextmanager
def whole_batch_norms(model):
    """Inside, batch norms (of stems) take their moments from the batch of all processes, as one process would.

    torch's SyncBatchNorm does that on GPUs alone.
    """
    from torch import nn

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)] if count() > 1 else []
    for module in norms:
        module.forward = types.MethodType(_whole_batch_norm, module)
    try:
        yield
    finally:
        for module in norms:
            del module.forward


def _whole_batch_norm(norm, x):
    """Batch norm of x [B, C, H, W], this process' part of a batch, by mean and biased variance over all parts."""
    import torch

    if not norm.training:
        return type(norm).forward(norm, x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = _mean_with_gradients()(wide.mean((0, 2, 3)))
    centred = wide - mean[:, None, None]
    variance = _mean_with_gradients()(centred.square().mean((0, 2, 3)))
    with torch.no_grad():
        total = count() * x.numel() / x.shape[1]
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * total / (total - 1), norm.momentum)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return (centred * scale[:, None, None] + norm.bias[:, None, None]).to(x.dtype)


@functools.cache
def _mean_with_gradients():
    """`mean` of a copy, through which gradients go: of a mean over processes they are the mean of theirs."""
    import torch

    class Mean(torch.autograd.Function):
        @staticmethod
        def forward(context, tensor):
            return mean(tensor.clone())

        @staticmethod
        def backward(context, gradient):
            return mean(gradient.clone())

    return Mean.apply
