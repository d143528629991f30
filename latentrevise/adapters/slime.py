"""slime: groups are repaired after a rollout, before they become training data.

    --rollout-sample-filter-path latentrevise.adapters.slime.repair_groups

Runs in the rollout manager (which Ray may start without a GPU). Leave ``check_reward_nonzero_std`` out of
``--dynamic-sampling-filter-path``: it drops groups without variance before this hook, zero-hit ones too.

Hook: ``filter_func(args, data)`` in slime/rollout/sglang_rollout.py (``generate_rollout_async``), which may change the
groups in place; fields of ``Sample`` as in slime/utils/types.py, read by ``_convert_samples_to_train_data`` in
slime/ray/rollout.py. THUDM/slime at 624b824 (2026-08-21).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentrevise.adapters import core
from latentrevise.errors import ConfigError


def repair_groups(args: Any, groups: Sequence[Sequence[Any]]) -> None:
    """Replace failed samples of zero-hit groups, in place. args: slime's namespace; groups: lists of ``Sample``."""
    recovery = core.current()
    able = [group for group in groups if all(_single_turn(sample) for sample in group)]
    if len(able) < len(groups):
        core.log.info("%d groups of several turns or with images are left alone", len(groups) - len(able))
    work = [
        core.Group(
            id=str(group[0].group_index),
            prompt_ids=_prompt(group[0]),
            answer=str(group[0].label),
            rows=[sample.tokens[len(sample.tokens) - sample.response_length :] for sample in group],
            usable=[sample.status in (sample.Status.COMPLETED, sample.Status.TRUNCATED) for sample in group],
        )
        for group in able
    ]
    for r in recovery(work).replacements:
        _replace(args, able[r.group][r.row], r, recovery.settings.reward)


def _prompt(sample: Any) -> list[int]:
    return list(sample.tokens[: len(sample.tokens) - sample.response_length])


def _single_turn(sample: Any) -> bool:
    """Text that was sampled in one piece: a list is a rollout in several samples, a 0 in the mask a tool's answer."""
    return not isinstance(sample, list) and not sample.multimodal_inputs and all(sample.loss_mask or [1])


def _replace(args: Any, sample: Any, r: core.Replacement, reward: float) -> None:
    for name in ("rollout_top_p_token_ids", "rollout_routed_experts", "teacher_log_probs"):
        if getattr(sample, name) is not None:
            raise ConfigError(
                f"slime recorded {name} while it sampled, which a recovered row cannot have; switch top-p replay,"
                " routing replay and on-policy distillation off"
            )
    sample.tokens = _prompt(sample) + r.ids
    sample.response, sample.response_length, sample.loss_mask = r.text, len(r.ids), r.trained
    if sample.rollout_log_probs is not None:
        sample.rollout_log_probs = r.logprobs
    key = getattr(args, "reward_key", None)
    sample.reward = {**(sample.reward or {}), key: reward} if key else reward
    sample.status = sample.Status.COMPLETED if r.ended else sample.Status.TRUNCATED
    sample.metadata = {**(sample.metadata or {}), "recovered": True}
