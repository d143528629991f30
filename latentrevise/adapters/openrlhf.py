"""OpenRLHF: an agent executor that repairs a prompt's samples once all of them are there.

    --train.agent_func_path $(python -c "import latentrevise.adapters as a; print(a.__path__[0])")/openrlhf.py
    --rollout.n_samples_per_prompt 8 --eval.n_samples_per_prompt 4

Runs in the rollout actors, before dynamic filtering. The reward is the verdict; an undecided row has 0. Evaluation uses
the same hook: give it another number of samples than ``group_size``, which must be set. ``device`` is a GPU with room:
the actor's own is vLLM's.

Hook: ``AgentExecutor.execute`` of the file named so, loaded by ``_load_agent_executor`` and called by
``RolloutRayActor.generate_responses`` in openrlhf/trainer/ray/vllm_engine.py; the response's fields as
``SamplesGenerator._process_response_into_experience`` reads them. OpenRLHF/OpenRLHF at 3c3be62 (2026-08-13), run with
0.11.2.
``execute`` sees one sample and is not told how many there are, but all calls for a prompt are made in one go by one
asyncio task, before any of them runs: that makes the group.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable
from typing import Any

from openrlhf.utils.agent import SingleTurnAgentExecutor

from latentrevise.adapters import core
from latentrevise.errors import ConfigError


class _Group:
    """The samples of one prompt: how many were asked for, those that are there, and whether all are done with.

    No dataclass: OpenRLHF does not enter the module it loads into ``sys.modules``, where one would look itself up.
    """

    def __init__(self) -> None:
        self.size, self.begun = 0, False
        self.responses: list[dict[str, Any]] = []
        self.done = asyncio.Event()
        self.error: BaseException | None = None


class AgentExecutor(SingleTurnAgentExecutor):
    """Single-turn sampling as OpenRLHF's own executor does it; the reward is the verdict, an undecided row has 0.

    Only groups of ``group_size`` rows (``rollout.n_samples_per_prompt``) are repaired: evaluation comes through here
    too, so ``eval.n_samples_per_prompt`` must be another number.
    """

    def __init__(self) -> None:
        super().__init__()
        self._groups: weakref.WeakKeyDictionary[Any, _Group] = weakref.WeakKeyDictionary()
        if core.current().settings.group_size < 2:
            raise ConfigError("OpenRLHF: set group_size to rollout.n_samples_per_prompt, evaluation is not repaired")

    def execute(
        self,
        prompt: str,
        label: str,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> Awaitable[dict[str, Any]]:
        """A coroutine for one sample. Not one itself: the call must count before any sample is drawn."""
        if images:
            raise ConfigError("OpenRLHF: repairing groups is for text without images; use an executor of its own")
        task = asyncio.current_task()
        group = self._groups.get(task)
        if group is None or group.begun:
            group = self._groups[task] = _Group()
        group.size += 1
        own = super().execute(prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images)
        return self._sampled(group, own, max_length)

    async def _sampled(self, group: _Group, own: Awaitable[dict[str, Any]], max_length: int) -> dict[str, Any]:
        group.begun = True
        response = {}
        try:
            response = await own
            group.responses.append(response)
            if len(group.responses) == group.size:
                await asyncio.to_thread(_judge, group.responses, max_length)
                group.done.set()
        except BaseException as error:  # the others wait for this one
            group.error = error
            group.done.set()
            raise
        await group.done.wait()
        if group.error is not None:
            raise RuntimeError("another sample of this prompt failed") from group.error
        return response


def _judge(responses: list[dict[str, Any]], max_length: int) -> None:
    """Rewards of a group, and replacements if it is zero-hit, in place. max_length: of prompt and response."""
    recovery = core.current()
    start = responses[0]["action_ranges"][0][0]
    prompt = responses[0]["observation_tokens"][:start]
    found = recovery(
        [
            core.Group(
                id=responses[0]["prompt"],
                prompt_ids=prompt,
                answer=str(responses[0]["label"]),
                rows=[response["observation_tokens"][start:] for response in responses],
            )
        ]
    )
    for response, verdict in zip(responses, found.verdicts[0], strict=True):
        response["reward"] = response["scores"] = recovery.settings.reward if verdict == "correct" else 0.0
        response["extra_logs"] = {"recovered": 0.0, "unknown": float(verdict == "unknown")}
    for r in found.replacements:
        if start + len(r.ids) > max_length:  # OpenRLHF would cut it, and the answer stands at its end
            core.log.warning("a recovered row of %d tokens does not fit; lower max_new_tokens", start + len(r.ids))
            continue
        response = responses[r.row]
        response["observation_tokens"] = [*prompt, *r.ids]
        response["action_ranges"] = core.spans(r.trained, start)
        if response["rollout_log_probs"] is not None:
            response["rollout_log_probs"] = [0.0] * start + r.logprobs
        response["truncated"] = not r.ended
        response["reward"] = response["scores"] = recovery.settings.reward
        response["extra_logs"] = {"recovered": 1.0, "unknown": 0.0}
