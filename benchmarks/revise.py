"""One step of the reviser against the obvious implementation, on random models of real shapes.

``obvious``: what one writes first with Hugging Face, written well: a batch of equal lengths, frozen parameters, two
full forward and backward passes a step over prompt, prefix and branch, the model's logits, ``grad @ E.T`` and an
argmin. Only the rows of the logits that are scored go through a softmax. ``loop``: the same, one prefix at a time.
``latentrevise``: the packed pass under the token budget the package chooses by itself; the prompts' cache is made
before the clock starts, as it is once for all K steps, but counts in the memory.

All three start from the same prefixes, and the gradient of the first is compared before anything is timed. Prompts
are as long as prefixes.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import harness
from latentrevise import FailedRollout, Mixture, ReviseConfig, Reviser, memory, solver
from latentrevise.objective import away_terms
from latentrevise.packing import batches, suffix_length

SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
KEY_HEADS = {"0.5B": 2, "1.5B": 2, "7B": 4}


@dataclass(frozen=True)
class Work:
    """Sizes of a measurement. prompt, prefix, gold (template and answer), failed: tokens; batch: prefixes."""

    shape: str
    layers: int
    vocab: int
    dtype: torch.dtype
    device: torch.device
    batch: int = 8
    prompt: int = 64
    prefix: int = 64
    gold: int = 12
    answer: int = 4
    failed: int = 8

    def model(self) -> Qwen2ForCausalLM:
        settings = SHAPES[self.shape] | {"num_hidden_layers": self.layers, "num_key_value_heads": KEY_HEADS[self.shape]}
        config = Qwen2Config(**settings, vocab_size=self.vocab, tie_word_embeddings=True, max_position_embeddings=4096)
        torch.manual_seed(0)
        with torch.device(self.device):
            return Qwen2ForCausalLM._from_config(config, dtype=self.dtype).eval().requires_grad_(False)

    def rollouts(self) -> list[FailedRollout]:
        g = torch.Generator().manual_seed(1)

        def ids(n: int) -> list[int]:
            return torch.randint(10, self.vocab, (n,), generator=g).tolist()

        template = self.gold - self.answer
        return [
            FailedRollout(
                ids(self.prompt), ids(self.prefix), ids(self.failed), ids(self.answer), template_ids=ids(template)
            )
            for _ in range(self.batch)
        ]

    @property
    def flops(self) -> float:
        """The fewest of a step: the suffixes once forward and backward through the body, the scored rows and the
        prefix against the table."""
        s = SHAPES[self.shape]
        d, kv = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"] * KEY_HEADS[self.shape]
        layer = 2 * d * d + 2 * d * kv + 3 * d * s["intermediate_size"]
        tokens = self.prefix + self.gold + self.failed - 2
        table = self.vocab * d * (2 * (self.answer + self.failed) + self.prefix)
        return 2.0 * self.batch * (2 * tokens * layer * self.layers + table)


class Obvious:
    """Two full passes a step."""

    def __init__(self, model: Qwen2ForCausalLM, rollouts: list[FailedRollout], config: ReviseConfig) -> None:
        self.model, self.config = model, config
        self.table = model.get_input_embeddings().weight

        def column(name: str) -> Tensor:
            return torch.tensor([getattr(r, name) for r in rollouts], device=self.table.device)

        self.prompt, self.answer = column("prompt_ids"), column("answer_ids")
        self.gold = torch.cat([column("template_ids"), self.answer], 1)
        self.failed = column("continuation_ids")[:, : config.away_window]
        self.z = self.table[column("prefix_ids")]

    def gradient(self) -> Tensor:
        total = torch.zeros_like(self.z)
        for branch, scored, weight in (
            (self.gold, self.answer.shape[1], self.config.alpha),
            (self.failed, self.failed.shape[1], self.config.beta),
        ):
            z = self.z.clone().requires_grad_(True)
            inputs = torch.cat([self.table[self.prompt], z, self.table[branch]], 1)
            logits = self.model(inputs_embeds=inputs, use_cache=False).logits
            rows = logits[:, -scored - 1 : -1].float().log_softmax(-1)
            logprobs = rows.gather(-1, branch[:, -scored:, None])[..., 0]
            terms = -logprobs if branch is self.gold else away_terms(logprobs, self.config)
            (weight * terms.mean(1).sum()).backward()
            assert z.grad is not None
            total += z.grad
        return total

    def step(self) -> Tensor:
        gradient = self.gradient()
        vertex = (gradient @ self.table.T).argmin(-1)
        return (1 - self.config.step_size) * self.z + self.config.step_size * self.table[vertex]


class Packed:
    """What ``Reviser.revise`` does in a step."""

    def __init__(self, model: Qwen2ForCausalLM, rollouts: list[FailedRollout], config: ReviseConfig) -> None:
        self.reviser = Reviser(model, config)
        self.rollouts = rollouts
        sizes = [(len(r.prompt_ids), suffix_length(r, config)) for r in rollouts]
        self.budget = config.token_budget or memory.token_budget(self.reviser.policy)
        with self.reviser._scope():
            self.batches = [
                self.reviser._batch(index, [rollouts[i] for i in index], config)
                for index in batches(sizes, self.budget)
            ]

    def gradient(self) -> Tensor:
        return self.reviser.value_and_grad(self.rollouts[:1])[0].grad

    def step(self) -> None:
        config = self.reviser.config
        with self.reviser._scope():
            for batch in self.batches:
                mixture = Mixture.from_tokens(batch.packing.prefix_ids, config.atoms)
                losses, gradients, _ = self.reviser._value_and_grad(batch, mixture, config)
                rows = batch.packing.prefix_row
                solver.advance(self.reviser.hull, mixture, gradients, rows, None, losses.total, _unused, 0, config)

    def whole(self) -> None:
        """With the prompts and one evaluation at the end: the whole memory."""
        Reviser(self.reviser.policy, replace(self.reviser.config, steps=1)).revise(self.rollouts)


def _unused(mixture: Mixture) -> Tensor:
    raise AssertionError("a constant step evaluates nothing")


def run(work: Work, report: harness.Report, rounds: int, loop: bool) -> dict:
    """Measure, add the rows to ``report`` and return ratios; the first implementation is ours."""
    model, rollouts, config = work.model(), work.rollouts(), ReviseConfig(beta=0.3, away_window=work.failed)
    packed, obvious = Packed(model, rollouts, config), Obvious(model, rollouts, config)
    singles = [Obvious(model, [rollout], config) for rollout in rollouts] if loop else []
    steps = {"latentrevise": packed.step, "obvious": obvious.step}
    if singles:
        steps["loop"] = lambda: [single.step() for single in singles]
    if not singles:
        report.absent["loop"] = "not asked for"
    extra = {
        "latentrevise": harness.extra_memory(packed.whole, work.device),
        "obvious": harness.extra_memory(obvious.step, work.device),
    }
    if singles:
        extra["loop"] = harness.extra_memory(singles[0].step, work.device)
    first = Obvious(model, rollouts[:1], config).gradient()[0].float()
    found = packed.gradient()
    difference = float((found - first).norm() / first.norm())
    if not difference < (1e-3 if work.dtype == torch.float32 else 0.2):
        raise RuntimeError(f"the two do not compute the same gradient: relative difference {difference:.1e}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(harness.clock(step, work.device))
            print(f"{name}: {times[name][-1]:.2f} s, {extra[name]:.0f} MiB", flush=True)
    dtype = str(work.dtype).removeprefix("torch.")
    shape = {"B": work.batch, "P": work.prompt, "T": work.prefix, "layers": work.layers, "V": work.vocab}
    floor = work.flops / harness.matmul_rate(work.device, work.dtype)
    for name, seconds in times.items():
        p20, median, p80 = harness.quantiles(seconds)
        row = (f"revise {work.shape}", shape, dtype, "random", name, 1e3 * median, 1e3 * p20, 1e3 * p80, rounds)
        rate = work.flops / median / 1e12
        report.rows.append(harness.Measurement(*row, rate, 100 * floor / median, extra[name]))
    ratios = [b / a for a, b in zip(times["latentrevise"], times["obvious"], strict=True)]
    p20, median, p80 = harness.quantiles(ratios)
    facts = {k: str(v) if isinstance(v, (torch.dtype, torch.device)) else v for k, v in asdict(work).items()}
    return facts | {
        "token_budget": packed.budget,
        "batches": len(packed.batches),
        "gradient_difference": difference,
        "speed_ratio": {"median": median, "p20": p20, "p80": p80, "rounds": rounds},
        "memory_ratio": extra["obvious"] / max(extra["latentrevise"], 1e-9),
        "prefixes_per_second": work.batch / (sum(times["latentrevise"]) / rounds),
    }


def scaling(work: Work, counts: list[int], rounds: int) -> list[dict]:
    """Seconds a step of ours over the number of prefixes; the model is shared, the rounds go over all sizes."""
    model, config = work.model(), ReviseConfig(beta=0.3, away_window=work.failed)
    rows = {n: Packed(model, replace(work, batch=n).rollouts(), config) for n in counts}
    times: dict[int, list[float]] = {n: [] for n in counts}
    for packed in rows.values():
        packed.step()
    for _ in range(rounds):
        for n, packed in rows.items():
            times[n].append(harness.clock(packed.step, work.device))
    found = []
    for n, seconds in times.items():
        p20, median, p80 = harness.quantiles(seconds)
        found.append({"prefixes": n, "median_s": median, "p20_s": p20, "p80_s": p80, "s_per_prefix": median / n})
    return found


def main(options: argparse.Namespace) -> dict:
    """``python -m benchmarks revise``: see ``--help`` for the options it reads."""
    device = torch.device(options.device)
    report = harness.Report.start("revise", device)
    documents, scales = [], []
    for dtype in [getattr(torch, name) for name in options.dtype or ["float32", "bfloat16"]]:
        report.floor[str(dtype).removeprefix("torch.")] = harness.matmul_rate(device, dtype) / 1e12
        for shape in options.shapes or (["0.5B", "1.5B", "7B"] if device.type == "cuda" else ["0.5B"]):
            layers = options.layers or SHAPES[shape]["num_hidden_layers"]
            work = Work(shape, layers, options.vocab, dtype, device)
            for prefix in options.T or [work.prefix]:
                documents.append(
                    run(replace(work, prompt=prefix, prefix=prefix), report, options.rounds, not options.no_loop)
                )
                show(documents[-1])
            if options.prefixes:
                scales.append({"shape": shape, "dtype": str(dtype), "layers": layers})
                scales[-1]["steps"] = scaling(work, options.prefixes, options.rounds)
                print(scales[-1])
    print(harness.table(report.rows))
    return report.to_json() | {"comparisons": documents, "scaling": scales}


def show(document: dict) -> None:
    ratio = document["speed_ratio"]
    print(
        f"{document['shape']} {document['dtype']} {document['layers']} layers, {document['batch']} prefixes: a step"
        f" x{ratio['median']:.2f} faster (x{ratio['p20']:.2f} to x{ratio['p80']:.2f} over {ratio['rounds']} rounds),"
        f" x{document['memory_ratio']:.1f} less memory over the model"
    )
