"""What RLVR is compared with, in TRL's own loop: DAPO's dynamic sampling, losses that read more than outcomes, and the
traps on which trainers lose the one correct row of a group."""

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from latentrevise import strategies
from latentrevise.engines import HFEngine, SamplingParams
from latentrevise.errors import ConfigError
from latentrevise.model.policy import Policy
from latentrevise.train.groups import onpolicy_advantages, peers_of, with_gold
from latentrevise.train.repair import Repairer, RepairSettings
from latentrevise.train.rlvr import RecoveringGRPOTrainer, RLVRSettings
from latentrevise.train.settings import trl_arguments
from latentrevise.verify.verifier import Judgement, Verifier
from tests.test_train_rlvr import (
    ARGUMENTS,
    NOTHING,
    PROMPTS,
    TOKENIZER,
    UNGUARDED,
    Boxing,
    Rollout,
    Told,
    batch_of,
    encode,
    rows,
)
from tests.tiny import EOS, tiny_model


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as own:
        yield own


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setitem(strategies._STRATEGIES, "told", lambda settings: Told())
    return RepairSettings(strategy="told", samples=4, guards=UNGUARDED)


def trainer_of(tmp_path, verifier, settings, engine=Boxing, **changes):
    model = tiny_model()
    return RecoveringGRPOTrainer(
        model=model,
        args=trl_arguments(GRPOConfig, tmp_path, ARGUMENTS | {"max_steps": 1} | changes),
        train_dataset=rows(),
        processing_class=TOKENIZER,
        verifier=verifier,
        settings=settings,
        engine=engine(model, TOKENIZER),
    )


def watched(trainer):
    """The batches that the loss is given."""
    seen, loss = [], trainer._loss

    def watch(batch):
        seen.append(batch)
        return loss(batch)

    trainer._loss = watch
    return seen


def weights_of(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_oc_compares_with_what_the_row_was_sampled_with(tmp_path, verifier, told, monkeypatch):
    """Behind a mixture those are other log-probs; the prefix and the end of the row were sampled behind nothing."""

    class Shifted(Boxing):
        def generate(self, requests, params, progress=None):
            found = super().generate(requests, params)
            return [[replace(c, logprobs=[v + 0.5 for v in c.logprobs]) for c in own] for own in found]

    trainer = trainer_of(tmp_path, verifier, RLVRSettings(repair=told, loss="oc"), engine=Shifted)
    seen = watched(trainer)
    trainer.train()
    assert sum(int(b.recovered.sum()) for b in seen) == 2
    prefix = len(encode("so"))
    for b in seen:
        assert torch.equal(b.behind[~b.recovered], b.old[~b.recovered])
        for gap, mask in zip((b.behind - b.old)[b.recovered], b.mask[b.recovered], strict=True):
            length = int(mask.sum())
            assert not gap[:prefix].any()
            torch.testing.assert_close(
                gap[prefix : length - 1], torch.full((length - 1 - prefix,), 0.5), atol=1e-4, rtol=0
            )
    with pytest.raises(ConfigError, match="temperature"):
        trainer_of(tmp_path, verifier, RLVRSettings(repair=told, loss="oc"), temperature=0.7)


@pytest.mark.parametrize("loss", ["lens", "rl_zvp", "sign"])
def test_losses_that_learn_from_failures_run_in_the_loop(tmp_path, verifier, loss):
    trainer = trainer_of(tmp_path, verifier, replace(NOTHING, loss=loss), num_iterations=2)
    seen, before = watched(trainer), weights_of(trainer)
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    if loss == "lens":  # what is known of the other rows is what those rows say of themselves
        own = torch.cat([b.peers[:, 0, 1] for b in seen])
        logp = torch.cat([(b.old * b.mask).sum(1) / b.mask.sum(1) for b in seen])
        torch.testing.assert_close(own, logp, atol=1e-5, rtol=1e-5)
        groups = torch.cat([b.peers for b in seen])[:, :, 1].sort(1).values
        assert len(groups.unique(dim=0)) == 2


def test_verifree_learns_the_gold_answer_behind_the_sampled_reasoning(tmp_path, verifier, monkeypatch):
    def boxing(self, prompts, *_):
        return [[*encode("so"), *encode("\\boxed{3}"), EOS] if i % 2 else list(encode("no"))
                for i in range(len(prompts))], None  # fmt: skip

    monkeypatch.setattr(RecoveringGRPOTrainer, "_generate_single_turn", boxing)
    trainer = trainer_of(tmp_path, verifier, replace(NOTHING, loss="verifree"))
    seen = watched(trainer)
    trainer.train()
    batch = batch_of(trainer)
    boxed = 0
    for i, ids in enumerate(batch["completion_ids"]):  # TRL shuffles the rows
        gold = ids[batch["answer"][i] > 0].tolist()
        boxed += bool(gold)
        assert tuple(gold) == ((*encode("\\boxed{7}"), EOS) if gold else ())
        learned = ids[(batch["tool_mask"][i] * batch["completion_mask"][i]) > 0].tolist()
        assert learned == list(encode("so" if gold else "no"))
    assert boxed == 4
    assert not batch["outcome"].any()  # judged is what was sampled
    for b in seen:
        chance = torch.where(b.answer.sum(1) > 0, (b.old * b.answer).sum(1).exp(), 0.0)
        torch.testing.assert_close(b.peers[:, 0, 2].exp(), chance, atol=1e-6, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"repair\.strategy=none"):
        RLVRSettings(loss="verifree")


def test_gold_answers_in_rows():
    assert with_gold(encode("so\\boxed{3}"), "7", TOKENIZER)[0] == [*encode("so\\boxed{7}"), EOS]
    assert with_gold(encode("so 3"), "7", TOKENIZER) == (list(encode("so 3")), [1] * 4, [0] * 4)


def test_peers_begin_with_the_row_itself():
    stats = torch.arange(6.0)[:, None]
    assert peers_of(stats, 3)[..., 0].tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [3, 4, 5], [4, 5, 3], [5, 3, 4]]


def test_dynamic_sampling_takes_other_prompts(tmp_path, monkeypatch):
    """A verifier under which the prompts a and b fail throughout, and the others are mixed."""

    class Picky:
        def verify(self, pairs):
            wrong = [gold == "dead" or i % 2 for i, (gold, _) in enumerate(pairs)]
            return [Judgement("wrong" if w else "correct", None) for w in wrong]

    data = [{"prompt": p.text, "prompt_ids": list(p.ids), "answer": "dead" if p.id in ("p0", "p1") else "7",
             "prompt_id": p.id} for p in PROMPTS]  # fmt: skip
    found = {}
    for rounds in (0, 8):
        model = tiny_model()
        trainer = RecoveringGRPOTrainer(
            model=model,
            args=trl_arguments(GRPOConfig, tmp_path, ARGUMENTS | {"max_steps": 1, "shuffle_dataset": False}),
            train_dataset=Dataset.from_list(data),
            processing_class=TOKENIZER,
            verifier=Picky(),
            settings=replace(NOTHING, dynamic_sampling=rounds),
        )
        trainer.train()
        found[rounds] = batch_of(trainer), trainer
    batch, _ = found[0]
    assert not batch["outcome"].any()
    assert not batch["advantages"].any()
    batch, trainer = found[8]
    assert batch["outcome"].sum() == 4
    assert batch["correct"].tolist() == [2.0] * 8
    assert batch["advantages"].abs().min() > 0.5
    prompts = {
        tuple(ids[mask > 0].tolist()) for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    }
    assert prompts <= {p.ids for p in PROMPTS[2:]}  # the rows are of the prompts that they are trained behind
    assert set(trainer._logs["prompt"]) <= {p.text for p in PROMPTS[2:]}
    (entry,) = [e for e in trainer.state.log_history if "dynamic/renewed_groups" in e]
    assert entry["dynamic/renewed_groups"] >= 2
    assert entry["sampled/tokens"] > 0


# Traps on which trainers lose the correct row, or learn from rows that teach nothing
# ------------------------------------------------------------------------------------------------------------------


def test_a_given_prefix_counts_in_no_denominator(tmp_path, verifier, told, monkeypatch):
    """ms-swift #10106: a response prefix counted as completion."""
    monkeypatch.setitem(strategies._STRATEGIES, "told", lambda settings: Told(latent=True))
    trainer = trainer_of(tmp_path, verifier, RLVRSettings(repair=told, loss="dapo"))
    seen = watched(trainer)
    trainer.train()
    batch = batch_of(trainer)
    learned = int((batch["completion_mask"] * batch["tool_mask"]).sum())
    assert learned == int(batch["completion_mask"].sum()) - 2 * len(encode("so"))
    assert sum(float(b.tokens) for b in seen) / len(seen) == pytest.approx(learned)
    assert float(seen[0].correct_tokens + seen[0].wrong_tokens) == pytest.approx(learned)


@pytest.mark.parametrize("ended", [False, True])
def test_a_row_that_the_trainer_would_mask_is_no_rescue(verifier, told, ended):
    """mask_truncated_completions drops rows without an end: a group's one correct row must not be among them."""
    model = tiny_model()

    class Endless(Boxing):
        def generate(self, requests, params, progress=None):
            return [[replace(c, finish_reason="length") for c in own] for own in super().generate(requests, params)]

    parts = (Policy(model, TOKENIZER), Endless(model, TOKENIZER), TOKENIZER, verifier, told)
    repairer = Repairer(*parts, SamplingParams(max_new_tokens=24), ended=ended)
    failed = [Rollout("p0", f"p0/{i}", (5, 6), "", None, "wrong", "stop", ()) for i in range(4)]
    (repair,), _ = repairer.repair([(PROMPTS[0], failed, 0)])
    assert repair.correct > 0
    assert bool(repair.rescues) == (not ended)


@pytest.mark.parametrize("latent", [False, True])
def test_a_row_with_a_broken_prefix_is_no_rescue(verifier, told, monkeypatch, latent):
    """The text that a mixture is written as must not be much less likely than the failed prefix; fed text may be."""
    monkeypatch.setitem(strategies._STRATEGIES, "told", lambda settings: Told(latent=latent))
    model, text, failed = tiny_model(), encode("so"), encode("no")
    policy = Policy(model, TOKENIZER)

    def nll(ids):
        whole = torch.tensor([[*PROMPTS[0].ids, *ids]])
        logits = model(whole).logits[0, len(PROMPTS[0].ids) - 1 : -1].detach()
        return -float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).mean())

    gap = nll(text) - nll(failed)
    rollouts = [Rollout("p0", f"p0/{i}", (*failed, *failed), "", None, "wrong", "stop", ()) for i in range(4)]
    for threshold, kept in ((gap - 1e-3, not latent), (gap + 1e-3, True)):
        settings = replace(told, prefix_fraction=0.5, guards=replace(UNGUARDED, max_text_nll=threshold))
        parts = (policy, Boxing(model, TOKENIZER), TOKENIZER, verifier, settings)
        (repair,), _ = Repairer(*parts, SamplingParams(max_new_tokens=24)).repair([(PROMPTS[0], rollouts, 0)])
        assert bool(repair.rescues) == kept


def test_the_trainer_asks_for_ended_rows_where_it_masks_the_others(tmp_path, verifier, told):
    for mask in (False, True):
        trainer = trainer_of(tmp_path, verifier, RLVRSettings(repair=told), mask_truncated_completions=mask)
        trainer.train()
        assert trainer._repairer.ended == mask


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("drop", [False, True])
def test_dead_groups_have_no_kl_gradient_once_they_are_dropped(tmp_path, verifier, scale, drop):
    """TRL #5588, #7068: a KL term moves weights by rows whose advantage is zero."""
    settings = replace(NOTHING, drop_unrescued=drop)
    tiny_model().save_pretrained(tmp_path / "model")
    trainer = RecoveringGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        args=trl_arguments(GRPOConfig, tmp_path, ARGUMENTS | {"max_steps": 1, "beta": 0.5, "scale_rewards": scale}),
        train_dataset=rows(),
        processing_class=TOKENIZER,
        verifier=verifier,
        settings=settings,
    )
    with torch.no_grad():  # as after some training
        for parameter in trainer.ref_model.parameters():
            parameter.mul_(0.9)
    before = weights_of(trainer)
    trainer.train()
    moved = any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert moved == (not drop)


def test_dead_groups_count_in_no_denominator(tmp_path, verifier, told):
    """TRL #6365: rows that teach nothing, counted among the tokens that the DAPO loss divides by."""
    settings = RLVRSettings(repair=replace(told, max_groups=1), drop_unrescued=True, loss="dapo")
    trainer = trainer_of(tmp_path, verifier, settings)
    seen = watched(trainer)
    trainer.train()
    batch = batch_of(trainer)
    repaired = batch["correct"] > 0
    assert repaired.sum() == 4  # of two groups one
    kept = int(batch["completion_mask"][repaired].sum())
    assert sum(float(b.tokens) for b in seen) / len(seen) == pytest.approx(kept)


def test_prompts_that_are_all_dead_do_not_end_the_training(tmp_path, verifier):
    """verl #953, DAPO #22: filtered until nothing is left. After so many rounds the batch is taken as it is."""
    trainer = trainer_of(tmp_path, verifier, replace(NOTHING, dynamic_sampling=2))
    before = weights_of(trainer)
    trainer.train()
    (entry,) = [e for e in trainer.state.log_history if "dynamic/renewed_groups" in e]
    assert entry["dynamic/renewed_groups"] == 2 * 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_on_policy_baselines_by_hand(scale):
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, math.nan, 1.0])
    recovered = torch.tensor([True] + [False] * 7)
    found = onpolicy_advantages(rewards, recovered, 4, scale)
    first, second = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    std = {"group": (1.0, second.std()), "batch": (torch.cat([first, second]).std(),) * 2, "none": (1.0, 1.0)}[scale]
    mean = second.mean()
    expected = [1 / std[0], 0, 0, 0, (1 - mean) / std[1], -mean / std[1], 0, (1 - mean) / std[1]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_repair_says_what_it_cost(verifier, told):
    model = tiny_model()
    parts = (Policy(model, TOKENIZER), HFEngine(model, TOKENIZER), TOKENIZER, verifier, told)
    failed = [Rollout("p0", f"p0/{i}", (5, 6), "", None, "wrong", "stop", ()) for i in range(4)]
    (repair,), seconds = Repairer(*parts, SamplingParams(max_new_tokens=24)).repair([(PROMPTS[0], failed, 0)])
    assert repair.compute.forward == len(PROMPTS[0].ids) + len(encode("so"))  # one prefill, nothing right to be scored
    assert 4 <= repair.compute.decoded <= 4 * 22
    assert seconds > 0
