"""The real vLLM, on a CPU: what it must compute, what it must refuse, new weights, death, and a whole recovery."""

import dataclasses
import logging

import pytest
import torch
from typer.testing import CliRunner

from latentrevise import recover
from latentrevise.cli import app
from latentrevise.data.storage import write_jsonl
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.engines import HFEngine, Request, SamplingParams, VLLMConfig, VLLMEngine
from latentrevise.engines.vllm_setup import named_weights, unavailable
from latentrevise.errors import ConfigError, ModelError, RunError
from latentrevise.model.loading import load_model
from tests.test_pipeline import content
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SMALL = VLLMConfig(kv_cache_gib=1 / 16, max_sequences=64)
GREEDY = SamplingParams(temperature=0, max_new_tokens=24)


def rule(dtype):
    return load_model(model_dir("rule"), dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def engine():
    """On the bundled model, in float32."""
    made = VLLMEngine(*rule("float32"), SMALL)
    yield made
    made.close()


def questions(tokenizer, count, seed=3):
    rows = make_prompts(get_family("rule"), count, split="develop", seed=seed)
    return [tokenizer.encode(row["prompt"]) for row in rows]


def forced(model, embeddings, completion):
    """Log-probs ``[n, V]`` of a plain pass over the prompt and the completion."""
    own = model.get_input_embeddings()(torch.tensor(completion, dtype=torch.long))
    with torch.no_grad():
        logits = model(inputs_embeds=torch.cat([embeddings, own])[None], use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)[len(embeddings) - 1 : -1]


def revised(model, ids, seed):
    g = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings().weight.detach()
    other = table[torch.randint(4, len(table), (len(ids),), generator=g)]
    return 0.8 * table[torch.tensor(ids)] + 0.2 * other


# What it computes
# ------------------------------------------------------------------------------------------------------------------


def test_float32_tokens_equal_those_of_transformers(engine):
    """From ids, from their embeddings and from revised prompts, in one batch; log-probs to 1e-4."""
    model = engine.model
    ids = questions(engine.tokenizer, 8)
    given = [model.get_input_embeddings()(torch.tensor(i)).detach() for i in ids]
    given += [revised(model, i, k) for k, i in enumerate(ids)]
    requests = [Request(i) for i in ids] + [Request(embeddings=e) for e in given]
    theirs = HFEngine(model, engine.tokenizer).generate(requests, GREEDY)
    ours = engine.generate(requests, GREEDY)
    assert [r[0].ids for r in ours] == [r[0].ids for r in theirs]
    assert [r[0].finish_reason for r in ours] == [r[0].finish_reason for r in theirs]
    for (mine,), (other,) in zip(ours, theirs, strict=True):
        assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert len({r[0].ids for r in ours}) > 6


def test_long_lists_are_handed_over_in_portions(engine, monkeypatch):
    engine.start()
    add, counts = engine._llm.llm_engine.add_request, []

    def watched(*args):
        counts.append(engine._llm.llm_engine.get_num_unfinished_requests())
        return add(*args)

    monkeypatch.setattr(engine._llm.llm_engine, "add_request", watched)
    found = engine.generate([Request([5 + i % 90]) for i in range(400)], SamplingParams(max_new_tokens=2))
    assert [len(row) for row in found] == [1] * 400
    assert 64 <= max(counts) < 2 * 64


def test_a_call_that_is_broken_off_leaves_nothing_behind(engine):
    """Its requests must not come back under the numbers of the next call's."""
    requests = [Request(ids) for ids in questions(engine.tokenizer, 10)]
    expected = engine.generate(requests[:3], GREEDY)

    def stop(*_):
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        engine.generate(requests[::-1], GREEDY, stop)
    assert engine._llm.llm_engine.get_num_unfinished_requests() == 0
    assert [r[0].ids for r in engine.generate(requests[:3], GREEDY)] == [r[0].ids for r in expected]


# What it refuses
# ------------------------------------------------------------------------------------------------------------------


def test_embeddings_that_are_fed_otherwise_are_refused(engine, monkeypatch):
    import vllm.inputs

    engine.start()
    true = vllm.inputs.embeds_input
    monkeypatch.setattr(vllm.inputs, "embeds_input", lambda rows: true(rows * 2))
    with pytest.raises(ModelError, match="does not feed prompt embeddings as they are given"):
        engine.compare()


def test_a_cache_that_confuses_embeddings_is_refused(engine, monkeypatch):
    """With vLLM's own cache key made blind to embeddings."""
    import vllm.v1.core.kv_cache_utils as utils

    engine.start()
    monkeypatch.setattr(utils, "_gen_prompt_embeds_extra_hash_keys", lambda *_: [])
    engine._llm.reset_prefix_cache()
    with pytest.raises(ModelError, match="does not tell embeddings apart"):
        engine.compare()
    monkeypatch.undo()
    engine._llm.reset_prefix_cache()
    engine.compare()


def test_other_weights_are_refused_at_the_start():
    model, tokenizer = rule("float32")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(ModelError, match=r"weights are not the policy's: .*pass it to `update`"):
        VLLMEngine(model, tokenizer, SMALL).start()


def test_what_vllm_cannot_load_is_named(tmp_path):
    tiny_model("qwen3", seed=1).save_pretrained(tmp_path)  # heads of 8
    tiny_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, device="cpu")
    with pytest.raises(ModelError, match=r"vLLM cannot run it .*head_dim.*--engine hf"):
        VLLMEngine(model, tokenizer, SMALL).start()
    model.config._name_or_path = ""
    with pytest.raises(ModelError, match="pass its directory"):
        VLLMEngine(model, tokenizer, SMALL)


def test_bfloat16_agrees_within_its_precision():
    """Sampled tokens have the policy's log-probs to a few hundredths; greedy ones are the policy's up to such ties."""
    model, tokenizer = rule("bfloat16")
    engine = VLLMEngine(model, tokenizer, SMALL)
    try:
        ids = questions(tokenizer, 6)
        given = [model.get_input_embeddings()(torch.tensor(i)).detach() for i in ids]
        given += [revised(model, i, k) for k, i in enumerate(ids)]
        requests = [Request(i) for i in ids] + [Request(embeddings=e) for e in given[6:]]
        sampled = engine.generate(requests, SamplingParams(n=2, max_new_tokens=24))
        greedy = engine.generate(requests, GREEDY)
    finally:
        engine.close()
    off = []
    for prompt, row, best in zip(given, sampled, greedy, strict=True):
        for c in row:
            expected = forced(model, prompt, c.ids).gather(1, torch.tensor(c.ids)[:, None])[:, 0]
            off += (expected - torch.tensor(c.logprobs)).abs().tolist()
        own = forced(model, prompt, best[0].ids)
        assert (own.amax(1) - own.gather(1, torch.tensor(best[0].ids)[:, None])[:, 0]).max() < 0.1
    off = torch.tensor(off)
    assert off.mean() < 0.02
    assert off.quantile(0.99) < 0.15


def test_settings():
    for name in ("kv_cache_gib", "max_length", "max_sequences", "tensor_parallel", "data_parallel"):
        with pytest.raises(ConfigError, match=name):
            VLLMConfig(**{name: 0})
    with pytest.raises(ConfigError, match="memory"):
        VLLMConfig(memory=1.0)
    model, tokenizer = rule("bfloat16")
    config = VLLMConfig(tensor_parallel=2, pipeline_parallel=3, data_parallel=4, max_length=100, kv_cache_gib=0.5)
    given = VLLMEngine(model, tokenizer, config).arguments()
    assert (given["tensor_parallel_size"], given["pipeline_parallel_size"], given["data_parallel_size"]) == (2, 3, 4)
    assert (given["dtype"], given["max_model_len"], given["kv_cache_memory_bytes"]) == ("bfloat16", 100, 1 << 29)
    assert given["load_format"] == "safetensors"


# New weights
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_new_weights_reach_a_running_engine(tmp_path, tied):
    """From memory, from a folder, with LoRA on top; each time log-probs are the new policy's, for warm prompts too."""
    from peft import LoraConfig, get_peft_model

    tiny_model("qwen3", seed=1, head_dim=32, tie_word_embeddings=tied).save_pretrained(tmp_path / "a")
    tiny_tokenizer().save_pretrained(tmp_path / "a")
    model, tokenizer = load_model(tmp_path / "a", device="cpu")
    other = tiny_model("qwen3", seed=2, head_dim=32, tie_word_embeddings=tied)
    other.save_pretrained(tmp_path / "b")
    requests = [Request([5 + i, *range(10, 80)]) for i in range(4)]
    engine = VLLMEngine(model, tokenizer, SMALL)

    def check(policy):
        for request, (c,) in zip(requests, engine.generate(requests, GREEDY), strict=True):
            prompt = policy.get_input_embeddings()(torch.tensor(request.ids)).detach()
            own = forced(policy, prompt, c.ids)
            chosen = own.gather(1, torch.tensor(c.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(c.logprobs), chosen, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(chosen, own.amax(1), rtol=1e-4, atol=1e-4)

    try:
        check(model)
        engine.update(other)
        check(other)
        engine.update(model, tmp_path / "a")
        check(model)
        adapted = get_peft_model(
            other, LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)
        )
        engine.update(adapted)
        check(adapted)
        engine.close()
        check(adapted)
    finally:
        engine.close()


def test_the_names_of_pushed_weights_are_those_of_a_checkpoint(tmp_path):
    """Also where transformers stores experts otherwise than it saves them."""
    from safetensors.torch import load_file
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )
    model.save_pretrained(tmp_path)
    loaded, _ = Qwen3MoeForCausalLM.from_pretrained(tmp_path), None
    found, stored = named_weights(loaded), load_file(tmp_path / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], value) for name, value in stored.items())


# Death
# ------------------------------------------------------------------------------------------------------------------


def poison(engine):
    """Hand vLLM, behind the engine's back, what kills it in its next step: rows of a wrong width."""
    from vllm import SamplingParams as Theirs
    from vllm.inputs import embeds_input

    engine._llm.llm_engine.add_request("poison", embeds_input(torch.zeros(5, 7)), Theirs(max_tokens=2))


def test_a_death_is_reported_and_survived_once(caplog):
    engine = VLLMEngine(*rule("float32"), SMALL)
    requests = [Request(ids, seed=i) for i, ids in enumerate(questions(engine.tokenizer, 60))]
    params = SamplingParams(n=2, max_new_tokens=40)
    try:
        undisturbed = engine.generate(requests, params)
        calls = []

        def progress(*now):
            calls.append(now)
            if len(calls) in (20, 90):
                poison(engine)

        with caplog.at_level(logging.ERROR):
            found = engine.generate(requests, params, progress)
        assert [[c.ids for c in row] for row in found] == [[c.ids for c in row] for row in undisturbed]
        assert len(calls) == 60, "finished requests are not run again"
        (record,) = [r for r in caplog.records if "vLLM died" in r.message]
        assert "of 60 requests finished" in record.message
        with pytest.raises(RunError, match=r"died a second time .*the same command goes on"):
            engine.generate([*requests, *requests], params, progress)
        assert engine.generate(requests[:1], params)[0][0].ids == undisturbed[0][0].ids
    finally:
        engine.close()


def test_weights_that_give_no_numbers_leave_nothing_behind(tmp_path):
    """One NaN row of the table, which the comparison does not meet: named, and later requests are clean."""
    made = tiny_model("qwen3", seed=1, head_dim=32)
    with torch.no_grad():
        made.get_input_embeddings().weight[3] = torch.nan  # <unk>
        made.lm_head.weight = torch.nn.Parameter(torch.randn(97, 32))
    made.config.tie_word_embeddings = False
    made.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    engine = VLLMEngine(*load_model(tmp_path, device="cpu"), SMALL)
    try:
        (before,) = engine.generate([Request([5, 6])], GREEDY)
        with pytest.raises(ModelError, match="request 1, token 0: the model's logits are not finite"):
            engine.generate([Request([5, 6]), Request([5, 3])], GREEDY)
        assert engine.generate([Request([5, 6])], GREEDY)[0] == before
    finally:
        engine.close()


# A whole recovery
# ------------------------------------------------------------------------------------------------------------------


def settings():
    return dataclasses.replace(
        demo_config(get_family("rule")), rollouts=4, samples=4, chunk=8, equal_compute_cap=8, vllm=SMALL
    )


def test_a_recovery_end_to_end_and_through_a_death(tmp_path, engine, monkeypatch, caplog):
    """Mine, revise, continue, verify on vLLM; then the same with vLLM dying in the middle: the same rows."""
    prompts = make_prompts(get_family("rule"), 24, split="develop", seed=3)
    model, tokenizer = engine.model, engine.tokenizer
    recovered = recover(model, tokenizer, prompts, settings(), tmp_path / "one", engine=engine)
    arms = recovered.metrics["arms"]
    assert recovered.metrics["zero_hit"] > 3
    assert arms["latent"]["recovered"] > 0
    assert recovered.trajectories
    for row in recovered.trajectories:
        assert len(row.sampling_logprobs) == len(row.plain_logprobs) == len(row.completion_ids)
        if row.strategy != "latent":
            assert row.plain_logprobs == pytest.approx(row.sampling_logprobs, abs=1e-3)

    other, calls = VLLMEngine(model, tokenizer, SMALL), 0
    generate = other.generate

    def fragile(requests, params, progress=None):
        nonlocal calls
        calls += 1
        if calls == 6:
            other.start()
            poison(other)
        return generate(requests, params, progress)

    monkeypatch.setattr(other, "generate", fragile)
    try:
        with caplog.at_level(logging.ERROR):
            recover(model, tokenizer, prompts, settings(), tmp_path / "two", engine=other)
    finally:
        other.close()
    assert other.restarts == 1
    assert "vLLM died" in caplog.text
    assert tokens_of(tmp_path / "two") == tokens_of(tmp_path / "one")


def tokens_of(out):
    """Every row's tokens and verdict: log-probs may differ in the last bits."""
    kept = ("sample_id", "start_id", "completion_ids", "verdict", "plain_ids", "finish_reason", "guard")
    return {
        name: [{k: row[k] for k in kept if k in row} for row in rows]
        for name, rows in content(out).items()
        if name.endswith(".parquet")
    }


def test_the_engine_is_an_option_of_every_command(tmp_path):
    """Mined with ``--engine vllm``; the later steps take the engine from the run."""
    import yaml

    from latentrevise.config import to_dict

    write_jsonl(tmp_path / "prompts.jsonl", make_prompts(get_family("rule"), 8, split="develop", seed=4))
    chosen = dataclasses.replace(settings(), strategies=("latent-plausible",), audit=False, equal_compute=False)
    values = to_dict(chosen)
    del values["vllm"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    words = [
        "--model",
        model_dir("rule"),
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--config",
        tmp_path / "config.yaml",
    ]
    words += ["--engine", "vllm", "--set", "vllm.kv_cache_gib=0.0625", "--dtype", "float32", "--device", "cpu"]
    out = ["--out", tmp_path / "run", "--quiet"]
    for command in (["mine", *words], ["revise"], ["continue"], ["verify"]):
        found = CliRunner().invoke(app, [*map(str, command), *map(str, out)], catch_exceptions=False)
        assert found.exit_code == 0, found.output
    assert "trajectories" in found.output
    assert '"engine": "VLLMEngine"' in (tmp_path / "run" / "run.json").read_text()
