"""RLVR on TRL's GRPOTrainer: zero-hit groups are repaired in place, the log-probs come from ``linear_logprob``.

The override is small: after the trainer has sampled a generation batch, every completion is verified; a group whose
rows are *all verified wrong* (over all processes; a timeout is unknown, never wrong) goes to a strategy, and what it
recovers takes the place of failed rows. From there on everything is TRL's: rewards, advantages, clipping, updates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from latentrevise.data.records import Prompt, Rollout, row_seed
from latentrevise.engines import Engine, HFEngine, SamplingParams
from latentrevise.errors import ConfigError
from latentrevise.model.loading import sharded
from latentrevise.model.policy import Policy
from latentrevise.recovery.evaluate import Evaluates
from latentrevise.train import losses
from latentrevise.train.groups import (
    Groups,
    VerifiedReward,
    judged_completions,
    one_outcome,
    onpolicy_advantages,
    padded,
    peers_of,
    with_gold,
)
from latentrevise.train.logprob import add_linear_logprob
from latentrevise.train.repair import (
    Repair,
    Repairer,
    Rescue,
    judged_rollouts,
    repair_metrics,
    replaced,
)
from latentrevise.train.sampling import EngineRollouts
from latentrevise.train.settings import (
    RLVRSettings,
    check_evaluation,
    check_loss,
    ready_tokenizer,
    refusals,
    run_training,
    trl_arguments,
)
from latentrevise.verify.verifier import Judgement, VerdictName, Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RecoveringGRPOTrainer(Evaluates, GRPOTrainer):
    """TRL's GRPOTrainer; see the module and RLVRSettings. Takes its arguments, and

    verifier: started when first needed; the caller closes it. settings: RLVRSettings without the trainer's. engine:
    where the repairs' continuations are sampled; by default ``rollouts``, or the model that is trained. It must take
    embeddings if the strategy feeds mixtures. rollouts: the engine that samples the rollouts, in place of TRL; see
    ``EngineRollouts``. Rows of the data set need ``prompt`` and ``answer``; ``prompt_ids`` (used as they are),
    ``prompt_id`` and ``conversation`` (the messages that the ids are of) are optional. Without reward functions the
    reward is the verdict.

    Logs TRL's metrics, those of ``repair_metrics``, ``sampled/tokens`` (tokens of the sampled rows),
    ``verifier/unparsed_frac`` (rows whose answer is not understood) and ``dynamic/renewed_groups`` (groups that another
    prompt took).

    Raises ConfigError for tools, images, ZeRO-3 and arguments that would be ignored, ModelError for a model whose
    logits are not understood.
    """

    def __init__(
        self,
        *args: Any,
        verifier: Verifier,
        settings: RLVRSettings | None = None,
        engine: Engine | None = None,
        rollouts: Engine | None = None,
        reward_funcs: Any = None,
        **kwargs: Any,
    ) -> None:
        self.verifier, self.settings, self._engine = verifier, settings or RLVRSettings(), engine or rollouts
        self._loss = None
        if self.settings.loss != "trl":
            self._loss = losses.build(self.settings.loss, self.settings.loss_options)
        self._repairer: Repairer | None = None
        self._rows: Sequence[Mapping[str, Any]] = ()
        kwargs["reward_funcs"] = reward_funcs or [VerifiedReward(verifier)]
        super().__init__(*args, **kwargs)
        if self.tools or self._is_vlm:
            raise ConfigError("repairing groups is for text without tools; train such a model with TRL's own trainer")
        check_loss(self.settings, cast(GRPOConfig, self.args))
        temperature = self.temperature
        if self.settings.dynamic_sampling and self.accelerator.num_processes > 1:
            raise ConfigError("dynamic_sampling works in one process; set it to 0, or use drop_unrescued")
        add_linear_logprob(self._base, temperature=temperature, metrics=("entropy",))
        if self.ref_model is not None:
            add_linear_logprob(self.accelerator.unwrap_model(self.ref_model), temperature=temperature)
        if rollouts is not None:
            self.vllm_generation: Any = EngineRollouts(rollouts, self, self.settings.seed)
            self.use_vllm, self._last_loaded_step = True, -1

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
            rewards = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(1)
            rewards[self._rewards.isnan().all(1)] = math.nan
            own = onpolicy_advantages(rewards, recovered, groups.size, self.scale_rewards)[mine]
            repaired = recovered.view(-1, groups.size).any(1).repeat_interleave(groups.size)[mine]
            output["advantages"] = torch.where(repaired, own, output["advantages"])
        # Counts of tokens over the generation batch, for losses that divide by those of one kind.
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        kinds = torch.stack([(mask * (output["outcome"] == r)[:, None]).sum() for r in (1.0, 0.0)])
        output["correct_tokens"], output["wrong_tokens"] = self.accelerator.gather(kinds[None]).sum(0)
        if "sampling_per_token_logps" in output:
            # A recovered row was not sampled behind plain tokens. To whatever compares samplers, its sampler is the
            # policy itself: its log-probs are the plain ones (its ratio was 1 already, by TRL's rule for NaN). So is
            # that of an id whose sampler told none.
            stream = output["sampling_per_token_logps"]
            output["sampling_per_token_logps"] = torch.where(
                output["recovered"][:, None] | stream.isnan(), output.get("old_per_token_logps", stream), stream
            )
        if self._loss is not None:
            output["behind"] = padded(self._behind, output["completion_ids"], math.nan)
            output["answer"] = padded(self._gold, output["completion_ids"], 0.0)
            output["peers"] = self._peers(output, groups.size, mine)
        return output

    def _peers(self, output: dict[str, Any], size: int, mine: slice) -> Tensor:
        """See ``losses.Rollouts``; nothing is computed for a loss that does not read them."""
        if self.settings.loss not in losses.OF_PEERS:
            return torch.zeros(len(output["outcome"]), size, 3, device=output["outcome"].device)
        if "old_per_token_logps" not in output:
            ids, seen = (
                torch.cat([output[f"prompt_{kind}"], output[f"completion_{kind}"]], 1) for kind in ("ids", "mask")
            )
            with torch.no_grad():
                output["old_per_token_logps"], *_ = self._get_per_token_logps_and_entropies(
                    self.model, ids, seen, output["completion_ids"].shape[1], self.args.per_device_train_batch_size
                )
        old, mask = output["old_per_token_logps"], output["completion_mask"] * output.get("tool_mask", 1)
        gold = torch.where(output["answer"].sum(1) > 0, (old * output["answer"]).sum(1), -math.inf)
        stats = torch.stack([output["outcome"], (old * mask).sum(1) / mask.sum(1), gold], 1)
        return peers_of(self.accelerator.gather(stats), size)[mine]

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, Any, Any]:
        if "prompt_ids" in self._rows[0]:  # never encode twice what is there as ids
            return [list(row["prompt_ids"]) for row in self._rows], None, {}
        return super()._tokenize_prompts(prompts)

    def _calculate_rewards(self, *args: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args)
        return self._rewards

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        sampled = super()._generate(prompts)
        training = self._base.training
        own = judged_completions(self.verifier, [row["answer"] for row in self._rows], sampled[3])
        size = cast(int, self.num_generations if training else self.num_generations_eval)
        if training and self.settings.dynamic_sampling:
            sampled = self._resampled(prompts, sampled, own, size)
        prompt_ids, ids, mask, completions, logprobs, *rest = sampled
        groups = self._groups = Groups(gather_object(own), size)
        first = self.accelerator.process_index * len(own)
        rescues: dict[int, Rescue] = {}
        if training:
            rescues = self._repaired(groups, first, prompt_ids, ids)
        self._behind: dict[int, Sequence[float]] = {}
        self._gold: dict[int, Sequence[float]] = {}
        self._recovered = torch.tensor([i in rescues for i in range(len(groups.verdicts))], device=self.args.device)
        left = groups.rows_without_correct(rescues) if training and self.settings.drop_unrescued else set()
        masks = [[0 if first + j in left else 1] * len(row) for j, row in enumerate(ids)]
        for j in range(len(own)):
            rescue = rescues.get(first + j)
            if rescue is None:
                continue
            ids[j], masks[j], self._behind[j] = list(rescue.ids), list(rescue.trained), rescue.sampled
            completions[j] = (
                rescue.text if isinstance(completions[j], str) else [{"role": "assistant", "content": rescue.text}]
            )
            if logprobs is not None:
                logprobs[j] = [math.nan] * len(rescue.ids)  # see _generate_and_score_completions
        if training and self.settings.loss == "verifree":
            for j, row in enumerate(self._rows):
                kept = first + j not in left
                ids[j], reasoning, gold = with_gold(self._without_end(ids[j]), str(row["answer"]), self._tokenizer)
                masks[j], self._gold[j] = [kept * t for t in reasoning], [kept * t for t in gold]
                if logprobs is not None:
                    logprobs[j] = [*logprobs[j][: sum(reasoning)], *[math.nan] * sum(gold)]
        if any(0 in row for row in masks):
            mask = masks
        if self._sampled_by_engine:
            self.vllm_generation.engine.sleep()
        return prompt_ids, ids, mask, completions, logprobs, *rest

    def _resampled(
        self, prompts: list[Any], sampled: tuple[Any, ...], judged: list[Judgement], size: int
    ) -> tuple[Any, ...]:
        """``sampled`` with other prompts in place of those of one outcome, in ``prompts``, the rows and ``judged``,
        too: TRL goes on with these very lists."""
        given = cast(list[Mapping[str, Any]], self._rows)
        kinds: list[VerdictName] = ["correct", "wrong"] if self.settings.repair.strategy == "none" else ["correct"]
        renewed, data = 0, cast(Dataset, self.train_dataset)
        for number in range(self.settings.dynamic_sampling):
            dead = one_outcome(Groups(judged, size), kinds)
            if not dead:
                break
            renewed += len(dead)
            places = [g * size + i for g in dead for i in range(size)]
            for g in dead:
                seed = row_seed(self.settings.seed, "dynamic", self.state.global_step, number, g)
                row = data[seed % len(data)]
                for j in range(g * size, (g + 1) * size):
                    given[j], prompts[j] = dict(row), row["prompt"]
            self._rows = [given[j] for j in places]
            again = super()._generate([prompts[j] for j in places])
            found = judged_completions(self.verifier, [row["answer"] for row in self._rows], again[3])
            for k, j in enumerate(places):
                judged[j] = found[k]
                for part in (0, 1, 3, 4):  # prompt ids, ids, completions, log-probs
                    if sampled[part] is not None:
                        sampled[part][j] = again[part][k]
        self._rows = given
        self._metrics["train"]["dynamic/renewed_groups"].append(float(renewed))
        return sampled

    def _repaired(
        self, groups: Groups, first: int, prompt_ids: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]
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
        own = {"sampled/tokens": float(sum(gather_object([sum(map(len, ids))])))}
        for name, value in (repair_metrics(groups.each(), failed, repairs, seconds) | own).items():
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
                ended=self.mask_truncated_completions,
            )
        if not self._sampled_by_engine or self._repairer.engine is not self.vllm_generation.engine:
            self._repairer.engine.update(self._base)
        return self._repairer

    @property
    def _sampled_by_engine(self) -> bool:
        return isinstance(getattr(self, "vllm_generation", None), EngineRollouts)

    def _failed(self, groups: Groups, group: int, rows: Mapping[int, Any]) -> tuple[Prompt, list[Rollout]]:
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
        old = torch.where(old.isnan(), logp.detach(), old)  # without a sampler's log-prob the ratio is 1
        batch = losses.Rollouts(
            logp=logp,
            old=old,
            mask=mask,
            outcome=inputs["outcome"],
            advantage=inputs["advantages"],
            correct=inputs["correct"],
            judged=inputs["judged"],
            recovered=inputs["recovered"],
            entropy=entropies.detach(),
            behind=torch.where(inputs["behind"].isnan(), old, inputs["behind"]),
            answer=inputs["answer"],
            peers=inputs["peers"],
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


def train_rlvr(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    out: str | os.PathLike[str],
    settings: RLVRSettings,
    eval_prompts: Sequence[Prompt] = (),
    *,
    engine: Engine | None = None,
    rollouts: Engine | None = None,
) -> RecoveringGRPOTrainer:
    """Train on prompts with verifiable answers; resumed from ``out`` where it holds a checkpoint. engine, rollouts: as
    in RecoveringGRPOTrainer.

    The trained model, or its adapter, is left in ``out/model``. Raises ConfigError for settings that TRL refuses, that
    would be ignored or do not go together; ModelError for a model whose logits or layers are not understood; RunError
    if memory does not suffice for one row.
    """

    def rows(of: Sequence[Prompt]) -> Dataset:
        names = {"prompt": "text", "answer": "answer", "prompt_id": "id", "conversation": "messages"}
        return Dataset.from_list(
            [{key: getattr(p, name) for key, name in names.items()} | {"prompt_ids": list(p.ids)} for p in of]
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
                rollouts=rollouts,
            )
        trainer.sample_at_evaluation(eval_prompts, replace(settings.evaluation, answer_pattern=settings.answer_pattern))
        run_training(trainer, Path(out))
    return trainer
