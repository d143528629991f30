"""RLVR on TRL's GRPOTrainer: zero-hit groups are repaired in place, the log-probs come from ``linear_logprob``.

The override is small: after the trainer has sampled a generation batch, every completion is verified; a group whose
rows are *all verified wrong* (over all processes; a timeout is unknown, never wrong) goes to a strategy, and what it
recovers takes the place of failed rows. From there on everything is TRL's: rewards, advantages, clipping, updates.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from latentrevise.data.prompts import PromptSettings
from latentrevise.data.records import Prompt, Rollout, VerdictName, row_seed
from latentrevise.engines import Engine, HFEngine, SamplingParams
from latentrevise.errors import ConfigError
from latentrevise.model.loading import sharded
from latentrevise.model.policy import Policy
from latentrevise.recovery.evaluate import EvalConfig, Evaluates
from latentrevise.train import losses
from latentrevise.train.logprob import add_linear_logprob
from latentrevise.train.repair import (
    Repair,
    Repairer,
    RepairSettings,
    Rescue,
    judged_rollouts,
    repair_metrics,
    replaced,
    zero_hit,
)
from latentrevise.train.settings import (
    LoraSettings,
    check_evaluation,
    ready_tokenizer,
    refusals,
    run_training,
    trl_arguments,
)
from latentrevise.verify.patterns import BOXED
from latentrevise.verify.settings import VerifySettings
from latentrevise.verify.verifier import Judgement, Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Convention = Literal["grpo_include", "onpolicy_baseline"]

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


@dataclass(frozen=True, kw_only=True)
class RLVRSettings(PromptSettings, VerifySettings):
    """Settings of ``latentrevise train rlvr``; how prompts are read: see PromptSettings; how answers are, in training,
    repair and evaluation: VerifySettings.

    repair: how zero-hit groups are repaired. advantages: ``grpo_include`` counts recovered rows in the group's mean and
    deviation (LUFFY's published script); ``onpolicy_baseline`` takes both from the sampled rows alone (its
    ``grpo_split``): a recovered row then has +1, the failed rows of its group 0. drop_unrescued: groups that stay
    without a correct row are masked from the loss and from its denominator. loss: ``trl``, what ``trainer.loss_type``
    says, or one of ``latentrevise.train.losses`` with its loss_options. lora: see LoraSettings. eval_prompts,
    evaluation: as in SFTSettings. trainer: arguments of TRL's GRPOConfig. seed:
    of the trainer and of the repairs.
    """

    repair: RepairSettings = field(default_factory=RepairSettings)
    advantages: Convention = "grpo_include"
    drop_unrescued: bool = False
    loss: str = "trl"
    loss_options: dict = field(default_factory=dict)  # type: ignore[type-arg]  # numbers by name
    lora: LoraSettings = field(default_factory=LoraSettings)
    eval_prompts: str | None = None
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    trainer: dict = field(default_factory=dict)  # type: ignore[type-arg]  # any argument of TRL's
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


class VerifiedReward:
    """TRL's reward function: 1 for a verified answer, 0 for a wrong one, None (not scored) for an undecided one."""

    __name__ = "verified"

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier

    def __call__(self, completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float | None]:
        judged = judged_completions(self.verifier, answer, completions)
        return [{"correct": 1.0, "wrong": 0.0, "unknown": None}[j.verdict] for j in judged]


class RecoveringGRPOTrainer(Evaluates, GRPOTrainer):
    """TRL's GRPOTrainer; see the module and RLVRSettings. Takes its arguments, and

    verifier: started when first needed; the caller closes it. settings: RLVRSettings without the trainer's. engine:
    where the repairs' continuations are sampled; by default the model that is trained. It must take embeddings if the
    strategy feeds mixtures. Rows of the data set need ``prompt`` and ``answer``; ``prompt_ids`` (used as they are),
    ``prompt_id`` and ``conversation`` (the messages that the ids are of) are optional. Without reward functions the
    reward is the verdict.

    Raises ConfigError for tools, images, ZeRO-3 and arguments that would be ignored, ModelError for a model whose
    logits are not understood.
    """

    def __init__(
        self,
        *args: Any,
        verifier: Verifier,
        settings: RLVRSettings | None = None,
        engine: Engine | None = None,
        reward_funcs: Any = None,
        **kwargs: Any,
    ) -> None:
        self.verifier, self.settings, self._engine = verifier, settings or RLVRSettings(), engine
        self._loss = None
        if self.settings.loss != "trl":
            self._loss = losses.build(self.settings.loss, self.settings.loss_options)
        self._repairer: Repairer | None = None
        self._rows: Sequence[Mapping[str, Any]] = ()
        kwargs["reward_funcs"] = reward_funcs or [VerifiedReward(verifier)]
        super().__init__(*args, **kwargs)
        if self.tools or self._is_vlm:
            raise ConfigError("repairing groups is for text without tools; train such a model with TRL's own trainer")
        if cast(GRPOConfig, self.args).cast_lm_head_to_fp32:
            raise ConfigError(
                "trainer.cast_lm_head_to_fp32 has no effect on linear_logprob, which sums in float32 in any case; leave"
                " it out"
            )
        usual = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
        changed = [name for name in _OF_TRLS_LOSSES if getattr(self.args, name) != usual[name]]
        if self._loss is not None and changed:
            raise ConfigError(
                f"loss = {self.settings.loss} does not read trainer.{', trainer.'.join(changed)}; leave that out (what"
                " the loss does read are loss_options), or take loss = trl"
            )
        temperature = self.temperature
        add_linear_logprob(self._base, temperature=temperature, metrics=("entropy",))
        if self.ref_model is not None:
            add_linear_logprob(self.accelerator.unwrap_model(self.ref_model), temperature=temperature)

    # The generation batch

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        output = super()._generate_and_score_completions(inputs)
        recovered, groups = self._recovered, self._groups
        mine = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        output["recovered"] = recovered[mine]
        outcome = torch.tensor([{"correct": 1.0, "wrong": 0.0}.get(v, math.nan) for v in groups.verdicts])
        outcome = torch.where(recovered.cpu(), 1.0, outcome).to(recovered.device)
        by_group = outcome.view(-1, groups.size)
        output["outcome"] = outcome[mine]
        output["correct"] = (by_group == 1).sum(1).repeat_interleave(groups.size)[mine].float()
        output["judged"] = by_group.isfinite().sum(1).repeat_interleave(groups.size)[mine].float()
        if self.settings.advantages == "onpolicy_baseline" and bool(recovered.any()):
            output["advantages"] = self._onpolicy_advantages(output["advantages"], recovered, groups.size, mine)
        # Counts of tokens over the generation batch, for losses that divide by those of one kind.
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        kinds = torch.stack([(mask * (output["outcome"] == r)[:, None]).sum() for r in (1.0, 0.0)])
        output["correct_tokens"], output["wrong_tokens"] = self.accelerator.gather(kinds[None]).sum(0)
        if "sampling_per_token_logps" in output:
            # A recovered row was not sampled behind plain tokens. To whatever compares samplers, its sampler is the
            # policy itself: its log-probs are the plain ones (its ratio was 1 already, by TRL's rule for NaN).
            stream = output["sampling_per_token_logps"]
            output["sampling_per_token_logps"] = torch.where(
                output["recovered"][:, None], output.get("old_per_token_logps", stream), stream
            )
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, Any, Any]:
        if "prompt_ids" in self._rows[0]:  # never encode twice what is there as ids
            return [list(row["prompt_ids"]) for row in self._rows], None, {}
        return super()._tokenize_prompts(prompts)

    def _calculate_rewards(self, *args: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args)
        return self._rewards

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        prompt_ids, ids, mask, completions, logprobs, *rest = super()._generate(prompts)
        training = self._base.training
        own = judged_completions(self.verifier, [row["answer"] for row in self._rows], completions)
        size = cast(int, self.num_generations if training else self.num_generations_eval)
        groups = self._groups = _Groups(gather_object(own), size)
        first = self.accelerator.process_index * len(own)
        rescues: dict[int, Rescue] = {}
        if training:
            rescues = self._repaired(groups, first, prompt_ids, ids)
        self._recovered = torch.tensor([i in rescues for i in range(len(groups.verdicts))], device=self.args.device)
        left = groups.rows_without_correct(rescues) if training and self.settings.drop_unrescued else set()
        masks = [[0 if first + j in left else 1] * len(row) for j, row in enumerate(ids)]
        for j in range(len(own)):
            rescue = rescues.get(first + j)
            if rescue is None:
                continue
            ids[j], masks[j] = list(rescue.ids), list(rescue.trained)
            completions[j] = (
                rescue.text if isinstance(completions[j], str) else [{"role": "assistant", "content": rescue.text}]
            )
            if logprobs is not None:
                logprobs[j] = [math.nan] * len(rescue.ids)  # see _generate_and_score_completions
        if any(0 in row for row in masks):
            mask = masks
        return prompt_ids, ids, mask, completions, logprobs, *rest

    def _repaired(
        self, groups: _Groups, first: int, prompt_ids: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]
    ) -> dict[int, Rescue]:
        """What takes the place of rows, by their place in the generation batch of all processes; metrics are logged."""
        wanted = groups.zero_hit()
        settings = self.settings.repair
        chosen = wanted[: settings.max_groups or None] if settings.strategy != "none" else []
        # A group may lie on several processes: each tells the rows of its part.
        texts = gather_object(
            [
                (first + j, tuple(prompt_ids[j]), self._without_end(row), self._rows[j])
                for j, row in enumerate(ids)
                if (first + j) // groups.size in chosen
            ]
        )
        rows = {i: rest for i, *rest in texts}
        work = [self._failed(groups, group, rows) for group in chosen]
        seed = row_seed(self.settings.seed, "repair", self.state.global_step)
        found, seconds = self._share(work, seed) if work else ([], 0.0)
        failed = {group: rollouts for group, (_, rollouts) in zip(chosen, work, strict=True)}
        repairs = dict(zip(chosen, found, strict=True))
        for name, value in repair_metrics(groups.each(), failed, repairs, seconds).items():
            self._metrics["train"][name].append(value)  # TRL leaves NaN out of the mean over a logging interval
        unparsed = sum(judgement.unparsed for judgement in groups.judged) / len(groups.judged)
        self._metrics["train"]["verifier/unparsed_frac"].append(unparsed)
        return {
            group * groups.size + i: rescue
            for group, repair in repairs.items()
            for i, rescue in replaced(failed[group], repair).items()
        }

    def _share(self, work: list[tuple[Prompt, list[Rollout]]], seed: int) -> tuple[list[Repair], float]:
        """The repairs of all groups, each made by one process and told to all."""
        repairer = self._ready()
        # A pass through sharded weights takes all processes, so there each does all the work.
        together = sharded(self._base)
        count = 1 if together else self.accelerator.num_processes
        own = range(0 if together else self.accelerator.process_index, len(work), count)
        found, seconds = repairer.repair([(*work[i], row_seed(seed, i)) for i in own])
        repairer.engine.sleep()
        told = list(zip(own, found, strict=True))
        if count > 1:
            told = sorted(gather_object(told), key=lambda pair: pair[0])
        return [repair for _, repair in told], seconds

    def _ready(self) -> Repairer:
        """The repairer, made when the first group needs one: the model is wrapped and placed by then."""
        if self._repairer is None:
            if sharded(self._base):
                # FSDP2 takes the first module that runs for the root; a repair runs parts of the model.
                model = self.accelerator.unwrap_model(self.model)
                with torch.no_grad():
                    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.accelerator.device))
            engine = self._engine or HFEngine(self._base, self._tokenizer)
            self._repairer = Repairer(
                Policy(self._base, self._tokenizer),
                engine,
                self._tokenizer,
                self.verifier,
                self.settings.repair,
                SamplingParams(
                    temperature=self.temperature,
                    top_p=self.top_p,
                    top_k=self.top_k or None,
                    max_new_tokens=cast(int, self.max_completion_length),
                ),
                self.settings.chat_template_kwargs,
            )
        self._repairer.engine.update(self._base)
        return self._repairer

    def _failed(self, groups: _Groups, group: int, rows: Mapping[int, Any]) -> tuple[Prompt, list[Rollout]]:
        places = range(group * groups.size, (group + 1) * groups.size)
        prompt_ids, _, row = rows[places[0]]
        name = str(row.get("prompt_id", group))
        given = row["prompt"]
        text, messages = (given, row.get("conversation")) if isinstance(given, str) else (given[-1]["content"], given)
        prompt = Prompt(name, text, prompt_ids, str(row["answer"]), messages=list(messages or ()))
        judged = groups.judged[places.start : places.stop]
        return prompt, judged_rollouts(prompt, [rows[i][1] for i in places], judged, self._tokenizer)

    def _without_end(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(ids[:-1]) if ids and ids[-1] in self.eos_token_ids else tuple(ids)

    # Advantages and losses

    def _onpolicy_advantages(self, advantages: Tensor, recovered: Tensor, size: int, mine: slice) -> Tensor:
        """``(r - mean) / std``, both from the sampled rows of a repaired group; a deviation of 0 counts as 1."""
        rewards = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(1)
        rewards[self._rewards.isnan().all(1)] = math.nan
        rewards, marked = rewards.view(-1, size), recovered.view(-1, size)
        sampled = rewards.masked_fill(marked, math.nan)
        mean = sampled.nanmean(1, keepdim=True).nan_to_num()
        count = sampled.isfinite().sum(1, keepdim=True)
        std = (((sampled - mean) ** 2).nansum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        std = torch.ones_like(std) if self.scale_rewards == "none" else torch.where(std > 0, std, 1.0)
        own = ((rewards - mean) / std).nan_to_num().flatten()[mine]
        repaired = marked.any(1).repeat_interleave(size)[mine]
        return torch.where(repaired, own, advantages)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self._loss is None:
            return super()._compute_loss(model, inputs)
        completion, mask = inputs["completion_ids"], inputs["completion_mask"] * inputs.get("tool_mask", 1)
        logp, entropies, balance = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], completion], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            completion.shape[1],
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
        )
        mode = "train" if self._base.training else "eval"
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        # Counts are of the generation batch over all processes; gradients are averaged over processes and summed over
        # the micro-batches of one step.
        generation = cast(GRPOConfig, self.args).steps_per_generation or 1
        part = steps / (generation if mode == "train" else 1) / self.accelerator.num_processes
        old = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps", logp)).detach()
        batch = losses.Rollouts(
            logp=logp,
            old=torch.where(old.isnan(), logp.detach(), old),  # without a sampler's log-prob the ratio is 1
            mask=mask,
            outcome=inputs["outcome"],
            advantage=inputs["advantages"],
            correct=inputs["correct"],
            judged=inputs["judged"],
            recovered=inputs["recovered"],
            rows=len(logp) * steps,
            tokens=inputs["num_items_in_batch"] * part,
            correct_tokens=inputs["correct_tokens"] * part,
            wrong_tokens=inputs["wrong_tokens"] * part,
        )
        loss = self._loss(batch)
        if self.beta:
            gap = inputs["ref_per_token_logps"] - logp
            kl = gap.exp() - gap - 1
            if cast(GRPOConfig, self.args).use_bias_correction_kl:
                kl = kl * batch.ratio
            loss = loss + self.beta * batch.token_mean(kl)
            self._metrics[mode]["kl"].append(float(batch.sum(kl.detach()).sum() / mask.sum().clamp(min=1)))
        if balance is not None:
            loss = loss + self.router_aux_loss_coef * balance / steps
        self._metrics[mode]["entropy"].append(float(batch.sum(entropies.detach()).sum() / mask.sum().clamp(min=1)))
        return loss


@dataclass(frozen=True)
class _Groups:
    """The judgements of a generation batch over all processes, ``size`` rows a group, groups one after another."""

    judged: list[Judgement]
    size: int

    @property
    def verdicts(self) -> list[VerdictName]:
        return [judgement.verdict for judgement in self.judged]

    def each(self) -> list[list[VerdictName]]:
        verdicts = self.verdicts
        return [verdicts[i : i + self.size] for i in range(0, len(verdicts), self.size)]

    def zero_hit(self) -> list[int]:
        """Groups of which every row is verified wrong."""
        return [g for g, verdicts in enumerate(self.each()) if zero_hit(verdicts)]

    def rows_without_correct(self, rescues: Mapping[int, Any]) -> set[int]:
        """Rows of groups that have neither a correct row nor a rescued one."""
        rescued = {i // self.size for i in rescues}
        dead = [g for g, verdicts in enumerate(self.each()) if "correct" not in verdicts and g not in rescued]
        return {g * self.size + i for g in dead for i in range(self.size)}


def judged_completions(verifier: Verifier, answers: Sequence[str], completions: Sequence[Any]) -> list[Judgement]:
    """Of completions as TRL hands them on: texts, or lists of messages."""
    texts = [c if isinstance(c, str) else str(c[-1].get("content") or "") for c in completions]
    return verifier.verify(list(zip(map(str, answers), texts, strict=True)))


def train_rlvr(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    out: str | os.PathLike[str],
    settings: RLVRSettings,
    eval_prompts: Sequence[Prompt] = (),
    *,
    engine: Engine | None = None,
) -> RecoveringGRPOTrainer:
    """Train on prompts with verifiable answers; resumed from ``out`` where it holds a checkpoint.

    The trained model, or its adapter, is left in ``out/model``. Raises ConfigError for settings that TRL refuses, that
    would be ignored or do not go together; ModelError for a model whose logits or layers are not understood; RunError
    if memory does not suffice for one row.
    """

    def rows(of: Sequence[Prompt]) -> Dataset:
        return Dataset.from_list(
            [
                {
                    "prompt": p.text,
                    "prompt_ids": list(p.ids),
                    "answer": p.answer,
                    "prompt_id": p.id,
                    "conversation": p.messages,
                }
                for p in of
            ]
        )

    arguments = trl_arguments(GRPOConfig, out, settings.trainer, seed=settings.seed)
    check_evaluation(arguments, eval_prompts)
    with settings.verifier() as verifier:
        with refusals():
            trainer = RecoveringGRPOTrainer(
                model=model,
                args=arguments,
                train_dataset=rows(prompts),
                eval_dataset=rows(eval_prompts) if eval_prompts else None,
                processing_class=ready_tokenizer(tokenizer),
                peft_config=settings.lora.peft(),
                verifier=verifier,
                settings=settings,
                engine=engine,
            )
        trainer.sample_at_evaluation(eval_prompts, replace(settings.evaluation, answer_pattern=settings.answer_pattern))
        run_training(trainer, Path(out))
    return trainer
