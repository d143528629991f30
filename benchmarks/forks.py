"""What requests that share tokens cost together: forks of one rollout, and prompts with a beginning in common.

A random model of about SmolLM2-135M's shape. Greedy forks of one rollout at different places are timed against one
request: the engine should compute the rollout once and keep its keys and values once, so that forks cost their own
tokens. Samples of prompts that share the beginning of a chat template are timed against those of prompts that share
nothing: what is shared should not make them dearer. Alternately in one run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import harness
from latentrevise.engines import HFEngine, Request, SamplingParams

VOCABULARY, LAYERS = 49152, 30
PROMPTS, LENGTH, BEGINNING = 8, 85, 25  # as the word problems' prompts are
SAMPLES, NEW = 8, 60


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
    cells = {"forks": _forks(options.forks, options.rollout_tokens), "prompts": _prompts}
    told = {
        "forks": f"{options.forks} forks of {options.rollout_tokens} tokens, against one request",
        "prompts": f"{PROMPTS} x {SAMPLES} samples, {BEGINNING} of {LENGTH} tokens in common, against none in common",
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


@dataclass(frozen=True)
class _Asked:
    """``shared``: the requests that are timed; ``other``: those that they are held against."""

    shared: list[Request]
    other: list[Request]
    params: SamplingParams


def _forks(count: int, length: int) -> Callable[[int], _Asked]:
    def ask(number: int) -> _Asked:
        drawn = _drawn(length + 1, number)
        rollout, other = drawn[:-1], drawn[-1]
        places = [length * (k + 1) // count - 1 for k in range(count)]
        params = SamplingParams(temperature=0, max_new_tokens=3)
        return _Asked([Request([*rollout[:at], other]) for at in places], [Request(rollout)], params)

    return ask


def _prompts(number: int) -> _Asked:
    drawn = _drawn(LENGTH * PROMPTS, number)
    prompts = [drawn[LENGTH * i : LENGTH * (i + 1)] for i in range(PROMPTS)]
    shared = [Request([*drawn[:BEGINNING], *prompt[BEGINNING:]], seed=i) for i, prompt in enumerate(prompts)]
    other = [Request(prompt, seed=i) for i, prompt in enumerate(prompts)]
    return _Asked(shared, other, SamplingParams(n=SAMPLES, max_new_tokens=NEW))


def _ratio(engine: HFEngine, ask: Callable[[int], _Asked], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of both, and of the rounds' ratios the median, 20 and 80 %. The first round is not counted."""
    seconds: dict[str, list[float]] = {"shared": [], "other": []}
    for number in range(rounds + 1):
        asked = ask(number)
        for name in ("other", "shared") if number % 2 else ("shared", "other"):
            requests = getattr(asked, name)
            taken = harness.clock(partial(engine.generate, requests, asked.params), device)
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
