"""The trainers' own code, on a CPU: `make test-adapters`, in an environment of its own."""

import importlib.machinery
import importlib.util
import os
import sys
import types
import typing
import warnings

import typing_extensions

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "tests.trainers.verl_platform",
    "TRANSFER_QUEUE_ENABLE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # or a busy machine starves them
    # What Ray would tell a worker's process.
    "WORLD_SIZE": "1",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def without_flash_attn() -> None:
    """OpenRLHF imports these for packed samples and ring attention alone, which need a GPU."""

    def gone(*_: object, **__: object) -> None:
        raise RuntimeError("flash_attn is for GPUs")

    names = {"bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"), "utils": ()}
    for name, members in ({"": ()} | names | {"utils.distributed": ("all_gather",)}).items():
        module = types.ModuleType(f"flash_attn.{name}".rstrip("."))
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        vars(module).update(dict.fromkeys(members, gone))
        sys.modules[module.__name__] = module


without_flash_attn()
# SkyRL hands TypedDicts to pydantic, which takes Python 3.12's, or these.
typing.TypedDict = typing_extensions.TypedDict
collect_ignore = []
if importlib.util.find_spec("vllm") is None:
    warnings.warn(
        "vLLM is not installed, and OpenRLHF imports it: its tests are left out (docs/engines.md)", stacklevel=1
    )
    collect_ignore.append("test_openrlhf.py")
