"""The adapters' contracts: what a framework hands over at its hook, and what it must get back.

The frameworks are not installed here (tests/trainers runs three of them). Each is stood in for by the fields that its
source declares at the hook (repository, file and commit are in the adapter's docstring), with ``slots``, so that no
other field can be written.
"""

import asyncio
import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass, field
from enum import Enum

import pytest
import torch

from latentrevise import strategies
from latentrevise.adapters import core, slime
from latentrevise.adapters.core import AdapterSettings, Group, Recovery
from latentrevise.engines import SamplingParams
from latentrevise.errors import ConfigError
from latentrevise.model.policy import Policy
from latentrevise.train.repair import Repairer, RepairSettings
from latentrevise.verify.verifier import Verifier
from tests.test_train_rlvr import TOKENIZER, UNGUARDED, Boxing, Told, encode
from tests.tiny import BOS, EOS, tiny_model

TEMPERATURE = 0.7
PROMPT = (BOS, *encode("qa="))
PREFIX = encode("so")
FAILED = [(*encode(text), EOS) for text in ("no, 3", "no, 4 it is", "no, 3", "no")]
DUPLICATE = 2  # goes first
SOLVED = [*FAILED[:3], (*encode("so 7: \\boxed{7}"), EOS)]
LATENT = {"told": False, "told-latent": True}


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=1) as own:
        yield own


@pytest.fixture(params=LATENT)
def recovery(request, verifier, monkeypatch):
    """With a tiny model; its strategy writes a prefix, as tokens or (``told-latent``) as a mixture."""
    for name, latent in LATENT.items():
        monkeypatch.setitem(strategies._STRATEGIES, name, lambda _, latent=latent: Told(latent=latent))
    repair = RepairSettings(strategy=request.param, samples=2, guards=UNGUARDED)
    settings = AdapterSettings(model="none", temperature=TEMPERATURE, group_size=4, reward=2.0, repair=repair)
    model = tiny_model()
    sampling = SamplingParams(temperature=TEMPERATURE, max_new_tokens=24)
    repairer = Repairer(Policy(model, TOKENIZER), Boxing(model, TOKENIZER), TOKENIZER, verifier, repair, sampling)
    own = Recovery(repairer, settings)
    core.hand_over(own)
    yield own
    core.hand_over(None)


def plain(prompt, ids):
    """Log-probs of ``ids`` by the model's own forward pass, at the trainer's temperature."""
    with torch.no_grad():
        logits = tiny_model()(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)


def check(recovery, ids, mask, logprobs=None, prompt=PROMPT):
    """A recovered row: its ids, what of them is trained, the plain stream, its end."""
    assert tuple(ids[: len(PREFIX)]) == PREFIX
    assert len(PREFIX) < len(ids) <= 24
    assert len(mask) == len(ids)
    latent = LATENT[recovery.settings.repair.strategy]
    assert [int(m) for m in mask] == [int(not latent)] * len(PREFIX) + [1] * (len(ids) - len(PREFIX))
    if logprobs is not None:
        torch.testing.assert_close(torch.as_tensor(logprobs), plain(prompt, list(ids)), atol=1e-5, rtol=1e-5)


# What all share
# ------------------------------------------------------------------------------------------------------------------


def group(rows=FAILED, **changes):
    return Group(**({"id": "p", "prompt_ids": PROMPT, "answer": "7", "rows": rows} | changes))


def test_rows_of_zero_hit_groups_alone_are_replaced(recovery):
    undecided = group(usable=[True, True, True, False])
    found = recovery([group(SOLVED), group(), undecided, group(FAILED[:2])])
    assert found.verdicts[0] == ["wrong", "wrong", "wrong", "correct"]
    assert found.verdicts[2] == ["wrong", "wrong", "wrong", "unknown"]
    (r,) = found.replacements  # the second; the third may be right, the last is too small to be trained on
    assert (r.group, r.row) == (1, DUPLICATE)
    check(recovery, r.ids, r.trained, r.logprobs)
    assert r.ended == (r.ids[-1] == EOS)
    assert r.text == TOKENIZER.decode(r.ids, skip_special_tokens=True)
    metrics = found.metrics
    assert metrics["zero_hit/frac_groups"] == 0.5
    assert metrics["zero_hit/rescued_frac"] == 0.5
    assert metrics["recovered/frac_rows"] == 1 / 14
    assert metrics["verifier/unknown_frac"] == 1 / 14


def test_nothing_to_repair(recovery):
    found = recovery([group(SOLVED)])
    assert (found.replacements, found.metrics["zero_hit/frac_groups"]) == ([], 0.0)


def test_the_newest_weights_are_loaded_before_a_repair(recovery, tmp_path):
    fresh = tiny_model(seed=5)
    fresh.save_pretrained(tmp_path / "step_2")
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "step_2" / name).unlink()
    (tmp_path / "step_2" / "STABLE").touch()
    recovery.settings = AdapterSettings(
        model="none", refresh=str(tmp_path / "*" / "STABLE"), repair=recovery.settings.repair
    )
    assert len(recovery([group()]).replacements) == 1
    for a, b in zip(recovery.repairer.policy.model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_settings_come_from_the_file_that_the_environment_names(tmp_path, monkeypatch):
    core._from_environment.cache_clear()
    monkeypatch.delenv(core.VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="set LATENTREVISE_ADAPTER"):
        core.current()
    tiny_model().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    file = tmp_path / "adapter.yaml"
    file.write_text(f"model: {tmp_path}\ndevice: cpu\nmax_new_tokens: 5\nrepair: {{strategy: resample, samples: 2}}\n")
    monkeypatch.setenv(core.VARIABLE, str(file))
    own = core.current()
    assert core.current() is own
    assert own.repairer.sampling.max_new_tokens == 5
    with own.repairer.verifier:
        assert own([group()]).verdicts == [["wrong"] * 4]
    core._from_environment.cache_clear()
    with pytest.raises(ConfigError, match="repairs nothing"):
        AdapterSettings(model="m", repair=RepairSettings(strategy="none"))


def test_spans():
    assert core.spans([0, 1, 1, 0, 1], offset=3) == [(4, 6), (7, 8)]
    assert core.spans([1, 1]) == [(0, 2)]
    assert core.spans([0, 0]) == []


@pytest.mark.parametrize("name", ["verl", "openrlhf", "prime_rl", "skyrl"])
def test_without_the_framework_its_name_is_in_the_error(name):
    with pytest.raises(ModuleNotFoundError, match=r"transfer_queue|openrlhf|prime_rl|skyrl"):
        importlib.import_module(f"latentrevise.adapters.{name}")


@pytest.fixture
def install(monkeypatch):
    """Stand-ins for modules of a framework; the adapter is imported anew on top of them."""

    def use(name, **modules):
        for path, members in modules.items():
            parts = path.split("__")
            for i in range(1, len(parts) + 1):
                whole = ".".join(parts[:i])
                if whole not in sys.modules:
                    monkeypatch.setitem(sys.modules, whole, types.ModuleType(whole))
            vars(sys.modules[".".join(parts)]).update(members)
        monkeypatch.delitem(sys.modules, f"latentrevise.adapters.{name}", raising=False)
        adapter = importlib.import_module(f"latentrevise.adapters.{name}")
        monkeypatch.delitem(sys.modules, f"latentrevise.adapters.{name}")
        return adapter

    return use


# slime
# ------------------------------------------------------------------------------------------------------------------


class Status(Enum):
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"


@dataclass(slots=True)
class Sample:
    """The fields of slime.utils.types.Sample that a rollout without tools fills."""

    tokens: list
    response_length: int
    group_index: int = 0
    index: int = 0
    rollout_id: int = 0
    prompt: str = "qa="
    multimodal_inputs: dict | None = None
    response: str = ""
    label: str = "7"
    reward: object = 0.0
    loss_mask: list | None = None
    rollout_log_probs: list | None = None
    rollout_top_p_token_ids: list | None = None
    rollout_routed_experts: list | None = None
    remove_sample: bool = False
    teacher_log_probs: list | None = None
    status: Status = Status.COMPLETED
    metadata: dict = field(default_factory=dict)

    @property
    def Status(self):
        return Status


def samples(rows=FAILED, **changes):
    return [
        Sample([*PROMPT, *row], len(row), index=i, rollout_log_probs=[-1.0] * len(row), **changes)
        for i, row in enumerate(rows)
    ]


def test_slime(recovery):
    data = [samples(SOLVED, group_index=0), samples(group_index=1)]
    before = [sample.tokens for own in data for sample in own]
    slime.repair_groups(types.SimpleNamespace(reward_key=None), data)
    changed = [sample for own in data for sample in own]
    changed = [s for s, tokens in zip(changed, before, strict=True) if s.tokens != tokens]
    (sample,) = changed
    assert sample is data[1][DUPLICATE]
    assert sample.tokens[: len(PROMPT)] == list(PROMPT)
    ids = sample.tokens[len(PROMPT) :]
    assert sample.response_length == len(ids) == len(sample.loss_mask) == len(sample.rollout_log_probs)
    check(recovery, ids, sample.loss_mask, sample.rollout_log_probs)
    assert sample.reward == 2.0
    assert sample.status is (Status.COMPLETED if ids[-1] == EOS else Status.TRUNCATED)
    assert (sample.rollout_id, sample.group_index, sample.index) == (0, 1, DUPLICATE)
    assert [len(own) for own in data] == [4, 4]


def test_slime_without_log_probs_and_with_several_rewards(recovery):
    data = [samples()]
    for sample in data[0]:
        sample.rollout_log_probs, sample.reward = None, {"acc": 0.0, "format": 1.0}
    slime.repair_groups(types.SimpleNamespace(reward_key="acc"), data)
    assert data[0][DUPLICATE].reward == {"acc": 2.0, "format": 1.0}
    assert all(sample.rollout_log_probs is None for sample in data[0])


def test_slime_leaves_alone_what_it_cannot_write(recovery):
    aborted, tools, nested = samples(), samples(), [samples()] * 4
    aborted[3].status = Status.ABORTED
    tools[0].loss_mask = [1, 0, *[1] * (len(FAILED[0]) - 2)]
    before = repr([aborted, tools, nested])
    slime.repair_groups(types.SimpleNamespace(), [aborted, tools, nested])
    assert repr([aborted, tools, nested]) == before
    with pytest.raises(ConfigError, match="rollout_routed_experts"):
        slime.repair_groups(types.SimpleNamespace(), [samples(rollout_routed_experts=[[0]])])


# verl
# ------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class KVBatchMeta:
    partition_id: str
    keys: list
    tags: list


@dataclass(slots=True)
class NonTensorData:
    data: object


class Queue:
    """TransferQueue's kv calls as verl makes them: tensors of ragged length come back nested, the rest wrapped."""

    def __init__(self):
        self.store, self.tags = {}, {}

    def kv_batch_get(self, keys, partition_id, select_fields=None):
        rows = [self.store[key] for key in keys]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return {
            name: torch.nested.as_nested_tensor(values, layout=torch.jagged)
            if isinstance(values[0], torch.Tensor)
            else [NonTensorData(value) for value in values]
            for name, values in columns.items()
        }

    def kv_batch_put(self, keys, partition_id, fields, tags):
        for key, row, tag in zip(keys, fields, tags, strict=True):
            assert set(row) <= set(self.store[key])  # nothing that the agent loop does not write
            self.store[key].update(row)
            self.tags[key] = tag


def stored(rows, uid, queue, **changes):
    """As ``AgentLoopWorkerTQ._agent_loop_postprocess`` stores a group."""
    for session, row in enumerate(rows):
        prompts, responses = torch.tensor(PROMPT), torch.tensor(row)
        input_ids = torch.cat([prompts, responses])
        key = f"{uid}_{session}_0"
        queue.store[key] = {
            "prompts": prompts,
            "responses": responses,
            "response_mask": torch.ones_like(responses),
            "loss_mask": torch.ones_like(responses),
            "rollout_log_probs": torch.full((len(row),), -1.0),
            "rm_scores": torch.zeros(len(row)),
            "input_ids": input_ids,
            "position_ids": torch.arange(len(input_ids)),
            "multi_modal_inputs": {},
            "extra_fields": {"reward_extra_info": {"acc": 0.0, "format": 1.0}, "min_global_steps": 3},
            "reward_model": {"style": "rule", "ground_truth": "7"},
            "uid": uid,
            **changes,
        }
        queue.tags[key] = {"status": "success", "prompt_len": len(PROMPT), "response_len": len(row), "seq_len": -1}


@pytest.fixture
def verl(install):
    queue = Queue()

    class ReplayBuffer:
        def sample(self, global_steps, partition_id, batch_size):
            keys = list(queue.store)
            return KVBatchMeta(partition_id, keys, [queue.tags[key] for key in keys]), {"kept": 1.0}

    adapter = install(
        "verl",
        transfer_queue={"kv_batch_get": queue.kv_batch_get, "kv_batch_put": queue.kv_batch_put},
        verl__trainer__ppo__v1__replay_buffer={"ReplayBuffer": ReplayBuffer, "ReplayBufferAsync": ReplayBuffer},
        verl__utils__tensordict_utils={"list_of_dict_to_tensordict": lambda rows: rows},
    )
    return adapter, queue


def test_verl(recovery, verl):
    adapter, queue = verl
    stored(SOLVED, "u1", queue)
    stored(FAILED, "u2", queue)
    before = {key: row["responses"] for key, row in queue.store.items()}
    batch, metrics = adapter.RecoveringReplayBuffer().sample(3, "train", 2)
    assert [key for key, row in queue.store.items() if row["responses"] is not before[key]] == [f"u2_{DUPLICATE}_0"]
    row = queue.store[f"u2_{DUPLICATE}_0"]
    ids = row["responses"].tolist()
    check(recovery, ids, row["response_mask"].tolist(), row["rollout_log_probs"])
    assert row["input_ids"].tolist() == [*PROMPT, *ids]
    assert row["position_ids"].tolist() == list(range(len(PROMPT) + len(ids)))
    assert torch.equal(row["loss_mask"], row["response_mask"])
    assert row["rm_scores"].tolist() == [0.0] * (len(ids) - 1) + [2.0]
    assert row["extra_fields"] == {"reward_extra_info": {"acc": 2.0, "format": 1.0}, "min_global_steps": 3}
    tag = batch.tags[batch.keys.index(f"u2_{DUPLICATE}_0")]
    assert tag == queue.tags[f"u2_{DUPLICATE}_0"]
    assert (tag["response_len"], tag["seq_len"]) == (len(ids), len(PROMPT) + len(ids))
    assert len(batch.keys) == 8
    assert metrics["kept"] == 1.0
    assert metrics["zero_hit/frac_groups"] == 0.5
    assert metrics["recovered/groups_left_alone"] == 0.0


def test_verl_validation_and_other_rows_stay_as_they_are(recovery, verl):
    adapter, queue = verl
    stored(FAILED, "u1", queue)
    before = repr(queue.store)
    _, metrics = adapter.RecoveringReplayBufferAsync().sample(3, "val", 2)
    assert metrics == {"kept": 1.0}
    tool = torch.ones(len(FAILED[0]), dtype=torch.long)
    tool[1] = 0
    queue.store["u1_0_0"]["response_mask"] = tool
    _, metrics = adapter.RecoveringReplayBufferAsync().sample(3, "train", 2)
    assert metrics["recovered/groups_left_alone"] == 1.0
    queue.store["u1_0_0"]["response_mask"] = torch.ones_like(tool)
    assert repr(queue.store) == before
    queue.store = {key: {k: v for k, v in row.items() if k != "rm_scores"} for key, row in queue.store.items()}
    with pytest.raises(ConfigError, match="no rm_scores"):
        adapter.RecoveringReplayBuffer().sample(3, "train", 2)


# OpenRLHF
# ------------------------------------------------------------------------------------------------------------------


class SingleTurnAgentExecutor:
    """OpenRLHF's, with rows in place of an engine's answers."""

    def __init__(self, remote_rm_url=None):
        pass

    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        row = llm_engine.pop(0)
        await asyncio.sleep(0.001 * len(row))
        if isinstance(row, str):
            raise OSError(row)
        return {
            "prompt": prompt,
            "label": label,
            "images": images,
            "mm_train_inputs": None,
            "observation_tokens": [*PROMPT, *row],
            "action_ranges": [(len(PROMPT), len(PROMPT) + len(row))],
            "rollout_log_probs": [0.0] * len(PROMPT) + [-1.0] * len(row) if sampling_params else None,
            "truncated": False,
            "reward": None,
            "scores": None,
            "extra_logs": {},
        }


@pytest.fixture
def executor(install, recovery):
    """As ``_load_agent_executor`` makes it: from the file, under another name, unknown to ``sys.modules``."""
    install("openrlhf", openrlhf__utils__agent={"SingleTurnAgentExecutor": SingleTurnAgentExecutor})
    place = importlib.util.find_spec("latentrevise.adapters.openrlhf").origin
    spec = importlib.util.spec_from_file_location("agent_module", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AgentExecutor()


async def generate_responses(executor, rows, label="7", sampling_params=True, max_length=64):
    """As ``RolloutRayActor.generate_responses`` calls it."""
    engine = list(rows)
    tasks = [
        executor.execute(
            prompt="qa=",
            label=label,
            sampling_params=sampling_params,
            max_length=max_length,
            hf_tokenizer=TOKENIZER,
            llm_engine=engine,
            images=None,
        )
        for _ in rows
    ]
    return await asyncio.gather(*tasks)


def run(*calls):
    """At once, as Ray runs an actor's calls: each in a task of its own."""

    async def every():
        return await asyncio.gather(*[asyncio.create_task(call) for call in calls])

    return asyncio.run(every())


def test_openrlhf(recovery, executor):
    solved, failed, evaluated = run(
        generate_responses(executor, SOLVED),
        generate_responses(executor, FAILED),
        generate_responses(executor, FAILED[:1]),
    )
    assert [response["reward"] for response in solved] == [0.0, 0.0, 0.0, 2.0]
    assert [response["scores"] for response in evaluated] == [0.0]
    assert evaluated[0]["observation_tokens"] == [*PROMPT, *FAILED[0]]
    rewards = [response["reward"] for response in failed]
    assert sorted(rewards) == [0.0, 0.0, 0.0, 2.0]
    row = failed[rewards.index(2.0)]
    ids = row["observation_tokens"][len(PROMPT) :]
    assert row["observation_tokens"][: len(PROMPT)] == list(PROMPT)
    mask = [0] * len(ids)
    for start, end in row["action_ranges"]:
        mask[start - len(PROMPT) : end - len(PROMPT)] = [1] * (end - start)
    assert row["rollout_log_probs"][: len(PROMPT)] == [0.0] * len(PROMPT)
    check(recovery, ids, mask, row["rollout_log_probs"][len(PROMPT) :])
    assert row["truncated"] == (ids[-1] != EOS)
    logs = [response["extra_logs"] for response in failed + solved]
    assert [set(own) for own in logs] == [{"recovered", "unknown"}] * 8  # the same for every row: they are concatenated
    assert sum(own["recovered"] for own in logs) == 1.0


def test_openrlhf_without_log_probs_or_room(recovery, executor):
    ((*rows,),) = run(generate_responses(executor, FAILED, sampling_params=None))
    assert all(response["rollout_log_probs"] is None for response in rows)
    ((*rows,),) = run(generate_responses(executor, FAILED, max_length=len(PROMPT) + len(PREFIX)))
    assert [response["reward"] for response in rows] == [0.0] * 4


def test_openrlhf_a_sample_that_fails_leaves_no_other_waiting(executor):
    with pytest.raises(OSError, match="engine died"):
        run(generate_responses(executor, [*FAILED[:3], "engine died"]))


def test_openrlhf_needs_the_size_of_a_group(recovery, executor):
    recovery.settings = AdapterSettings(model="none", repair=recovery.settings.repair)
    with pytest.raises(ConfigError, match="group_size"):
        type(executor)()


# prime-rl
# ------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Message:
    content: str
    reasoning_content: str | None = None

    def model_copy(self, update):
        return Message(**{"content": self.content, "reasoning_content": self.reasoning_content, **update})


@dataclass(slots=True)
class MessageNode:
    message: Message
    token_ids: list
    mask: list
    sampled: bool = False
    logprobs: list = field(default_factory=list)
    is_content: list = field(default_factory=list)
    advantages: list | None = None
    routed_experts: object = None
    kept_tokens: object = None


@dataclass(slots=True)
class Trace:
    task: object
    nodes: list
    rewards: dict
    info: dict = field(default_factory=dict)

    @property
    def reward(self):
        return sum(self.rewards.values())

    def record_reward(self, name, value, weight=1.0):
        self.rewards[name] = value * weight


@dataclass(slots=True)
class Episode:
    traces: list


def traces(rows, answer="7"):
    """Two nodes a trace: the question, and the answer behind the chat's generation prompt."""
    task = types.SimpleNamespace(key="k", data=types.SimpleNamespace(answer=answer))
    question, opening = PROMPT[:2], PROMPT[2:]
    return [
        Trace(
            task,
            [
                MessageNode(Message("qa="), list(question), [False] * len(question)),
                MessageNode(
                    Message("text", "thought"),
                    [*opening, *row],
                    [False] * len(opening) + [True] * len(row),
                    sampled=True,
                    logprobs=[-1.0] * len(row),
                    is_content=[False] * len(opening) + [True] * len(row),
                ),
            ],
            {"correct": 0.0},
        )
        for row in rows
    ]


@pytest.fixture
def prime_rl(install):
    class GRPOAlgorithm:
        async def score_group(self, episodes):
            own = [trace for episode in episodes for trace in episode.traces]
            mean = sum(trace.reward for trace in own) / len(own)
            for trace in own:
                for node in trace.nodes:
                    if any(node.mask):
                        node.advantages = [trace.reward - mean] * sum(node.mask)

    def iter_trainable_traces(episodes):
        yield from ((episode, trace) for episode in episodes for trace in episode.traces)

    return install(
        "prime_rl",
        prime_rl__orchestrator__algo={"ALGORITHM_CLASSES": {"grpo": GRPOAlgorithm}},
        prime_rl__orchestrator__algo__base={"iter_trainable_traces": iter_trainable_traces},
        prime_rl__orchestrator__algo__grpo={"GRPOAlgorithm": GRPOAlgorithm},
        prime_rl__entrypoints__orchestrator={"main": lambda: None},
    )


def test_prime_rl(recovery, prime_rl):
    own = traces(FAILED)
    asyncio.run(prime_rl.RecoveringGRPO().score_group([Episode([trace]) for trace in own]))
    assert [trace.reward for trace in own] == [0.0, 0.0, 2.0, 0.0]
    trace = own[DUPLICATE]
    question, node = trace.nodes
    assert question.token_ids == list(PROMPT[:2])
    opening = len(PROMPT) - 2
    assert node.token_ids[:opening] == list(PROMPT[2:])
    assert node.mask[:opening] == [False] * opening
    ids, mask = node.token_ids[opening:], node.mask[opening:]
    check(recovery, ids, mask)
    wanted = [value for value, trained in zip(plain(PROMPT, ids).tolist(), mask, strict=True) if trained]
    assert node.logprobs == pytest.approx(wanted, abs=1e-5)
    assert node.advantages == [1.5] * len(node.logprobs)
    assert (node.is_content, node.message.reasoning_content) == ([], None)
    assert node.message.content == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert trace.info == {"recovered": True}
    assert own[0].nodes[1].advantages == [-0.5] * len(FAILED[0])


def test_prime_rl_leaves_alone_what_it_cannot_write(recovery, prime_rl):
    solved, turns = traces(SOLVED), traces(FAILED)
    turns[0].nodes.append(turns[0].nodes[1])
    before = repr([solved, turns])
    prime_rl.repair_traces(solved)
    prime_rl.repair_traces(turns)
    assert repr([solved, turns]) == before
    with pytest.raises(ConfigError, match="no `answer`"):
        prime_rl.repair_traces(traces(FAILED, answer=None))
    own = traces(FAILED)
    own[DUPLICATE].nodes[1].kept_tokens = [1]
    with pytest.raises(ConfigError, match="kept_tokens"):
        prime_rl.repair_traces(own)


def test_prime_rl_command_puts_the_algorithm_in_its_place(prime_rl):
    prime_rl.main()
    assert prime_rl.ALGORITHM_CLASSES["grpo"] is prime_rl.RecoveringGRPO
