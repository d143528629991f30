"""Trains under ``accelerate launch`` for test_train_distributed.py: ``distributed_worker.py MODE OUT LIMIT``.

MODE is ``one``, ``ddp`` or ``fsdp2``; after LIMIT seconds a process says where it stands, and ends. Each check trains a
few steps; the first process leaves what it saw in ``OUT/CHECK.pt``: the trainer's log, the rows of each generation
batch, the trained weights.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.distributed.tensor import DTensor
from trl import GRPOConfig, SFTConfig

from latentrevise import strategies
from latentrevise.engines import HFEngine, Request, SamplingParams, hf
from latentrevise.model import memory
from latentrevise.model.loading import sharded
from latentrevise.recovery.evaluate import EvalConfig
from latentrevise.revise.revision import ReviseConfig
from latentrevise.train import logprob
from latentrevise.train.repair import RepairSettings
from latentrevise.train.rlvr import RecoveringGRPOTrainer, RLVRSettings, train_rlvr
from latentrevise.train.settings import begin, trl_arguments
from latentrevise.train.sft import LinearSFTTrainer, SFTSettings, train_sft
from latentrevise.verify.patterns import AnswerPattern
from latentrevise.verify.verifier import Judgement
from tests.test_train_rlvr import ARGUMENTS, PROMPTS, TOKENIZER, UNGUARDED, Boxing, Told, rows
from tests.test_train_sft import rows as sft_rows
from tests.tiny import tiny_model

strategies._STRATEGIES["told"] = lambda settings: Told()
REPAIR = RepairSettings(strategy="told", samples=2, guards=UNGUARDED)
ROWS = ("recovered", "advantages", "outcome", "correct")
COMMON = {
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",  # Adam turns rounding in tiny gradients into whole steps
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def shard_on_cpu() -> None:
    """accelerate (1.15, state.py) turns FSDP on for accelerators only, and ignores it where it finds CPUs; everything
    below that switch works on CPUs. So the processes are given out as another kind's while it looks."""
    plain = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        if not AcceleratorState._shared_state:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        plain(self, *args, **kwargs)

    AcceleratorState.__init__ = init


class Contains:
    """A verifier without worker processes: correct is what contains the answer."""

    pattern = AnswerPattern()

    def verify(self, pairs: Any) -> list[Judgement]:
        return [Judgement("correct" if answer in text else "wrong", None) for answer, text in pairs]


class Seeded(RecoveringGRPOTrainer):
    """Its rollouts depend on their place in the generation batch, not on the process that trains on them.

    TRL seeds each process by its rank, so that its own samples cannot be compared across numbers of processes.
    """

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """Kept as it was made: TRL shuffles the rows before it trains on them."""
        made = super()._generate_and_score_completions(inputs)
        rows = {name: self.accelerator.gather(made[name]).tolist() for name in ROWS}
        kept = zip(made["completion_ids"], made["completion_mask"].bool(), strict=True)
        rows["completion_ids"] = gather_object([ids[mask].tolist() for ids, mask in kept])
        self.batches = [*getattr(self, "batches", []), rows]
        return made

    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        every = gather_object(list(prompt_ids))
        step = self.state.global_step
        requests = [Request(ids, seed=1000 * step + i) for i, ids in enumerate(every)]
        self._ready()
        engine = HFEngine(self._base, TOKENIZER)
        found = engine.generate(requests, SamplingParams(max_new_tokens=self.max_completion_length))
        first = self.accelerator.process_index * len(prompt_ids)
        own = [list(c.ids) for (c,) in found][first : first + len(prompt_ids)]
        return [ids + [TOKENIZER.eos_token_id] * (len(ids) < self.max_completion_length) for ids in own], None


class Undecided(Contains):
    def verify(self, pairs: Any) -> list[Judgement]:
        return [Judgement("unknown", None) for _ in pairs]


class Skewed(Seeded):
    """With sharded weights the second process has next to no memory, samples nothing but the end, and no verdict of a
    repair is in time there: each alone would have it run other passes than the first."""

    def _ready(self) -> Any:
        repairer = super()._ready()
        if self.accelerator.process_index and sharded(self._base):
            memory._CPU_TOKENS, memory._CPU_BYTES = {4: 1}, 1
            repairer.verifier = Undecided()
            hf.choose = lambda logits, *_: torch.full((len(logits),), TOKENIZER.eos_token_id)
        return repairer


def sft(out: Path, processes: int) -> Any:
    trainer = LinearSFTTrainer(
        model=tiny_model(),
        args=trl_arguments(
            SFTConfig, out, COMMON | {"per_device_train_batch_size": 2 // processes, "gradient_accumulation_steps": 2}
        ),
        train_dataset=Dataset.from_list(sft_rows(12)),
        processing_class=TOKENIZER,
    )
    with mock.patch.object(logprob._Lookup, "apply", wraps=logprob._Lookup.apply) as lookups:
        trainer.train()
    assert lookups.call_count == 6  # the table is tied, and however it is sharded, its uses share one gradient
    return trainer


def evaluated(out: Path, processes: int) -> Any:
    """``train_sft`` that samples prompts before its first step, when no pass for training has placed the weights."""
    every = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
    settings = SFTSettings(
        holdout=4,
        evaluation=EvalConfig(samples=2, k=(1, 2), max_new_tokens=8, resamples=10),
        trainer=COMMON | every | {"per_device_train_batch_size": 4 // processes},
    )
    return train_sft(tiny_model(), TOKENIZER, sft_rows(16), out / "evaluated", settings, PROMPTS[:3])


def rlvr(settings: RLVRSettings, cls: type[Seeded] = Seeded, **changes: Any) -> Callable[[Path, int], Any]:
    """12 rows a generation batch: 3 groups of 4, the second of which lies on both processes."""

    def check(out: Path, processes: int) -> Any:
        own = {
            "per_device_train_batch_size": 4 // processes,
            "gradient_accumulation_steps": 3,
            "max_completion_length": 16,  # most groups fail
        }
        model = tiny_model()
        trainer = cls(
            model=model,
            args=trl_arguments(GRPOConfig, out, ARGUMENTS | COMMON | own | changes),
            train_dataset=rows(),
            processing_class=TOKENIZER,
            verifier=Contains(),
            settings=settings,
            engine=Boxing(model, TOKENIZER),
        )
        trainer.train()
        return trainer

    return check


def whole(out: Path, processes: int, seed: int = 0, name: str = "whole") -> Any:
    """``train_rlvr`` as the command calls it: TRL's own generation (greedy: see Seeded), the real verifier, a
    checkpoint, and the model saved."""
    settings = RLVRSettings(
        repair=REPAIR,
        trainer=ARGUMENTS
        | COMMON
        | {
            "per_device_train_batch_size": 4 // processes,
            "gradient_accumulation_steps": 3,
            "generation_kwargs": {"do_sample": False},
            "save_strategy": "steps",
            "save_steps": 2,
        },
    )
    begin(out / name, "rlvr", settings, [p.id for p in PROMPTS])
    model = tiny_model(seed=seed)
    return train_rlvr(model, TOKENIZER, PROMPTS, out / name, settings, engine=Boxing(model, TOKENIZER))


def resumed(out: Path, processes: int) -> Any:
    """The same from its checkpoint after two steps, with other weights to begin with."""
    if PartialState().is_main_process:
        shutil.copytree(out / "whole" / "checkpoint-2", out / "resumed" / "checkpoint-2")
    PartialState().wait_for_everyone()
    return whole(out, processes, seed=9, name="resumed")


CHECKS = {
    "sft": sft,
    "evaluated": evaluated,
    "rlvr": rlvr(RLVRSettings(repair=REPAIR)),
    "rlvr-registry": rlvr(
        RLVRSettings(repair=REPAIR, advantages="onpolicy_baseline", loss="oreal", drop_unrescued=True), beta=0.0
    ),
    "whole": whole,
    "resumed": resumed,
    "skewed": rlvr(RLVRSettings(repair=replace(REPAIR, strategy="latent", latent=ReviseConfig(steps=2))), Skewed),
}


def seen(trainer: Any, mode: str) -> dict[str, Any]:
    """What a check leaves, the same on every process."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert sharded(model) == (mode == "fsdp2")
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {
        "log": [e for e in trainer.state.log_history if "loss" in e],
        "evaluations": [e for e in trainer.state.log_history if "eval_pass@1" in e],
        "weights": {n: p.detach().clone() for n, p in weights.items()},
        "batches": getattr(trainer, "batches", []),
    }


def main(mode: str, out: Path, limit: float) -> None:
    faulthandler.dump_traceback_later(limit, exit=True)  # the test shows where each process stood
    torch.set_num_threads(1)
    if mode == "fsdp2":
        shard_on_cpu()
    processes = 1 if mode == "one" else 2
    for name, check in CHECKS.items():
        trainer = check(out, processes)
        assert trainer.accelerator.num_processes == processes
        found = seen(trainer, mode)
        if trainer.accelerator.is_main_process:
            torch.save(found, out / f"{name}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()
        # All is written. Returning would free the trainer, and with it gloo's threads, which can then wait for the lock
        # that this thread holds while it waits for them: seen once, a process that stood here until its limit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
