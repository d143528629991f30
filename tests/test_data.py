"""Prompts: every usual format and column name is read, and every row that cannot be used says why."""

import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentrevise.data.prompts import PromptSettings, evenly, load_prompts, spread
from latentrevise.errors import ConfigError, InputError
from latentrevise.verify.verifier import Verifier
from tests.tiny import BOS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def verifier():
    with Verifier(timeout=30, workers=1) as it:
        yield it


def load(source, **changes):
    return load_prompts(source, **({"tokenizer": TOKENIZER} | changes))


def reasons(errors):
    return [(e.row, e.reason) for e in errors]


ROWS = [
    {"id": "a", "prompt": "1+1", "answer": "2", "level": 5},
    {"id": "b", "prompt": "2+2", "answer": "4", "level": 1},
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(r) for r in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [",".join(rows[0]), *(",".join(str(v) for v in r.values()) for r in rows)]
        path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_formats(tmp_path, suffix):
    prompts, errors = load(write(tmp_path / f"p.{suffix}", ROWS))
    assert errors == []
    assert [(p.id, p.text, p.answer) for p in prompts] == [("a", "1+1", "2"), ("b", "2+2", "4")]
    assert prompts[0].ids == tuple(TOKENIZER.encode("1+1"))
    assert prompts[0].meta == {"level": "5" if suffix == "csv" else 5}


@pytest.mark.parametrize("key", ["data", "prompts"])
def test_json_with_the_list_inside(tmp_path, key):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"version": 1, key: ROWS}))
    assert len(load(path)[0]) == 2


def test_byte_order_mark_is_not_a_column_name(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("\ufeffprompt,answer\n1+1,2\n", encoding="utf-8")
    assert load(path)[0][0].text == "1+1"


@pytest.mark.parametrize(
    ("row", "text", "answer"),
    [
        ({"problem": "p", "answer": "1", "solution": "\\boxed{7}"}, "p", "1"),
        ({"question": "q", "ground_truth": "1", "solution": "\\boxed{7}"}, "q", "1"),
        ({"problem": "p", "solution": "first \\boxed{3}, no: \\boxed{7}."}, "p", "7"),
        ({"question": "q", "answer": "5 + 2 = 7\n#### 7"}, "q", "7"),
        ({"question": "q", "final_answer": ["7"]}, "q", "7"),
        ({"prompt": "p", "label": 7}, "p", "7"),
        ({"prompt": "p", "data_source": "x", "reward_model": {"style": "rule", "ground_truth": "7"}}, "p", "7"),
    ],
)
def test_columns_are_found_by_their_usual_names(row, text, answer):
    (prompt,), errors = load([row])
    assert (prompt.text, prompt.answer, errors) == (text, answer, [])


def test_columns_by_request():
    row = {"prompt": "no", "task": "yes", "answer": "1", "gold": "2"}
    (prompt,), _ = load([row], prompt_column="task", answer_column="gold")
    assert (prompt.text, prompt.answer, prompt.meta) == ("yes", "2", {"prompt": "no", "answer": "1"})


def test_ids_are_hashes_of_the_content_when_there_are_none():
    rows = [{"prompt": "1+1", "answer": "2"}, {"prompt": "1+1", "answer": "3"}]
    first, second = load(rows)[0]
    assert first.id != second.id
    assert load(rows[::-1])[0][1].id == first.id
    (named,), _ = load([{"prompt": "1+1", "answer": "2", "unique_id": 17}])
    assert named.id == "17"


def test_an_instruction_stands_behind_the_last_message():
    chatty = tiny_tokenizer(chat=True)
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "1+1"}]
    rows = [{"prompt": "1+1", "answer": "2"}, {"prompt": messages, "answer": "2"}]
    plain, many = load(rows, tokenizer=chatty, instruction="box it")[0]
    assert chatty.decode(plain.ids) == "[user]1+1\n\nbox it\n[assistant]"
    assert chatty.decode(many.ids) == "[system]be\n[user]1+1\n\nbox it\n[assistant]"
    assert (plain.text, many.text) == ("1+1\n\nbox it", "be\n1+1\n\nbox it")
    assert messages[1]["content"] == "1+1"  # the rows are the caller's
    assert [m["content"] for m in many.messages] == ["be", "1+1\n\nbox it"]
    assert reasons(load([{"prompt": " ", "answer": "2"}], instruction="box it")[1]) == [(0, "empty-prompt")]


def test_a_setting_does_not_make_room_that_the_model_lacks():
    rows = [{"prompt": "1" * n, "answer": "2"} for n in (4, 8, 12)]
    for most, room, left in ((None, 10, 2), (100, 10, 2), (6, 10, 1), (100, None, 3)):
        positions, new = (None, 7) if room is None else (room + 7, 7)
        prompts, errors = PromptSettings(max_prompt_tokens=most).load(iter(rows), TOKENIZER, positions, new)
        assert (len(prompts), {e.reason for e in errors} <= {"over-long-prompt"}) == (left, True)
    assert len(PromptSettings().load(rows, TOKENIZER, 12)[0]) == 2, "one position is left for a completion"


def test_fewer_prompts_are_spread_over_all():
    rows = [{"id": str(i), "prompt": f"{i}+1", "answer": "2"} for i in range(7)]
    rows[1]["answer"] = None
    for most, ids in ((None, "023456"), (9, "023456"), (6, "023456"), (3, "035"), (1, "0")):
        prompts, errors = PromptSettings(max_prompts=most).load(rows, TOKENIZER, None)
        assert "".join(prompt.id for prompt in prompts) == ids
        assert [error.row for error in errors] == [1]
    with pytest.raises(ConfigError, match="max_prompts = 0: it must be at least 1, or null"):
        PromptSettings(max_prompts=0).load(rows, TOKENIZER, None)


@pytest.mark.parametrize("most", [1, 3, 50, 4096])
@pytest.mark.parametrize("count", [0, 2, 4096, 4097, 20_000])
def test_some_of_a_stream_are_spread_over_all_of_it(count, most):
    chosen, found = spread(iter(range(count)), most)
    assert (found, len(chosen), chosen) == (count, min(most, count), sorted(chosen))
    if count <= 4096:
        assert chosen == evenly(range(count), most)
    apart = [b - a for a, b in pairwise([*chosen, count])]
    assert all(0 < step <= 1.6 * count / len(chosen) + 1 for step in apart)


@pytest.mark.parametrize("new", [14, 16, 17, 1024])
def test_too_many_new_tokens_are_refused_with_the_number_that_fits(new):
    rows = [{"prompt": "1" * n, "answer": "2"} for n in (3, 4)]
    assert len(PromptSettings().load(rows, TOKENIZER, 16, 12)[0]) == 2
    with pytest.raises(
        ConfigError, match=rf"max_new_tokens = {new} leaves no room .* 16 positions; set it to at most 12, or"
    ):
        PromptSettings().load(iter(rows), TOKENIZER, 16, new)
    with pytest.raises(ConfigError, match=r"trainer\.max_completion_length = 99 leaves .* at most 12$"):
        PromptSettings().load(rows, TOKENIZER, 16, 99, setting="trainer.max_completion_length")


def test_the_chat_template_is_applied_once():
    chatty = tiny_tokenizer(chat=True)
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "1+1"}]
    rows = [{"prompt": "1+1", "answer": "2"}]
    (plain,), _ = load(rows, tokenizer=chatty, chat="never")
    (auto,), _ = load(rows, tokenizer=chatty)
    (many,), _ = load([{"messages": messages, "answer": "2"}], tokenizer=chatty)
    assert plain.ids == tuple(chatty.encode("1+1"))
    assert chatty.decode(auto.ids) == "[user]1+1\n[assistant]"
    assert auto.text == "1+1"
    assert chatty.decode(many.ids) == "[system]be\n[user]1+1\n[assistant]"
    assert (auto.messages, many.messages) == ([], messages)
    assert (auto.conversation, many.conversation) == ([{"role": "user", "content": "1+1"}], messages)
    assert load(rows, chat="auto")[0][0].ids == plain.ids
    assert reasons(load([{"messages": messages, "answer": "2"}])[1]) == [(0, "no-chat-template")]
    assert reasons(load(rows, chat="always")[1]) == [(0, "no-chat-template")]


def test_the_tokenizers_own_beginning_is_kept_once():
    class WithBos:
        chat_template = None

        def encode(self, text, add_special_tokens=True):
            return [BOS] * add_special_tokens + TOKENIZER.encode(text)

    (prompt,), _ = load([{"prompt": "1+1", "answer": "2"}], tokenizer=WithBos())
    assert prompt.ids == (BOS, *TOKENIZER.encode("1+1"))


def test_a_template_that_refuses_a_row_loses_only_that_row():
    chatty = tiny_tokenizer(chat=True)
    chatty.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}ok"
    rows = [
        {"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], "answer": "1"},
        {"prompt": [{"role": "user", "content": "y"}], "answer": "1"},
    ]
    prompts, errors = load(rows, tokenizer=chatty)
    assert len(prompts) == 1
    assert reasons(errors) == [(0, "chat-template")]
    assert "no system" in errors[0].message


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answer": "2"}, "empty-prompt"),
        ({"prompt": "", "answer": "2"}, "empty-prompt"),
        ({"prompt": " \n", "answer": "2"}, "empty-prompt"),
        ({"prompt": [], "answer": "2"}, "empty-prompt"),
        ({"prompt": 5, "answer": "2"}, "bad-messages"),
        ({"prompt": ["a"], "answer": "2"}, "bad-messages"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "2"}, "bad-messages"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": "2"},
            "bad-messages",
        ),
        ({"prompt": "1+1"}, "missing-answer"),
        ({"prompt": "1+1", "answer": None}, "missing-answer"),
        ({"prompt": "1+1", "answer": " "}, "missing-answer"),
        ({"prompt": "1+1", "answer": float("nan")}, "missing-answer"),
        ({"prompt": "1+1", "answer": ["1", "2"]}, "several-answers"),
        ({"prompt": "1+1", "answer": "x #### "}, "missing-answer"),
        ({"prompt": "1+1", "answer": "\\frac{"}, "unparsable-answer"),
        ({"prompt": "1" * 21, "answer": "2"}, "over-long-prompt"),
        ({"id": "a", "prompt": "3+3", "answer": "6"}, "duplicate-id"),
        ({"prompt": "\ud800", "answer": "2"}, "bad-text"),
        ("text", "not-a-row"),
    ],
)
def test_a_bad_row_has_a_reason_and_the_rest_goes_on(verifier, row, reason):
    good = {"id": "a", "prompt": "1+1", "answer": "2"}
    rows = [good, row, {"id": "z", "prompt": "2+2", "answer": "4"}]
    prompts, errors = load(rows, max_prompt_tokens=20, verifier=verifier)
    assert [p.id for p in prompts] == ["a", "z"]
    assert reasons(errors) == [(1, reason)]
    assert len(errors[0].message) > 10
    with pytest.raises(InputError, match=rf"row 1: .*\({reason}\)"):
        load(rows, max_prompt_tokens=20, verifier=verifier, strict=True)


def test_a_solution_stays_beside_the_answer_that_was_taken_from_it():
    rows = [{"problem": "p", "solution": "it is \\boxed{7}"}, {"problem": "q", "solution": "\\boxed{7}"}]
    assert [p.meta for p in load(rows)[0]] == [{"solution": row["solution"]} for row in rows]
    (prompt,) = load([{"question": "q", "answer": "5 + 2 = 7\n#### 7"}])[0]
    assert prompt.meta == {"answer": "5 + 2 = 7\n#### 7"}
    (prompt,) = load([{"question": "q", "answer": " 7 "}])[0]
    assert prompt.meta == {}


def test_a_solution_without_a_box():
    rows = [{"problem": "p", "solution": "it is 7"}, {"problem": "q", "solution": "\\boxed{7}"}]
    prompts, errors = load(rows)
    assert len(prompts) == 1
    assert reasons(errors) == [(0, "missing-answer")]


def test_bad_lines_are_named_by_their_number(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "1+1", "answer": "2"}\n\n{"prompt": \n[1]\n{"prompt": "2+2", "answer": "4"}\n')
    prompts, errors = load(path)
    assert len(prompts) == 2
    assert reasons(errors) == [(3, "bad-json"), (4, "not-a-row")]
    assert "line 3 is not JSON" in errors[0].message
    path = tmp_path / "p.csv"
    path.write_text("prompt,answer\n1+1,2\nf(1,2),3\n")
    assert reasons(load(path)[1]) == [(1, "bad-csv")]


def test_not_a_number_in_another_column_is_null():
    """As pandas writes an empty cell; records refuse NaN, since it is not JSON."""
    (prompt,), _ = load([{"prompt": "1+1", "answer": "2", "level": float("nan"), "tags": ["a"]}])
    assert prompt.meta == {"level": None, "tags": ["a"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"", r"p\.jsonl is empty"),
        ("p.json", b"[]", r"p\.json is empty"),
        ("p.csv", b"prompt,answer\n", r"p\.csv is empty"),
        ("p.json", b"{", r"not JSON .*line 1.*\.jsonl"),
        ("p.json", b'{"a": 1}', "no list of rows"),
        ("p.txt", b"x", r"ends in '\.txt'; give a \.jsonl"),
        ("p.parquet", b"x", "not a readable parquet"),
        ("p.jsonl", b'{"prompt": "\xff", "answer": "2"}', "not UTF-8"),
        ("p.csv", b"prompt,answer\n\xff,2\n", "not UTF-8"),
        ("p.csv", b"prompt,answer\n" + b"1" * 200_000 + b",2\n", "not readable CSV"),
        ("p.jsonl", b'{"text": "1+1", "answer": "2"}', r"no prompt column \(looked for prompt.*found text, answer"),
        ("p.jsonl", b'{"prompt": "1+1", "result": "2"}', r"no answer column .*found prompt, result; .*answer_column"),
    ],
)
def test_files_that_cannot_be_used_at_all(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / name)


def test_places_without_a_file(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match=r"holds no \.jsonl"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"no column 'task'; found id, prompt, answer, level"):
        load(ROWS, prompt_column="task")
    with pytest.raises(InputError, match="is empty"):
        load([])


def test_an_answer_without_a_token_is_left_out(monkeypatch):
    tokenizer = tiny_tokenizer()
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **options: [] if text == "7" else encode(text, **options))
    prompts, errors = load_prompts(
        [{"prompt": "w1", "answer": "7"}, {"prompt": "w1", "answer": "8"}], tokenizer=tokenizer
    )
    assert [p.answer for p in prompts] == ["8"]
    assert [(e.row, e.reason) for e in errors] == [(0, "empty-answer")]
