"""verl: groups are repaired between the replay buffer and the update.

    trainer.v1.sampler.custom_sampler.path=pkg://latentrevise.adapters.verl
    trainer.v1.sampler.custom_sampler.name=RecoveringReplayBuffer  # trainer_mode=sync; else RecoveringReplayBufferAsync

The v1 trainer; runs in its driver (which Ray may start without a GPU), before any group is filtered. The reward must
come from the rollout (``rm_scores``). Metrics appear in verl's log. The published settings
(``latentrevise/configs/paper-grpo.yaml``) are ``algorithm.adv_estimator=grpo``, ``data.train_batch_size=512``,
``actor_rollout_ref.rollout.n=8``, and under ``actor_rollout_ref.actor`` ``use_kl_loss=true``, ``kl_loss_coef=0.001``.

Hook: ``ReplayBuffer.sample`` of verl/trainer/ppo/v1/replay_buffer.py; ``PPOTrainer._build_replay_buffer``
(trainer_base.py) makes the class that the two settings name. Fields of a trajectory as ``_agent_loop_postprocess`` of
agent_loop_tq.py stores them. verl-project/verl at 1dda039 (2026-08-22); run with 0.9.1. A custom sampler is given no
``algorithm.filter_groups``, so the groups that DAPO's filter would evict arrive here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from latentrevise.adapters import core
from latentrevise.errors import ConfigError

READ = ("prompts", "responses", "response_mask", "rm_scores", "reward_model", "extra_fields", "multi_modal_inputs")
UNKNOWN = ("routed_experts", "teacher_logprobs")


class _Recovering:
    """Zero-hit groups of a training batch are repaired in TransferQueue before the trainer reads them."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict]:  # type: ignore[type-arg]  # as verl declares it
        batch, metrics = super().sample(global_steps, partition_id, batch_size)  # type: ignore[misc]
        if partition_id != "val":
            metrics = {**metrics, **repair_batch(batch)}
        return batch, metrics


class RecoveringReplayBuffer(_Recovering, ReplayBuffer):
    """verl's replay buffer of the synchronous trainer."""


class RecoveringReplayBufferAsync(_Recovering, ReplayBufferAsync):
    """verl's replay buffer of the asynchronous trainers."""


def repair_batch(batch: Any) -> dict[str, float]:
    """Replace failed trajectories of zero-hit groups; ``batch``: a KVBatchMeta, whose tags are kept right.

    Keys are ``{uid}_{session}_{index}``: one group is one uid. Returns metrics.
    """
    groups: dict[str, list[int]] = {}
    for i, key in enumerate(batch.keys):
        groups.setdefault(key.rsplit("_", 2)[0], []).append(i)
    rows = _rows(batch.keys, batch.partition_id)
    able = {
        uid: group
        for uid, group in groups.items()
        if _single_turn([batch.keys[i] for i in group], [rows[i] for i in group])
    }
    recovery = core.current()
    found = recovery(
        [
            core.Group(
                id=uid,
                prompt_ids=rows[group[0]]["prompts"].tolist(),
                answer=str(rows[group[0]]["reward_model"]["ground_truth"]),
                rows=[rows[i]["responses"].tolist() for i in group],
            )
            for uid, group in able.items()
        ]
    )
    if found.replacements:
        members = list(able.values())
        places, fields = [members[r.group][r.row] for r in found.replacements], []
        for i, r in zip(places, found.replacements, strict=True):
            fields.append(_fields(rows[i], r, recovery.settings.reward))
            lengths = {"response_len": len(r.ids), "seq_len": len(fields[-1]["input_ids"])}
            batch.tags[i] = {**batch.tags[i], **lengths}
        tq.kv_batch_put(
            keys=[batch.keys[i] for i in places],
            partition_id=batch.partition_id,
            fields=list_of_dict_to_tensordict(fields),
            tags=[batch.tags[i] for i in places],
        )
    measured = {name: value for name, value in found.metrics.items() if not math.isnan(value)}  # verl averages them
    return {**measured, "recovered/groups_left_alone": float(len(groups) - len(able))}


def _rows(keys: Sequence[str], partition_id: str) -> list[dict[str, Any]]:
    """The fields of each trajectory. ``rollout_log_probs`` only where the rollout was told to calculate them."""
    data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id)
    if missing := [name for name in READ if name not in data]:
        raise ConfigError(f"verl's trajectories have no {', '.join(missing)}: the reward must come from the rollout")
    if recorded := [name for name in UNKNOWN if name in data]:
        raise ConfigError(f"verl recorded {', '.join(recorded)} while it sampled, which a recovered row cannot have")
    names = [*READ, *(("rollout_log_probs",) if "rollout_log_probs" in data else ())]
    columns = {name: [_plain(value) for value in data[name]] for name in names}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(keys))]


def _plain(value: Any) -> Any:
    """A tensor, or what tensordict wraps in NonTensorData."""
    return value if isinstance(value, torch.Tensor) else getattr(value, "data", value)


def _single_turn(keys: Sequence[str], rows: Sequence[dict[str, Any]]) -> bool:
    """One trajectory a session, text, sampled in one piece (a 0 in the mask is a tool's answer)."""
    alone = len({key.rsplit("_", 1)[0] for key in keys}) == len(keys)
    return alone and all(bool(row["response_mask"].all()) and not row["multi_modal_inputs"] for row in rows)


def _fields(row: dict[str, Any], r: core.Replacement, reward: float) -> dict[str, Any]:
    """What the agent loop would have stored for this response."""
    responses, mask = torch.tensor(r.ids), torch.tensor(r.trained)
    input_ids = torch.cat([row["prompts"], responses])
    scores = torch.zeros(len(r.ids))
    scores[-1] = reward
    extra = dict(row["extra_fields"])
    if "reward_extra_info" in extra:  # what the reward function told of the failed row
        told = extra["reward_extra_info"]
        extra["reward_extra_info"] = {k: reward if k in ("acc", "score") else v for k, v in told.items()}
    found = {
        "responses": responses,
        "response_mask": mask,
        "loss_mask": mask,
        "rm_scores": scores,
        "input_ids": input_ids,
        "position_ids": torch.arange(len(input_ids)),
        "extra_fields": extra,
    }
    if "rollout_log_probs" in row:
        found["rollout_log_probs"] = torch.tensor(r.logprobs)
    return found
