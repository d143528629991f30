"""TRL's AsyncGRPOTrainer: groups are repaired in the process of its rollout worker, before they are scored.

    from latentrevise.adapters.trl_async import RecoveringRolloutWorker
    AsyncGRPOTrainer(..., rollout_worker=RecoveringRolloutWorker(model_name=..., dataset=..., reward_funcs=..., ...))

Takes what TRL's own ``AsyncRolloutWorker`` takes; the data set needs ``answer``. Reward functions judge recovered rows
too.

Hook: ``rollout_worker`` of trl/experimental/async_grpo/async_grpo_trainer.py, a worker with a loop of its own by
``_loop_cls`` (as TRL's own ``HarnessRolloutWorker``); ``_AsyncRolloutLoop._score_group`` of async_rollout_worker.py.
TRL 1.16. The process is one that TRL starts without GPUs, so the copy of the policy that repairs is on its CPUs: a real
model needs a worker that keeps a GPU.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker, TrainingSequence, _AsyncRolloutLoop

from latentrevise.adapters import core
from latentrevise.errors import ConfigError


class _RecoveringLoop(_AsyncRolloutLoop):
    async def _score_group(self, group: Any) -> list[Any]:
        await asyncio.to_thread(self._repair, group)
        return await super()._score_group(group)

    def _repair(self, group: Any) -> None:
        """Replace failed rows of a zero-hit group, in place; TRL's reward functions then judge what is there."""
        if "answer" not in group.reward_kwargs:
            raise ConfigError("AsyncGRPOTrainer: the data set has no column `answer`, by which groups are verified")
        if not _single_turn(group):
            self._push_metrics({"recovered/groups_left_alone": 1.0})
            return
        rows = [sequences[0] for sequences in group.completions_sequences]
        start = rows[0].completion_mask.index(1)
        found = core.current()(
            [
                core.Group(
                    id=str(group.group_id),
                    prompt_ids=rows[0].input_ids[:start],
                    answer=str(group.reward_kwargs["answer"][0]),
                    rows=[row.input_ids[start:] for row in rows],
                )
            ]
        )
        for r in found.replacements:
            prompt = rows[r.row].input_ids[:start]
            group.completions_sequences[r.row] = [
                TrainingSequence(
                    input_ids=[*prompt, *r.ids],
                    completion_mask=[0] * start + r.trained,
                    old_log_probs=[0.0] * start + r.logprobs,
                    rollout_id=rows[r.row].rollout_id,
                )
            ]
            group.completions_ids[r.row] = r.ids
            group.completions[r.row] = [{"role": "assistant", "content": r.text}]
        self._push_metrics({name: value for name, value in found.metrics.items() if not math.isnan(value)})


class RecoveringRolloutWorker(AsyncRolloutWorker):
    """TRL's rollout worker, of the same arguments; LATENTREVISE_ADAPTER names the settings of the repairs."""

    _loop_cls = _RecoveringLoop


def _single_turn(group: Any) -> bool:
    """One row a conversation, no tools, and nothing behind the prompt that was not sampled."""
    return not sum(group.tool_call_counts) and all(
        len(sequences) == 1 and 0 not in sequences[0].completion_mask[sequences[0].completion_mask.index(1) :]
        for sequences in group.completions_sequences
    )
