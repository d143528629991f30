"""What the trainers have in common: adapters, TRL's own arguments, where a training run is taken up."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import PartialState

from latentrevise.config import to_dict
from latentrevise.data.records import stable_hash, write_json
from latentrevise.errors import ConfigError, RunError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

    from latentrevise.data.records import Prompt

Arguments = TypeVar("Arguments")


@dataclass(frozen=True)
class LoraSettings:
    """Adapters in place of training all weights. rank: 0 for none. targets: names of modules, or ``all-linear``."""

    rank: int = 0
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)

    def peft(self) -> LoraConfig | None:
        """peft's configuration, or None without adapters."""
        if not self.rank:
            return None
        from peft import LoraConfig

        targets = self.targets[0] if self.targets == ("all-linear",) else list(self.targets)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )


def trl_arguments(
    cls: type[Arguments], out: str | os.PathLike[str], given: Mapping[str, Any], **defaults: Any
) -> Arguments:
    """``SFTConfig`` or ``GRPOConfig`` with ``given`` over our defaults: nothing is reported, float32 without a GPU.

    Raises ConfigError for a name that is no argument (with the nearest one) or a value it refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise ConfigError(
                f"unknown setting trainer.{name}; {f'did you mean {near[0]}?' if near else 'see ' + cls.__name__}"
            )
    cpu = {} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}
    values = {"output_dir": str(out), "report_to": "none", **cpu, **defaults, **given}
    for name, value in values.items():  # YAML 1.1 reads 1e-4 as text, and no as false
        kind = str(fields[name].type)
        if isinstance(value, str) and "float" in kind:
            with suppress(ValueError):
                values[name] = float(value)
        elif value is False and "bool" not in kind:
            values[name] = "no"
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{cls.__name__} refuses these settings: {error}") from error


def check_evaluation(arguments: TrainingArguments, prompts: Sequence[Prompt]) -> None:
    """Raises ConfigError if the trainer never comes to sample the prompts."""
    if prompts and arguments.eval_strategy == "no" and not arguments.eval_on_start:
        raise ConfigError("eval_prompts are sampled when the trainer evaluates; set trainer.eval_strategy=steps")


def ready_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """TRL pads with a token of the tokenizer's; one that has none pads with its end-of-sequence token."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has neither a padding nor an end-of-sequence token; give it one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def begin(out: str | os.PathLike[str], kind: str, settings: Any, data: Any) -> None:
    """Note in ``out/train.json`` what is trained there. Raises RunError if another training run is in it.

    data: what identifies the rows. All processes may call it; the first one writes.
    """
    header = json.loads(json.dumps({"kind": kind, "settings": to_dict(settings), "data": stable_hash(data)}))
    path = Path(out) / "train.json"
    with PartialState().main_process_first():
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8")) != header:
                raise RunError(
                    f"{out} holds a training run with other settings or data; resume it as it was, or choose another"
                    " --out"
                )
        else:
            write_json(path, header)


def run_training(trainer: Trainer, out: str | os.PathLike[str]) -> None:
    """Train, from the last checkpoint in ``out`` if there is one, and leave model and tokenizer in ``out/model``."""
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(str(out)) if Path(out).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_fsdp_enabled:  # or else nothing would be saved: checkpoints are in shards, a model directory is not
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(Path(out) / "model"))
    trainer.save_state()
