"""What a result was made with: versions and code for the set, the machine for the report."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import distill

_PACKAGES = ("torch", "torchvision", "kornia", "numpy", "scipy", "h5py", "scikit-learn", "POT", "numba")


def versions() -> dict[str, str]:
    """Versions of this package and of those that decide results; the same on every machine with the same install."""
    found = {"distill": distill.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def code_revision() -> str:
    """The git commit of a checkout, marked where files differ from it; the released version of an installed wheel."""
    folder = Path(distill.__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", str(folder))
        tracked = _git(folder, "ls-files", "--", "__init__.py")
    except (OSError, subprocess.SubprocessError):
        return f"release {distill.__version__}"
    if not tracked:  # installed into some other project's checkout
        return f"release {distill.__version__}"
    return f"{commit} with changes" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def machine(device: torch.device) -> dict[str, Any]:
    """Where and when: for report.json, never for the set."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": device_name(device),
        "code": code_revision(),
        "versions": versions(),
    }


def device_name(device: torch.device) -> str:
    """What computes: the GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
