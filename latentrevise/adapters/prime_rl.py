"""prime-rl: the algorithm ``grpo`` with its zero-hit groups repaired before they are scored.

    python -m latentrevise.adapters.prime_rl @ orchestrator.toml       # in place of: orchestrator @ orchestrator.toml

Starts the orchestrator with the settings of its ``grpo``; for ``rl``, put a script ``orchestrator`` that calls it first
in ``PATH``. Task data need an ``answer``. The gate on advantages may stay on.

Hook: ``Algorithm.score_group`` of src/prime_rl/orchestrator/algo/base.py; a new algorithm is registered in
``ALGORITHM_CLASSES`` (algo/__init__.py), which no setting reaches, hence the command. Traces and their nodes as in
verifiers/v1/trace.py and graph.py, read by orchestrator/trajectories.py. PrimeIntellect-ai/prime-rl at 559b447
(2026-08-21), PrimeIntellect-ai/verifiers at a60a606 (2026-08-21).

A recovered row is trained by the ``rl`` loss with its plain log-probs. It cannot be sent to ``ce`` alone: a stream of
``rl`` weights that is zero throughout is read as none at all (``_loss_weights``), and a trace without a sampled token
is not trained.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from prime_rl.orchestrator.algo import ALGORITHM_CLASSES
from prime_rl.orchestrator.algo.base import iter_trainable_traces
from prime_rl.orchestrator.algo.grpo import GRPOAlgorithm

from latentrevise.adapters import core
from latentrevise.errors import ConfigError


class RecoveringGRPO(GRPOAlgorithm):
    """GRPO; its settings are those of prime-rl."""

    async def score_group(self, episodes: list[Any]) -> None:
        traces = [trace for _, trace in iter_trainable_traces(episodes)]
        if traces:
            await asyncio.to_thread(repair_traces, traces)
        await super().score_group(episodes)


def repair_traces(traces: Sequence[Any]) -> None:
    """Replace failed traces of a zero-hit group, in place. Traces of several turns are left alone, with their group."""
    sampled = [[node for node in trace.nodes if node.sampled] for trace in traces]
    if any(len(nodes) != 1 or trace.nodes[-1] is not nodes[0] for trace, nodes in zip(traces, sampled, strict=True)):
        core.log.info("a group of several turns is left alone")
        return
    data = traces[0].task.data
    answer = getattr(data, "answer", None)
    if answer is None:
        raise ConfigError(f"prime-rl: the task data ({type(data).__name__}) has no `answer` to verify by")
    starts = [nodes[0].mask.index(True) for nodes in sampled]
    prompt = [i for node in traces[0].nodes[:-1] for i in node.token_ids] + sampled[0][0].token_ids[: starts[0]]
    recovery = core.current()
    found = recovery(
        [
            core.Group(
                id=str(traces[0].task.key),
                prompt_ids=prompt,
                answer=str(answer),
                rows=[nodes[0].token_ids[start:] for nodes, start in zip(sampled, starts, strict=True)],
            )
        ]
    )
    for r in found.replacements:
        _replace(traces[r.row], sampled[r.row][0], starts[r.row], r, recovery.settings.reward)


def _replace(trace: Any, node: Any, start: int, r: core.Replacement, reward: float) -> None:
    """``logprobs`` has a value for each True of ``mask``. start: tokens of the chat's generation prompt."""
    for name in ("routed_experts", "kept_tokens"):
        if getattr(node, name) is not None:
            raise ConfigError(f"prime-rl recorded {name} while it sampled, which a recovered row cannot have")
    node.token_ids = [*node.token_ids[:start], *r.ids]
    node.mask = [False] * start + [bool(t) for t in r.trained]
    node.logprobs = [value for value, t in zip(r.logprobs, r.trained, strict=True) if t]
    node.is_content = []  # not attributed
    node.message = node.message.model_copy(update={"content": r.text, "reasoning_content": None})
    trace.rewards.clear()
    trace.record_reward("recovered", reward)
    trace.info["recovered"] = True


def main() -> None:
    """prime-rl's orchestrator, with ``grpo`` replaced."""
    from prime_rl.entrypoints.orchestrator import main as orchestrator

    ALGORITHM_CLASSES["grpo"] = RecoveringGRPO
    orchestrator()


if __name__ == "__main__":
    main()
