"""What the adapters share: groups of sampled rows in, replacements for failed rows out.

A framework's own engine takes no embeddings and its trained weights live in other processes, so a repair is made with
a copy of the policy in the process where the hook runs: the one that AdapterSettings names, or one handed over.
"""

from __future__ import annotations

import functools
import glob
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from latentrevise.config import load_config
from latentrevise.data.records import Prompt, VerdictName, decoded, row_seed
from latentrevise.engines import HFEngine, SamplingParams
from latentrevise.engines.base import stop_ids
from latentrevise.errors import ConfigError
from latentrevise.model.loading import load_model
from latentrevise.model.policy import Policy
from latentrevise.train.repair import Repairer, RepairSettings, judged_rollouts, repair_metrics, replaced, zero_hit
from latentrevise.verify.settings import VerifySettings

log = logging.getLogger(__name__)

VARIABLE = "LATENTREVISE_ADAPTER"
"""The environment variable that names the YAML file of AdapterSettings."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(VerifySettings):
    """Settings of an adapter; how answers are read: see VerifySettings.

    model: directory or hub id of the policy that is trained. dtype, device: of the copy that repairs, as in
    ``load_model``. refresh: a glob of files that the trainer writes last into a model directory
    (``out/broadcasts/step_*/STABLE``); the weights beside the newest are loaded before groups are repaired. None: the
    copy stays as it was loaded.
    temperature, top_p, top_k, max_new_tokens: as the trainer samples; the log-probs of replacements are at this
    temperature. group_size: rows of a group that is trained on; groups of another size are left alone (0: any size).
    reward: of a recovered row. repair: see RepairSettings.
    """

    model: str
    dtype: str = "auto"
    device: str | None = None
    refresh: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_new_tokens: int = 1024
    group_size: int = 0
    reward: float = 1.0
    repair: RepairSettings = field(default_factory=RepairSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_verification()
        self.pattern().template(self.repair.answer_template)
        if self.repair.strategy == "none":
            raise ConfigError("repair.strategy = none: an adapter that repairs nothing is better left out")


@dataclass(frozen=True)
class Group:
    """What was sampled for one prompt. rows: ids as the trainer has them, with or without an end-of-sequence token.

    usable: for each row, whether it came to its end (an aborted one has no verdict).
    """

    id: str
    prompt_ids: Sequence[int]
    answer: str
    rows: Sequence[Sequence[int]]
    usable: Sequence[bool] | None = None


@dataclass(frozen=True)
class Replacement:
    """A recovered row in place of row ``row`` of group ``group``.

    ids: prefix, continuation and end. trained: 0 or 1 for each. logprobs: of each id behind the *plain* prompt, nats at
    the trainer's temperature: what an off-policy correction must see, never those it was sampled with behind a
    revision. ended: by itself. text: without the end.
    """

    group: int
    row: int
    ids: list[int]
    trained: list[int]
    logprobs: list[float]
    text: str
    ended: bool


@dataclass(frozen=True)
class Found:
    """verdicts: of every row of every group. metrics: see ``repair_metrics``."""

    replacements: list[Replacement]
    verdicts: list[list[VerdictName]]
    metrics: dict[str, float]


class Recovery:
    """Repairs with ``repairer``; the one object of a process, and safe to use from several of its threads.

    To be used in place of the one that the settings describe, it is handed to ``hand_over``.
    """

    def __init__(self, repairer: Repairer, settings: AdapterSettings) -> None:
        self.repairer, self.settings = repairer, settings
        self._ends = set(stop_ids(repairer.policy.model, repairer.tokenizer, repairer.sampling))
        self._lock, self._batches, self._loaded = threading.Lock(), 0, ""

    @classmethod
    def load(cls, settings: AdapterSettings) -> Recovery:
        """With a copy of the policy, its own engine and a verifier. Raises ConfigError or ModelError."""
        model, tokenizer = load_model(settings.model, dtype=settings.dtype, device=settings.device)
        sampling = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_new_tokens=settings.max_new_tokens,
        )
        verifier = settings.verifier()
        engine = HFEngine(model, tokenizer)
        repairer = Repairer(Policy(model, tokenizer), engine, tokenizer, verifier, settings.repair, sampling)
        return cls(repairer, settings)

    def __call__(self, groups: Sequence[Group]) -> Found:
        """What takes the place of rows of zero-hit groups; see the module."""
        with self._lock:
            return self._found(groups)

    def _found(self, groups: Sequence[Group]) -> Found:
        repairer, settings = self.repairer, self.settings
        work = []
        for group in groups:
            tokenizer = repairer.tokenizer
            text = decoded(tokenizer, group.prompt_ids)
            prompt = Prompt(group.id, text, tuple(group.prompt_ids), group.answer)
            rows = [self._without_end(row) for row in group.rows]
            judged = repairer.verifier.verify([(group.answer, decoded(tokenizer, row)) for row in rows])
            work.append((prompt, judged_rollouts(prompt, rows, judged, tokenizer)))
        verdicts: list[list[VerdictName]] = [
            [r.verdict if usable else "unknown" for r, usable in zip(rollouts, _all(group), strict=True)]
            for group, (_, rollouts) in zip(groups, work, strict=True)
        ]
        chosen = [
            g for g, group in enumerate(groups) if zero_hit(verdicts[g]) and settings.group_size in (0, len(group.rows))
        ]
        chosen = chosen[: settings.repair.max_groups or None]
        if not chosen:
            return Found([], verdicts, repair_metrics(verdicts, {}, {}, 0.0))
        self._refresh()
        seed = row_seed(settings.seed, "repair", self._batches)
        self._batches += 1
        made, seconds = repairer.repair([(*work[g], row_seed(seed, g)) for g in chosen])
        repairer.engine.sleep()
        repairs, failed = dict(zip(chosen, made, strict=True)), {g: work[g][1] for g in chosen}
        replacements = [
            Replacement(
                group=g,
                row=row,
                ids=list(rescue.ids),
                trained=list(rescue.trained),
                logprobs=self._plain(work[g][0].ids, rescue.ids),
                text=rescue.text,
                ended=rescue.ids[-1] in self._ends,
            )
            for g, repair in repairs.items()
            for row, rescue in replaced(failed[g], repair).items()
        ]
        metrics = repair_metrics(verdicts, failed, repairs, seconds)
        log.info("repaired: %s", ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        return Found(replacements, verdicts, metrics)

    @torch.no_grad()
    def _plain(self, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
        policy = self.repairer.policy
        with policy.frozen():
            hidden = policy.prompt_cache([(*prompt, *ids)]).hidden[0, len(prompt) - 1 : len(prompt) + len(ids) - 1]
            targets = torch.tensor(ids, device=hidden.device)
            return policy.head.logprob(hidden, targets, self.settings.temperature).tolist()

    def _without_end(self, ids: Sequence[int]) -> list[int]:
        return list(ids[:-1]) if len(ids) and ids[-1] in self._ends else list(ids)

    def _refresh(self) -> None:
        """Load the trainer's newest weights into the copy."""
        policy = self.repairer.policy
        if self.settings.refresh is not None:
            files = sorted(glob.glob(os.path.expanduser(self.settings.refresh), recursive=True), key=os.path.getmtime)
            if files and files[-1] != self._loaded:
                fresh = type(policy.model).from_pretrained(  # trainers leave the weights, not always the settings
                    Path(files[-1]).parent,
                    config=policy.model.config,
                    generation_config=policy.model.generation_config,
                    dtype=policy.dtype,
                    use_safetensors=True,
                )
                policy.model.load_state_dict(fresh.state_dict())
                self._loaded = files[-1]
        self.repairer.engine.update(policy.model)


def _all(group: Group) -> Sequence[bool]:
    return group.usable if group.usable is not None else [True] * len(group.rows)


_handed: list[Recovery] = []


def hand_over(recovery: Recovery | None) -> None:
    """Let this process's adapter use ``recovery``; None: what the settings describe again."""
    _handed[:] = [] if recovery is None else [recovery]


def current() -> Recovery:
    """What was handed over, or else what the file of settings describes, loaded once. Raises ConfigError."""
    return _handed[0] if _handed else _from_environment()


@functools.cache
def _from_environment() -> Recovery:
    path = os.environ.get(VARIABLE)
    if not path:
        raise ConfigError(f"set {VARIABLE} to a YAML file of the adapter's settings (docs/adapters.md)")
    return Recovery.load(load_config(AdapterSettings, path))


def spans(trained: Sequence[int], offset: int = 0) -> list[tuple[int, int]]:
    """``[start, end)`` of each run of trained tokens, shifted by ``offset``."""
    walls = [0, *trained, 0]
    edges = [i for i in range(len(walls) - 1) if walls[i] != walls[i + 1]]
    return [(a + offset, b + offset) for a, b in zip(edges[::2], edges[1::2], strict=True)]
