"""OpenRLHF 0.11.2: from its rollout actor's call to its loss. Given rows stand for vLLM's answers."""

import asyncio
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from openrlhf.models import Actor, PolicyLoss
from openrlhf.trainer.ppo_utils import experience_maker, samples_generator
from openrlhf.trainer.ray.vllm_engine import RolloutRayActor, _load_agent_executor
from vllm import SamplingParams

from tests.test_adapters import (  # noqa: F401
    FAILED,
    LATENT,
    PREFIX,
    PROMPT,
    SOLVED,
    TEMPERATURE,
    TOKENIZER,
    check,
    plain,
    recovery,
    verifier,
)
from tests.tiny import EOS, tiny_model

NAMES = {"solved": SOLVED, "failed": FAILED}


class Rollouts(RolloutRayActor.__ray_metadata__.modified_class):
    """OpenRLHF's actor with its executor, as it loads ours; ``generate`` answers with rows, each at its own time."""

    def __init__(self, rows):
        self.executor = _load_agent_executor(find_spec("latentrevise.adapters.openrlhf").origin)
        self.rows = list(rows)

    async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
        assert tuple(prompt_token_ids) == PROMPT
        row = self.rows.pop(0)
        await asyncio.sleep(0.001 * len(row))
        logprobs = [
            {token: SimpleNamespace(logprob=value)}
            for token, value in zip(row, plain(PROMPT, row).tolist(), strict=True)
        ]
        output = SimpleNamespace(token_ids=list(row), text="", finish_reason="stop", logprobs=logprobs)
        return SimpleNamespace(outputs=[output])


def responses(rows, max_tokens=24):
    return asyncio.run(
        Rollouts(rows).generate_responses(
            prompt="<bos>qa=",
            label="7",
            sampling_params=SamplingParams(temperature=TEMPERATURE, max_tokens=max_tokens, logprobs=1),
            max_length=len(PROMPT) + max_tokens,
            hf_tokenizer=TOKENIZER,
            num_samples=len(rows),
        )
    )


ARGS = SimpleNamespace(
    rollout=SimpleNamespace(n_samples_per_prompt=4, micro_batch_size=4),
    train=SimpleNamespace(dynamic_batch_enable=False, colocate_all=False, colocate_actor_ref=False),
    ds=SimpleNamespace(ring_attn_size=1, tensor_parallel_size=1),
    algo=SimpleNamespace(
        dynamic_filtering_range=(0.0, 1.0),
        kl=SimpleNamespace(use_loss=False),
        advantage=SimpleNamespace(estimator="group_norm", gamma=1.0),
    ),
    reward=SimpleNamespace(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None),
)


@pytest.fixture
def here(monkeypatch):
    """References of Ray are the values themselves, as in OpenRLHF's own tests."""
    direct = SimpleNamespace(wait=lambda refs, **_: (refs[:1], refs[1:]), get=lambda ref: ref, put=lambda value: value)
    for module in (samples_generator, experience_maker):
        monkeypatch.setattr(module, "ray", direct)


def sampled(names, **changes):
    """Through the generator with its dynamic filter on."""
    generator = samples_generator.SamplesGenerator(SimpleNamespace(args=ARGS), None, None, TOKENIZER, [])
    generator._dispatch_prompts_to_vllm = lambda prompts, labels, images, **_: [
        responses(NAMES[name], **changes) for name in prompts
    ]
    prompts = iter([(None, [name], ["7"], [None]) for name in names])
    return generator._generate_vllm(prompts, 2, dynamic_filtering=True, max_len=64)


class Group:
    """A group of one actor."""

    def __init__(self, actor):
        self.actor = actor

    def async_run_method_batch(self, method_name, sequences, action_mask, attention_mask, **_):
        assert method_name == "forward"
        with torch.no_grad():
            return [[self.actor(*given)] for given in zip(sequences, action_mask, attention_mask, strict=True)]

    def async_run_method(self, method_name):
        assert method_name == "empty_cache"


def test_the_filter_keeps_a_repaired_group_and_a_lone_correct_row(recovery, here):  # noqa: F811
    samples, consumed, _ = sampled(["solved", "failed"])
    assert (len(samples), consumed) == (8, 2)
    scores = [s.scores.item() for s in samples]
    assert scores[:4] == [0.0, 0.0, 0.0, 2.0]
    assert sorted(scores[4:]) == [0.0, 0.0, 0.0, 2.0]
    row = samples[4 + scores[4:].index(2.0)]
    start = len(PROMPT)
    ids = row.sequences[0, start:].tolist()
    check(recovery, ids, row.action_mask[0, start - 1 :].tolist(), row.rollout_log_probs[0, start - 1 :])
    assert bool(row.truncated) == (ids[-1] != EOS)


def test_a_group_that_stays_dead_is_filtered(recovery, here):  # noqa: F811
    """Its recovered row has no room in the trainer's length: it is left out, not cut, and another prompt comes."""
    samples, consumed, _ = sampled(["failed", "solved", "solved"], max_tokens=8)
    assert consumed == 3
    assert [s.scores.item() for s in samples] == [0.0, 0.0, 0.0, 2.0] * 2


def test_to_the_loss(recovery, here):  # noqa: F811
    """Advantages by the experience maker, OpenRLHF's own policy and loss with its off-policy mask on."""
    samples, _, _ = sampled(["solved", "failed"])
    actor = Actor(tiny_model(), temperature=TEMPERATURE)
    actor.packing_samples = False  # said for models that it loads itself, in half precision
    maker = experience_maker.RemoteExperienceMaker(
        Group(actor), None, None, None, SimpleNamespace(value=0.0), SimpleNamespace(args=ARGS), TOKENIZER
    )
    experiences = maker.make_experience_batch(samples)
    repaired = experiences[1]
    place = int(repaired.rewards.argmax())
    mask = repaired.action_mask.bool()
    given = len(PROMPT) - 1 + (len(PREFIX) if LATENT[recovery.settings.repair.strategy] else 0)
    assert not mask[place, :given].any()
    torch.testing.assert_close(repaired.advantages[place][mask[place]].unique(), torch.tensor([1.5]))
    others = [i for i in range(4) if i != place]
    torch.testing.assert_close(repaired.advantages[others][mask[others]].unique(), torch.tensor([-0.5]))

    logp = actor(repaired.sequences, repaired.action_mask, repaired.attention_mask)
    logp.retain_grad()
    loss = PolicyLoss(is_correction_level="token", is_correction_threshold=[0.9, 1.1])
    value, _, _, _, filtered = loss(
        logp, repaired.action_log_probs, repaired.advantages, mask, rollout_log_probs=repaired.rollout_log_probs
    )
    assert filtered.max() == 0.0  # with log-probs of behind a revision, the row would be
    value.backward()
    assert torch.equal(logp.grad[place] != 0, mask[place])
    assert (logp.grad[place][mask[place]] < 0).all()
    norms = [p.grad.norm() for p in actor.parameters()]
    assert all(torch.isfinite(n) for n in norms)
    assert max(norms) > 0
