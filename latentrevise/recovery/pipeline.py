"""The main job: mine zero-hit prompts, revise their failed rollouts, continue, verify, and keep what holds.

    mine      sample rollouts of every prompt and verify them; a prompt none of whose rollouts is correct is zero-hit
    revise    each strategy proposes prefixes to continue from
    continue  sample from them, all strategies alike
    verify    judge the samples, check derivations where the task can, let the guards decide what may become a label

Every strategy that reads the answer also runs on a random *wrong* one (the arm ``NAME@wrong``), and plain resampling is
sampled until it has cost as much as the dearest strategy (the arm ``resample@equal``). All of it lives in a
``RunDirectory``.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from latentrevise.data.records import Prompt, Rollout, Start, Trajectory, read_records
from latentrevise.data.storage import write_signed
from latentrevise.data.stored import Stored
from latentrevise.engines import Engine
from latentrevise.errors import ConfigError
from latentrevise.recovery.cases import Case
from latentrevise.recovery.collect import admitted, collect, cost, results
from latentrevise.recovery.gate import implicit_value
from latentrevise.recovery.job import Job
from latentrevise.recovery.metrics import POOL, WRONG
from latentrevise.recovery.progress import Progress, Shown
from latentrevise.recovery.ray_workers import RayWorkers
from latentrevise.recovery.schedule import Alone, Scheduler
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.recovery.stages import Ahead, Arm, Continue, Judge, Mine, Part, Propose, Stage, set_aside, unsettled
from latentrevise.strategies import Work, build

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Recovered:
    """What ``recover`` gives back: the admitted trajectories (read when they are asked for), the metrics, and the
    directory everything is in."""

    trajectories: Sequence[Trajectory]
    metrics: dict[str, Any]
    out: Path


class Recovery:
    """One run: the order of its stages. Of every stage the scheduler runs the parts that are not there.

    model, tokenizer: a causal LM of transformers and its tokenizer; both are only read.
    out: the run directory. engine: where samples come from; by default the model itself, through transformers.
    progress: show progress on stderr, as bars or as ``json`` lines. scheduler: who runs the parts, by
    default this process alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: RecoverConfig,
        out: str | os.PathLike[str],
        *,
        engine: Engine | None = None,
        progress: bool | Shown = True,
        scheduler: Scheduler | None = None,
    ) -> None:
        self.job = Job(model, tokenizer, config, out, engine)
        self.config, self.run, self.engine = config, self.job.run, self.job.engine
        self.shown: Shown = "bar" if progress is True else (progress or None)
        self.scheduler = scheduler or Alone()
        self._pool: Arm | None = None
        self._recovered: dict[str, set[str]] = {}

    # The stages

    def mine(self, prompts: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None = None) -> None:
        """Sample and verify ``config.rollouts`` rollouts of every prompt, in the rounds of ``config.mine``.

        prompts: a file, or rows with a prompt and an answer; None when the run has its prompts already.
        """
        self.job.take_prompts(prompts)
        self.run.extend(self.job.header)  # only now: the prompts are the run's own
        for found in self.job.rounds():
            parts = [Part(index, rows, round=found.number) for index, rows in found.parts.items()]
            self._stage(Mine(), {f"round-{found.number}" if found.number else "": parts})

    def revise(self) -> None:
        """Let every strategy propose its prefixes, for the right target and for a wrong one.

        With ``stop_at_success`` a strategy must know what those before it recovered, so each is run to its verdicts.
        """
        self.run.extend(self.job.header)
        if self.config.stop_at_success:
            for arm in self.arms():
                parts = self._parts_of([arm])
                self._stage(Propose(), parts)
                self._stage(Continue(), parts, ahead=parts)
                self._stage(Judge(), parts)
            return
        self._stage(Propose(), self._parts_of(self.arms()))

    def sample(self, ahead: bool = False) -> None:
        """Sample from all proposals; then the equal-compute control, whose size follows from what the strategies
        cost. ahead: verify what is sampled, in place of waiting for what others sample."""
        own = self._parts_of(self.arms())
        self._stage(Continue(), own, ahead=own if ahead else {})
        self._pool = None  # what the strategies cost is known only now
        pool = self.pool()
        if pool is not None:
            parts = self._parts_of([pool])
            for stage in (Propose(), Continue()):
                self._stage(stage, parts, "control", own | parts if ahead else {})

    def verify(self) -> None:
        """Judge every sample, check derivations, compute plain log-probs, apply the guards."""
        self._stage(Judge(), self._parts_of(self.all_arms()))

    def collect(self) -> Recovered:
        """Gather the admitted trajectories and the metrics, and write both."""
        arms = self.all_arms()
        metrics = collect(self.job, arms, self._parts_of(arms))
        return Recovered(Stored(self.run.trajectories, Trajectory), metrics, self.run.path)

    def recover(self, prompts: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None = None) -> Recovered:
        """All stages, one after another, and what they come to."""
        with self.session():
            self.work(prompts)
            return self.collect()

    def work(self, prompts: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None = None) -> None:
        """All stages but the last, which gathers: what any number of processes do together."""
        self.mine(prompts)
        self.revise()
        self.sample(ahead=True)
        self.verify()

    @contextmanager
    def session(self) -> Iterator[None]:
        """The run held by the scheduler, and the verifier's workers alive as long as they are needed."""
        with self.scheduler.session(self.run), self.job.verifier:
            yield

    # What there is

    @property
    def prompts(self) -> Sequence[Prompt]:
        return self.job.prompts

    def rollouts(self) -> dict[str, list[Rollout]]:
        """The mined rollouts of each prompt, all at once: for a look at a small run. Raises RunError while mining is
        not complete."""
        return {prompt.id: own for prompt, own in self.job.rollouts()}

    def cases(self) -> list[Case]:
        """All zero-hit prompts, at once: for a look at a small run."""
        return self.job.cases_at(range(len(self.job.targets)))

    def gate(self) -> dict[str, Any]:
        """Measure on the solved prompts whether the answer's score knows which branches succeed (see ``gate``); once
        measured, it is read from ``gate.json``. Needs the mined rollouts alone."""
        if not self.run.gate.exists():
            config, first, last = self.config, list[Work](), list[Work]()
            for prompt, rollouts in self.job.rollouts():
                own = [r for r in rollouts if len(r.completion_ids) >= 2]
                failed = [r for r in own if r.verdict == "wrong"]
                # A failed rollout is what a recovery leaves; the prompts that have one come first.
                kept = first if failed else last
                if any(r.verdict == "correct" for r in own) and len(kept) < config.gate.prompts:
                    kept.append(self.job.case(prompt, failed or own).work(False))
            checked = config.step_checker is not None
            found = implicit_value(self.job.tools(), first + last, self.job.succeed, config.forks, config.gate, checked)
            write_signed(self.run.gate, found)
        return self.run.read_gate()

    def arms(self) -> list[Arm]:
        """The strategies, and behind each one that reads the answer its wrong-target arm."""
        arms = []
        for name in self.config.strategies:
            strategy = build(name, self.config)
            arms.append(Arm(name, strategy, False, self.config.samples, self.config.continuations))
            if self.config.audit and strategy.uses_answer:
                arms.append(replace(arms[-1], name=name + WRONG, wrong=True))
        return arms

    def pool(self) -> Arm | None:
        """The equal-compute control: as many fresh rollouts a prompt as the dearest strategy, or all of a chain
        together, could have paid for."""
        targets = self.job.targets
        if self._pool is not None or not self.config.equal_compute or not len(targets):
            return self._pool
        if not self.run.control.exists():
            with self.run.once():  # parts that are verified ahead may be set aside meanwhile, and cost no more
                if not self.run.control.exists():
                    costs = [cost(self.job, self.parts(arm)).passes for arm in self.arms() if not arm.wrong]
                    fresh = pc.sum(targets["decoded"]).as_py() / pc.sum(targets["rollouts"]).as_py()
                    size = control_size(self.config, costs, len(targets), fresh)
                    self._discard_pool_unless(size)
                    write_signed(self.run.control, {"samples": size})
        count = self.run.read_control()["samples"]
        self._pool = Arm(POOL, build("resample", self.config), False, count)
        return self._pool

    def _discard_pool_unless(self, size: int) -> None:
        """A dearer strategy, added to a run, needs more rollouts of the control than there are."""
        if any(s.n != size for path in self.run.parts("starts", POOL)[:1] for s in read_records(path, Start)):
            self.run.discard(POOL)

    def all_arms(self) -> list[Arm]:
        pool = self.pool()
        return [*self.arms(), *([] if pool is None else [pool])]

    def parts(self, arm: Arm) -> list[Part]:
        """The pieces of an arm's work, without those that were set aside."""
        chunks, aside = _chunks(self._rows_of(arm), self.config.chunk), set_aside(self.run, arm)
        return [Part(index, rows, arm) for index, rows in enumerate(chunks) if index not in aside]

    def _parts_of(self, arms: Sequence[Arm]) -> dict[str, list[Part]]:
        return {arm.name: self.parts(arm) for arm in arms}

    def _stage(
        self,
        stage: Stage,
        parts: Mapping[str, Sequence[Part]],
        shown: str | None = None,
        ahead: Mapping[str, Sequence[Part]] | None = None,
    ) -> None:
        """Have the parts of some arms (or of rounds of mining) run that are not there yet. ahead: parts that whoever
        would wait verifies, where they are sampled."""
        name = shown or stage.name
        for key, own in parts.items():
            plan = self.run.plan(stage.folder, key)
            if own and not plan.exists():
                arm = own[0].arm.name if own[0].arm else ""
                write_signed(plan, {"stage": name, "arm": arm, "sizes": {part.index: part.size for part in own}})
        missing = [part for own in parts.values() for part in unsettled(self.run, stage, own)]
        total = sum(part.size for own in parts.values() for part in own)
        left = sum(part.size for part in missing)
        with Progress(name, total, total - left, self.shown).showing(self.job.policy.body) as bar:
            self.scheduler.run(self.job, stage, missing, bar, Ahead(Judge(), ahead) if ahead else None)

    def _rows_of(self, arm: Arm) -> Sequence[int]:
        """The prompts an arm is given, as rows of ``Job.targets``; a wrong-target arm gets those of its strategy that
        have a wrong target."""
        targets, keep = self.job.targets, None
        if arm.wrong:
            keep = pc.is_valid(targets["wrong"])
        if self.config.stop_at_success and arm.name != POOL:
            before = self.config.strategies[: self.config.strategies.index(arm.strategy.name)]
            done: set[str] = set().union(*(self._recovered_by(name) for name in before))
            left = pc.invert(pc.is_in(targets["prompt_id"], pa.array(sorted(done), pa.string())))
            keep = left if keep is None else pc.and_(keep, left)
        return range(len(targets)) if keep is None else pc.indices_nonzero(keep).to_pylist()

    def _recovered_by(self, name: str) -> set[str]:
        """The prompts of which this strategy brought an admitted trajectory. Raises RunError before it is verified."""
        if name not in self._recovered:
            arm = next(arm for arm in self.arms() if arm.name == name)
            found = (verdict for part in self.parts(arm) for _, _, verdict in results(self.job, part))
            self._recovered[name] = {verdict.prompt_id for verdict in found if admitted(verdict)}
        return self._recovered[name]


def control_size(config: RecoverConfig, costs: Sequence[float], prompts: int, fresh: float) -> int:
    """Rollouts a prompt of the equal-compute control. costs: of the strategies over all ``prompts``; fresh: of a
    rollout; in token passes."""
    dearest = (sum(costs) if config.stop_at_success else max(costs)) / prompts
    return max(math.ceil(min(config.equal_compute_cap, dearest / fresh)), config.samples)


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    config: RecoverConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    engine: Engine | None = None,
    progress: bool = False,
    ray: str | None = None,
    workers: int = 1,
) -> Recovered:
    """Recover zero-hit prompts: mine, revise, continue, verify.

    model, tokenizer: a causal LM of transformers and its tokenizer. prompts: a file or rows, each with a prompt and an
    answer under one of the usual names, see ``load_prompts``. out: the run directory, resumed where it holds this run;
    a new temporary one when left out. ray: ``local``, ``auto`` or the address of a Ray cluster of which ``workers``
    actors do the work, each with a copy of the model; rows are the same.
    Returns the admitted trajectories, the metrics and the directory.

    Raises ConfigError, InputError, ModelError or RunError; what was computed before stays in ``out``.
    Source: arXiv 2606.29938; the audit, the controls and the guards are our own decision.
    """
    scheduler: Scheduler = Alone()
    if ray is not None:
        if engine is not None:
            raise ConfigError(
                "an engine cannot be sent to Ray workers; leave it out, or give `Recovery` a RayWorkers whose `load`"
                " makes it there"
            )
        scheduler = RayWorkers(ray, workers)
    place = tempfile.mkdtemp(prefix="latentrevise-") if out is None else out
    chosen = config or RecoverConfig()
    run = Recovery(model, tokenizer, chosen, place, engine=engine, progress=progress, scheduler=scheduler)
    return run.recover(prompts)


def _chunks(items: Sequence[Any], size: int) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]
