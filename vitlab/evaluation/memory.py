"""Measure the memory of this process and of the device.

Public: own_memory_mb, peak_memory_mb, release_memory, reset_peak_memory.
"""

import ctypes
import math
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch


def reset_peak_memory():
    """Forget the peaks of memory so far, so that `peak_memory_mb` tells only what follows."""
    # This works on Linux and on GPUs. Elsewhere a peak includes all that came before.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def release_memory():
    """Give freed memory back to the system, which glibc may keep otherwise."""
    with suppress(OSError, AttributeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def own_memory_mb(device, *, peak=False):
    """Return memory in use in MB (10^6 bytes), without files that are mapped into the process.

    device: a torch.device or its name
    peak: whether to return the most since `reset_peak_memory` instead of what is in use now
    Returns nan on a CPU without Linux's /proc.
    """
    if torch.device(device).type == "cuda":
        # On a GPU it is the memory of torch's tensors, on a CPU that of this process.
        allocated = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return allocated(device) / 1e6
    status = _process_status()
    if "RssFile" not in status:
        return math.nan
    # Mapped files are libraries and decoded images, which come in as they are touched. The files
    # that count are those mapped at the time of the call: a true peak is at least what is returned.
    resident = status["VmHWM" if peak else "VmRSS"]
    return (resident - status["RssFile"]) / 1e6


def peak_memory_mb(device):
    """Return the highest memory since `reset_peak_memory`, in MB (10^6 bytes).

    device: a torch.device or its name
    """
    if torch.device(device).type == "cuda":
        return own_memory_mb(device, peak=True)
    # On a CPU it is the resident memory of the whole process, with all that was imported and
    # loaded.
    # ru_maxrss would start from the peak of the process that started this one
    status = _process_status()
    if "VmHWM" in status:
        return status["VmHWM"] / 1e6
    import resource  # here, as Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _process_status():
    """Return {name: bytes} of /proc/self/status, {} on systems without it."""
    with suppress(OSError):
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        return {name: 1024 * int(size) for name, size in re.findall(r"(\w+):\s+(\d+) kB", text)}
    return {}
