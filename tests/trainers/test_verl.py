"""verl 0.9.1: rows through its queue, filters, advantages; ten steps of its trainer (what a CPU lacks: verl_cpu.py)."""

import os
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import transfer_queue as tq
import yaml
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from latentrevise.adapters import core
from latentrevise.adapters.verl import RecoveringReplayBuffer
from latentrevise.data.formats import verl_rl_rows
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.model.loading import load_model
from tests.test_adapters import DUPLICATE, FAILED, LATENT, PREFIX, PROMPT, SOLVED, check, recovery, verifier  # noqa: F401
from tests.test_exports import trajectory
from tests.trainers.verl_cpu import Server, Trainer, settings

SAMPLER = (
    "trainer.v1.sampler.custom_sampler.path=pkg://latentrevise.adapters.verl",
    "trainer.v1.sampler.custom_sampler.name=RecoveringReplayBuffer",
)


@pytest.fixture(scope="module", autouse=True)
def queue():
    """verl's TransferQueue on a Ray of this machine."""
    names = ("VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES", "OMP_NUM_THREADS")
    env = {name: os.environ[name] for name in names} | {"PYTHONPATH": os.getcwd()}
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": env},
    )
    one = "transfer_queue.backend.SimpleStorage.num_data_storage_units=1"  # each takes a CPU of Ray's
    tq.init(settings("transfer_queue.enable=true", one).transfer_queue)
    yield
    tq.close()
    ray.shutdown()


def put(uid, rows, partition="train", **changes):
    """A finished group, as ``AgentLoopWorkerTQ`` stores it."""
    keys, fields, tags = [], [], []
    for session, row in enumerate(rows):
        prompts, responses = torch.tensor(PROMPT), torch.tensor(row)
        keys.append(f"{uid}_{session}_0")
        fields.append(
            {
                "prompts": prompts,
                "responses": responses,
                "response_mask": torch.ones_like(responses),
                "loss_mask": torch.ones_like(responses),
                "rollout_log_probs": torch.full((len(row),), -1.0),
                "rm_scores": torch.zeros(len(row)).index_fill(0, torch.tensor([len(row) - 1]), float(row == SOLVED[3])),
                "input_ids": torch.cat([prompts, responses]),
                "position_ids": torch.arange(len(prompts) + len(row)),
                "multi_modal_inputs": {},
                "extra_fields": {"reward_extra_info": {"acc": 0.0}, "min_global_steps": 3},
                "reward_model": {"style": "rule", "ground_truth": "7"},
                "uid": uid,
                **changes,
            }
        )
        tags.append({"status": "success", "response_len": len(row), "seq_len": len(PROMPT) + len(row)})
    tq.kv_batch_put(keys=keys, partition_id=partition, fields=list_of_dict_to_tensordict(fields), tags=tags)
    tq.kv_batch_put(
        keys=[uid], partition_id=partition, tags=[{"is_prompt": True, "status": "finished", "global_steps": 3}]
    )


def buffer(cls=RecoveringReplayBuffer, **changes):
    config = settings(*SAMPLER).trainer.v1
    return cls(
        trainer_mode="sync",
        trainer_config=config.sync,
        max_off_policy_threshold=config.sampler.max_off_policy_threshold,
        max_off_policy_strategy=config.sampler.max_off_policy_strategy,
        sampler_kwargs=config.sampler.sampler_kwargs,
        refill_fn=lambda count: None,
        **changes,
    )


@pytest.fixture
def batch(recovery):  # noqa: F811
    """A group with a lone correct row and a zero-hit one, sampled through the adapter."""
    put("u1", SOLVED)
    put("u2", FAILED)
    found, metrics = buffer().sample(3, "train", 2)
    yield found, metrics
    tq.kv_clear(keys=found.keys, partition_id="train")


def test_a_row_of_another_length_goes_through_the_queue(recovery, batch):  # noqa: F811
    found, metrics = batch
    data = tq.kv_batch_get(keys=found.keys, partition_id="train")
    names = ("responses", "response_mask", "loss_mask", "rollout_log_probs", "rm_scores", "input_ids", "position_ids")
    place = found.keys.index(f"u2_{DUPLICATE}_0")
    row = {name: data[name][place] for name in names}
    ids = row["responses"].tolist()
    assert len(ids) != len(FAILED[DUPLICATE])
    check(recovery, ids, row["response_mask"].tolist(), row["rollout_log_probs"])
    assert row["input_ids"].tolist() == [*PROMPT, *ids]
    assert {len(row[name]) for name in names[:5]} == {len(ids)}
    assert row["rm_scores"].tolist() == [0.0] * (len(ids) - 1) + [2.0]
    assert found.tags[place]["seq_len"] == len(PROMPT) + len(ids)
    others = [k for k in found.keys if k != f"u2_{DUPLICATE}_0"]
    given = {f"{uid}_{i}_0": row for uid, rows in (("u1", SOLVED), ("u2", FAILED)) for i, row in enumerate(rows)}
    kept = tq.kv_batch_get(keys=others, partition_id="train", select_fields=["responses"])["responses"]
    assert {k: tuple(r.tolist()) for k, r in zip(others, kept, strict=True)} == {k: given[k] for k in others}
    assert metrics["zero_hit/rescued_frac"] == 1.0


def test_a_prefix_that_was_not_sampled_has_no_advantage(recovery, batch):  # noqa: F811
    """By verl's own GRPO, over the whole batch: positive where the recovered row is trained, and nowhere else in it."""
    found, _ = batch
    trainer = SimpleNamespace(config=settings("algorithm.adv_estimator=grpo"))
    old = tq.kv_batch_get(keys=found.keys, partition_id="train", select_fields=["rollout_log_probs"])
    old["old_log_probs"] = old.pop("rollout_log_probs")
    tq.kv_batch_put(keys=found.keys, partition_id="train", fields=old)
    Trainer._compute_advantage(trainer, found, {})
    data = tq.kv_batch_get(keys=found.keys, partition_id="train", select_fields=["advantages", "response_mask"])
    advantages = dict(zip(found.keys, data["advantages"], strict=True))
    own = advantages[f"u2_{DUPLICATE}_0"]
    given = len(PREFIX) if LATENT[recovery.settings.repair.strategy] else 0
    assert torch.equal(own[:given], torch.zeros(given))
    torch.testing.assert_close(own[given:], torch.full((len(own) - given,), 1.5), atol=1e-3, rtol=0)
    for key in ("u2_0_0", "u2_1_0", "u2_3_0", "u1_0_0"):
        torch.testing.assert_close(advantages[key], torch.full_like(advantages[key], -0.5), atol=1e-3, rtol=0)
    assert (advantages["u1_3_0"] > 0).all()


def test_verls_filter_keeps_a_repaired_group_and_a_lone_correct_row(batch):
    """Its DAPO filter, on what the queue holds after the repair; beside them a group that stays dead."""
    put("u3", FAILED[:2])
    for uid in ("u1", "u2"):
        tag = {"is_prompt": True, "status": "finished", "global_steps": 3}
        tq.kv_batch_put(keys=[uid], partition_id="train", tags=[tag])
    filtering = buffer(ReplayBuffer, filter_groups_metric="reward", train_batch_size=2, gen_batch_size=1)
    filtering._sync_metadata_from_transfer_queue()
    assert filtering._dapo_filtered_keys("train")[0] == {"u3"}
    tq.kv_clear(keys=["u1", "u2", "u3", "u3_0_0", "u3_1_0"], partition_id="train")


def test_ten_steps(tmp_path, monkeypatch):
    """The rows of `export --to verl-rl`, the bundled model, a real strategy, its copy renewed after each step."""
    family = get_family("rule")
    config = demo_config(family)
    model, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompts = make_prompts(family, 24, split="develop", seed=3)
    recovered = [trajectory(prompt_id=p["id"], answer=p["answer"]) for p in prompts]
    talks = {p["id"]: [{"role": "user", "content": p["prompt"]}] for p in prompts}
    pq.write_table(pa.Table.from_pylist(verl_rl_rows(recovered, talks, tokenizer)), tmp_path / "train.parquet")
    names = ("prefix_fraction", "prefix_boundary", "answer_template")
    adapter = {
        "model": str(tmp_path / "model"),
        "device": "cpu",
        "refresh": str(tmp_path / "weights" / "*" / "DONE"),
        "max_new_tokens": 24,
        "group_size": 4,
        "repair": {"strategy": "latent-plausible"} | {name: getattr(config, name) for name in names},
    }
    (tmp_path / "adapter.yaml").write_text(yaml.safe_dump(adapter))
    monkeypatch.setenv(core.VARIABLE, str(tmp_path / "adapter.yaml"))
    core._from_environment.cache_clear()
    server = Server(str(tmp_path / "model"), tmp_path / "weights")
    trainer = Trainer(settings(*SAMPLER, *overrides(tmp_path)), server)
    trainer.init()
    trainer.fit(trainer.manager)

    steps = trainer.steps
    assert len(steps) == server.version == 10
    assert server.calls == 10 * 16
    assert sum(s["recovered/frac_rows"] for s in steps) > 0.3
    assert all(s["recovered/groups_left_alone"] == 0 for s in steps)
    # verl's own comparison of what each row was sampled with and what its actor gives it, recovered rows among them.
    assert max(s["training/rollout_probs_diff_max"] for s in steps) < 1e-3
    for s in steps:
        assert (s["actor/grad_norm"] > 0) == (s["critic/score/max"] > 0)  # a batch of zero-hit groups teaches nothing
    weights = [tmp_path / "weights" / str(n) / "model.safetensors" for n in (0, 10)]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    own = core.current().repairer.policy.model.state_dict()
    last = {name: value for name, value in server.model.state_dict().items() if name in own}
    assert not all(torch.equal(own[name], value) for name, value in last.items())  # of before the tenth update


def overrides(place):
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return (
        f"data.train_files={place}/train.parquet",
        f"data.val_files={place}/train.parquet",
        "data.train_batch_size=4",
        "data.max_prompt_length=64",
        "data.max_response_length=24",
        "data.dataloader_num_workers=0",
        "data.seed=1",
        f"actor_rollout_ref.model.path={place}/model",
        "actor_rollout_ref.model.use_remove_padding=false",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        f"{rollout}.name=vllm",  # nothing of it is started
        f"{rollout}.n=4",
        f"{rollout}.calculate_log_probs=true",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=4",
        f"{actor}.strategy=fsdp2",
        f"+{actor}.fsdp_config.mixed_precision.param_dtype=fp32",
        f"{actor}.ppo_mini_batch_size=4",
        f"{actor}.ppo_micro_batch_size_per_gpu=4",
        f"{actor}.optim.lr=1e-4",
        "algorithm.adv_estimator=grpo",
        f"reward.custom_reward_function.path={os.path.dirname(__file__)}/verl_reward.py",
        "reward.num_workers=1",
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=1",
        "trainer.total_training_steps=10",
        "trainer.total_epochs=10",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "trainer.val_before_train=false",
        "trainer.logger=[console]",
    )
