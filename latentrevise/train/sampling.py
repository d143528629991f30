"""Rollouts by one of this package's engines inside TRL's loop: what it samples and what repairs continue is one engine.

TRL (1.16) asks ``trainer.vllm_generation`` for completions where ``use_vllm`` is on, pushes weights through it before
the first ones of a step, and compares its log-probs with the policy's (``vllm_importance_sampling_correction``; metrics
``sampling/*``). ``EngineRollouts`` answers there, so all of that is TRL's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from latentrevise.data.records import row_seed
from latentrevise.engines import Engine, Request, SamplingParams
from latentrevise.errors import ConfigError
from latentrevise.model.loading import unwrapped

if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer

_NOT_READ: dict[str, Any] = {"min_p": None, "repetition_penalty": 1.0, "generation_kwargs": None}
_OF_TRLS_SAMPLERS = ("use_vllm", "use_transformers_continuous_batching")


class EngineRollouts:
    """In the place of TRL's ``VLLMGeneration``. Each rollout has a seed of its own, of ``seed``, the step, the call
    within the step and its place: a resumed run samples what an undisturbed one does.

    Raises ConfigError for arguments that the engine would ignore, and for several processes.
    """

    def __init__(self, engine: Engine, trainer: GRPOTrainer, seed: int) -> None:
        arguments = cast("GRPOConfig", trainer.args)
        if on := [name for name in _OF_TRLS_SAMPLERS if getattr(arguments, name)]:
            raise ConfigError(f"trainer.{on[0]} is another engine beside the one that was given; choose one")
        if told := [name for name, usual in _NOT_READ.items() if getattr(arguments, name) != usual]:
            raise ConfigError(f"trainer.{', trainer.'.join(told)}: the engine does not read that; leave it out")
        if trainer.accelerator.num_processes > 1:
            raise ConfigError(
                "rollouts by an engine of this package are for one process; leave --engine out, or use trainer.use_vllm"
            )
        self._raw = arguments.temperature == 1
        if not self._raw and arguments.vllm_importance_sampling_correction:
            raise ConfigError(
                f"trainer.temperature = {arguments.temperature}: engines report log-probs of temperature 1, which TRL's"
                " correction would compare with the policy's at its own; set"
                " trainer.vllm_importance_sampling_correction=false"
            )
        self.engine, self._trainer, self._seed = engine, trainer, seed
        self._step, self._calls = -1, 0

    def sync_weights(self) -> None:
        """TRL calls it when the step has changed."""
        self.engine.update(unwrapped(self._trainer.accelerator.unwrap_model(self._trainer.model)))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        images: None,
        num_generations: int,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> tuple[Sequence[Sequence[int]], list[list[int]], list[list[list[float]]], None]:
        """One completion for each of ``prompts`` (ids; TRL repeats a prompt for its group), the end-of-sequence token
        with it, and the log-prob of each of its ids: NaN, to TRL unknown, at another temperature than 1."""
        step = self._trainer.state.global_step
        self._calls = self._calls + 1 if step == self._step else 0
        self._step = step
        seed = row_seed(self._seed, "rollout", step, self._calls)
        requests = [Request(ids, seed=row_seed(seed, i)) for i, ids in enumerate(prompts)]
        with profiler or nullcontext():
            found = self.engine.generate(requests, [self._params(len(ids)) for ids in prompts])
        ids, logprobs = [], []
        for (c,) in found:
            end = [] if c.end is None else [c.end]
            own = [*(c.logprobs or ()), *(value for _, value in end)]
            ids.append([*c.ids, *(token for token, _ in end)])
            logprobs.append([[value if self._raw else math.nan] for value in own])
        return prompts, ids, logprobs, None

    def _params(self, length: int) -> SamplingParams:
        trainer, limit = self._trainer, self.engine.limit
        most = cast(int, trainer.max_completion_length)
        return SamplingParams(
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k or None,
            max_new_tokens=most if limit is None else max(1, min(most, limit - length)),
        )
