"""Which number format forward and backward passes run in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from distill.training.config import Precision


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of autocast regions: bfloat16 only where the processor multiplies it natively, if `auto`."""
    if precision == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    return torch.float32 if precision == "float32" else torch.bfloat16


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    # torch runs bfloat16 on any CPU by conversion, slower than float32; these two mean instructions for it.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """An autocast region for `dtype`, nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
