"""Exports: the columns that the trainers read, from the ids that were sampled."""

import json

import pyarrow.parquet as pq
import pytest

from latentrevise.data.boundary import Boundary
from latentrevise.data.export import export_run
from latentrevise.data.formats import (
    FORMATS,
    message_rows,
    preference_rows,
    prefix_rows,
    rl_rows,
    sft_rows,
    verl_rl_rows,
)
from latentrevise.data.records import Prompt, Rollout, Trajectory, write_records
from latentrevise.data.storage import write_json
from latentrevise.errors import ConfigError, InputError, ModelError, RunError
from latentrevise.verify.patterns import AnswerPattern
from tests.tiny import BOS, EOS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def encode(text):
    return tuple(TOKENIZER.encode(text))


def trajectory(n=0, **changes):
    row = {
        "prompt_id": f"p{n}",
        "sample_id": f"p{n}/latent/0",
        "start_id": f"p{n}/latent",
        "parent_sample_id": f"p{n}/1",
        "strategy": "latent",
        "prompt": "2 * 3 = ?",
        "prompt_ids": (BOS, *encode("[user]2 * 3 = ?")),
        "prefix_ids": encode("think five"),
        "plain_prefix_ids": encode("think six."),
        "prefix_rendering": "argmax",
        "completion_ids": encode(" so \\boxed{6}"),
        "completion": " so \\boxed{6}",
        "answer": "6",
        "extracted_answer": "6",
        "verdict": "correct",
        "valid": n % 2 == 0,
        "reward": 1.0,
        "finish_reason": "stop",
        "model": "m",
        "seed": 0,
        "temperature": 1.0,
        "top_p": 1.0,
        "steps": [],
        "trace": None,
        "sampling_logprobs": (-1.0,) * 13,
        "plain_logprobs": None,
        "backend": "reference",
        "config_hash": "c",
    }
    return Trajectory(**(row | changes))


def rollout(n, sample, text, verdict="wrong"):
    ids = encode(text)
    return Rollout(f"p{n}", f"p{n}/{sample}", ids, text, None, verdict, "stop", (-1.0,) * len(ids))


PROMPTS = [
    Prompt(t.prompt_id, t.prompt, t.prompt_ids, t.answer, {}, messages)
    for t, messages in (
        (trajectory(0), []),
        (trajectory(1), [{"role": "system", "content": "2 * 3"}, {"role": "user", "content": " = ?"}]),
        (trajectory(2), []),
    )
]
CONVERSATIONS = {p.id: p.conversation for p in PROMPTS}
ROLLOUTS = [
    rollout(n, s, f"think five, no. {s}", "unknown" if s == 0 else "wrong") for n in (0, 1, 2) for s in (0, 1, 2)
]


def learned(row):
    return tuple(i for i, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m)


def test_sft_learns_the_rendered_prefix_and_the_end():
    (row,) = sft_rows([trajectory()], TOKENIZER)
    t = trajectory()
    assert row["input_ids"] == [*t.prompt_ids, *t.plain_prefix_ids, *t.completion_ids, EOS]
    assert learned(row) == (*t.plain_prefix_ids, *t.completion_ids, EOS)
    assert row["completion"] == "think six. so \\boxed{6}"
    assert row["prompt"] == "<bos>[user]2 * 3 = ?"
    assert (row["sample_id"], row["strategy"], row["prefix_rendering"]) == ("p0/latent/0", "latent", "argmax")


def test_sft_masks_the_prefix_when_only_the_continuation_is_learned():
    t = trajectory(prefix_rendering="continuation")
    (row,) = sft_rows([t], TOKENIZER)
    assert learned(row) == (*t.completion_ids, EOS)
    assert row["input_ids"][: len(t.prompt_ids) + len(t.plain_prefix_ids)] == [*t.prompt_ids, *t.plain_prefix_ids]
    assert row["prompt"].endswith("?think six.")
    assert row["completion"] == " so \\boxed{6}"


@pytest.mark.parametrize(
    ("changes", "stop"), [({"finish_reason": "length"}, ()), ({}, ("}",)), ({"completion": "x\n\nab"}, ("\n\n",))]
)
def test_sft_teaches_no_end_where_the_sampler_cut(changes, stop):
    (row,) = sft_rows([trajectory(**changes)], TOKENIZER, stop)
    assert EOS not in row["input_ids"]


def test_a_beginning_that_the_tokenizer_adds_by_itself_is_not_written_twice():
    class Adding:
        eos_token_id = EOS
        decode = staticmethod(TOKENIZER.decode)

        def __call__(self, text):
            found = TOKENIZER(text)
            found["input_ids"] = [BOS, *found.input_ids]
            return found

    (row,) = sft_rows([trajectory()], Adding())
    assert row["prompt"] == "[user]2 * 3 = ?"
    assert Adding()(row["prompt"]).input_ids == list(trajectory().prompt_ids)


def test_preferences_reject_the_parent_and_never_an_unknown():
    parentless = trajectory(1, parent_sample_id=None)
    of_unknown = trajectory(2, parent_sample_id="p2/0")
    rows = preference_rows([trajectory(parent_sample_id="p0/2"), parentless, of_unknown], ROLLOUTS, TOKENIZER)
    assert [r["rejected_sample_id"] for r in rows] == ["p0/2", "p1/1", "p2/1"]
    assert rows[0]["rejected"] == "think five, no. 2"
    assert rows[0]["chosen"] == "think six. so \\boxed{6}"
    (row,) = preference_rows([trajectory(prefix_rendering="continuation")], ROLLOUTS, TOKENIZER)
    assert (row["chosen"], row["rejected"]) == (" so \\boxed{6}", ", no. 1")
    assert row["prompt"].endswith("think six.")
    with pytest.raises(InputError, match="p7 has no rollout verified wrong"):
        preference_rows([trajectory(7)], ROLLOUTS, TOKENIZER)


def test_messages_cannot_mask():
    first, second = message_rows([trajectory(), trajectory(1)], CONVERSATIONS, TOKENIZER)
    assert first["messages"] == [
        {"role": "user", "content": "2 * 3 = ?"},
        {"role": "assistant", "content": "think six. so \\boxed{6}"},
    ]
    assert second["messages"] == [*PROMPTS[1].messages, first["messages"][1]]
    with pytest.raises(ConfigError, match=r"p0/latent/0.*out of the loss"):
        message_rows([trajectory(prefix_rendering="continuation")], CONVERSATIONS, TOKENIZER)
    cut = trajectory(prefix_rendering="continuation", plain_prefix_ids=())
    assert message_rows([cut], CONVERSATIONS, TOKENIZER)


def test_verl_rl_has_one_row_a_prompt():
    given = [trajectory(), trajectory(sample_id="p0/latent/1"), trajectory(1)]
    rows = verl_rl_rows(given, CONVERSATIONS, TOKENIZER)
    assert [r["extra_info"]["sample_id"] for r in rows] == ["p0/latent/0", "p1/latent/0"]
    assert [r["extra_info"]["index"] for r in rows] == [0, 1]
    assert rows[0]["reward_model"] == {"style": "rule", "ground_truth": "6"}
    assert [r["prompt"] for r in rows] == [[{"role": "user", "content": "2 * 3 = ?"}], PROMPTS[1].messages]


def test_rl_has_one_row_a_prompt_with_the_gold_under_both_names():
    rows = rl_rows([trajectory(), trajectory(sample_id="p0/latent/1"), trajectory(1)], CONVERSATIONS)
    assert [r["metadata"]["sample_id"] for r in rows] == ["p0/latent/0", "p1/latent/0"]
    assert [r["prompt"] for r in rows] == [[{"role": "user", "content": "2 * 3 = ?"}], PROMPTS[1].messages]
    assert rows[0]["answer"] == rows[0]["label"] == "6"


def test_prefix_starts_shrink_from_stage_to_stage_and_never_hold_the_answer():
    steps = trajectory(plain_prefix_ids=encode("ab;"), completion_ids=encode("cd;ef;\\boxed{6}"))
    other = trajectory(1, plain_prefix_ids=(), completion_ids=encode("x\\boxed{6}"))
    again = trajectory(sample_id="p0/latent/1")
    rows = prefix_rows([steps, again, other], TOKENIZER, Boundary(";", TOKENIZER), AnswerPattern())
    kept = [(r["prompt_id"], r["stage"], r["prompt"].removeprefix("<bos>[user]2 * 3 = ?")) for r in rows]
    # Of 9 tokens before the box 6.75, 4.5 and 2.25, each to the nearest step; without steps, the nearest token.
    assert kept == [
        *(("p0", 0, "ab;cd;"), ("p1", 0, "x")),
        *(("p0", 1, "ab;"), ("p1", 1, "")),
        ("p0", 3, ""),
    ]
    for row, ids in zip(rows, ("ab;cd;", "x", "ab;", "", ""), strict=True):
        assert row["prompt_ids"] == [*steps.prompt_ids, *encode(ids)]
        assert row["kept"] == len(ids)
        assert row["answer"] == "6"


# A run
# ------------------------------------------------------------------------------------------------------------------

COLUMNS = {
    "trl-sft": {"prompt", "completion", "input_ids", "completion_mask"},
    "trl-pref": {"prompt", "chosen", "rejected", "rejected_sample_id"},
    "trl-step-pref": {"prompt", "chosen", "rejected", "rejected_sample_id", "shared_tokens"},
    "prefix-rl": {"prompt", "answer", "prompt_ids", "kept", "stage"},
    "messages": {"messages"},
    "verl-sft": {"messages"},
}
ORIGIN = {"prompt_id", "sample_id", "strategy", "prefix_rendering"}


@pytest.fixture
def run(tmp_path):
    place = tmp_path / "run"
    tokenizer = tmp_path / "model"
    TOKENIZER.save_pretrained(tokenizer)
    write_json(place / "run.json", {"config": {"stop": []}, "model": {"path": str(tokenizer)}})
    write_records(place / "trajectories.parquet", [trajectory(0), trajectory(1), trajectory(2, strategy="resample")])
    write_records(place / "rollouts" / "part-00000.parquet", ROLLOUTS)
    write_records(place / "prompts.parquet", PROMPTS)
    return place


def test_every_format_has_its_columns(run, tmp_path):
    for name in FORMATS:
        out = tmp_path / f"{name}.parquet"
        assert export_run(run, name, out) == (12 if name == "prefix-rl" else 3)  # four starts of each
        columns = set(pq.read_schema(out).names)
        if name == "trl-groups":
            columns -= {"prompt", "answer", "prompt_id", "prompt_ids"}
            assert columns == {"completions", "masks", "outcomes", "recovered"}
        elif name == "rl":
            assert columns == {"prompt", "answer", "label", "metadata"}
            assert set(pq.read_table(out).to_pylist()[0]["metadata"]) == ORIGIN
        elif name == "verl-rl":
            assert columns == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
            assert set(pq.read_table(out).to_pylist()[0]["extra_info"]) == {"split", "index", "target", *ORIGIN}
        else:
            assert columns == COLUMNS[name] | ORIGIN


def test_jsonl_holds_the_same_rows_as_parquet(run, tmp_path):
    for suffix in ("jsonl", "parquet"):
        export_run(run, "trl-sft", tmp_path / f"rows.{suffix}")
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert lines == pq.read_table(tmp_path / "rows.parquet").to_pylist()


def test_only_what_was_asked_for(run, tmp_path):
    out = tmp_path / "x.jsonl"
    assert export_run(run, "messages", out, strategy="latent") == 2
    assert export_run(run, "messages", out, strategy="latent", valid_only=True) == 1
    assert export_run(run, "messages", out, valid_only=True) == 2
    with pytest.raises(InputError, match=r"none of its 3 trajectories.*latent, resample; 2 valid"):
        export_run(run, "messages", out, strategy="pivot")


def test_bad_requests(run, tmp_path):
    with pytest.raises(ConfigError, match="'trl': choose one of trl-sft"):
        export_run(run, "trl", tmp_path / "x.jsonl")
    with pytest.raises(ConfigError, match=r"verl-sft is written as \.parquet"):
        export_run(run, "verl-sft", tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="finished run"):
        export_run(tmp_path, "trl-sft", tmp_path / "x.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        export_run(run, "trl-sft", tmp_path / "file" / "x.jsonl")
    write_json(run / "run.json", {"config": {}, "model": {"path": str(tmp_path / "gone")}})
    with pytest.raises(ModelError, match="tokenizer of this run"):
        export_run(run, "trl-sft", tmp_path / "x.jsonl")
    assert export_run(run, "trl-sft", tmp_path / "x.jsonl", tokenizer=TOKENIZER) == 3
    assert export_run(run, "trl-sft", f"file://{tmp_path}/url/x.jsonl", tokenizer=TOKENIZER) == 3
    assert (tmp_path / "url" / "x.jsonl").read_bytes() == (tmp_path / "x.jsonl").read_bytes()
