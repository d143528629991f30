"""GRPO over groups of completions that are there already (asked for in TRL #3663), as ``export --to trl-groups`` writes
them: nothing is sampled, verified or repaired.

TRL's GRPOTrainer asks a ``rollout_func`` for completions; here it looks them up. The rows were sampled by another
policy than the one that is trained, and TRL takes its own log-probs for the old ones: the ratio starts at 1 for every
row, so this is for one or two passes over rollouts of the model that starts, not for many.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from latentrevise.data.parquet import read_table
from latentrevise.data.records import Prompt
from latentrevise.data.storage import read_jsonl
from latentrevise.errors import ConfigError, InputError
from latentrevise.recovery.evaluate import EvalConfig, Evaluates
from latentrevise.train.logprob import add_linear_logprob
from latentrevise.train.settings import (
    LoraSettings,
    check_evaluation,
    ready_tokenizer,
    refusals,
    run_training,
    trl_arguments,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COLUMNS = ("prompt_id", "prompt_ids", "completions", "masks", "outcomes")


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """Settings of ``latentrevise train groups``.

    lora: see LoraSettings. eval_prompts, evaluation: as in SFTSettings. trainer: arguments of TRL's GRPOConfig.
    seed: of the trainer.
    """

    lora: LoraSettings = field(default_factory=LoraSettings)
    eval_prompts: str | None = None
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    trainer: dict = field(default_factory=dict)  # type: ignore[type-arg]  # any argument of TRL's GRPOConfig
    seed: int = 0


def read_groups(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file of groups. Raises InputError for one that does not hold groups, all of one size."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; write it by `latentrevise export --to trl-groups`")
    rows = read_table(path, remedy="export it again").to_pylist() if path.suffix == ".parquet" else read_jsonl(path)
    missing = [c for c in COLUMNS if any(c not in row for row in rows)]
    sizes = {len(row["completions"]) for row in rows} if not missing else set()
    if missing or len(sizes) != 1 or len({row["prompt_id"] for row in rows}) != len(rows):
        why = f"no column {', '.join(missing)}" if missing else f"groups of {sorted(sizes)} rows, or a prompt id twice"
        raise InputError(f"{path}: {why}; write it by `latentrevise export --to trl-groups`")
    return rows


class Pregenerated:
    """TRL's ``rollout_func``: the completions of the groups by their prompts' ids, each process its part."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.groups = {row["prompt_id"]: row for row in groups}

    def __call__(self, prompts: Sequence[str], trainer: GRPOTrainer) -> dict[str, Any]:
        first = trainer.accelerator.process_index * len(prompts)
        rows = [(self.groups[name], (first + j) % trainer.num_generations) for j, name in enumerate(prompts)]
        return {
            "prompt_ids": [list(group["prompt_ids"]) for group, _ in rows],
            "completion_ids": [list(group["completions"][i]) for group, i in rows],
            "env_mask": [list(group["masks"][i]) for group, i in rows],
            "outcome": [group["outcomes"][i] for group, i in rows],
            "logprobs": None,
        }


def recorded(outcome: Sequence[float], **_: Any) -> list[float]:
    """TRL's reward function: the outcome that stands in the file."""
    return list(outcome)


class OfflineGRPOTrainer(Evaluates, GRPOTrainer):
    """TRL's GRPOTrainer over Pregenerated, its log-probs from ``linear_logprob``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        add_linear_logprob(self._base, temperature=self.temperature, metrics=("entropy",))
        if self.ref_model is not None:
            add_linear_logprob(self.accelerator.unwrap_model(self.ref_model), temperature=self.temperature)


def train_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Mapping[str, Any]],
    out: str | os.PathLike[str],
    settings: GroupSettings,
    eval_prompts: Sequence[Prompt] = (),
) -> OfflineGRPOTrainer:
    """GRPO over the groups; resumed from ``out`` where it holds a checkpoint, the model is left in ``out/model``.

    Raises ConfigError for settings that TRL refuses or that do not fit the groups.
    """
    size = len(groups[0]["completions"])
    if settings.trainer.get("num_generations", size) != size:
        raise ConfigError(f"trainer.num_generations: the groups have {size} rows each; leave it out")
    arguments = trl_arguments(
        GRPOConfig, out, settings.trainer, seed=settings.seed, num_generations=size, per_device_train_batch_size=size
    )
    check_evaluation(arguments, eval_prompts)
    with refusals():
        trainer = OfflineGRPOTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": row["prompt_id"]} for row in groups]),
            processing_class=ready_tokenizer(tokenizer),
            peft_config=settings.lora.peft(),
            reward_funcs=[recorded],
            rollout_func=Pregenerated(groups),
        )
    trainer.sample_at_evaluation(eval_prompts, settings.evaluation)
    run_training(trainer, Path(out))
    return trainer
