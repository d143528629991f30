"""Tokens a second of the engines, from token prompts and from embedding prompts, and two ways to score tokens.

Random models in a folder of their own; no token ends a completion, so that every engine decodes the same number of
tokens. Each round has prompts of its own, the same for all: what a prefix cache kept of earlier rounds is of no use.

``scoring`` compares where log-probs of sampled continuations behind the plain prefix, and answer scores of branches,
may come from: the policy's packed pass (what the package uses) or vLLM's prompt log-probs.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import harness
from latentrevise.engines import Engine, HFEngine, Request, SamplingParams, VLLMConfig, VLLMEngine
from latentrevise.engines.vllm_setup import unavailable
from latentrevise.model.branches import Branch, score_branches
from latentrevise.model.loading import input_embedding
from latentrevise.model.policy import Policy

SHAPES = {
    "1M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "29M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}

Score = Callable[[list[list[int]], list[Branch]], torch.Tensor]


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sizes", nargs="+", choices=list(SHAPES), help="none: 1M and 29M, on a GPU 0.6B and 8B")
    group.add_argument("--requests", type=int, default=32, help="prompts a round")
    group.add_argument("--prompt-tokens", type=int, default=128)
    group.add_argument("--new-tokens", type=int, default=64)
    group.add_argument("--samples", type=int, nargs="+", default=[1, 8])


@dataclass(frozen=True)
class Work:
    """One cell of the table: ``requests`` prompts of ``prompt`` tokens, ``n`` completions of ``new`` tokens each."""

    size: str
    dtype: str
    requests: int
    prompt: int
    new: int
    n: int


def main(options: argparse.Namespace) -> dict:
    """``python -m benchmarks engines``: see ``--help`` for the options it reads."""
    device = torch.device(options.device)
    report = harness.Report.start("engines", device)
    if (why := unavailable()) is not None:
        report.absent["vllm"] = why
        print(f"vllm is left out: {why}")
    gpu = device.type == "cuda"
    cells: list[dict] = []
    for size in options.sizes or (["0.6B", "8B"] if gpu else ["1M", "29M"]):
        for dtype in options.dtype or (["bfloat16"] if gpu else ["float32", "bfloat16"]):
            with tempfile.TemporaryDirectory() as folder:
                model = build(size, dtype, device, Path(folder))
                engines: dict[str, Engine] = {"hf": HFEngine(model)}
                if why is None:
                    length = options.prompt_tokens + options.new_tokens
                    engines["vllm"] = VLLMEngine(model, config=VLLMConfig(max_length=max(256, length)))
                for n in options.samples:
                    work = Work(size, dtype, options.requests, options.prompt_tokens, options.new_tokens, n)
                    cells += sampling(engines, work, options.rounds)
                cells += scoring(engines, model, size, dtype, options)
                if why is None:
                    engines["vllm"].close()  # type: ignore[attr-defined]
    return report.to_json() | {"cells": cells}


def build(size: str, dtype: str, device: torch.device, folder: Path) -> Qwen3ForCausalLM:
    shape = SHAPES[size]
    config = Qwen3Config(
        **shape,
        vocab_size=8192 if shape["hidden_size"] <= 512 else 151936,
        num_key_value_heads=min(8, shape["num_attention_heads"]),
        head_dim=shape["hidden_size"] // shape["num_attention_heads"] if size != "0.6B" else 128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


def draw(rows: int, shape: tuple[int, int], seed: int) -> list[list[int]]:
    return torch.randint(10, rows, shape, generator=torch.Generator().manual_seed(seed)).tolist()


def sampling(engines: dict[str, Engine], work: Work, rounds: int) -> list[dict]:
    """Tokens a second of every engine and kind of prompt, and the ratio of the two kinds, round by round."""
    model = engines["hf"].model  # type: ignore[attr-defined]
    embedding, device = input_embedding(model), model.device
    rates: dict[str, list[float]] = {f"{name} {kind}": [] for name in engines for kind in ("tokens", "embeddings")}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            order = ["tokens", "embeddings"] if number % 2 else ["embeddings", "tokens"]
            for kind in order:
                ids = draw(8192, (work.requests, work.prompt), 1000 * number + work.n)
                if kind == "tokens":
                    requests = [Request(i) for i in ids]
                else:
                    with torch.no_grad():
                        rows = embedding(torch.tensor(ids, device=device))
                    requests = [Request(embeddings=row) for row in rows]
                params = SamplingParams(n=work.n, max_new_tokens=work.new, seed=number)
                seconds = harness.clock(lambda e=engine, r=requests, p=params: e.generate(r, p), device)
                if number:  # the first round starts engines and fills caches of compiled code
                    rates[f"{name} {kind}"].append(work.requests * work.n * work.new / seconds)
    cells = []
    for label, values in rates.items():
        p20, median, p80 = harness.quantiles(values)
        cell = vars(work) | {"implementation": label, "tokens_per_s": median, "p20": p20, "p80": p80, "rounds": rounds}
        if label.endswith("embeddings"):
            pairs = zip(values, rates[label.replace("embeddings", "tokens")], strict=True)
            cell["embeddings_over_tokens"] = harness.quantiles([a / b for a, b in pairs])[1]
        cells.append(cell)
        ratio = f", x{cell['embeddings_over_tokens']:.3f} of tokens" if "embeddings_over_tokens" in cell else ""
        print(
            f"{work.size} {work.dtype} n={work.n} {label}: {median:,.0f} tokens/s ({p20:,.0f} to {p80:,.0f}){ratio}",
            flush=True,
        )
    return cells


def scoring(
    engines: dict[str, Engine], model: Qwen3ForCausalLM, size: str, dtype: str, options: argparse.Namespace
) -> list[dict]:
    """Scored tokens a second: 8 continuations a prompt, and 16 branches of 12 tokens at positions of one trunk."""
    policy = Policy(model)
    ways: dict[str, Score] = {"policy": lambda trunks, branches: score_branches(policy, trunks, branches).total}
    if isinstance(vllm := engines.get("vllm"), VLLMEngine):
        ways["vllm"] = functools.partial(_by_vllm, vllm)
    prompts, cells = max(1, options.requests // 4), []
    for task, count, length in (("continuations", 8, options.new_tokens), ("branches", 16, 12)):
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds + 1):
            trunks = draw(8192, (prompts, options.prompt_tokens), 10_000 + number)
            ends = iter(draw(8192, (prompts * count, length), 20_000 + number))
            # Continuations leave at the end; branches all along the trunk.
            last = options.prompt_tokens
            places = [last if task == "continuations" else last * (k + 1) // count for k in range(count)]
            branches = [Branch(t, at, next(ends)) for t in range(prompts) for at in places]
            found: list[torch.Tensor] = []
            for name, way in ways.items():
                seconds = harness.clock(lambda w=way, t=trunks, b=branches, f=found: f.append(w(t, b)), model.device)
                if number:
                    rates[name].append(len(branches) * length / seconds)
            off = float((found[0] - found[-1]).abs().max()) / length
            if not off < (1e-3 if dtype == "float32" else 0.1):
                raise RuntimeError(f"policy and vLLM score differently, by {off:.1e} nats a token")
        for name, values in rates.items():
            p20, median, p80 = harness.quantiles(values)
            cells.append(
                {"size": size, "dtype": dtype, "task": task, "implementation": name}
                | {"scored_tokens_per_s": median, "p20": p20, "p80": p80, "rounds": options.rounds}
            )
            print(
                f"{size} {dtype} {task} by {name}: {median:,.0f} scored tokens/s ({p20:,.0f} to {p80:,.0f})", flush=True
            )
    return cells


def _by_vllm(engine: VLLMEngine, trunks: list[list[int]], branches: list[Branch]) -> torch.Tensor:
    """Summed log-prob of each branch from vLLM's log-probs of the prompt; it then computes the whole prompt."""
    from vllm import SamplingParams as Theirs

    engine.start()
    assert engine._llm is not None
    prompts = [{"prompt_token_ids": [*trunks[b.trunk][: b.at], *b.tokens]} for b in branches]
    params = Theirs(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    found = engine._llm.generate(prompts, params, use_tqdm=False)
    totals = []
    for output, branch in zip(found, branches, strict=True):
        rows = output.prompt_logprobs[branch.at :]
        totals.append(sum(row[token].logprob for row, token in zip(rows, branch.tokens, strict=True)))
    return torch.tensor(totals)
