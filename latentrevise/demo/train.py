"""Train the demo's tiny models: ``python -m latentrevise.demo.train --out DIR``.

One process with one thread a family, side by side on two cores.  Schedules count steps, not seconds, so that a seed
gives the same model on the same software and machine however busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from latentrevise.demo import BUNDLED, families, get_family, model_dir, split_of
from latentrevise.demo.family import Family, Trace
from latentrevise.demo.knowledge import Model, evaluate_model
from latentrevise.demo.tokenizer import build_tokenizer
from latentrevise.errors import ConfigError, ModelError
from latentrevise.verify.processes import safe_path

IGNORED = -100
EVALUATION_PROMPTS = 128


@dataclass(frozen=True)
class Recipe:
    """How a family's model is trained.

    Attributes:
        steps: optimizer steps.
        drills_only: share of the steps, from the start, that see drills alone.
        drill_share: share of the batches that are drills after that.
        drills_per_row: drills strung together in one row.
        batch_tokens: tokens a step, padding included.
        hidden_lr: Muon's learning rate, for the layers' matrices.
        other_lr: AdamW's learning rate, for embeddings and norms.
        warmup: steps of linear warm-up.
        flat: share of the steps after which the rates fall linearly to zero.
    """

    steps: int
    drills_only: float
    drill_share: float
    drills_per_row: int = 12
    batch_tokens: int = 3000
    hidden_lr: float = 0.02
    other_lr: float = 3e-3
    warmup: int = 100
    flat: float = 0.5


RECIPES = {
    "rule": Recipe(steps=600, drills_only=0.4, drill_share=0.3),
    "chain": Recipe(steps=2200, drills_only=0.2, drill_share=0.2),
    **dict.fromkeys(("pair", "far", "partial"), Recipe(steps=1100, drills_only=0.2, drill_share=0.3)),
    "pair64": Recipe(steps=1100, drills_only=0.6, drill_share=0.3),
}


@dataclass(frozen=True)
class Batch:
    """``ids`` and ``labels`` [B, T] int64; labels are IGNORED where nothing is predicted."""

    ids: torch.Tensor
    labels: torch.Tensor
    drill: bool


def build_model(family: Family, tokenizer: PreTrainedTokenizerFast, seed: int) -> Model:
    """A Qwen3 of about one million parameters with random weights.

    A number's embedding starts as the sum of one random vector for each of its digits; without that head start the
    arithmetic takes far longer to learn.
    """
    torch.manual_seed(seed)
    width = 128
    model: Model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            intermediate_size=384,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    table = model.get_input_embeddings().weight.data
    table.normal_(0, 0.06)
    ids_of = tokenizer.get_vocab()
    digits = torch.randn(len(str(family.modulus - 1)), 10, width) * 0.05
    for number in range(family.modulus):
        row = table[ids_of[str(number)]]
        row.mul_(1 / 3)
        for place, vectors in enumerate(digits):
            row += vectors[number // 10**place % 10]
    return model


def make_batch(rows: list[Trace], prompts: list[int], ids_of: dict[str, int], drill: bool) -> Batch:
    """Right-padded rows; the first ``prompts[i]`` words of row i are never predicted."""
    width = max(len(row.words) for row in rows)
    ids = torch.full((len(rows), width), ids_of["<pad>"])
    labels = torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        tokens = torch.tensor([ids_of[w] for w in row.words])
        ids[i, : len(tokens)] = tokens
        predicted = torch.tensor(row.loss)
        predicted[: prompts[i]] = False
        labels[i, : len(tokens)][predicted] = tokens[predicted]
    return Batch(ids, labels, drill)


def drill_batch(family: Family, recipe: Recipe, ids_of: dict[str, int], rng: random.Random) -> Batch:
    """Rows of several drills each."""
    rows: list[Trace] = []
    tokens = 0
    while tokens < recipe.batch_tokens:
        parts = [family.drill(rng) for _ in range(recipe.drills_per_row)]
        rows.append(Trace(tuple(w for p in parts for w in p.words), tuple(k for p in parts for k in p.loss)))
        tokens += len(rows[-1].words)
    return make_batch(rows, [0] * len(rows), ids_of, drill=True)


def trace_batches(family: Family, recipe: Recipe, ids_of: dict[str, int], rng: random.Random) -> Iterator[Batch]:
    """Endless batches of prompt + trace, rows of similar length together, from the ``train`` split only."""
    while True:
        rows: list[tuple[int, Trace]] = []
        while len(rows) < 1000:
            problem = family.sample_problem(rng)
            prompt = family.prompt_text(problem)
            if split_of(prompt) != "train":
                continue
            words, trace = prompt.split(), family.sample_trace(problem, rng)
            rows.append((len(words), Trace((*words, *trace.words), (*[False] * len(words), *trace.loss))))
        rows.sort(key=lambda row: len(row[1].words))
        batches: list[Batch] = []
        start = 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or (end + 1 - start) * len(rows[end][1].words) > recipe.batch_tokens:
                group = rows[start:end]
                batches.append(make_batch([t for _, t in group], [n for n, _ in group], ids_of, drill=False))
                start = end
        rng.shuffle(batches)
        yield from batches


class Trainer:
    """A model, its optimizers and its stream of batches; ``step()`` does one optimizer step."""

    def __init__(self, family: Family, recipe: Recipe, seed: int) -> None:
        self.family, self.recipe = family, recipe
        self.tokenizer = build_tokenizer(family)
        self.model = build_model(family, self.tokenizer, seed)
        self.model.train()
        self.rng = random.Random(f"{family.name}/training/{seed}")
        self.done = 0
        self.tokens = 0
        self._ids_of = self.tokenizer.get_vocab()
        self._traces = trace_batches(family, recipe, self._ids_of, self.rng)
        hidden = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        other = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(hidden, lr=recipe.hidden_lr, momentum=0.95, weight_decay=0.0), recipe.hidden_lr),
            (torch.optim.AdamW(other, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0), recipe.other_lr),
        ]

    def rate(self) -> float:
        """The coming step's share of the full learning rates."""
        r = self.recipe
        falling = (1 - self.done / r.steps) / (1 - r.flat)
        return min(1.0, (self.done + 1) / r.warmup, falling)

    def next_batch(self) -> Batch:
        """The coming step's batch."""
        r = self.recipe
        if self.done < r.drills_only * r.steps or self.rng.random() < r.drill_share:
            return drill_batch(self.family, r, self._ids_of, self.rng)
        return next(self._traces)

    def step(self) -> tuple[float, bool]:
        """One optimizer step.  Returns the mean loss a predicted token (nats) and whether the batch was drills."""
        batch, rate = self.next_batch(), self.rate()
        targets = batch.labels[:, 1:]
        predicted = targets != IGNORED
        # Rows are padded on the right, so causal attention needs no mask; only predicted positions meet the vocabulary.
        hidden = self.model.model(input_ids=batch.ids[:, :-1], use_cache=False).last_hidden_state
        loss = F.cross_entropy(self.model.lm_head(hidden[predicted]), targets[predicted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, full in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = full * rate
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1
        self.tokens += batch.ids.numel()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the {self.family.name} model's loss became {value} at step {self.done}")
        return value, batch.drill


# -- evaluation ------------------------------------------------------------------------------------------------------


# -- command ---------------------------------------------------------------------------------------------------------


def round_to_bfloat16(model: Model) -> None:
    """Round the weights to the nearest bfloat16 in place; they stay float32 tensors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def train_family(name: str, recipe: Recipe, directory: Path, seed: int, evaluation: int, *, position: int = 0) -> None:
    """Train, evaluate and write one family's model to ``directory``; ``position`` is its progress bar's line."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    family = get_family(name)
    trainer = Trainer(family, recipe, seed)
    wall, cpu = time.perf_counter(), time.process_time()
    log: list[dict[str, float]] = []
    recent: dict[bool, list[float]] = {True: [], False: []}
    parameters = sum(p.numel() for p in trainer.model.parameters())
    with tqdm(
        total=recipe.steps, desc=f"{name} seed {seed}", unit="step", position=position, dynamic_ncols=True
    ) as bar:
        while trainer.done < recipe.steps:
            loss, drill = trainer.step()
            bar.update()
            recent[drill].append(loss)
            if trainer.done % 50 == 0 or trainer.done == recipe.steps:
                means = {
                    key: round(sum(losses) / len(losses), 4)
                    for key, losses in (("drill_loss", recent[True]), ("trace_loss", recent[False]))
                    if losses
                }
                log.append({"step": trainer.done, **means})
                recent = {True: [], False: []}
                bar.set_postfix(means)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    round_to_bfloat16(trainer.model)
    figures = evaluate_model(trainer.model, trainer.tokenizer, family, evaluation)

    trainer.model.to(torch.bfloat16).save_pretrained(directory)
    build_tokenizer(family).save_pretrained(directory)  # trainer.tokenizer would bring its padding state along
    record = {
        "family": name,
        "seed": seed,
        "recipe": asdict(recipe),
        "parameters": parameters,
        "tokens": trainer.tokens,
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
        "evaluation": figures,
        "losses": log,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
        },
    }
    (directory / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def model_for(family: str, seed: int, cache: Path) -> Path:
    """The directory of a family's model of that training seed: the bundled one, or else ``cache/FAMILY-SEED``.

    A model that is not there is trained first, with a progress bar, in a process of its own: the caller's threads and
    random state stay as they are.  It appears in the cache whole or not at all, also where several callers train it.

    Raises:
        ConfigError: there is no such family.
        ModelError: the model in the cache is of another recipe, or its training failed.
    """
    if seed == 0 and family in BUNDLED:
        return model_dir(family)
    directory, recipe = cache / f"{get_family(family).name}-{seed}", RECIPES[family]
    if not directory.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=cache) as temporary:
            made = Path(temporary) / directory.name
            worker = multiprocessing.get_context("spawn").Process(
                target=train_family, args=(family, recipe, made, seed, EVALUATION_PROMPTS)
            )
            with safe_path():
                worker.start()
            worker.join()
            if worker.exitcode != 0:
                raise ModelError(f"training the {family!r} model of seed {seed} failed; see the messages above")
            try:
                made.rename(directory)
            except OSError:
                if not directory.is_dir():  # somebody else's, in the meantime, is as good
                    raise
    record = json.loads((directory / "training.json").read_text())
    if record["recipe"] != asdict(recipe):
        raise ModelError(f"{directory} was trained by another recipe than today's; delete it, or choose another cache")
    return directory


def main(argv: list[str] | None = None) -> int:
    """Train the chosen families side by side, one process each.  Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m latentrevise.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-models"), help="directory to write FAMILY/ to")
    parser.add_argument(
        "--families",
        default=",".join(BUNDLED),
        help=f"comma-separated, of: {', '.join(families())} (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimizer steps instead of the recipe's, e.g. for a quick look")
    parser.add_argument(
        "--evaluation-prompts", type=int, default=EVALUATION_PROMPTS, help="problems a figure (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    names = args.families.split(",")
    recipes = {}
    for name in names:
        try:
            get_family(name)
        except ConfigError as error:
            parser.error(str(error))
        recipes[name] = replace(RECIPES[name], steps=args.steps) if args.steps is not None else RECIPES[name]
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.evaluation_prompts < 1:
        parser.error(f"--evaluation-prompts must be at least 1, got {args.evaluation_prompts}")
    args.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(
            target=train_family,
            args=(name, recipes[name], args.out / name, args.seed, args.evaluation_prompts),
            kwargs={"position": position},
            name=name,
        )
        for position, name in enumerate(names)
    ]
    with safe_path():
        for worker in workers:
            worker.start()
    for worker in workers:
        worker.join()
    failed = [worker.name for worker in workers if worker.exitcode != 0]
    if failed:
        print(f"training failed: {', '.join(failed)}; see the messages above", flush=True)
    for name in names:
        if name not in failed:
            record = json.loads((args.out / name / "training.json").read_text())
            spent = f"{record['seconds'] / 60:.1f} min ({record['cpu_seconds'] / 60:.1f} min of CPU time)"
            print(f"{args.out / name}: trained in {spent}: {json.dumps(record['evaluation'])}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
