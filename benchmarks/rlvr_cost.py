"""What repair adds to one RLVR step: n = 8 with repair against the same step with n = 8 and with n = 16.

A step is the trainer's own: sampling, verifying, repair, loss, backward pass and update, on the bundled model of a
family, with the same prompts in every arm, and the published repair (``paper-grpo``: one failed path of each zero-hit
group, rho 0.8, K = 10). The arms take turns in every round, in one process, and go on from the weights that they left;
the first round warms up and is not counted. Seconds and peak memory over what was held before the step; ratios are of
the same round, their mean with a 95 % bootstrap interval over rounds and seeds. ``parts`` says where repair's seconds
went. Published (Table 4, 1.5B, four B200): repair +24 % time, +3 % memory; n = 16 +66 % and +14 %.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from benchmarks import harness

ARMS = {"n8": (8, False), "n8 + repair": (8, True), "n16": (16, False)}
PUBLISHED = {"n8 + repair": (1.24, 1.03), "n16": (1.66, 1.14)}


def main(options: argparse.Namespace) -> dict:
    """``python -m benchmarks rlvr_cost``."""
    report = harness.Report.start("rlvr_cost", torch.device("cpu")).to_json()
    seeds = options.seeds or [0, 1, 2]
    report |= {"commit": harness.commit(), "seeds": seeds, "rounds": options.rounds, "prompts": options.cost_prompts}
    report["families"] = {}
    for family in options.families or ["rule", "chain"]:
        rounds = [r for seed in seeds for r in measure(family, seed, options.rounds, options.cost_prompts)]
        found = report["families"][family] = summary(rounds)
        print(table(family, found), flush=True)
    return report


def measure(family: str, seed: int, rounds: int, prompts: int) -> list[dict[str, Any]]:
    """For each round, of each arm: seconds, MiB, share of zero-hit groups, of repaired ones, seconds of its parts."""
    from latentrevise.data.prompts import load_prompts
    from latentrevise.demo import get_family, make_prompts
    from latentrevise.verify.verifier import Verifier

    found = []
    with tempfile.TemporaryDirectory() as out, Verifier() as verifier:
        trainers = {arm: trainer_of(family, arm, seed, prompts, out, verifier) for arm in ARMS}
        tokenizer = trainers["n8"].processing_class
        rows = make_prompts(get_family(family), prompts * (rounds + 1), split="train", seed=seed)
        loaded, _ = load_prompts(rows, tokenizer=tokenizer)
        for number in range(rounds + 1):
            own = loaded[number * prompts : (number + 1) * prompts]
            inputs = [{"prompt": p.text, "prompt_ids": list(p.ids), "answer": p.answer, "prompt_id": p.id} for p in own]
            order = list(ARMS)[number % len(ARMS) :] + list(ARMS)[: number % len(ARMS)]
            this = {arm: step(trainers[arm], inputs, ARMS[arm][0]) for arm in order}
            if number:
                found.append(this)
    return found


def trainer_of(family: str, arm: str, seed: int, prompts: int, out: str, verifier: Any) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig

    from latentrevise.config import load_config
    from latentrevise.demo import get_family, model_dir
    from latentrevise.demo.run import demo_config
    from latentrevise.model.loading import load_model
    from latentrevise.train.rlvr import RecoveringGRPOTrainer
    from latentrevise.train.settings import RLVRSettings, trl_arguments

    size, repairs = ARMS[arm]
    demo = demo_config(get_family(family))
    preset = load_config(RLVRSettings, "paper-grpo")
    # The families' tokenizers do not know the words of the paper's template.
    repair = replace(preset.repair, answer_template=demo.answer_template)
    settings = replace(preset, repair=repair if repairs else replace(repair, strategy="none"), seed=seed)
    model, tokenizer = load_model(model_dir(family), dtype="float32", device="cpu")
    given = {
        "per_device_train_batch_size": prompts * size,
        "gradient_accumulation_steps": 1,
        "num_generations": size,
        "max_completion_length": demo.max_new_tokens,
        "temperature": demo.temperature,
        "beta": 0.0,  # the reference model's passes are no part of the comparison
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    trainer = RecoveringGRPOTrainer(
        model=model,
        args=trl_arguments(GRPOConfig, out, preset.trainer | given, seed=seed),
        train_dataset=Dataset.from_list([{"prompt": "", "prompt_ids": [0], "answer": ""}] * prompts),
        processing_class=tokenizer,
        verifier=verifier,
        settings=settings,
    )
    trainer.create_optimizer()
    trainer.model_wrapped, trainer.current_gradient_accumulation_steps = trainer.model, 1
    return trainer


def step(trainer: Any, inputs: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """One whole step of ``trainer``."""
    rows = [row for row in inputs for _ in range(size)]
    parts: dict[str, float] = defaultdict(float)
    trainer._metrics["train"].clear()

    def whole() -> None:
        trainer.model.train()
        trainer.training_step(trainer.model, rows, None)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    device, seconds = torch.device("cpu"), []
    with timed(trainer, parts):
        memory = harness.extra_memory(lambda: seconds.append(harness.clock(whole, device)), device)
    trainer.state.global_step += 1
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items() if values}
    keys = ("zero_hit/frac_groups", "zero_hit/rescued_frac", "time/revise_s", "repair/passes", "sampled/tokens")
    return {"seconds": seconds[0], "mib": memory, "parts": dict(parts)} | {key: metrics[key] for key in keys}


@contextmanager
def timed(trainer: Any, parts: dict[str, float]) -> Iterator[None]:
    """Where the seconds of a repair go, by wrapping what it calls."""
    if trainer.settings.repair.strategy == "none":
        yield
        return
    repairer = trainer._ready()

    def watch(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                parts[name] += time.perf_counter() - began

        return inner

    places = [(repairer, "_propose"), (repairer, "_sampled"), (repairer, "_judged")]
    for place, name in places:
        setattr(place, name, watch(name.strip("_"), getattr(place, name)))
    try:
        yield
    finally:
        for place, name in places:
            delattr(place, name)


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of each arm, ratios to n = 8 of the same round with intervals, and where repair's seconds went."""
    from latentrevise.recovery.guards import bootstrap_mean

    found: dict[str, Any] = {"rounds": len(rounds), "arms": {}}
    for arm in ARMS:
        own = [r[arm] for r in rounds]
        means = {key: fmean(r[key] for r in own) for key in ("seconds", "mib", "zero_hit/frac_groups", "time/revise_s")}
        names = sorted({name for r in own for name in r["parts"]})
        found["arms"][arm] = means | {
            "time_ratio": bootstrap_mean([r[arm]["seconds"] / r["n8"]["seconds"] for r in rounds]),
            "memory_ratio": bootstrap_mean([r[arm]["mib"] / max(r["n8"]["mib"], 1e-9) for r in rounds]),
            "parts": {name: fmean(r["parts"].get(name, 0.0) for r in own) for name in names},
        }
    return found


def table(family: str, found: dict[str, Any]) -> str:
    lines = [
        f"**{family}** ({found['rounds']} rounds)",
        "",
        "| step | seconds | MiB | zero-hit | time over n8 | memory over n8 | published | repair's seconds |",
        "|" + "---|" * 8,
    ]
    for arm, row in found["arms"].items():
        ratios = ["{:.2f} [{:.2f}, {:.2f}]".format(*row[key]) for key in ("time_ratio", "memory_ratio")]
        paper = "{:.2f}, {:.2f}".format(*PUBLISHED[arm]) if arm in PUBLISHED else "-"
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["parts"].items()) or "-"
        lines.append(
            f"| {arm} | {row['seconds']:.2f} | {row['mib']:.0f} | {row['zero_hit/frac_groups']:.2f} | {ratios[0]} |"
            f" {ratios[1]} | {paper} | {parts} |"
        )
    return "\n".join(lines) + "\n"


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cost-prompts", type=int, default=8, help="prompts a step; --rounds, --seeds and --families, too"
    )
