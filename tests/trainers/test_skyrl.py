"""SkyRL 0.3.0: from its generator's output to its loss. Given rows stand for the inference engine's answers."""

import asyncio
import inspect

import numpy as np
import pytest
import torch
from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.train.config import AlgorithmConfig
from skyrl.train.dataset.preprocess import convert_prompts_responses_to_batch_tensors
from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
from skyrl.train.generators.utils import prepare_generator_input
from skyrl.train.utils.trainer_utils import handle_dynamic_sampling, validate_generator_output

from latentrevise.adapters.skyrl import RecoveringGenerator
from latentrevise.errors import ConfigError
from tests.test_adapters import (  # noqa: F401
    DUPLICATE,
    FAILED,
    LATENT,
    PREFIX,
    PROMPT,
    SOLVED,
    TOKENIZER,
    check,
    plain,
    recovery,
    verifier,
)
from tests.tiny import tiny_model


def sampled(monkeypatch, groups, phase="train", **changes):
    """A batch through the adapter, over SkyRL's own input and validation."""
    rows = [row for group in groups for row in group]
    output = {
        "prompt_token_ids": [list(PROMPT)] * len(rows),
        "response_ids": [list(row) for row in rows],
        "rewards": [float(row == SOLVED[3]) for row in rows],
        "loss_masks": [[1] * len(row) for row in rows],
        "stop_reasons": ["stop"] * len(rows),
        "rollout_metrics": None,
        "rollout_logprobs": [plain(PROMPT, row).tolist() for row in rows],
        **changes,
    }
    extras = {"reward_spec": {"method": "rule", "ground_truth": "7"}}
    prompts = [{"prompt": [], "env_class": None, "env_extras": extras, "uid": f"u{g}"} for g in range(len(groups))]
    given, uids = prepare_generator_input(prompts, len(groups[0]), {}, "gsm8k", phase, 3)

    async def own(self, input_batch, disable_tqdm=False):
        return output

    assert inspect.signature(own).parameters.keys() == inspect.signature(SkyRLGymGenerator.generate).parameters.keys()
    monkeypatch.setattr(SkyRLGymGenerator, "generate", own)
    found = asyncio.run(RecoveringGenerator.__new__(RecoveringGenerator).generate(given))
    validate_generator_output(len(rows), found)
    return found, uids


def test_a_zero_hit_group_is_repaired_and_a_lone_correct_row_kept(recovery, monkeypatch):  # noqa: F811
    output, uids = sampled(monkeypatch, [SOLVED, FAILED])
    assert output["rewards"] == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 2.0, 0.0]
    place = 4 + DUPLICATE
    check(recovery, output["response_ids"][place], output["loss_masks"][place], output["rollout_logprobs"][place])
    assert output["rollout_metrics"]["zero_hit/rescued_frac"] == 1.0
    # Its DAPO filter keeps both, and drops a group that stays dead.
    dead = {key: [*value, *value[:4]] for key, value in output.items() if isinstance(value, list)}
    dead["rewards"][8:] = [0.0] * 4
    sizes = {"type": "filter", "train_batch_size": 2, "n_samples_per_prompt": 4, "max_sample_batches": 1}
    state = {"sample_batch_count": 1}  # as its trainer begins
    kept, names, again, _ = handle_dynamic_sampling(
        dead | {"rollout_metrics": None}, [*uids, *["u2"] * 4], sizes, state
    )
    assert (names, again) == (uids, False)
    assert kept["response_ids"] == output["response_ids"]


def test_evaluation_and_rows_of_several_turns_stay_as_they_are(recovery, monkeypatch):  # noqa: F811
    output, _ = sampled(monkeypatch, [FAILED], phase="eval")
    assert output["response_ids"] == [list(row) for row in FAILED]
    masks = [[1] * len(row) for row in FAILED]
    masks[0][1] = 0
    output, _ = sampled(monkeypatch, [FAILED], loss_masks=masks)
    assert output["response_ids"] == [list(row) for row in FAILED]
    assert output["rollout_metrics"]["recovered/groups_left_alone"] == 1.0
    with pytest.raises(ConfigError, match="routing replay"):
        sampled(monkeypatch, [FAILED], rollout_expert_indices=[[]] * 4)


def test_to_the_loss(recovery, monkeypatch):  # noqa: F811
    """SkyRL's batch, its GRPO and its loss, with the off-policy correction on."""
    output, uids = sampled(monkeypatch, [SOLVED, FAILED])
    rewards = [[0.0] * (len(ids) - 1) + [r] for ids, r in zip(output["response_ids"], output["rewards"], strict=True)]
    sequences, attention, response, scores, trained, logprobs, _ = convert_prompts_responses_to_batch_tensors(
        TOKENIZER,
        output["prompt_token_ids"],
        output["response_ids"],
        rewards,
        output["loss_masks"],
        output["rollout_logprobs"],
    )
    advantages, _ = ppo_utils.compute_advantages_and_returns(
        scores.float(), response, np.array(uids), "grpo", config=None
    )
    place = 4 + DUPLICATE
    mask = trained.bool()
    given = len(PREFIX) if LATENT[recovery.settings.repair.strategy] else 0
    assert int(response[place].sum()) - int(mask[place].sum()) == given
    torch.testing.assert_close(advantages[place][mask[place]].unique(), torch.tensor([1.5]), atol=1e-3, rtol=0)
    others = [i for i in range(4, 8) if i != place]
    torch.testing.assert_close(advantages[others][mask[others]].unique(), torch.tensor([-0.5]), atol=1e-3, rtol=0)

    model, width = tiny_model(), trained.shape[1]
    logits = model(sequences, attention_mask=attention, position_ids=attention.cumsum(-1).sub(1).clamp(0)).logits
    scaled = logits[:, -width - 1 : -1] / recovery.settings.temperature
    own = scaled.log_softmax(-1).gather(2, sequences[:, -width:, None])[..., 0]
    own.retain_grad()
    config = AlgorithmConfig()
    correction = config.off_policy_correction
    correction.token_mask_is_threshold_low, correction.token_mask_is_threshold_high = 0.9, 1.1
    loss, _ = ppo_utils.ppo_policy_loss(own, own.detach(), advantages, config, trained.float(), logprobs)
    loss.backward()
    assert torch.equal(own.grad[place] != 0, mask[place])  # with log-probs of behind a revision it would be masked
    assert (own.grad[place][mask[place]] < 0).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
