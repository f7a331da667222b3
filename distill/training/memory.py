"""Memory of the process: how the allocator behaves, how much was used at most, and what running out is called."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from distill.errors import MemoryExhaustedError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = (1 << 31) - 1

# How torch's CPU allocator, CUDA, and cuDNN and cuBLAS (which wrap it in their own errors) say it.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of returning it to the system at once.

    By default every activation above 32 MiB (and, early on, above 128 KiB) is mapped and unmapped anew, and a
    training step on a CPU spends up to half of its time in page faults. Elsewhere than on glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


def reset_peak(device: torch.device) -> None:
    """Start measuring `peak_bytes` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not Linux, or not permitted: the peak is then that of the process's whole life
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Greatest memory since `reset_peak`: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def memory_errors(doing: str, *, fix: str) -> Iterator[None]:
    """Turn running out of memory into one error that names the option to turn (exit code 4)."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MemoryExhaustedError(f"out of memory while {doing}", fix=fix) from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        raise MemoryExhaustedError(f"out of memory while {doing}", fix=fix) from error
