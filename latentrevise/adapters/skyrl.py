"""SkyRL: a generator that repairs zero-hit groups before its trainer sees them.

    from latentrevise.adapters.skyrl import RecoveringGenerator
    class Experiment(BasePPOExp):
        def get_generator(self, cfg, tokenizer, inference_engine_client):
            return RecoveringGenerator(cfg.generator, cfg.environment.skyrl_gym, inference_engine_client, tokenizer)

Runs before dynamic sampling, which may stay on; evaluation is not repaired. The answer is ``reward_spec.ground_truth``.
``step_wise_trajectories`` are refused. Install the package with ``--no-deps``: it demands transformers up to 5.8.

Hook: ``GeneratorInterface.generate`` (skyrl/train/generators/base.py), whose ``GeneratorOutput`` goes through
``validate_generator_output`` and dynamic sampling (skyrl/train/utils/trainer_utils.py) into the training batch. The
package skyrl 0.3.0.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator

from latentrevise.adapters import core
from latentrevise.errors import ConfigError


class RecoveringGenerator(SkyRLGymGenerator):  # type: ignore[misc]  # no types where SkyRL is not installed
    """SkyRL's own generator; groups of a training batch are repaired, evaluation's are not."""

    async def generate(self, input_batch: Any, disable_tqdm: bool = False) -> Any:
        """As SkyRL's; the answer is ``reward_spec.ground_truth``."""
        output = await super().generate(input_batch, disable_tqdm)
        if input_batch["batch_metadata"].training_phase == "train":
            await asyncio.to_thread(repair_groups, input_batch, output)
        return output


def repair_groups(given: Any, output: Any) -> None:
    """Replace failed rows of zero-hit groups, in place. given: SkyRL's GeneratorInput; output: its GeneratorOutput."""
    for name in ("rollout_expert_indices", "is_last_step"):
        if output.get(name) is not None:
            raise ConfigError(
                f"SkyRL recorded {name} while it sampled, which a recovered row cannot have; switch routing replay and"
                " step_wise_trajectories off"
            )
    recovery = core.current()
    groups: dict[str, list[int]] = {}
    for i, trajectory in enumerate(given["trajectory_ids"]):
        groups.setdefault(trajectory.instance_id, []).append(i)
    able = {uid: rows for uid, rows in groups.items() if _single_turn(output, rows)}
    found = recovery(
        [
            core.Group(
                id=uid,
                prompt_ids=output["prompt_token_ids"][rows[0]],
                answer=str(given["env_extras"][rows[0]]["reward_spec"]["ground_truth"]),
                rows=[output["response_ids"][i] for i in rows],
                usable=[output["stop_reasons"][i] in ("stop", "length") for i in rows],
            )
            for uid, rows in able.items()
        ]
    )
    members = list(able.values())
    for r in found.replacements:
        _replace(output, members[r.group][r.row], r, recovery.settings.reward)
    measured = {name: value for name, value in found.metrics.items() if not math.isnan(value)}
    measured["recovered/groups_left_alone"] = float(len(groups) - len(able))
    output["rollout_metrics"] = {**(output["rollout_metrics"] or {}), **measured}


def _single_turn(output: Any, rows: list[int]) -> bool:
    """Text that was sampled in one piece: a mask of both kinds has a tool's answer in it, one of zeros was filtered for
    its length."""
    return not output.get("pixel_values") and all(len(set(output["loss_masks"][i])) <= 1 for i in rows)


def _replace(output: Any, i: int, r: core.Replacement, reward: float) -> None:
    output["response_ids"][i], output["loss_masks"][i] = r.ids, r.trained
    output["stop_reasons"][i] = "stop" if r.ended else "length"
    per_token = isinstance(output["rewards"][i], list)
    output["rewards"][i] = [0.0] * (len(r.ids) - 1) + [reward] if per_token else reward
    if output["rollout_logprobs"] is not None:
        output["rollout_logprobs"][i] = r.logprobs
