"""Tensors without their zeros, as they are stored: one bit an entry, and the values of those that stay. Tensors only.

NAME becomes NAME:bits, uint8, eight entries a byte in order of memory, first entry highest (numpy.packbits), and
NAME:values, the entries whose bit is set. Bool tensors are bits alone. 90 % zeros of float32 take 13 % of the bytes.
"""

import math

import numpy as np
import torch

OVERHEAD = 160  # bytes that two more tensors take in the header of a safetensors file
BITS, VALUES = ":bits", ":values"


def pack(tensors, masks=None):
    """tensors ({name: tensor}, on the CPU) as they are to be stored, and {name: shape} of those that were packed.

    Packed is what becomes smaller. masks: {name: bool tensor}; where a tensor is zero outside its mask, bits are the
    mask, so that `to_mask` brings it back, too; otherwise bits are where a tensor is not zero.
    """
    stored, shapes, masks = {}, {}, masks or {}
    for name, tensor in tensors.items():
        bits = tensor != 0
        if name in masks and not (bits & ~masks[name].cpu()).any():
            bits = masks[name].cpu()
        values = None if tensor.dtype == torch.bool else tensor[bits]
        size = (
            OVERHEAD + math.ceil(bits.numel() / 8) + (0 if values is None else values.numel() * values.element_size())
        )
        if size >= tensor.numel() * tensor.element_size():
            stored[name] = tensor
            continue
        stored[name + BITS] = from_mask(bits)
        if values is not None:
            stored[name + VALUES] = values
        shapes[name] = list(tensor.shape)
    return stored, shapes


def unpack(stored, shapes):
    """What `pack` was given, from what it returned; negative zeros come back as zeros.

    Raises ValueError, with the name, where bits, values and shape do not belong together.
    """
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith((BITS, VALUES))}
    for name, shape in shapes.items():
        if name + BITS not in stored:
            raise ValueError(f"{name} should be packed, and there is no {name + BITS}")
        mask, values = to_mask(stored[name + BITS], shape, name), stored.get(name + VALUES)
        if values is None:
            tensors[name] = mask
            continue
        if len(values) != mask.count_nonzero():
            raise ValueError(f"{name} has {len(values)} values for {mask.count_nonzero()} entries")
        tensors[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(mask, values)
    return tensors


def from_mask(mask):
    """The bits of a bool tensor, uint8 [ceil(n / 8)]."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def to_mask(bits, shape, name="mask"):
    """The bool tensor of that shape whose bits these are. Raises ValueError, with the name, for too few or too many."""
    count = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (math.ceil(count / 8),):
        raise ValueError(f"{name} of shape {list(shape)} needs {math.ceil(count / 8)} bytes of bits; got {len(bits)}")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).view(bool)).view(*shape)
