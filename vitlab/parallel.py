"""Train one model with several processes: what they share out, and what they must agree on.

torchrun starts the processes and tells each in its environment which one it is; accelerate joins
them. All run the same code on the same images and draws, a notebook too. Each takes its part of
every batch. The first process computes what must be the same everywhere and sends it to the others,
and it alone writes files. Without torchrun nothing here happens.

Public: broadcast_weights, first_decides, gather, is_first, join, mean, rank, shard,
wait_for_everyone, whole_batch_norms, world_size.
"""

import atexit
import contextlib
import functools
import os
import types
from datetime import timedelta

# torch and accelerate are imported where they are used: the command line starts without them.

_alone = False  # whether the first process computes something while the others wait


def rank():
    """Return the number of this process among those that torchrun started, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """Return how many processes train together."""
    return 1 if _alone else int(os.environ.get("WORLD_SIZE", 1))


def is_first():
    """Return whether this is the process that writes and speaks."""
    return rank() == 0


def join():
    """Meet the other processes at the first call and return accelerate's PartialState.

    It waits for them as long as it takes.
    """
    import torch
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    options = {}
    if world_size() > 1:
        # Without cpu=True accelerate 1.15 takes processes without a GPU for one each, and shares no
        # gradients.
        options = {"cpu": not torch.accelerator.is_available(), "timeout": timedelta(days=7)}
    state = PartialState(**options)
    if world_size() != state.num_processes and not _alone:
        # A notebook has asked accelerate for its device before, which then counted one process.
        AcceleratorState._reset_state(reset_partial_state=True)
        state = PartialState(**options)
    _leave_at_exit()
    return state


@functools.cache
def _leave_at_exit():
    """End what `join` began before Python ends.

    Threads of gloo that still run would abort the process, and torchrun would take all for failed.
    """
    from torch import distributed

    atexit.register(lambda: distributed.is_initialized() and distributed.destroy_process_group())


def wait_for_everyone():
    """Wait until all processes have come here: what the first wrote before is there then."""
    if world_size() > 1:
        join().wait_for_everyone()


def gather(value):
    """Return, in every process, the list of what each process gave, in their order.

    value: anything that pickle can send
    """
    if world_size() == 1:
        return [value]
    from accelerate.utils import gather_object, send_to_device

    join()
    return gather_object([send_to_device(value, "cpu")])


def broadcast_weights(model):
    """Give model the weights and buffers that it has in the first process, in place."""
    if world_size() > 1:
        from accelerate.utils import broadcast

        join()
        broadcast(model.state_dict())


def shard(tensors):
    """Return this process' share of each tensor: consecutive rows.

    tensors: sequence; the number of their rows must be a multiple of how many processes there are
    """
    if world_size() == 1:
        return tensors
    return tuple(tensor.chunk(world_size())[rank()] for tensor in tensors)


def mean(tensor):
    """Return tensor, averaged over the processes."""
    if world_size() == 1:
        return tensor
    from accelerate.utils import reduce

    join()
    return reduce(tensor)


def first_decides(function):
    """Let the first process alone compute function; the others wait for its result or error.

    Tensors in the result come on the device of the function's first model.

    This is for what chooses what is cut: the smallest difference, by rounding or by a clock, would
    give the processes different models.
    """

    @functools.wraps(function)
    def decided(*arguments, **options):
        if world_size() == 1:
            return function(*arguments, **options)
        from accelerate.utils import broadcast_object_list, find_device, send_to_device
        from torch.nn import Module

        message = [None, None]  # result and error
        if is_first():
            with _nobody_else():
                try:
                    message[0] = send_to_device(function(*arguments, **options), "cpu")
                except Exception as error:
                    message[1] = error
        join()
        result, error = broadcast_object_list(message)
        if error is not None:
            raise error
        models = [argument for argument in arguments if isinstance(argument, Module)]
        device = find_device([model.state_dict() for model in models])
        return send_to_device(result, device or "cpu")

    return decided


@contextlib.contextmanager
def _nobody_else():
    """Let the first process compute as if it were the only one."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


@contextlib.contextmanager
def whole_batch_norms(model):
    """Let batch norms (of stems) take their moments from the batch of all processes.

    torch's SyncBatchNorm does that on GPUs alone.
    """
    from torch import nn

    norms = []
    if world_size() > 1:
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.forward = types.MethodType(_whole_batch_norm, module)
    try:
        yield
    finally:
        for module in norms:
            del module.forward


def _whole_batch_norm(norm, x):
    """Normalise x [B, C, H, W], a part of a batch, by mean and biased variance over all parts."""
    import torch

    if not norm.training:
        return type(norm).forward(norm, x)
    mean_with_gradients = _mean_with_gradients()
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    batch_mean = mean_with_gradients(wide.mean((0, 2, 3)))
    centred = wide - batch_mean[:, None, None]
    variance = mean_with_gradients(centred.square().mean((0, 2, 3)))
    with torch.no_grad():
        total = world_size() * x.numel() / x.shape[1]
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(batch_mean, norm.momentum)
        norm.running_var.lerp_(variance * total / (total - 1), norm.momentum)  # unbiased
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return (centred * scale[:, None, None] + norm.bias[:, None, None]).to(x.dtype)


@functools.cache
def _mean_with_gradients():
    """Return `mean` as a function that gradients pass; it averages them, too."""
    import torch

    class Mean(torch.autograd.Function):
        @staticmethod
        def forward(context, tensor):
            return mean(tensor)

        @staticmethod
        def backward(context, gradient):
            return mean(gradient)

    return Mean.apply
