"""Store tensors without their zeros: a bit for each entry, and the entries that are not zero.

This module knows tensors only.

Public: BITS, bits_to_mask, mask_to_bits, pack, unpack.
"""

import math

import numpy as np
import torch

# A tensor NAME is stored as two tensors. With 90 % zeros a float32 tensor takes 13 % of its bytes.
# NAME:bits is uint8, eight entries a byte in order of memory, the first entry in the highest bit
# (numpy.packbits).
BITS = ":bits"
_VALUES = ":values"  # NAME:values are the entries whose bit is set; bool tensors have bits alone
_OVERHEAD = 160  # bytes that two more tensors take in the header of a safetensors file


def pack(tensors, masks=None):
    """Return tensors as they are to be stored, packed where that makes them smaller.

    tensors: {name: tensor}, on the CPU
    masks: {name: bool tensor}; where a tensor is zero outside its mask, its bits are the mask
    Returns ({name: tensor} to store, {name: shape} of the tensors that were packed).
    """
    masks = masks or {}
    stored = {}
    shapes = {}
    for name, tensor in tensors.items():
        bits = tensor != 0
        # The bits say where the tensor is not zero. Where it is zero outside its mask they are the
        # mask, so that `bits_to_mask` gives the mask back, too.
        if name in masks:
            mask = masks[name].cpu()
            if not (bits & ~mask).any():
                bits = mask
        parts = {name + BITS: mask_to_bits(bits)}
        if tensor.dtype != torch.bool:
            parts[name + _VALUES] = tensor[bits]
        if _OVERHEAD + sum(part.nbytes for part in parts.values()) < tensor.nbytes:
            stored |= parts
            shapes[name] = list(tensor.shape)
        else:
            stored[name] = tensor
    return stored, shapes


def unpack(stored, shapes):
    """Return the tensors that `pack` was called with; negative zeros come back as zeros.

    stored, shapes: the two results of `pack`
    Returns {name: tensor}.
    Raises ValueError, with the name, where bits, values and shape do not belong together.
    """
    tensors = {name: t for name, t in stored.items() if not name.endswith((BITS, _VALUES))}
    for name, shape in shapes.items():
        if name + BITS not in stored:
            raise ValueError(f"{name} should be packed, and there is no {name + BITS}")
        tensors[name] = mask = bits_to_mask(stored[name + BITS], shape, name)
        values = stored.get(name + _VALUES)
        if values is None:  # a bool tensor, which is its bits
            continue
        if len(values) != mask.count_nonzero():
            raise ValueError(f"{name} has {len(values)} values for {mask.count_nonzero()} entries")
        tensors[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(mask, values)
    return tensors


def mask_to_bits(mask):
    """Return the bits of a bool tensor of n entries, uint8 [ceil(n / 8)]."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def bits_to_mask(bits, shape, name="mask"):
    """Return the bool tensor that has these bits.

    bits: uint8 [ceil(n / 8)], as from `mask_to_bits`
    shape: shape of the tensor, of n entries
    name: what an error calls the tensor
    Raises ValueError, with the name, for too few or too many bits.
    """
    count = math.prod(shape)
    size = math.ceil(count / 8)
    if bits.dtype != torch.uint8 or bits.shape != (size,):
        raise ValueError(
            f"{name} of shape {list(shape)} needs {size} bytes of bits; got {len(bits)}"
        )
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).view(bool)).view(*shape)
