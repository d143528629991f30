"""Self-distillation with the gold answer as privileged information, by TRL's own trainers (``trl.experimental``).

``opsd`` (arXiv 2601.18734): the policy samples behind the prompt; the teacher, the model as it was at the start, reads
the same tokens behind prompt and gold answer; learned is the divergence of the two over the whole vocabulary at every
token. TRL has it as SDFT (arXiv 2601.19897). ``sdpo`` (arXiv 2601.20802): GRPO with that divergence beside it, the
teacher being told a correct rollout of the group, or, where there is none, the gold answer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from latentrevise.data.prompts import PromptSettings
from latentrevise.data.records import Prompt
from latentrevise.errors import ConfigError
from latentrevise.train.groups import VerifiedReward
from latentrevise.train.settings import LoraSettings, ready_tokenizer, refusals, run_training, trl_arguments
from latentrevise.verify.verifier import Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class DistillSettings(PromptSettings):
    """Settings of ``latentrevise train distill``; how prompts are read: see PromptSettings.

    method: see the module. privileged: what the teacher is told, ``{answer}`` being the gold one. trainer: arguments of
    TRL's SDFTConfig or SDPOConfig. verify_timeout: seconds for one answer (sdpo). lora: see LoraSettings. seed: of the
    trainer. Others as in RLVRSettings.
    """

    method: Literal["opsd", "sdpo"] = "opsd"
    privileged: str = "The final answer is {answer}."
    lora: LoraSettings = field(default_factory=LoraSettings)
    verify_timeout: float = 5.0
    trainer: dict = field(default_factory=dict)  # type: ignore[type-arg]  # any argument of TRL's
    seed: int = 0

    def __post_init__(self) -> None:
        if "{answer}" not in self.privileged:
            raise ConfigError(f"privileged = {self.privileged!r}: it must hold {{answer}}")


def train_distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    out: str | os.PathLike[str],
    settings: DistillSettings,
) -> Any:
    """Train; resumed from ``out`` where it holds a checkpoint, the model is left in ``out/model``. Returns TRL's
    trainer. Raises ConfigError for settings that TRL refuses."""
    data = Dataset.from_list(
        [
            {
                "prompt": p.messages or p.text,
                "answer": p.answer,
                "privileged_context": settings.privileged.replace("{answer}", p.answer),
            }
            for p in prompts
        ]
    )
    common = {"model": model, "train_dataset": data, "processing_class": ready_tokenizer(tokenizer)}
    common["peft_config"] = settings.lora.peft()
    usual: dict[str, Any] = {"chat_template_kwargs": dict(settings.chat_template_kwargs)}
    if settings.method == "opsd":
        usual |= {"teacher_model_kind": "base", "distillation_mode": "full_logits", "distillation_topk": None}
        arguments = trl_arguments(SDFTConfig, out, settings.trainer, seed=settings.seed, **usual)
        with refusals():
            trainer: Any = SDFTTrainer(args=arguments, **common)
        run_training(trainer, Path(out))
        return trainer
    usual |= {"include_environment_feedback": True, "environment_feedback_only_without_solution": True}
    with Verifier(timeout=settings.verify_timeout) as verifier:
        own = trl_arguments(SDPOConfig, out, settings.trainer, seed=settings.seed, **usual)
        with refusals():
            trainer = SDPOTrainer(args=own, reward_funcs=[VerifiedReward(verifier)], **common)
        run_training(trainer, Path(out))
    return trainer
