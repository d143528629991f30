"""What requests that share tokens cost: forks of one rollout, prompts with a beginning in common, and step by step.

A random model of about SmolLM2-135M's shape. Greedy forks of one rollout at different places are timed against one
request: the engine should compute the rollout once and keep its keys and values once, so that forks cost their own
tokens. Samples of prompts that share the beginning of a chat template are timed against those of prompts that share
nothing: what is shared should not make them dearer. Rollouts that are sampled in calls of a step each, as a search with
a step checker does, are timed with the keys and values of the calls before (``Engine.reusing``) and without.
Alternately in one run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import harness
from latentrevise.engines import HFEngine, Request, SamplingParams

VOCABULARY, LAYERS = 49152, 30
PROMPTS, LENGTH, BEGINNING = 8, 85, 25  # as the word problems' prompts are
SAMPLES, NEW = 8, 60
STEPS = 5  # of NEW / STEPS tokens


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--forks", type=int, default=48, help="each at a place of its own, 3 greedy tokens")
    group.add_argument("--rollout-tokens", type=int, default=700, help="prompt and rollout")


def main(options: argparse.Namespace) -> dict:
    """``python -m benchmarks forks``: see ``--help`` for the options it reads."""
    device = torch.device(options.device)
    report = harness.Report.start("forks", device)
    cells = [
        _cell(options, dtype, device, report)
        for dtype in options.dtype or (["bfloat16"] if device.type == "cuda" else ["float32"])
    ]
    return report.to_json() | {"cells": cells}


def _cell(options: argparse.Namespace, dtype: str, device: torch.device, report: harness.Report) -> dict:
    layers = options.layers or LAYERS
    engine = HFEngine(_model(layers, dtype, device))
    cells = {"forks": _forks(options.forks, options.rollout_tokens), "prompts": _prompts, "steps": _steps}
    told = {
        "forks": f"{options.forks} forks of {options.rollout_tokens} tokens, against one request",
        "prompts": f"{PROMPTS} x {SAMPLES} samples, {BEGINNING} of {LENGTH} tokens in common, against none in common",
        "steps": f"{PROMPTS} x {SAMPLES} rollouts in {STEPS} calls that reuse keys and values, or not",
    }
    found = {}
    for name, ask in cells.items():
        own = found[name] = _ratio(engine, ask, options.rounds, device)
        print(
            f"{dtype}, {layers} layers, {told[name]}: {own['shared_s']:.2f} s, {own['other_s']:.2f} s,"
            f" {own['ratio']:.2f} times ({own['p20']:.2f} to {own['p80']:.2f}), {report.threads} threads",
            flush=True,
        )
    asked = {"forks": options.forks, "rollout_tokens": options.rollout_tokens, "rounds": options.rounds}
    return {"dtype": dtype, "layers": layers, **asked, "cells": found}


Timed = Callable[[HFEngine], object]


def _forks(count: int, length: int) -> Callable[[int], tuple[Timed, Timed]]:
    def ask(number: int) -> tuple[Timed, Timed]:
        drawn = _drawn(length + 1, number)
        rollout, other = drawn[:-1], drawn[-1]
        places = [length * (k + 1) // count - 1 for k in range(count)]
        params = SamplingParams(temperature=0, max_new_tokens=3)
        forks = [Request([*rollout[:at], other]) for at in places]
        return _sampled(forks, params), _sampled([Request(rollout)], params)

    return ask


def _prompts(number: int) -> tuple[Timed, Timed]:
    drawn = _drawn(LENGTH * PROMPTS, number)
    prompts = [drawn[LENGTH * i : LENGTH * (i + 1)] for i in range(PROMPTS)]
    shared = [Request([*drawn[:BEGINNING], *prompt[BEGINNING:]], seed=i) for i, prompt in enumerate(prompts)]
    other = [Request(prompt, seed=i) for i, prompt in enumerate(prompts)]
    params = SamplingParams(n=SAMPLES, max_new_tokens=NEW)
    return _sampled(shared, params), _sampled(other, params)


def _steps(number: int) -> tuple[Timed, Timed]:
    drawn = _drawn(LENGTH * PROMPTS, number)
    prompts = [drawn[LENGTH * i : LENGTH * (i + 1)] for i in range(PROMPTS)]

    def walk(engine: HFEngine) -> None:
        rollouts = [prompt for prompt in prompts for _ in range(SAMPLES)]
        for step in range(STEPS):
            requests = [Request(ids, seed=STEPS * i + step) for i, ids in enumerate(rollouts)]
            found = engine.generate(requests, SamplingParams(max_new_tokens=NEW // STEPS))
            rollouts = [[*ids, *one.ids] for ids, (one,) in zip(rollouts, found, strict=True)]

    def reusing(engine: HFEngine) -> None:
        with engine.reusing():
            walk(engine)

    return reusing, walk


def _sampled(requests: list[Request], params: SamplingParams) -> Timed:
    return lambda engine: engine.generate(requests, params)


def _ratio(
    engine: HFEngine, ask: Callable[[int], tuple[Timed, Timed]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of what ``ask`` names, and of the rounds' ratios the median, 20 and 80 %. The first round is not
    counted."""
    seconds: dict[str, list[float]] = {"shared": [], "other": []}
    for number in range(rounds + 1):
        asked = dict(zip(("shared", "other"), ask(number), strict=True))
        for name in ("other", "shared") if number % 2 else ("shared", "other"):
            taken = harness.clock(partial(asked[name], engine), device)
            if number:
                seconds[name].append(taken)
    low, middle, high = harness.quantiles([a / b for a, b in zip(seconds["shared"], seconds["other"], strict=True)])
    medians = {f"{name}_s": harness.quantiles(own)[1] for name, own in seconds.items()}
    return medians | {"ratio": middle, "p20": low, "p80": high}


def _model(layers: int, dtype: str, device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    return model


def _drawn(count: int, seed: int) -> list[int]:
    return torch.randint(10, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
