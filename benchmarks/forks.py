"""Greedy forks of one rollout at different places against one request, alternately in one run.

A random model of about SmolLM2-135M's shape. What is asked: the engine computes the rollout once and keeps its keys and
values once, so that the forks cost their own tokens.
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import harness
from latentrevise.engines import HFEngine, Request, SamplingParams

VOCABULARY, LAYERS = 49152, 30


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
    params = SamplingParams(temperature=0, max_new_tokens=3)
    seconds: dict[str, list[float]] = {"one": [], "forks": []}
    for number in range(options.rounds + 1):
        drawn = torch.randint(10, VOCABULARY, (options.rollout_tokens + 1,), generator=_generator(number)).tolist()
        rollout, other = drawn[:-1], drawn[-1]
        places = [options.rollout_tokens * (k + 1) // options.forks - 1 for k in range(options.forks)]
        asked = {"one": [Request(rollout)], "forks": [Request([*rollout[:at], other]) for at in places]}
        for name in ("one", "forks") if number % 2 else ("forks", "one"):
            taken = harness.clock(lambda requests=asked[name]: engine.generate(requests, params), device)
            if number:
                seconds[name].append(taken)
    ratios = [a / b for a, b in zip(seconds["forks"], seconds["one"], strict=True)]
    low, middle, high = harness.quantiles(ratios)
    one, forks = (harness.quantiles(seconds[name])[1] for name in ("one", "forks"))
    print(
        f"{dtype}, {layers} layers: {options.forks} forks of {options.rollout_tokens} tokens {forks:.2f} s, one"
        f" request {one:.2f} s: {middle:.2f} times ({low:.2f} to {high:.2f}), {report.threads} threads",
        flush=True,
    )
    return {
        "dtype": dtype,
        "layers": layers,
        "forks": options.forks,
        "rollout_tokens": options.rollout_tokens,
        "forks_s": forks,
        "one_s": one,
        "ratio": middle,
        "p20": low,
        "p80": high,
        "rounds": options.rounds,
    }


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


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
