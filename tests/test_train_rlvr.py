"""RLVR through TRL's own loop: equal to it when nothing is recovered; repairs, streams, masks, losses, resumption."""

import math
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from benchmarks.training_plan import UNGUARDED
from latentrevise import strategies
from latentrevise.config import load_config
from latentrevise.data.records import Prompt, Rollout
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.engines import HFEngine, SamplingParams
from latentrevise.engines.draw import choose
from latentrevise.errors import ConfigError
from latentrevise.model.loading import load_model
from latentrevise.model.policy import Policy
from latentrevise.recovery.evaluate import EvalConfig
from latentrevise.revise.hull import Mixture
from latentrevise.strategies import Proposal
from latentrevise.train.groups import Groups, VerifiedReward
from latentrevise.train.repair import Repair, Repairer, RepairSettings, Rescue, replaced
from latentrevise.train.rlvr import RecoveringGRPOTrainer, RLVRSettings, train_rlvr
from latentrevise.train.settings import trl_arguments
from latentrevise.verify.verifier import Judgement, Verifier
from tests.tiny import BOS, EOS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 24,
    "learning_rate": 1e-2,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def encode(text):
    return tuple(TOKENIZER.encode(text))


PROMPTS = [Prompt(f"p{i}", f"q{c}", (BOS, *encode(f"q{c}=")), "7") for i, c in enumerate("abcdef")]


class Boxing(HFEngine):
    """Begins every continuation with the answer to PROMPTS, boxed; the log-probs are the model's."""

    def _sample(self, *args):
        forced = iter(encode("\\boxed{7}"))

        def boxing(*given):
            own, token = choose(*given), next(forced, None)
            return own if token is None else torch.full_like(own, token)

        with patch("latentrevise.engines.hf.choose", boxing):
            return super()._sample(*args)


@dataclass(frozen=True)
class Told:
    """A strategy for tests: the same prefix for all, as tokens or as a mixture of one atom each."""

    name: str = "told"
    uses_answer: bool = True
    backend: str = "none"
    latent: bool = False
    prefix: str = "so"

    def propose(self, tools, work, samples):
        return [[self.proposal(item, samples)] for item in work]

    def proposal(self, item, samples):
        ids = encode(self.prefix)
        return Proposal(
            n=samples,
            plain_ids=ids,
            mixture=Mixture(torch.tensor(ids)[:, None], torch.ones(len(ids), 1)) if self.latent else None,
            latent=self.latent,
            parent=item.cuts[0].sample_id,
            original_ids=item.cuts[0].prefix_ids,
        )


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setitem(strategies._STRATEGIES, "told", lambda settings: Told())
    return RepairSettings(strategy="told", samples=4, guards=UNGUARDED)


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as own:
        yield own


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model on disk, from where TRL loads its reference copy."""
    place = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(place)
    return place


def rows(prompts=PROMPTS):
    return Dataset.from_list(
        [{"prompt": p.text, "prompt_ids": list(p.ids), "answer": p.answer, "prompt_id": p.id} for p in prompts]
    )


def variety(completion_ids, **_):
    """A reward that differs from row to row."""
    return [len(set(ids)) / 10 for ids in completion_ids]


class Plain(GRPOTrainer):
    """TRL's trainer on the same prompt ids."""

    def _tokenize_prompts(self, prompts):
        by_text = {p.text: list(p.ids) for p in PROMPTS}
        return [by_text[text] for text in prompts], None, {}


def history(trainer):
    return torch.tensor([[e["loss"], e["grad_norm"], e["entropy"]] for e in trainer.state.log_history if "loss" in e])


def assert_same(ours, theirs):
    assert len(history(theirs)) == 3
    torch.testing.assert_close(history(ours), history(theirs), atol=1e-5, rtol=1e-5)
    for (name, a), (_, b) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)


def compared(tmp_path, verifier, saved, settings, theirs=None, **changes):
    """Both trainers after three steps from one model; ``theirs``: arguments of TRL's alone. SGD: Adam turns rounding in
    tiny gradients into whole steps."""
    from transformers import AutoModelForCausalLM

    trainers = []
    recovering = {"verifier": verifier, "settings": settings}
    for cls, alone, own in ((Plain, theirs or {}, {}), (RecoveringGRPOTrainer, {}, recovering)):
        trainer = cls(
            model=AutoModelForCausalLM.from_pretrained(saved),
            args=trl_arguments(GRPOConfig, tmp_path / cls.__name__, ARGUMENTS | {"optim": "sgd"} | changes | alone),
            train_dataset=rows(),
            processing_class=TOKENIZER,
            reward_funcs=[variety],
            **own,
        )
        trainer.train()
        trainers.append(trainer)
    return trainers


NOTHING = RLVRSettings(repair=RepairSettings(strategy="none"))


@pytest.mark.parametrize("name", ["min_agreement", "min_contrast"])
def test_a_repair_refuses_guards_that_it_does_not_measure(name):
    with pytest.raises(ConfigError, match=rf"repair\.guards\.{name} = 0\.5: a repair does not measure it"):
        load_config(RLVRSettings, None, [f"repair.guards.{name}=0.5"])


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "dapo", "num_iterations": 2, "temperature": 0.8},
        {"loss_type": "grpo", "beta": 0.1},
    ],
)
def test_equal_to_trl_when_nothing_is_recovered(tmp_path, verifier, saved, changes):
    theirs, ours = compared(tmp_path, verifier, saved, NOTHING, **changes)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("loss", "theirs", "changes"),
    [
        ("grpo", {"loss_type": "grpo"}, {}),
        ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28}, {"num_iterations": 2, "beta": 0.1}),
    ],
)
def test_losses_of_the_registry_equal_those_of_trl(tmp_path, verifier, saved, loss, theirs, changes):
    theirs, ours = compared(tmp_path, verifier, saved, replace(NOTHING, loss=loss), theirs, **changes)
    assert_same(ours, theirs)


def trained(tmp_path, verifier, settings, engine=Boxing, **changes):
    model = tiny_model()
    trainer = RecoveringGRPOTrainer(
        model=model,
        args=trl_arguments(GRPOConfig, tmp_path, ARGUMENTS | changes),
        train_dataset=rows(),
        processing_class=TOKENIZER,
        verifier=verifier,
        settings=settings,
        engine=engine(model, TOKENIZER),
    )
    trainer.train()
    return trainer


def batch_of(trainer):
    """The last generation batch, in one piece."""
    parts = trainer._buffered_inputs
    return {k: torch.cat([p[k] for p in parts]) for k, v in parts[0].items() if v.ndim}


@pytest.mark.parametrize("convention", ["grpo_include", "onpolicy_baseline"])
def test_zero_hit_groups_are_repaired_in_place(tmp_path, verifier, told, convention):
    trainer = trained(tmp_path, verifier, RLVRSettings(repair=told, advantages=convention), max_steps=1)
    batch = batch_of(trainer)
    assert batch["recovered"].sum() == 2  # one row of each of the two groups
    assert len(batch["recovered"]) == 8
    high, low = (1.5, -0.5) if convention == "grpo_include" else (1.0, 0.0)
    torch.testing.assert_close(batch["advantages"][batch["recovered"]], torch.full((2,), high), atol=2e-3, rtol=0)
    torch.testing.assert_close(batch["advantages"][~batch["recovered"]], torch.full((6,), low), atol=2e-3, rtol=0)
    assert batch["outcome"].tolist() == batch["recovered"].float().tolist()
    assert batch["correct"].tolist() == [1.0] * 8
    text = TOKENIZER.decode(batch["completion_ids"][batch["recovered"]][0], skip_special_tokens=True)
    assert text.startswith("so\\boxed{")
    (entry,) = [e for e in trainer.state.log_history if "zero_hit/frac_groups" in e]
    assert entry["zero_hit/frac_groups"] == 1.0
    assert entry["zero_hit/rescued_frac"] == 1.0
    assert entry["recovered/frac_rows"] == 0.25
    assert entry["verifier/unknown_frac"] == entry["verifier/unparsed_frac"] == 0.0
    assert entry["recovered/answer_leak_frac"] == 0.0  # the guard is off
    assert abs(entry["recovered/reliance"]) < 1e-4  # what was fed were the plain tokens
    assert entry["rewards/verified/mean"] == 0.25
    for name in ("recovered/len_ratio", "time/revise_s"):
        assert entry[name] > 0


def test_an_answer_in_the_prefix_alone_is_no_recovery(tmp_path, verifier, told, monkeypatch):
    monkeypatch.setitem(strategies._STRATEGIES, "told", lambda settings: Told(prefix="so\\boxed{7}"))
    trainer = trained(tmp_path, verifier, RLVRSettings(repair=told), engine=HFEngine, max_steps=1)
    assert not batch_of(trainer)["recovered"].any()
    assert batch_of(trainer)["outcome"].tolist() == [0.0] * 8


@pytest.mark.parametrize(("positions", "recovered"), [(16, 1), (6, 0)])
def test_a_continuation_has_the_positions_that_the_model_has(verifier, told, positions, recovered):
    """Prompt and prefix take 6, the box 9."""
    model = tiny_model(max_position_embeddings=positions)
    repairer = Repairer(
        Policy(model, TOKENIZER), Boxing(model, TOKENIZER), TOKENIZER, verifier, told, SamplingParams(max_new_tokens=24)
    )
    failed = [Rollout("p0", f"p0/{i}", (5, 6), "", None, "wrong", "stop", ()) for i in range(4)]
    (repair,), _ = repairer.repair([(PROMPTS[0], failed, 0)])
    assert len(repair.rescues) == recovered
    assert all(len(PROMPTS[0].ids) + len(r.ids) <= positions for r in repair.rescues)


def test_a_group_with_an_undecided_row_is_left_alone():
    verdicts = ["wrong"] * 4 + ["wrong", "unknown"] + ["wrong"] * 2 + ["correct"] + ["wrong"] * 3
    groups = Groups([Judgement(verdict, None) for verdict in verdicts], 4)
    assert groups.zero_hit() == [0]
    assert groups.rows_without_correct({}) == set(range(8))
    assert groups.rows_without_correct({1: None}) == {4, 5, 6, 7}


def test_duplicates_go_first_then_the_longest():
    rows = [(1, 2), (1, 2, 3), (1, 2), (4,), (1, 2)]
    failed = [Rollout("p", f"p/{i}", ids, "", None, "wrong", "stop", ()) for i, ids in enumerate(rows)]
    rescues = [Rescue((i,), (1,), "", 0.0, 0.0) for i in range(4)]
    assert list(replaced(failed, Repair(rescues)).items()) == list(zip([2, 4, 1, 0], rescues, strict=True))


def test_a_prefix_that_was_not_fed_as_tokens_is_not_trained(tmp_path, verifier, told, monkeypatch):
    monkeypatch.setitem(strategies._STRATEGIES, "told", lambda settings: Told(latent=True))
    batch = batch_of(trained(tmp_path, verifier, RLVRSettings(repair=told), max_steps=1))
    assert batch["recovered"].sum() == 2
    prefix = len(encode("so"))
    assert not batch["tool_mask"][batch["recovered"], :prefix].any()
    assert batch["tool_mask"][batch["recovered"], prefix:].all()
    assert batch["tool_mask"][~batch["recovered"]].all()


def test_a_row_is_judged_once_before_its_group_is_repaired(tmp_path, verifier, told, monkeypatch):
    """And the strategy is handed what was found then: a second judgement could be another one."""
    asked, failed = [], []

    class Counting:
        pattern = verifier.pattern

        def verify(self, pairs):
            asked.append(len(pairs))
            return [replace(j, extracted="seen") for j in verifier.verify(pairs)]

    class Asked(Told):
        def propose(self, tools, work, samples):
            failed.extend((r.extracted, r.verdict) for item in work for r in item.failed)
            assert asked == [8]
            return super().propose(tools, work, samples)

    monkeypatch.setitem(strategies._STRATEGIES, "told", lambda settings: Asked())
    trained(tmp_path, Counting(), RLVRSettings(repair=told), max_steps=1)
    assert failed == [("seen", "wrong")] * 8


def test_a_strategy_is_told_where_steps_end(tmp_path, verifier, told, monkeypatch):
    seen = []

    class Asked(Told):
        def propose(self, tools, work, samples):
            seen.append(tools.boundary.stops["stop"])
            return super().propose(tools, work, samples)

    monkeypatch.setitem(strategies._STRATEGIES, "told", lambda settings: Asked())
    trained(tmp_path, verifier, RLVRSettings(repair=replace(told, prefix_boundary="}")), max_steps=1)
    assert seen
    assert set(seen) == {("}",)}


def test_groups_that_stay_dead_can_be_left_out(tmp_path, verifier):
    settings = replace(NOTHING, drop_unrescued=True, loss="nsr")
    trainer = trained(tmp_path, verifier, settings, max_steps=1)
    batch = batch_of(trainer)
    assert not (batch["tool_mask"] * batch["completion_mask"]).any()
    assert trainer.state.log_history[0]["loss"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), tiny_model().parameters(), strict=True))


@pytest.mark.parametrize("loss", ["luffy", "nft", "redi", "sft_mix", "topr"])
def test_every_kind_of_loss_runs_in_the_loop(tmp_path, verifier, told, loss):
    trainer = trained(tmp_path, verifier, RLVRSettings(repair=told, loss=loss), max_steps=1, num_iterations=2)
    (entry,) = [e for e in trainer.state.log_history if "grad_norm" in e]
    assert math.isfinite(entry["loss"])
    assert 0 < entry["grad_norm"] < math.inf


class Vllm:
    """What TRL asks of its vLLM client, answered by the model itself with log-probs that are a little off."""

    def __init__(self, trainer):
        self.trainer = trainer

    def sync_weights(self):
        pass

    def generate(self, prompts, num_generations, **_):
        g = torch.Generator().manual_seed(0)
        ids = [[*torch.randint(4, 97, (6,), generator=g).tolist(), EOS] for _ in prompts]
        out = []
        for prompt, row in zip(prompts, ids, strict=True):
            whole = torch.tensor([[*prompt, *row]])
            with torch.no_grad():
                logits = self.trainer._base(whole).logits[0, len(prompt) - 1 : -1]
            own = logits.log_softmax(-1).gather(1, torch.tensor(row)[:, None]).squeeze(1) - 0.01
            out.append([[value] for value in own.tolist()])
        return prompts, ids, out, None


def with_vllm(tmp_path, verifier, settings, correction):
    model = tiny_model()
    trainer = RecoveringGRPOTrainer(
        model=model,
        args=trl_arguments(GRPOConfig, tmp_path, ARGUMENTS | {"max_steps": 1}),
        train_dataset=rows(),
        processing_class=TOKENIZER,
        verifier=verifier,
        settings=settings,
        engine=Boxing(model, TOKENIZER),
    )
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Vllm(trainer), -1
    trainer.vllm_importance_sampling_correction = correction
    return trainer


def test_a_recovered_row_has_a_ratio_of_one_without_off_policy_correction(tmp_path, verifier, told):
    """Nothing computes old log-probs then: a loss of the registry has vLLM's alone, and those of its own rows only."""
    trainer = with_vllm(tmp_path, verifier, RLVRSettings(repair=told, loss="grpo"), correction=False)
    seen, loss = [], trainer._loss

    def watched(batch):
        seen.append(batch)
        return loss(batch)

    trainer._loss = watched
    trainer.train()
    assert sum(int(batch.recovered.sum()) for batch in seen) == 2
    for batch in seen:
        for row, ratio, trained in zip(batch.recovered, batch.ratio.detach(), batch.mask.bool(), strict=True):
            assert torch.equal(ratio[trained], torch.ones(int(trained.sum()))) == bool(row)


def test_the_plain_stream_is_what_off_policy_correction_sees(tmp_path, verifier, told):
    trainer = with_vllm(tmp_path, verifier, RLVRSettings(repair=told), correction=True)
    trainer.train()
    batch = batch_of(trainer)
    recovered, ratio = batch["recovered"], batch["importance_sampling_ratio"].squeeze(1)
    assert recovered.sum() == 2
    assert torch.equal(ratio[recovered], torch.ones(2))  # not zeroed, not exploded
    assert (ratio[~recovered] > 1.01).all()
    assert torch.equal(batch["sampling_per_token_logps"][recovered], batch["old_per_token_logps"][recovered])
    assert torch.isfinite(batch["sampling_per_token_logps"]).all()


def test_interrupted_training_resumes_to_the_same_losses(tmp_path, told):
    settings = RLVRSettings(
        repair=told, trainer=ARGUMENTS | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    )
    engine = Boxing(tiny_model(), TOKENIZER)
    whole = train_rlvr(tiny_model(), TOKENIZER, PROMPTS, tmp_path / "whole", settings, engine=engine)
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "resumed" / "checkpoint-2")
    resumed = train_rlvr(tiny_model(seed=9), TOKENIZER, PROMPTS, tmp_path / "resumed", settings, engine=engine)
    names = ("loss", "reward", "zero_hit/frac_groups", "recovered/reliance")
    found = [[[e[n] for n in names] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert len(found[0]) == 4
    assert found[0] == found[1]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_recovered_row_becomes_more_probable(tmp_path):
    """The whole way on the bundled model: sampled groups fail, the plausible hull recovers, the update takes it up."""
    family = get_family("rule")
    model, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    config = demo_config(family)
    prompts = [
        Prompt(r["id"], r["prompt"], tuple(tokenizer.encode(r["prompt"])), r["answer"]) for r in make_prompts(family, 4)
    ]
    repair = RepairSettings(
        strategy="latent-plausible",
        samples=8,
        prefix_fraction=config.prefix_fraction,
        prefix_boundary=config.prefix_boundary,
        answer_template=config.answer_template,
    )
    arguments = ARGUMENTS | {"max_steps": 1, "learning_rate": 1e-4, "gradient_accumulation_steps": 4}
    settings = RLVRSettings(
        repair=repair, trainer=arguments | {"max_completion_length": config.max_new_tokens, "warmup_steps": 0}
    )
    trainer = train_rlvr(model, tokenizer, prompts, tmp_path, settings)
    (entry,) = [e for e in trainer.state.log_history if "zero_hit/rescued_frac" in e]
    assert entry["zero_hit/frac_groups"] > 0
    assert entry["zero_hit/rescued_frac"] > 0
    batch = batch_of(trainer)
    assert (batch["advantages"][batch["recovered"]] > 0).all()
    before, _ = load_model(model_dir("rule"), dtype="float32", device="cpu")
    logp = []
    for policy in (before, trainer.model.eval()):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)[batch["recovered"]]
        seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)[batch["recovered"]]
        with torch.no_grad():
            logits = policy(input_ids=ids, attention_mask=seen).logits[:, :-1].log_softmax(-1)
        width = batch["completion_ids"].shape[1]
        rows = logits.gather(2, ids[:, 1:, None]).squeeze(2)[:, -width:]
        logp.append((rows * batch["completion_mask"][batch["recovered"]]).sum(1))
    assert (logp[1] > logp[0]).all()


def test_evaluation_in_the_loop(tmp_path, told):
    settings = RLVRSettings(
        repair=told,
        evaluation=EvalConfig(samples=2, k=(2,), max_new_tokens=4, resamples=10),
        trainer=ARGUMENTS
        | {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4},
    )
    trainer = train_rlvr(tiny_model(), TOKENIZER, PROMPTS, tmp_path, settings, PROMPTS[:2])
    assert any("eval_pass@2" in e for e in trainer.state.log_history)
    assert any("eval_rewards/verified/mean" in e for e in trainer.state.log_history)


def test_command(tmp_path):
    from typer.testing import CliRunner

    from latentrevise.cli import app
    from latentrevise.data.storage import write_jsonl

    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    rows = [{"task": p.text, "gold": p.answer} for p in PROMPTS]
    rows.append({"task": "1" * 250, "gold": "1"})  # of the model's 256 positions
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    own = ["repair.strategy=resample", "prompt_column=task", "answer_column=gold"]
    own += (f"trainer.{k}={v}" for k, v in (ARGUMENTS | {"max_steps": 1}).items())
    places = ["--model", tmp_path / "model", "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out"]
    arguments = ["train", "rlvr", *map(str, places), *(part for key in own for part in ("--set", key))]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"row {len(rows)} left out (over-long-prompt)" in result.output
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_reward_says_nothing_of_undecided_rows():
    class Slow:
        def verify(self, pairs):
            return [Judgement(v, None) for v in ("correct", "wrong", "unknown")]

    assert VerifiedReward(Slow())(["a", "b", [{"content": "c"}]], ["1"] * 3) == [1.0, 0.0, None]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"loss": "nft", "trainer": {"epsilon_high": 0.28, "entropy_coef": 0.1}}, "epsilon_high, trainer.entropy_coef"),
        ({"trainer": {"cast_lm_head_to_fp32": True}}, "cast_lm_head_to_fp32"),
        ({}, "trainer.eval_strategy"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path, settings, match):
    given = NOTHING if not settings else replace(NOTHING, **{**settings, "trainer": ARGUMENTS | settings["trainer"]})
    with pytest.raises(ConfigError, match=match):
        train_rlvr(tiny_model(), TOKENIZER, PROMPTS, tmp_path, given, [] if settings else PROMPTS)


def test_the_repairs_are_seeded_by_the_seed_of_the_run(tmp_path, verifier, told, monkeypatch):
    seeds = {}

    class Asked(Told):
        def propose(self, tools, work, samples):
            seeds.setdefault(seed, []).extend(item.seed for item in work)
            return super().propose(tools, work, samples)

    monkeypatch.setitem(strategies._STRATEGIES, "told", lambda settings: Asked())
    for seed in (0, 1):
        trained(tmp_path, verifier, RLVRSettings(repair=told, seed=seed), max_steps=1)
    assert len(seeds[0]) == 2
    assert not set(seeds[0]) & set(seeds[1])


def test_a_strategy_sees_the_conversation_that_the_ids_are_of(tmp_path, told, monkeypatch):
    seen = []

    class Asked(Told):
        def propose(self, tools, work, samples):
            seen.extend(item.prompt for item in work)
            return super().propose(tools, work, samples)

    monkeypatch.setitem(strategies._STRATEGIES, "told", lambda settings: Asked())
    said = [{"role": "system", "content": "be"}, {"role": "user", "content": "qa"}]
    prompts = [replace(PROMPTS[0], messages=said), PROMPTS[1]]
    settings = RLVRSettings(repair=told, trainer=ARGUMENTS | {"max_steps": 1})
    train_rlvr(tiny_model(), TOKENIZER, prompts, tmp_path, settings)
    assert {p.id: p.messages for p in seen} == {"p0": said, "p1": []}


def test_settings_are_checked():
    settings = load_config(RLVRSettings, overrides=["loss=nft", "loss_options.q_min=0.1", "repair.strategy=none"])
    assert settings.loss_options == {"q_min": 0.1}
    for bad, match in (
        (["loss=ppo"], "choose from"),
        (["loss_options.clip=0.1"], "name one"),
        (["repair.strategy=magic"], "unknown strategy"),
        (["repair.strategy=hint"], "no reference solution"),
        (["repair.replace=0"], "at least 1"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_config(RLVRSettings, overrides=bad)
