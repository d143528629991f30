"""Rollouts by this package's engines in TRL's loop: log-probs, new weights, seeds; with the real vLLM too."""

import math
from dataclasses import replace

import pytest
import torch
from trl import GRPOConfig
from typer.testing import CliRunner

from latentrevise import strategies
from latentrevise.cli import app
from latentrevise.data.records import Prompt
from latentrevise.data.storage import write_jsonl
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.engines import HFEngine, VLLMConfig, VLLMEngine
from latentrevise.engines.vllm_setup import unavailable
from latentrevise.errors import ConfigError
from latentrevise.model.loading import load_model
from latentrevise.train.repair import RepairSettings
from latentrevise.train.rlvr import RecoveringGRPOTrainer, RLVRSettings, train_rlvr
from latentrevise.train.settings import LoraSettings, trl_arguments
from latentrevise.verify.verifier import Verifier
from tests.test_train_rlvr import (
    ARGUMENTS,
    NOTHING,
    PROMPTS,
    TOKENIZER,
    UNGUARDED,
    Boxing,
    Told,
    batch_of,
    history,
    rows,
    variety,
)
from tests.tiny import EOS, tiny_model

real = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
SMALL = VLLMConfig(kv_cache_gib=1 / 16, max_sequences=64)
TOLERANCE = 1e-3  # nats, float32: of each token, between the engine that sampled it and the policy


def forced(model, request, ids):
    """Log-probs of ``ids`` behind a request, by a plain pass of the model as it is now."""
    table = model.get_input_embeddings()
    given = request.embeddings
    prompt = table(torch.tensor(request.ids)) if given is None else given
    training = model.training
    with torch.no_grad():
        embedded = torch.cat([prompt, table(torch.tensor(ids))])[None]
        logits = model.eval()(inputs_embeds=embedded, use_cache=False).logits[0, len(prompt) - 1 : -1]
    model.train(training)
    return logits.float().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


class Watched:
    """An engine, each of whose samples is compared with the policy as it is at that moment, and as it was at first."""

    def __init__(self, engine, start):
        self.engine, self.policy, self.start = engine, None, start
        self.updates, self.asleep = 0, False
        self.apart = {"tokens": [], "embeddings": []}  # from the policy
        self.moved = []  # from the policy at first

    @property
    def limit(self):
        return self.engine.limit

    def update(self, model):
        self.policy, self.updates = model, self.updates + 1
        self.engine.update(model)

    def sleep(self):
        self.asleep = True
        self.engine.sleep()

    def generate(self, requests, params, progress=None):
        self.asleep = False
        found = self.engine.generate(requests, params, progress)
        for request, completions in zip(requests, found, strict=True):
            for c in completions:
                ids, told = list(c.ids), list(c.logprobs)
                if c.end is not None:
                    ids.append(c.end[0])
                    told.append(c.end[1])
                told, kind = torch.tensor(told), "tokens" if request.embeddings is None else "embeddings"
                self.apart[kind].append(float((told - forced(self.policy, request, ids)).abs().max()))
                if kind == "tokens":
                    self.moved.append(float((told - forced(self.start, request, ids)).abs().max()))
        return found


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as own:
        yield own


def make(tmp_path, verifier, settings, sampler, model=None, tokenizer=TOKENIZER, data=None, rewards=None, **changes):
    model = model or tiny_model()
    return RecoveringGRPOTrainer(
        model=model,
        args=trl_arguments(GRPOConfig, tmp_path, ARGUMENTS | changes),
        train_dataset=data or rows(),
        processing_class=tokenizer,
        peft_config=settings.lora.peft(),
        verifier=verifier,
        settings=settings,
        rollouts=sampler(model, tokenizer),
        reward_funcs=rewards,
    )


def hf(model, tokenizer):
    return Watched(HFEngine(model, tokenizer), tiny_model())


def test_an_engine_samples_rollouts_and_continuations_of_each_steps_weights(tmp_path, verifier, monkeypatch):
    """With a mixture before the continuations; ratios of TRL's correction are 1, ends of rows have log-probs too."""
    monkeypatch.setitem(strategies._STRATEGIES, "told", lambda settings: Told(latent=True))
    repair = RepairSettings(strategy="told", samples=4, guards=UNGUARDED)

    def boxing(model, tokenizer):  # every continuation begins with the answer, every rollout does as well: no repair
        return Watched(Boxing(model, tokenizer), tiny_model())

    trainer = make(tmp_path / "solved", verifier, RLVRSettings(repair=repair), boxing, max_steps=1)
    trainer.train()
    assert not batch_of(trainer)["recovered"].any()
    assert batch_of(trainer)["outcome"].all()

    trainer = make(tmp_path / "failed", verifier, NOTHING, hf, rewards=[variety], max_completion_length=60)
    trainer.train()
    watched, batch = trainer.vllm_generation.engine, batch_of(trainer)
    assert (watched.updates, watched.asleep) == (3, True)
    assert max(watched.apart["tokens"]) < TOLERANCE
    assert max(watched.moved[-8:]) > 20 * TOLERANCE  # not the log-probs of the first weights
    mask = batch["completion_mask"].bool()
    assert (batch["completion_ids"][mask] == EOS).any()
    torch.testing.assert_close(
        batch["sampling_per_token_logps"][mask], batch["old_per_token_logps"][mask], atol=TOLERANCE, rtol=0
    )
    assert all(e["sampling/sampling_logp_difference/max"] < TOLERANCE for e in trainer.state.log_history if "loss" in e)


def test_a_resumed_run_samples_what_an_undisturbed_one_does(tmp_path):
    settings = replace(NOTHING, trainer=ARGUMENTS | {"save_strategy": "steps", "save_steps": 1, "max_steps": 3})

    def run(place, model):
        engine = HFEngine(model, TOKENIZER)
        return train_rlvr(model, TOKENIZER, PROMPTS, tmp_path / place, settings, rollouts=engine)

    whole = run("whole", tiny_model())
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole" / "checkpoint-1").rename(tmp_path / "resumed" / "checkpoint-1")
    resumed = run("resumed", tiny_model(seed=9))
    assert torch.equal(batch_of(resumed)["completion_ids"], batch_of(whole)["completion_ids"])
    assert len(history(whole)) == 3
    assert torch.equal(history(resumed), history(whole))


def test_other_temperatures_have_no_correction(tmp_path, verifier):
    """Their log-probs are not the policy's at that temperature: TRL gets none, and the ratio is to the old policy."""
    changes = {"temperature": 0.7, "num_iterations": 2, "vllm_importance_sampling_correction": False, "max_steps": 2}
    trainer = make(tmp_path, verifier, replace(NOTHING, loss="grpo"), hf, **changes)
    trainer.train()
    batch = batch_of(trainer)
    assert torch.equal(batch["sampling_per_token_logps"], batch["old_per_token_logps"])
    assert all(map(math.isfinite, history(trainer).flatten().tolist()))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"temperature": 0.7}, "trainer.temperature = 0.7"),
        ({"min_p": 0.1, "repetition_penalty": 1.1}, "trainer.min_p, trainer.repetition_penalty"),
        ({"use_transformers_continuous_batching": True}, "another engine"),
    ],
)
def test_what_an_engine_would_ignore_is_refused(tmp_path, verifier, changes, match):
    with pytest.raises(ConfigError, match=match):
        make(tmp_path, verifier, NOTHING, hf, **changes)


# The real vLLM
# ------------------------------------------------------------------------------------------------------------------


def rule(count):
    family = get_family("rule")
    model, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    return family, model, tokenizer, make_prompts(family, count, split="develop", seed=3)


@real
@pytest.mark.parametrize("lora", [0, 4])
def test_vllm_in_the_loop(tmp_path, verifier, lora):
    """Three steps: one engine samples rollouts and what follows revised prefixes (as embeddings), each time with the
    log-probs of the policy as it is then; the recovered rows are trained on."""
    family, model, tokenizer, prompts = rule(12)
    start = load_model(model_dir("rule"), dtype="float32", device="cpu")[0]
    config = demo_config(family)
    repair = RepairSettings(
        strategy="latent",
        samples=8,
        prefix_fraction=config.prefix_fraction,
        prefix_boundary=config.prefix_boundary,
        answer_template=config.answer_template,
        guards=UNGUARDED,
    )
    given = [Prompt(row["id"], row["prompt"], tuple(tokenizer.encode(row["prompt"])), row["answer"]) for row in prompts]
    engine = VLLMEngine(model, tokenizer, SMALL)
    trainer = make(
        tmp_path,
        verifier,
        RLVRSettings(repair=repair, lora=LoraSettings(rank=lora)),
        lambda *_: Watched(engine, start),
        model,
        tokenizer,
        rows(given),
        max_completion_length=config.max_new_tokens,
        gradient_accumulation_steps=4,
        learning_rate=3e-3,
    )
    try:
        trainer.train()
    finally:
        engine.close()
    watched, steps = trainer.vllm_generation.engine, [e for e in trainer.state.log_history if "loss" in e]
    assert len(steps) == watched.updates == 3
    assert len(watched.apart["tokens"]) == 3 * 16
    assert len(watched.apart["embeddings"]) >= 8
    assert max(watched.apart["tokens"] + watched.apart["embeddings"]) < TOLERANCE
    assert max(watched.moved[:16]) < TOLERANCE
    for step in (1, 2):
        assert max(watched.moved[16 * step : 16 * (step + 1)]) > 20 * TOLERANCE
    assert sum(e["recovered/frac_rows"] for e in steps) > 0
    assert all(e["sampling/sampling_logp_difference/max"] < TOLERANCE for e in steps)
    batch = batch_of(trainer)
    assert torch.isfinite(batch["sampling_per_token_logps"]).all()


@real
def test_vllm_by_the_command(tmp_path):
    family, _, _, prompts = rule(8)
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    template = demo_config(family).answer_template
    own = ["repair.strategy=resample", f"repair.answer_template={template}", "vllm.kv_cache_gib=0.0625"]
    own += (f"trainer.{k}={v}" for k, v in (ARGUMENTS | {"max_steps": 2}).items())
    words = ["train", "rlvr", "--model", model_dir("rule"), "--prompts", tmp_path / "prompts.jsonl"]
    words += ["--out", tmp_path / "out", "--engine", "vllm", *(part for key in own for part in ("--set", key))]
    found = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
