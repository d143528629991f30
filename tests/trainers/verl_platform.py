"""A CPU as a platform of verl, by VERL_PLATFORM=cpu and VERL_USE_EXTERNAL_MODULES=tests.trainers.verl_platform."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


def nothing(*_: Any, **__: Any) -> None:
    """For what a CPU does not have."""


@PlatformRegistry.register(platform="cpu")
class CPU(PlatformBase):
    """Named by VERL_PLATFORM=cpu."""

    device_name = vendor_name = "cpu"
    device_module = SimpleNamespace(
        **dict.fromkeys(("empty_cache", "synchronize", "set_device", "reset_peak_memory_stats"), nothing),
        **{name: lambda *_: 0 for name in ("memory_allocated", "memory_reserved", "max_memory_allocated")},
        max_memory_reserved=lambda *_: 0,
        mem_get_info=lambda *_: (0, 1),
        is_available=lambda: False,
        current_device=lambda: "cpu",
        get_device_name=lambda *_: "CPU",
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
    )
    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = nothing

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> Any:
        return contextlib.nullcontext()

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False
