"""Engines that sample completions from token ids or from embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from latentrevise.engines.base import Completion, Engine, Progress, Request, SamplingParams
from latentrevise.engines.hf import HFEngine
from latentrevise.engines.vllm import VLLMEngine
from latentrevise.engines.vllm_setup import VLLMConfig, unavailable
from latentrevise.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Completion",
    "Engine",
    "HFEngine",
    "Progress",
    "Request",
    "SamplingParams",
    "VLLMConfig",
    "VLLMEngine",
    "engine_factory",
]


def engine_factory(name: str) -> Callable[[PreTrainedModel, PreTrainedTokenizerBase, VLLMConfig], Engine]:
    """What makes the engine ``hf`` or ``vllm`` (or of this class name: so it stands in a run's header).

    Raises ConfigError if there is no such engine, or if it cannot run here.
    """
    if name in ("hf", HFEngine.__name__):
        return lambda model, tokenizer, _: HFEngine(model, tokenizer)
    if name in ("vllm", VLLMEngine.__name__):
        if (why := unavailable()) is not None:
            raise ConfigError(f"engine vllm: {why}")
        return VLLMEngine
    raise ConfigError(f"engine {name!r}: there are hf (the model itself) and vllm")
