"""TRL's asynchronous trainer: groups through its own scoring loop and into its own rows, with our hook in the loop."""

import asyncio
import copy
import itertools
import queue
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from trl.experimental.async_grpo.async_grpo_trainer import RolloutQueueDataset
from trl.experimental.async_grpo.async_rollout_worker import RolloutGroup, TurnRecord, _chain_to_sequences

from latentrevise.adapters.trl_async import RecoveringRolloutWorker, _RecoveringLoop
from latentrevise.errors import ConfigError
from latentrevise.train.groups import VerifiedReward
from tests.test_adapters import DUPLICATE, FAILED, PROMPT, SOLVED, TOKENIZER, check, recovery, verifier  # noqa: F401
from tests.tiny import EOS


@pytest.fixture
def loop(verifier):  # noqa: F811
    """As ``_child_main`` makes it, with queues of this process."""
    PartialState(cpu=True)
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.response_template = {}  # TRL looks for one that knows tools
    kinds = ("rollout_buffer", "metrics_queue", "exception_info_queue")
    shared = {"model_version_value": SimpleNamespace(value=3), "heartbeat_value": None, "failed_event": None}
    return _RecoveringLoop(
        model_name="none",
        dataset=Dataset.from_list([{"prompt": "qa=", "answer": "7"}]),
        reward_funcs=[VerifiedReward(verifier)],
        processing_class=tokenizer,
        eos_token_ids=[EOS],
        num_generations=4,
        **{name: queue.Queue() for name in kinds},
        **shared,
    )


def group(rows, **changes):
    """As ``_generate_loop`` fills it, a turn each."""
    sequences = [
        _chain_to_sequences([TurnRecord(list(PROMPT), list(row), [-1.0] * len(row))], f"r{i}", 1024)[0]
        for i, row in enumerate(rows)
    ]
    given = {
        "prompts": [[{"role": "user", "content": "qa="}]] * len(rows),
        "reward_kwargs": {"answer": ["7"] * len(rows)},
        "completions": [[{"role": "assistant", "content": TOKENIZER.decode(row[:-1])}] for row in rows],
        "completions_ids": [list(row) for row in rows],
        "completions_sequences": sequences,
        "tool_call_counts": [0] * len(rows),
        "tool_failure_counts": [0] * len(rows),
        "model_version": 3,
        "group_id": 5,
        "env_rewards": [None] * len(rows),
        "rollout_rewards": [None] * len(rows),
    }
    return RolloutGroup(**(given | changes))


def metrics(loop):
    found = {}
    while not loop._metrics_queue.empty():
        found |= loop._metrics_queue.get()
    return found


def test_a_zero_hit_group_is_repaired_before_it_is_scored(recovery, loop):  # noqa: F811
    samples = asyncio.run(loop._score_group(group(FAILED)))
    assert [s.metrics["reward"] for s in samples] == [0.0, 0.0, 1.0, 0.0]
    start = len(PROMPT)
    sample = samples[DUPLICATE]
    assert sample.input_ids[:start].tolist() == list(PROMPT)
    assert not sample.completion_mask[:start].any()
    ids = sample.input_ids[start:].tolist()
    check(recovery, ids, sample.completion_mask[start:].tolist(), torch.tensor(sample.old_log_probs[start:]))
    assert sample.completion[0]["content"] == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert sample.advantage == pytest.approx(3**0.5, abs=1e-4)
    assert [s.advantage for s in samples if s is not sample] == pytest.approx([-(3**-0.5)] * 3, abs=1e-4)
    assert {s.group_id for s in samples} == {5}
    assert metrics(loop)["zero_hit/rescued_frac"] == 1.0


def test_the_trainers_queue_takes_the_recovered_row(recovery, loop):  # noqa: F811
    """Rows of another length than their group's, as the data set of the trainer's loader yields them."""
    buffer = queue.Queue()
    for sample in asyncio.run(loop._score_group(group(FAILED))):
        sample.enqueued_at = 0.0
        buffer.put(sample)
    data = RolloutQueueDataset(
        rollout_queue=buffer,
        model_version_fn=lambda: 3,
        check_health_fn=lambda stale_after_s: None,
        stale_after_s=1.0,
        metrics=defaultdict(list),
    )
    rows = list(itertools.islice(data, 4))
    assert len({len(row["input_ids"]) for row in rows}) > 1
    for row in rows:
        assert len(row["input_ids"]) == len(row["completion_mask"]) == len(row["old_log_probs"])


def test_other_groups_stay_as_they_are(recovery, loop):  # noqa: F811
    """Solved ones (the lone correct row among them), those with tools, and rows with a part that was not sampled."""
    samples = asyncio.run(loop._score_group(group(SOLVED)))
    assert [s.input_ids[len(PROMPT) :].tolist() for s in samples] == [list(row) for row in SOLVED]
    assert [s.metrics["reward"] for s in samples] == [0.0, 0.0, 0.0, 1.0]
    assert "recovered/groups_left_alone" not in metrics(loop)
    given = group(FAILED, tool_call_counts=[1, 0, 0, 0])
    samples = asyncio.run(loop._score_group(given))
    assert all(s.metrics["reward"] == 0.0 for s in samples)
    assert metrics(loop)["recovered/groups_left_alone"] == 1.0
    with pytest.raises(ConfigError, match="no column `answer`"):
        asyncio.run(loop._score_group(group(FAILED, reward_kwargs={})))


def test_the_worker_runs_the_loop_that_repairs():
    assert RecoveringRolloutWorker._loop_cls is _RecoveringLoop
