"""Evaluation: sample, verify, unbiased pass@k with bootstrap intervals; the usual benchmarks by name.

A small harness for the questions of this project. For full tables with the field's own prompts and metrics use
lighteval; see docs/training.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from latentrevise.config import at_least_one, to_dict
from latentrevise.data.golds import unwrap
from latentrevise.data.prompts import PromptSettings
from latentrevise.data.records import Prompt, Rollout, decoded, read_records, row_seed, write_records
from latentrevise.data.storage import stable_hash, write_signed
from latentrevise.data.tables import file_hash
from latentrevise.engines import Engine, HFEngine, Request, SamplingParams, VLLMConfig
from latentrevise.errors import ConfigError, InputError
from latentrevise.model.loading import sharded, unwrapped
from latentrevise.recovery.guards import bootstrap_mean, pass_at_k
from latentrevise.recovery.mined import glances
from latentrevise.recovery.rundir import RunDirectory, run_header
from latentrevise.recovery.settings import new_tokens
from latentrevise.recovery.verdicts import load_checker, warn_of_missing_answers
from latentrevise.verify.patterns import AnswerPattern
from latentrevise.verify.settings import VerifySettings
from latentrevise.verify.verifier import Verifier, understood

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ASKED = "Please reason step by step, and {}."
INSTRUCTION = ASKED.format(AnswerPattern().instruction)
"""What benchmarks are asked with, where nothing else is said; under another answer pattern ASKED says how to answer."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(PromptSettings, VerifySettings):
    """How to evaluate; how prompts are read: see PromptSettings; how answers are: VerifySettings.

    samples: drawn for each prompt. k: of pass@k, none larger than ``samples``. temperature, top_p, max_new_tokens,
    stop: of sampling (see RecoverConfig). resamples: bootstrap resamples of the prompts. checker: ``module:attribute``
    of a derivation checker (see RecoverConfig); adds valid@1. seed: of the samples and of the bootstrap.
    """

    samples: int = 1
    k: tuple[int, ...] = (1,)
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    resamples: int = 2000
    checker: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_verification()
        at_least_one(self, "samples", "resamples")
        if not self.k or not all(1 <= k <= self.samples for k in self.k):
            raise ConfigError(f"k = {self.k!r}: each must lie between 1 and samples = {self.samples}")


@dataclass(frozen=True, kw_only=True)
class EvalRunConfig(EvalConfig):
    """Settings of ``latentrevise eval``. chunk: prompts in one part. vllm: of that engine, see ``VLLMConfig``."""

    chunk: int = 64
    vllm: VLLMConfig = field(default_factory=VLLMConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "chunk")


@dataclass(frozen=True)
class Score:
    """The samples of one prompt: how many there are, are correct, have no verdict, have a valid derivation."""

    prompt_id: str
    samples: int
    correct: int
    unknown: int
    valid: int | None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    *,
    engine: Engine | None = None,
    verifier: Verifier | None = None,
) -> tuple[list[Score], list[Rollout]]:
    """Sample and judge ``config.samples`` completions of each prompt; one score a prompt, in order.

    A prompt's samples depend on its id and the seed, not on the other prompts. An undecided verdict counts as not
    correct and is told apart in ``unknown``.
    """
    if verifier is None:
        with config.verifier() as started:
            return evaluate(model, tokenizer, prompts, config, engine=engine, verifier=started)
    checker = load_checker(config.checker)
    engine = engine or HFEngine(model, tokenizer)
    params = [
        SamplingParams(
            n=config.samples,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=new_tokens(
                config.max_new_tokens, None if engine.limit is None else engine.limit - len(prompt.ids)
            ),
            stop=config.stop,
        )
        for prompt in prompts
    ]
    requests = [Request(p.ids, seed=row_seed(config.seed, "eval", p.id)) for p in prompts]
    found = engine.generate(requests, params)
    texts = [[decoded(tokenizer, c.ids) for c in own] for own in found]
    judged = iter(verifier.verify([(p.answer, t) for p, own in zip(prompts, texts, strict=True) for t in own]))
    scores, rollouts = [], []
    for prompt, completions, own in zip(prompts, found, texts, strict=True):
        verdicts = [next(judged) for _ in own]
        valid = None
        if checker is not None:
            right = [t for t, v in zip(own, verdicts, strict=True) if v.verdict == "correct"]
            valid = sum(checker(prompt.text, "", text, prompt.answer).valid for text in right)
        correct, unknown = (sum(v.verdict == kind for v in verdicts) for kind in ("correct", "unknown"))
        scores.append(Score(prompt.id, len(own), correct, unknown, valid))
        rollouts += [
            Rollout(
                prompt_id=prompt.id,
                sample_id=f"{prompt.id}/{j}",
                completion_ids=c.ids,
                completion=text,
                extracted=v.extracted,
                verdict=v.verdict,
                finish_reason=c.finish_reason,
                sampling_logprobs=c.logprobs or (),
            )
            for j, (c, text, v) in enumerate(zip(completions, own, verdicts, strict=True))
        ]
    return scores, rollouts


def summary(scores: Sequence[Score], config: EvalConfig) -> dict[str, Any]:
    """``pass@k`` as ``[mean, low, high]``: the unbiased estimator (Chen et al. 2021) of each prompt, averaged, with the
    95 % percentile bootstrap over prompts; ``valid@1`` alike. ``zero_hit``, ``unknown``: shares."""
    if not scores:
        raise InputError("nothing was evaluated; give at least one usable prompt")

    def rate(values: Sequence[float]) -> list[float]:
        return list(bootstrap_mean(values, config.resamples, config.seed))

    total = sum(s.samples for s in scores)
    out: dict[str, Any] = {
        "prompts": len(scores),
        "samples": config.samples,
        **{f"pass@{k}": rate([pass_at_k(s.samples, s.correct, k) for s in scores]) for k in config.k},
        "zero_hit": sum(s.correct == 0 for s in scores) / len(scores),
        "unknown": sum(s.unknown for s in scores) / total,
    }
    if config.checker is not None:
        out["valid@1"] = rate([(s.valid or 0) / s.samples for s in scores])
    return out


@dataclass(frozen=True)
class Benchmark:
    """A benchmark on the hub: where it is, and which columns it must have. size: its number of problems."""

    hub_id: str
    split: str
    prompt: str
    answer: str
    size: int
    subset: str | None = None


BENCHMARKS = {
    "math-500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer", 500),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer", 30),
    "aime25": Benchmark("yentinglin/aime_2025", "train", "problem", "answer", 30),
    "amc23": Benchmark("math-ai/amc23", "test", "question", "answer", 40),
    "minerva": Benchmark("math-ai/minervamath", "test", "question", "answer", 272),
    "olympiadbench": Benchmark("math-ai/olympiadbench", "test", "question", "final_answer", 674),
}


def benchmark_rows(name: str, source: str | os.PathLike[str] | None = None) -> list[dict[str, Any]]:
    """The problems of one of BENCHMARKS as rows with a prompt and an answer.

    source: a local ``.parquet``, ``.json``, ``.jsonl`` or ``.csv`` file of the same form, in place of the hub. Several
    gold answers to one problem become one list, comma by comma. Raises ConfigError for an unknown name, InputError if
    the data cannot be had or lacks a column.
    """
    from datasets import load_dataset

    if name not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark {name!r}; choose from {', '.join(BENCHMARKS)}, or give a file")
    known = BENCHMARKS[name]
    try:
        if source is None:
            data: Any = load_dataset(known.hub_id, known.subset, split=known.split)
        else:
            kind = {"jsonl": "json"}.get(suffix := Path(source).suffix.lstrip("."), suffix)
            data = load_dataset(kind, data_files=str(Path(source).expanduser()), split="train")
    except Exception as error:  # whatever hub, network and readers raise
        place = known.hub_id if source is None else source
        raise InputError(
            f"{name}: {place} cannot be loaded ({type(error).__name__}: {str(error).strip().split(chr(10))[0][:200]});"
            " check the network, or give a local copy as source"
        ) from error
    missing = {known.prompt, known.answer} - set(data.column_names)
    if missing:
        raise InputError(
            f"{name}: no column {', '.join(sorted(missing))} (found: {', '.join(data.column_names)}); its form has"
            " changed, so give a copy of the old form as source"
        )
    return [_problem(row, known) for row in data]


def _problem(row: Mapping[str, Any], known: Benchmark) -> dict[str, Any]:
    answer = row[known.answer]
    if isinstance(answer, list):
        answer = ", ".join(unwrap(str(part)) for part in answer)
    ids = {key: str(row[key]) for key in ("id", "unique_id") if row.get(key) is not None}
    return {"prompt": str(row[known.prompt]), "answer": answer, **dict(list(ids.items())[:1])}


def evaluate_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | os.PathLike[str],
    config: EvalRunConfig,
    out: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    engine: Engine | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate on a benchmark or a file of prompts, in parts of ``config.chunk`` prompts: the metrics.

    data: one of BENCHMARKS (source: see ``benchmark_rows``; without an instruction in the settings its problems get
    INSTRUCTION), or a file as ``load_prompts`` reads it. out: a run directory with ``rollouts/`` and ``scores/``;
    parts that are in it are not computed again. Rows that cannot be used, a prompt that leaves no room for its
    completion among them, are in ``errors.jsonl``. Raises RunError where ``out`` holds another evaluation, InputError
    where no row can be used.
    """
    engine, run = engine or HFEngine(model, tokenizer), RunDirectory(out)
    rows: Any = data
    if str(data) in BENCHMARKS:
        rows, config = benchmark_rows(str(data), source), replace(config, instruction=_instruction(config))
        known_by = stable_hash(rows)
    elif source is not None:
        raise ConfigError(f"source goes with one of {', '.join(BENCHMARKS)}; give a file of your own as data")
    else:
        known_by = _file_hash(Path(data))
    header = {**run_header(model, config, engine), "data": {"name": str(data), "hash": known_by}}
    run.check(header)
    with run.locked(), config.verifier() as verifier:
        if not run.prompts.exists():
            usable, errors = config.load(rows, tokenizer, engine.limit, config.max_new_tokens, verifier)
            run.begin(header, usable, errors)
        prompts, scores = read_records(run.prompts, Prompt), []
        with tqdm(total=len(prompts), desc="eval", unit="prompt", disable=not progress) as bar:
            for index, first in enumerate(range(0, len(prompts), config.chunk)):
                chunk, part = prompts[first : first + config.chunk], run.part("scores", index)
                if not part.exists():
                    found, rollouts = evaluate(model, tokenizer, chunk, config, engine=engine, verifier=verifier)
                    write_records(run.part("rollouts", index), rollouts, Rollout)
                    write_records(part, found, Score)
                scores += read_records(part, Score)
                bar.update(len(chunk))
        total = without = cut = unparsed = 0
        for index in sorted(run.there("rollouts")):
            glimpsed = [r for own in glances(run, [index]).values() for r in own]
            silent = [r for r in glimpsed if r.extracted is None]
            total, without = total + len(glimpsed), without + len(silent)
            cut += sum(r.finish_reason == "length" for r in silent)
            unparsed += sum(not understood(r.extracted) for r in glimpsed)
        warn_of_missing_answers(without, cut, total, verifier.pattern)
        metrics = {
            "data": str(data),
            "model": header["model"]["path"],
            "left_out": len(run.read_errors()),
            **summary(scores, config),
            "unparsed": unparsed / total,
            "config": to_dict(config),
        }
        write_signed(run.metrics, metrics)
    return metrics


def _instruction(config: EvalRunConfig) -> str:
    asked = config.pattern().instruction
    if not config.instruction and asked is None:
        raise ConfigError(
            f"answer_pattern = {config.answer_pattern!r}: nothing is known that asks for such an answer; say it with"
            " `instruction`"
        )
    return config.instruction or ASKED.format(asked)


def _file_hash(path: Path) -> str:
    try:
        return file_hash(path)
    except OSError as error:
        raise InputError(
            f"{path} is neither a file that can be read ({error.strerror or error}) nor one of {', '.join(BENCHMARKS)};"
            " check the path"
        ) from error


class Evaluates:
    """For a Trainer: at each of its evaluations also sample prompts; the rates come as ``eval_pass@k`` and so on."""

    _evaluated: Sequence[Prompt] = ()
    _evaluation: EvalConfig

    def sample_at_evaluation(self, prompts: Sequence[Prompt], config: EvalConfig) -> None:
        self._evaluated, self._evaluation = prompts, config

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        if self._evaluated:
            found = self._sampled()
            own = {
                f"{metric_key_prefix}_{name}": value[0] if isinstance(value, list) else value
                for name, value in found.items()
                if name not in ("prompts", "samples")
            }
            self.log(own)  # type: ignore[attr-defined]
            metrics.update(own)
        return metrics

    @property
    def _base(self) -> PreTrainedModel:
        """The model below wrappers and adapters (which act on it in place)."""
        return unwrapped(self.accelerator.unwrap_model(self.model))  # type: ignore[attr-defined]

    def _sampled(self) -> dict[str, Any]:
        from accelerate.utils import broadcast_object_list, gather_object

        accelerator = self.accelerator  # type: ignore[attr-defined]
        # A pass through sharded weights takes all processes, so there each does all the work.
        together = sharded(self._base)
        count = 1 if together else accelerator.num_processes
        own = list(self._evaluated[0 if together else accelerator.process_index :: count])
        scores, _ = evaluate(self._base, self.processing_class, own, self._evaluation)  # type: ignore[attr-defined]
        if together:  # a verdict may be in time on one of them alone
            broadcast_object_list(told := [scores])
            scores = told[0]
        return summary(scores if count == 1 else gather_object(scores), self._evaluation)
