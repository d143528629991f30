"""The bundled models: they load offline from package data and do what the documentation says of them."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from latentrevise.demo import BUNDLED, get_family, knowledge, make_prompts, model_dir
from latentrevise.demo import train as training
from latentrevise.engines import HFEngine, Request, SamplingParams
from latentrevise.errors import ModelError


@pytest.fixture(scope="module")
def bundled():
    torch.set_num_threads(1)
    return {
        name: (
            AutoModelForCausalLM.from_pretrained(model_dir(name), dtype=torch.float32, local_files_only=True).eval(),
            AutoTokenizer.from_pretrained(model_dir(name), local_files_only=True),
        )
        for name in BUNDLED
    }


def test_load_without_a_network():
    script = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network used')\n"
        "socket.socket.connect = refuse\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from latentrevise.demo import BUNDLED, model_dir\n"
        "for name in BUNDLED:\n"
        "    model = AutoModelForCausalLM.from_pretrained(model_dir(name))\n"
        "    tokenizer = AutoTokenizer.from_pretrained(model_dir(name))\n"
        "    print(name, model.config.model_type, model.dtype, model.config.vocab_size == len(tokenizer))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} qwen3 torch.bfloat16 True" for name in BUNDLED]


def test_size_and_weights():
    total = sum(f.stat().st_size for name in BUNDLED for f in model_dir(name).iterdir())
    assert total <= 8 * 2**20
    for name in BUNDLED:
        files = {f.name for f in model_dir(name).iterdir()}
        assert files == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "training.json",
        }
        with safe_open(model_dir(name) / "model.safetensors", "pt") as weights:
            tensors = [weights.get_tensor(key) for key in weights.keys()]  # noqa: SIM118 (not a mapping)
        assert {t.dtype for t in tensors} == {torch.bfloat16}
        assert all(t.isfinite().all() for t in tensors)
        record = json.loads((model_dir(name) / "training.json").read_text())
        assert sum(t.numel() for t in tensors) == record["parameters"]


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_tokenizer_is_the_familys(name, bundled):
    built = training.build_tokenizer(get_family(name))
    assert bundled[name][1].get_vocab() == built.get_vocab()


def test_rule_model_has_implicit_knowledge(bundled):
    """The precondition of answer-driven revision; an untrained model has 0.01 of each."""
    found = knowledge.implicit_knowledge(*bundled["rule"], get_family("rule"), 100)
    assert found["implicit_accuracy"] >= 0.8
    assert found["implicit_rank_first"] >= 0.6
    assert found["right_rule_plausible"] >= 0.8
    assert found["right_rule_proposed"] <= 0.15


def test_rule_model_misses_most_uniform_prompts(bundled):
    family = get_family("rule")
    found = knowledge.hits(*bundled["rule"], family, make_prompts(family, 32, split="develop", seed=1))
    assert 0.4 <= found["zero_hit"] <= 0.9
    trained = knowledge.hits(*bundled["rule"], family, knowledge.problems(family, 32, seed=1), n=8)
    assert trained["accuracy"] >= 0.1
    assert trained["accuracy"] > 2 * found["accuracy"]


def test_pair_model_knows_pairs_but_seldom_proposes_them(bundled):
    """The right names give the answer away, one right name does not, and behind the right names the model seldom fails.

    The last was 0.82 while frequent names were nearly always wrong ones in training, 0.89 while half of the traces
    tried other names first.
    """
    family = get_family("pair")
    found = knowledge.joint_knowledge(*bundled["pair"], family, 48)
    assert found["implicit_accuracy"] >= 0.95
    assert found["one_wrong_accuracy"] <= 0.05
    assert found["right_name_proposed"] <= 0.1
    model, tokenizer = bundled["pair"]
    rows = make_prompts(family, 64, split="develop", seed=3)
    steps = [" ".join(family.solution(family.parse(row["prompt"]))[:5]) for row in rows]
    assert {step.split()[-1] for step in steps} == {";"}
    requests = [Request(tokenizer.encode(f"{row['prompt']} {step}")) for row, step in zip(rows, steps, strict=True)]
    greedy = HFEngine(model, tokenizer).generate(requests, SamplingParams(n=1, temperature=0.0, max_new_tokens=60))
    valid = [
        family.check(row["prompt"], step, tokenizer.decode(completion.ids), row["answer"]).valid
        for row, step, (completion,) in zip(rows, steps, greedy, strict=True)
    ]
    assert sum(valid) / len(valid) >= 0.95


def test_a_model_that_is_not_bundled_is_refused():
    with pytest.raises(ModelError, match=r"no 'far' model is bundled, only those of rule, chain, pair;"):
        model_dir("far")


def test_chain_model_does_one_step_and_often_fails_six(bundled):
    family = get_family("chain")
    one, six = (
        knowledge.hits(*bundled["chain"], family, knowledge.problems(family, 32, seed=1, steps=steps), n=8)
        for steps in (1, 6)
    )
    assert one["accuracy"] >= 0.9
    assert one["valid"] >= 0.9
    assert 0.05 <= six["accuracy"] <= 0.45
    assert six["zero_hit"] >= 0.25


@pytest.mark.parametrize("name", BUNDLED)
def test_training_record_matches_the_model(name, bundled):
    """The documented figures are this model's: sampled anew, they agree within sampling noise."""
    family = get_family(name)
    record = json.loads((model_dir(name) / "training.json").read_text())
    assert record["evaluation"]["mined"]["prompts"] >= 128
    found = knowledge.hits(*bundled[name], family, make_prompts(family, 32, split="develop", seed=2))
    assert found["zero_hit"] == pytest.approx(record["evaluation"]["mined"]["zero_hit"], abs=0.25)
    assert found["accuracy"] == pytest.approx(record["evaluation"]["mined"]["accuracy"], abs=0.12)
