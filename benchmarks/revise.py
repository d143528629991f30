"""One step of the reviser (arXiv 2606.29938, Algorithm 1) against the obvious implementation, on random models of real
shapes.

``obvious``: what one writes first with Hugging Face, written well: a batch of equal lengths, frozen parameters, one
full forward and backward pass over prompt, prefix and failed continuation (explore and fluency) and one over prompt,
prefix, template and answer (guide), the model's logits, ``grad @ E.T`` and an argmin. Only the rows of the logits that
are scored go through a softmax. ``loop``: the same, one rollout at a time. ``latentrevise``: the packed pass under the
token budget the package chooses by itself; the prompts' cache is made before the clock starts, as it is once for all K
steps, but counts in the memory.

``cuda_graph``, on a GPU: ours with that setting; a step is a replay, and ``revision_s`` compares whole revisions, the
capture within.

Rollouts of M tokens are cut at rho = 0.8. All start from the same prefixes, and the gradient of the first is
compared before anything is timed. Beside the comparison: where our step's time goes, and with ``--rollouts``,
``--lengths`` and ``--steps`` how it grows with the number of rollouts, their prefixes' length and K. Utilisation is the
fewest FLOPs of the step over what torch's matmul does in that time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import harness
from latentrevise import FailedRollout, Mixture, ReviseConfig, Reviser, kernels
from latentrevise.model import memory
from latentrevise.model.packing import batches
from latentrevise.revise import objective, solver
from latentrevise.revise.reviser import _Batch

SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
KEY_HEADS = {"0.5B": 2, "1.5B": 2, "7B": 4}


@dataclass(frozen=True)
class Work:
    """Sizes of a measurement. prompt, prefix, gold (template and answer), failed: tokens; batch: rollouts."""

    shape: str
    layers: int
    vocab: int
    dtype: torch.dtype
    device: torch.device
    attention: str = "sdpa"
    batch: int = 8
    prompt: int = 64
    prefix: int = 205
    failed: int = 51
    gold: int = 16
    answer: int = 4

    def of_length(self, tokens: int, rho: float = 0.8) -> Work:
        """Rollouts of that many tokens, cut at ``rho``."""
        prefix = round(rho * tokens)
        return replace(self, prefix=prefix, failed=tokens - prefix)

    def model(self) -> Qwen2ForCausalLM:
        settings = SHAPES[self.shape] | {"num_hidden_layers": self.layers, "num_key_value_heads": KEY_HEADS[self.shape]}
        config = Qwen2Config(**settings, vocab_size=self.vocab, tie_word_embeddings=True, max_position_embeddings=16384)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = Qwen2ForCausalLM._from_config(config, dtype=self.dtype, attn_implementation=self.attention)
        return model.eval().requires_grad_(False)

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
        """The fewest of a step: the suffixes once forward and backward through the body, the scored rows
        (the prefix among them) and the oracle against the table. Keys of the prompt get no gradient, nor do weights."""
        s = SHAPES[self.shape]
        d, kv = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"] * KEY_HEADS[self.shape]
        layer = 2 * d * d + 2 * d * kv + 3 * d * s["intermediate_size"]
        ends = [self.gold - 1, self.failed - 1]
        tokens = self.prefix + sum(ends)
        # Pairs of a query and a key: scores and values forward, their two gradients each backward.
        own = self.prefix**2 / 2 + sum(n * self.prefix + n**2 / 2 for n in ends)
        attention = d * (6 * own + 4 * tokens * self.prompt)
        table = self.vocab * d * (2 * (self.answer + self.failed + self.prefix) + self.prefix)
        return 2.0 * self.batch * (self.layers * (2 * tokens * layer + attention) + table)


class Obvious:
    """Two full passes a step."""

    def __init__(self, model: Qwen2ForCausalLM, rollouts: list[FailedRollout], config: ReviseConfig) -> None:
        self.model, self.config = model, config
        self.table = model.get_input_embeddings().weight

        def column(name: str) -> Tensor:
            return torch.tensor([getattr(r, name) for r in rollouts], device=self.table.device)

        self.prompt, self.prefix, self.answer = column("prompt_ids"), column("prefix_ids"), column("answer_ids")
        self.gold = torch.cat([column("template_ids"), self.answer], 1)
        self.failed = column("continuation_ids")
        self.z = self.table[self.prefix]

    def gradient(self) -> Tensor:
        config, total = self.config, torch.zeros_like(self.z)
        both = torch.cat([self.prefix, self.failed], 1)
        weights = torch.full(both.shape, -config.fluency_weight, device=both.device)
        weights[:, self.prefix.shape[1] :] = config.explore_weight
        guide = torch.full(self.answer.shape, -config.guide_weight, device=both.device)
        for branch, targets, weight in ((self.failed, both, weights), (self.gold, self.answer, guide)):
            z = self.z.clone().requires_grad_(True)
            inputs = torch.cat([self.table[self.prompt], z, self.table[branch]], 1)
            logits = self.model(inputs_embeds=inputs, use_cache=False).logits
            rows = logits[:, -targets.shape[1] - 1 : -1].float().log_softmax(-1)
            (weight * rows.gather(-1, targets[..., None])[..., 0]).sum().backward()
            assert z.grad is not None
            total += z.grad
        return total

    def step(self) -> Tensor:
        gamma = solver.schedule(0, self.config)
        vertex = (self.gradient() @ self.table.T).argmin(-1)
        return (1 - gamma) * self.z + gamma * self.table[vertex]


class Packed:
    """What ``Reviser.revise`` does in a step."""

    def __init__(self, model: Qwen2ForCausalLM, rollouts: list[FailedRollout], config: ReviseConfig) -> None:
        self.reviser = Reviser(model, config)
        self.rollouts = rollouts
        sizes = [(len(r.prompt_ids), self.reviser.tokens(r)) for r in rollouts]
        self.budget = config.token_budget or memory.token_budget(self.reviser.policy, config.recompute)
        with self.reviser._scope():
            share = memory.cached_share(self.reviser.policy, config.recompute)
            self.batches = [
                self.reviser._batch(index, [rollouts[i] for i in index]) for index in batches(sizes, self.budget, share)
            ]
        self.evaluations = [self.reviser._evaluation(batch) for batch in self.batches]

    def gradient(self) -> Tensor:
        return self.reviser.value_and_grad(self.rollouts[:1])[0].grad

    def step(self) -> None:
        config = self.reviser.config
        with self.reviser._scope():
            for batch, evaluate in zip(self.batches, self.evaluations, strict=True):
                mixture = Mixture.from_tokens(batch.packing.prefix_ids, config.atoms)
                _, gradient = evaluate(mixture)
                solver.advance(self.reviser.hull, mixture, gradient, batch.packing.prefix_row, None, 0, config)

    def revise(self, steps: int = 1) -> None:
        """The public call: with the prompts' cache before the steps and one evaluation behind them."""
        Reviser(self.reviser.policy, replace(self.reviser.config, steps=steps)).revise(self.rollouts)

    def parts(self, device: torch.device) -> dict[str, float]:
        """Seconds of a step, part by part; the update is what ``hull_step`` does beside the oracle."""
        policy, hull, config = self.reviser.policy, self.reviser.hull, self.reviser.config
        seconds = dict.fromkeys(("body forward", "head", "body backward", "oracle", "update"), 0.0)
        done: dict[str, Tensor] = {}

        def part(name: str, work: Callable[[], Tensor]) -> None:
            def call() -> None:
                done[name] = work()

            seconds[name] += harness.clock(call, device)

        with self.reviser._scope():
            for batch in self.batches:
                packing = batch.packing
                mixture = Mixture.from_tokens(packing.prefix_ids, config.atoms)
                z = mixture.embed(hull.table).requires_grad_(True)
                part("body forward", lambda z=z, b=batch: policy.hidden(b.ready, b.packing.prefix_index, z))
                hidden = done["body forward"]

                def head(hidden: Tensor = hidden, batch: _Batch = batch) -> Tensor:
                    packing, count = batch.packing, len(batch.rollouts)
                    logprobs = policy.head.logprob(packing.scored(hidden, batch.prompt.last_hidden), packing.targets)
                    terms = objective.terms(logprobs, packing.score_row, packing.score_kind, count, config)
                    return torch.autograd.grad(terms.loss.sum(), hidden)[0]

                part("head", head)
                part("body backward", lambda z=z, h=hidden: torch.autograd.grad(h, z, done["head"])[0])
                gradient = done["body backward"]
                part("oracle", lambda g=gradient: kernels.vertex_oracle(g, hull.table, hull.allowed)[0])
                rows = packing.prefix_row
                part(
                    "update",
                    lambda m=mixture, g=gradient, r=rows: solver.advance(hull, m, g, r, None, 0, config).gap,
                )
        seconds["update"] = max(0.0, seconds["update"] - seconds["oracle"])
        return seconds


def run(work: Work, report: harness.Report, rounds: int, loop: bool) -> dict:
    """Measure, add the rows to ``report`` and return ratios; the first implementation is ours."""
    model, rollouts, config = work.model(), work.rollouts(), ReviseConfig()
    packed, obvious = Packed(model, rollouts, config), Obvious(model, rollouts, config)
    singles = [Obvious(model, [rollout], config) for rollout in rollouts] if loop else []
    steps = {"latentrevise": packed.step, "obvious": obvious.step}
    if singles:
        steps["loop"] = lambda: [single.step() for single in singles]
    if not singles:
        report.absent["loop"] = "not asked for"
    graphed: Packed | None = None
    if work.device.type == "cuda" and work.attention != "flex_attention":
        graphed = Packed(model, rollouts, replace(config, cuda_graph=True))
        steps["cuda_graph"] = graphed.step
    else:
        report.absent["cuda_graph"] = "a CUDA graph of the step needs a GPU, and sdpa or eager attention"
    extra = {
        "latentrevise": harness.extra_memory(packed.revise, work.device),
        "obvious": harness.extra_memory(obvious.step, work.device),
    }
    if singles:
        extra["loop"] = harness.extra_memory(singles[0].step, work.device)
    if graphed:
        extra["cuda_graph"] = harness.extra_memory(partial(graphed.revise, 3), work.device)
        for _ in range(2):  # the first runs as it is, the second captures
            graphed.step()
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
    shape = {
        "B": work.batch,
        "P": work.prompt,
        "T": work.prefix,
        "c": work.failed,
        "layers": work.layers,
        "V": work.vocab,
    }
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
        "parts_s": breakdown(packed, work.device, min(rounds, 3)),
        "batches": len(packed.batches),
        "gradient_difference": difference,
        "speed_ratio": {"median": median, "p20": p20, "p80": p80, "rounds": rounds},
        "revision_s": revisions({"latentrevise": packed, "cuda_graph": graphed} if graphed else {}, work, rounds),
        "memory_ratio": extra["obvious"] / max(extra["latentrevise"], 1e-9),
        "rollouts_per_second": work.batch / (sum(times["latentrevise"]) / rounds),
    }


def revisions(packed: dict[str, Packed], work: Work, rounds: int) -> dict[str, float]:
    """Median seconds of a whole revision (K = 10), the capture of its graphs within."""
    calls = {name: partial(one.revise, 10) for name, one in packed.items()}
    times = [{name: harness.clock(call, work.device) for name, call in calls.items()} for _ in range(rounds)]
    return {name: statistics.median(row[name] for row in times) for name in calls}


def breakdown(packed: Packed, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each part."""
    found = [packed.parts(device) for _ in range(rounds)]
    return {name: statistics.median(f[name] for f in found) for name in found[0]}


def scaling(work: Work, rollouts: list[int], lengths: list[int], steps: list[int], rounds: int) -> list[dict]:
    """Seconds of ours over the number of rollouts, their prefixes' length and K; the rounds go over all sizes in turn.
    Beside them the memory that a call takes over the model.

    A step of all rollouts, and for K the whole call: prompts, K steps, one evaluation.
    """
    model, config = work.model(), ReviseConfig()
    cases: list[tuple[dict[str, int], Work, Callable[[], object]]] = []
    for n in rollouts:
        sized = replace(work, batch=n)
        cases.append(({"rollouts": n}, sized, Packed(model, sized.rollouts(), config).step))
    for length in lengths:
        sized = replace(work, batch=1, prefix=length)
        cases.append(({"prefix": length}, sized, Packed(model, sized.rollouts(), config).step))
    for k in steps:
        cases.append(({"K": k}, work, partial(Packed(model, work.rollouts(), config).revise, k)))
    times: list[list[float]] = [[] for _ in cases]
    extra = [harness.extra_memory(call, work.device) for _, _, call in cases]
    for _ in range(rounds):
        for seconds, (_, _, call) in zip(times, cases, strict=True):
            seconds.append(harness.clock(call, work.device))
    rate = harness.matmul_rate(work.device, work.dtype)
    found = []
    for seconds, memory_mib, (varied, sized, _) in zip(times, extra, cases, strict=True):
        p20, median, p80 = harness.quantiles(seconds)
        row = varied | {"median_s": median, "p20_s": p20, "p80_s": p80, "rounds": rounds, "extra_mib": memory_mib}
        if "K" not in varied:
            row["utilisation_percent"] = 100 * sized.flops / median / rate
        row["s_per_unit"] = median / next(iter(varied.values()))
        found.append(row)
        print(row, flush=True)
    return found


def main(options: argparse.Namespace) -> dict:
    """``python -m benchmarks revise``: see ``--help`` for the options it reads."""
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    report = harness.Report.start("revise", device)
    documents, scales = [], []
    for dtype in [getattr(torch, name) for name in options.dtype or (["bfloat16"] if gpu else ["float32", "bfloat16"])]:
        report.floor[str(dtype).removeprefix("torch.")] = harness.matmul_rate(device, dtype) / 1e12
        for shape in options.shapes or (["0.5B", "1.5B", "7B"] if gpu else ["0.5B"]):
            layers = options.layers or SHAPES[shape]["num_hidden_layers"]
            sizes = {"prompt": options.prompt, "batch": options.batch}
            work = Work(shape, layers, options.vocab, dtype, device, options.attention, **sizes)
            if not options.ours_only:
                for length in options.M or [256]:
                    documents.append(run(work.of_length(length), report, options.rounds, not options.no_loop))
                    show(documents[-1])
            if options.rollouts or options.lengths or options.steps:
                found = scaling(
                    work, options.rollouts or [], options.lengths or [], options.steps or [], options.rounds
                )
                facts = {"shape": shape, "dtype": str(dtype), "layers": layers, "prompt": work.prompt}
                scales.append(facts | {"prefix": work.prefix, "batch": work.batch, "rows": found})
    print(harness.table(report.rows))
    return report.to_json() | {"comparisons": documents, "scaling": scales}


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="none: 0.5B, on a GPU all")
    group.add_argument("--attention", default="sdpa", help="of the model, for all sides: sdpa, eager, flex_attention")
    group.add_argument("--batch", type=int, default=8, help="rollouts in the comparison and over K")
    group.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    group.add_argument("--M", type=int, nargs="+", help="tokens of a rollout, cut at 0.8 (256)")
    group.add_argument("--rollouts", type=int, nargs="+", help="also time our step over these numbers of rollouts")
    group.add_argument("--lengths", type=int, nargs="+", help="and over these lengths of one prefix")
    group.add_argument("--steps", type=int, nargs="+", help="and a whole revision over these K")
    group.add_argument("--no-loop", action="store_true", help="leave out the loop over single rollouts")
    group.add_argument("--ours-only", action="store_true", help="only what --rollouts, --lengths and --steps ask for")


def show(document: dict) -> None:
    ratio, parts = document["speed_ratio"], document["parts_s"]
    print(
        f"{document['shape']} {document['dtype']} {document['layers']} layers, {document['batch']} rollouts,"
        f" T = {document['prefix']}: a step"
        f" x{ratio['median']:.2f} faster (x{ratio['p20']:.2f} to x{ratio['p80']:.2f} over {ratio['rounds']} rounds),"
        f" x{document['memory_ratio']:.1f} less memory over the model\n"
        + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
    )
