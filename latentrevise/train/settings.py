"""What the trainers have in common: adapters, TRL's own arguments, where a training run is taken up."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from accelerate import PartialState

from latentrevise.config import to_dict
from latentrevise.data.leftovers import sweep
from latentrevise.data.prompts import PromptSettings
from latentrevise.data.records import Prompt, RowError, read_records, write_records
from latentrevise.data.storage import read_jsonl, stable_hash, write_json, write_jsonl
from latentrevise.engines import VLLMConfig
from latentrevise.errors import ConfigError, RunError
from latentrevise.recovery.evaluate import EvalConfig
from latentrevise.recovery.rundir import other_prompts
from latentrevise.train import losses
from latentrevise.train.repair import RepairSettings
from latentrevise.verify.patterns import BOXED
from latentrevise.verify.settings import VerifySettings

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
    from trl import GRPOConfig

Arguments = TypeVar("Arguments")
Convention = Literal["grpo_include", "onpolicy_baseline"]


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


@dataclass(frozen=True, kw_only=True)
class RLVRSettings(PromptSettings, VerifySettings):
    """Settings of ``latentrevise train rlvr``; how prompts are read: see PromptSettings; how answers are, in training,
    repair and evaluation: VerifySettings.

    repair: how zero-hit groups are repaired. advantages: ``grpo_include`` counts recovered rows in the group's mean and
    deviation (LUFFY's published script); ``onpolicy_baseline`` takes both from the sampled rows alone (its
    ``grpo_split``): a recovered row then has +1, the failed rows of its group 0. drop_unrescued: groups that stay
    without a correct row are masked from the loss and from its denominator. dynamic_sampling: that of DAPO (arXiv
    2503.14476): so many times over, other prompts take the place of those whose rows are all correct, or, where nothing
    is repaired, all wrong (0: none, as in TRL); in one process only. loss: ``trl``, what ``trainer.loss_type`` says, or
    one of ``latentrevise.train.losses`` with loss_options: its numbers, by name. lora: see LoraSettings. eval_prompts,
    evaluation: as in SFTSettings. trainer: arguments of TRL's GRPOConfig. vllm: of that engine, where it samples. seed:
    of the trainer, of the repairs and of an engine's rollouts.
    """

    repair: RepairSettings = field(default_factory=RepairSettings)
    advantages: Convention = "grpo_include"
    drop_unrescued: bool = False
    dynamic_sampling: int = 0
    loss: str = "trl"
    loss_options: dict = field(default_factory=dict)  # type: ignore[type-arg]  # numbers by name
    lora: LoraSettings = field(default_factory=LoraSettings)
    eval_prompts: str | None = None
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    trainer: dict = field(default_factory=dict)  # type: ignore[type-arg]  # any argument of TRL's
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_verification()
        self.pattern().template(self.repair.answer_template)
        if self.evaluation.answer_pattern not in (BOXED, self.answer_pattern):
            raise ConfigError(
                f"evaluation.answer_pattern = {self.evaluation.answer_pattern!r}: the training reads answers by"
                f" {self.answer_pattern!r}; set answer_pattern once, for both"
            )
        if self.loss != "trl":
            losses.build(self.loss, self.loss_options)
        elif self.loss_options:
            raise ConfigError("loss_options belong to a loss of the registry; name one with `loss`")
        if self.loss == "verifree" and self.repair.strategy != "none":
            raise ConfigError("loss = verifree puts the gold answer into every row; set repair.strategy=none")
        if self.loss == "verifree" and self.answer_pattern != BOXED:
            raise ConfigError(f"loss = verifree writes gold answers as {BOXED}; set answer_pattern={BOXED}")
        if self.dynamic_sampling < 0:
            raise ConfigError(f"dynamic_sampling = {self.dynamic_sampling}: it may not be negative")


def trl_arguments(
    cls: type[Arguments], out: str | os.PathLike[str], given: Mapping[str, Any], **defaults: Any
) -> Arguments:
    """``SFTConfig`` or ``GRPOConfig`` with ``given`` over our defaults: nothing is reported, float32 without a GPU.

    Raises ConfigError for a name that is no argument (with the nearest one), one that would be ignored, or a value it
    refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise ConfigError(
                f"unknown setting trainer.{name}; {f'did you mean {near[0]}?' if near else 'see ' + cls.__name__}"
            )
    if "chat_template_kwargs" in given:
        raise ConfigError(
            "trainer.chat_template_kwargs would be ignored: the prompts come as ids, with the template on them; set"
            " chat_template_kwargs (and evaluation.chat_template_kwargs) instead"
        )
    cpu = {} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}
    values = {"output_dir": str(Path(out).expanduser()), "report_to": "none", **cpu, **defaults, **given}
    for name, value in values.items():  # YAML 1.1 reads 1e-4 as text, and no as false
        kind = str(fields[name].type)
        if isinstance(value, str) and "float" in kind:
            with suppress(ValueError):
                values[name] = float(value)
        elif value is False and "bool" not in kind:
            values[name] = "no"
    with refusals():
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{cls.__name__} refuses these settings: {error}") from error


@contextmanager
def refusals() -> Iterator[None]:
    """What TRL and peft refuse when a trainer is made is a ConfigError, packages that are not there included
    (``report_to``, ``use_vllm``)."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"the trainer refuses these settings: {' '.join(str(error).split())}") from error
    except (ImportError, RuntimeError) as error:
        if not isinstance(error, ImportError) and "installed" not in str(error):
            raise
        raise ConfigError(
            f"trainer.*: one of these settings needs a package that is not installed ({' '.join(str(error).split())});"
            " install it, or leave the setting out"
        ) from error


# Arguments of TRL's that shape its own losses alone.
_OF_TRLS_LOSSES = (
    "loss_type",
    "epsilon",
    "epsilon_high",
    "delta",
    "importance_sampling_level",
    "off_policy_mask_threshold",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
)


def check_loss(settings: RLVRSettings, arguments: GRPOConfig) -> None:
    """Raises ConfigError for arguments of TRL's that our log-probs or the chosen loss would ignore."""
    if arguments.cast_lm_head_to_fp32:
        raise ConfigError(
            "trainer.cast_lm_head_to_fp32 has no effect on linear_logprob, which sums in float32 in any case; leave it"
            " out"
        )
    usual = {f.name: f.default for f in dataclasses.fields(arguments)}
    changed = [name for name in _OF_TRLS_LOSSES if getattr(arguments, name) != usual[name]]
    if settings.loss != "trl" and changed:
        raise ConfigError(
            f"loss = {settings.loss} does not read trainer.{', trainer.'.join(changed)}; leave that out (what the loss"
            " does read are loss_options), or take loss = trl"
        )
    if settings.loss == "oc" and arguments.temperature != 1:
        raise ConfigError(
            f"loss = oc reads log-probs of temperature 1; set trainer.temperature=1 (it is {arguments.temperature})"
        )


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
    path = Path(out).expanduser() / _HEADER
    with PartialState().main_process_first():
        sweep(path.parent)
        if not path.exists() or (_untouched(path.parent) and json.loads(path.read_text(encoding="utf-8")) != header):
            write_json(path, header)
        elif json.loads(path.read_text(encoding="utf-8")) != header:
            raise RunError(
                f"{out} holds a training run with other settings or data; resume it as it was, or choose another --out"
            )


def kept_prompts(
    out: str | os.PathLike[str], prompts: Sequence[Prompt], errors: Sequence[RowError]
) -> Sequence[Prompt]:
    """The prompts as a training run in ``out`` first read them (a template may print today's date), or these, which
    are then kept there. Raises RunError where it has others."""
    path, left_out = Path(out).expanduser() / _PROMPTS, Path(out).expanduser() / _ERRORS
    with PartialState().main_process_first():
        if not path.exists() or (_untouched(path.parent) and PartialState().is_main_process):
            write_jsonl(left_out, errors)
            write_records(path, prompts, Prompt)
        stored = read_records(path, Prompt)
    if other_prompts(prompts, errors, stored, read_jsonl(left_out)):
        raise RunError(
            f"{out} holds a training run over other prompts; resume it with its own, or choose another --out"
        )
    return stored


_HEADER, _PROMPTS, _ERRORS = "train.json", "prompts.parquet", "errors.jsonl"


def _untouched(out: Path) -> bool:
    """Whether nothing was computed in a folder yet: it holds no more than what a training starts from."""
    return all(p.name in (_HEADER, _PROMPTS, _ERRORS) or p.name.startswith(".") for p in out.iterdir())


def run_training(trainer: Trainer, out: str | os.PathLike[str]) -> None:
    """Train, from the last checkpoint in ``out`` if there is one, and leave model and tokenizer in ``out/model``."""
    from transformers.trainer_utils import get_last_checkpoint

    out = Path(out).expanduser()
    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_fsdp_enabled:  # or else nothing would be saved: checkpoints are in shards, a model directory is not
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(out / "model"))
    trainer.save_state()
