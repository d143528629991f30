"""What vLLM's workers run for us; imported by them, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Weights:
    """Mixed into the worker, whose attributes these methods use."""

    def latentrevise_load(self, named: list[tuple[str, Tensor]] | None, folder: str | None) -> None:
        """Replace the model's weights: from tensors named as in a checkpoint, or from a folder of safetensors."""
        config = self.model_runner.vllm_config.model_config  # type: ignore[attr-defined]
        origin = config.model, config.model_weights, config.revision
        try:
            if named is not None:
                self.reload_weights(weights_iterator=iter(named))  # type: ignore[attr-defined]
            else:
                self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]
        finally:
            config.model, config.model_weights, config.revision = origin
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        head: Any = getattr(model, "lm_head", None)
        # On a CPU the head keeps a repacked copy of its weight. A tied head gets no weight of its own from a
        # checkpoint, so nothing renews that copy.
        if getattr(model.config, "tie_word_embeddings", False) and hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)


class KnownTokens(LogitsProcessor):
    """Keeps ids that the tokenizer cannot decode (padding rows of the table) from being sampled."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._known = vllm_config.additional_config["latentrevise_known_tokens"]

    def apply(self, logits: Tensor) -> Tensor:
        logits[:, self._known :] = -torch.inf
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: object) -> None:
        """The same for every request."""
