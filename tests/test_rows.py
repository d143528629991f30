"""Rows in the forms that data sets have: golds and prompts come out right, or are left out with a reason."""

import gzip
import json
import logging
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentrevise.data.golds import unwrap
from latentrevise.data.prompts import PromptSettings, load_prompts
from latentrevise.data.storage import read_jsonl, write_jsonl
from latentrevise.data.tables import plain
from latentrevise.errors import ConfigError, InputError
from latentrevise.verify.verifier import Verifier
from tests.tiny import BOS, EOS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def verifier():
    with Verifier(timeout=30, workers=1) as it:
        yield it


@pytest.fixture
def load(verifier):
    def load(source, **changes):
        return load_prompts(source, **({"tokenizer": TOKENIZER, "verifier": verifier} | changes))

    return load


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        (r"\boxed{7}", "7"),
        (r"$\boxed{7}$", "7"),
        (r"$\frac{1}{2}$", r"\frac{1}{2}"),
        (r"$$\frac{1}{2}$$", r"\frac{1}{2}"),
        (r"\(x^2\)", "x^2"),
        (r"\[x^2\]", "x^2"),
        (r"The answer is \boxed{7}.", "7"),
        ("The answer is 7.", "7"),
        ("Final Answer: $7$", "7"),
        ("So, the final answer is: **73**.", "73"),
        ("steps = 7\n#### 7", "7"),
        ("#### 1,000", "1,000"),
        ("<think>6+1</think> <answer> 7 </answer>", "7"),
        ("故答案为：$7$。", "7"),
        ("**Answer:** 73", "73"),
        ("**Answer: 73**", "73"),
        ("'73'", "73"),
        ("“73”", "73"),
        ("**73**", "73"),
        ("`73`", "73"),
        ('"73"', "73"),
        (" 5. ", "5"),
        ("0.5.", "0.5"),
        ("$42.$", "42"),
        ("Yes.", "Yes"),
        ("$1$, $2$", "1, 2"),
        ("$1$ and $2$", "1 and 2"),
        # What is part of the answer stays.
        ("5", "5"),
        ("[1, 2]", "[1, 2]"),
        (r"\{1,2\}", r"\{1,2\}"),
        ("a.m.", "a.m."),
        ("0.333...", "0.333..."),
        (r"\$18", r"\$18"),
        ("$18", "$18"),
        (r"$\$18$", r"\$18"),
        ("x = 5", "x = 5"),
        ("4.5e33", "4.5e33"),
        ("(0,1)", "(0,1)"),
        ("2**3", "2**3"),
        (r"\text{The answer is 7}", r"\text{The answer is 7}"),
        ("f'(x)", "f'(x)"),
        ("the only answer", "the only answer"),
    ],
)
def test_golds_are_unwrapped(text, bare):
    assert unwrap(text) == bare
    assert unwrap(bare) == bare, "once unwrapped, nothing is left to take off"


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        ('["12"]', "12"),
        ("['12']", "12"),
        ("['1 2']", "1 2"),
        ('["\\\\boxed{7}"]', "7"),
        ('{"ground_truth": "7", "style": "rule"}', "7"),
        (np.array(["4"], dtype=object), "4"),
        (np.array([4]), "4"),
        (np.float32(0.1), "0.1"),
        (np.int64(4), "4"),
        (("4",), "4"),
        (["7", "$7$"], "7"),
        ([None, "7"], "7"),
        (1e20, "100000000000000000000"),
        (1e-7, "0.0000001"),
        (27.0, "27.0"),
        (Decimal("1E+3"), "1000"),
        (7, "7"),
        ({"ground_truth": np.array([r"\boxed{7}"], dtype=object)}, "7"),
        ({"target": "7"}, "7"),
    ],
)
def test_cells_are_read_as_the_answer_they_hold(load, cell, answer):
    (prompt,), errors = load([{"problem": "p", "answer": cell}])
    assert (prompt.answer, errors) == (answer, [])


@pytest.mark.parametrize(
    "cell",
    [
        *("proof", "Proof.", "notfound", "not found", "None", "nan", "NaN", "N/A", "NA", "null", "unknown", "<NA>"),
        *(r"\text{proof}", r"$\text{None}$", r"\boxed{}", "", " ", "[]", '[""]', '["None"]', "-", "?", "####"),
        *(None, float("nan"), np.nan, float("inf"), [], {}, {"ground_truth": None}, np.array([], dtype=object)),
    ],
)
def test_golds_that_say_there_is_none_are_left_out(load, cell):
    prompts, errors = load([{"problem": "p", "answer": cell}, {"problem": "q", "answer": "7"}])
    assert [p.answer for p in prompts] == ["7"]
    assert [(e.row, e.reason) for e in errors] == [(0, "missing-answer")]
    assert "'answer'" in errors[0].message


def test_answers_that_only_look_like_none(load):
    golds = ["Na", "-5", r"\emptyset", "0", "no solution"]
    prompts, _ = load([{"problem": "p", "answer": gold} for gold in golds])
    assert [p.answer for p in prompts] == golds


def test_several_answers_are_one_list_only_where_the_data_say_so(load):
    rows = [
        {"problem": "a", "final_answer": ["$1$", "2"]},
        {"problem": "b", "final_answer": '["1", "2"]'},
        {"problem": "c", "final_answer": np.array(["1", "$2$"], dtype=object)},
    ]
    assert [p.answer for p in load(rows)[0]] == ["1, 2"] * 3
    flagged = {"problem": "a", "answer": ["1", "2"], "is_multiple_answer": True}
    assert load([flagged])[0][0].answer == "1, 2"
    for cell in (
        ["1", "2"],
        '["1", "2"]',
        "['1' '2']",
        "['1'\n '2']",
        str(np.array([r"\text{1}", r"\text{2}"])),
        np.array(["1", "2"]),
        {"ground_truth": {"target": ["1", "2"]}},
    ):
        prompts, errors = load([{"problem": "a", "answer": cell}])
        assert (prompts, [e.reason for e in errors]) == ([], ["several-answers"])
        assert "2 answers (" in errors[0].message


@pytest.mark.parametrize(
    ("row", "named", "answer"),
    [
        ({"solution": r"$\frac{63}{400}$"}, None, r"\frac{63}{400}"),  # TRL's rows
        ({"solution": "63/400"}, None, "63/400"),
        ({"solution": r"10\text{ cm long}"}, None, r"10\text{ cm long}"),
        ({"solution": r"it is \boxed{7}"}, None, "7"),
        ({"solution": "it follows.\nThe answer is 7."}, None, "7"),
        ({"solution": "it is 7"}, None, None),
        ({"solution": "x = 3\ny = 7"}, None, None),
        ({"solution": "it is odd"}, "solution", "it is odd"),
        ({"solution": r"$\frac{63}{400}$"}, "solution", r"\frac{63}{400}"),
        ({"solution": r"\boxed{7}", "gold": "8"}, "gold", "8"),
        ({"expected_answer": "8", "solution": r"\boxed{7}"}, None, "8"),
    ],
)
def test_a_solution_needs_a_mark_unless_the_answer_stands_there_alone(load, row, named, answer):
    prompts, errors = load(
        [{"prompt": [{"role": "user", "content": "q"}], **row}], tokenizer=CHATTY, answer_column=named
    )
    assert [p.answer for p in prompts] == ([] if answer is None else [answer])
    assert [e.reason for e in errors] == (["missing-answer"] if answer is None else [])


def test_only_a_solution_is_kept_beside_its_answer(load):
    """What is kept is what `hint` may show: never a bare answer in another dress."""
    rows = [{"problem": "p", "answer": cell} for cell in (r"$7$", "The answer is 8.", '["9"]', "6 #### 5")]
    assert [p.meta for p in load(rows)[0]] == [{}, {}, {}, {"answer": "6 #### 5"}]


def test_arrays_in_further_columns_stay_lists(load):
    row = {"problem": "p", "answer": "7", "tags": np.array(["a", "b"], dtype=object), "level": np.int64(3), "x": np.nan}
    (prompt,), _ = load([row])
    assert prompt.meta == {"tags": ["a", "b"], "level": 3, "x": None}
    assert plain((np.float32(0.1), np.array([[1, 2]]), np.bool_(True))) == [0.1, [[1, 2]], True]


def test_a_table_is_its_rows(load):
    assert load(pa.table({"problem": ["p"], "answer": ["7"]}))[0][0].answer == "7"

    class Frame:  # as much of pandas' as is looked at
        columns = ("problem", "answer")

        def to_dict(self, orient):
            assert orient == "records"
            return [{"problem": "p", "answer": "7"}]

    assert load(Frame())[0][0].answer == "7"
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    data = datasets.Dataset.from_list([{"problem": "p", "answer": ["7"]}])
    assert load(data.with_format("numpy"))[0][0].answer == load(data)[0][0].answer == "7"
    with pytest.raises(InputError, match="a mapping of train, test"):
        load({"train": [], "test": []})


# Prompts

CHATTY = tiny_tokenizer(chat=True)
MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    "cell",
    [
        MESSAGES,
        tuple(MESSAGES),
        np.array(MESSAGES, dtype=object),
        json.dumps(MESSAGES),
        str(MESSAGES),
        [{**m, "name": None} for m in MESSAGES],  # a table's empty cells
        [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": "2+2?"}]}],
    ],
)
@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_messages_in_every_form(load, column, cell):
    (prompt,), errors = load([{column: cell, "answer": "4"}], tokenizer=CHATTY)
    assert errors == []
    assert CHATTY.decode(prompt.ids) == "[system]be\n[user]2+2?\n[assistant]"
    assert prompt.messages == MESSAGES


@pytest.mark.parametrize(
    "cell", [str(np.array(MESSAGES, dtype=object)), json.dumps(MESSAGES)[:-1], '[{"role": "user"}]']
)
def test_messages_that_cannot_be_read_are_no_question(load, cell):
    prompts, errors = load([{"prompt": cell, "answer": "4"}], tokenizer=CHATTY)
    assert (prompts, [e.reason for e in errors]) == ([], ["bad-messages"])


@pytest.mark.parametrize("text", ["[1, 2] has what sum?", '["a"]', '{"a": 1}', "[x"])
def test_text_that_is_no_message_stays_text(load, text):
    (prompt,), _ = load([{"prompt": text, "answer": "4"}], tokenizer=CHATTY)
    assert (prompt.text, prompt.messages) == (text, [])


def special(template, *tokens):
    """A tokenizer with a template of special tokens, which also begins each text with <bos>."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.chat_template = template
    return tokenizer


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nbe<|im_end|>\n' }}{% endif %}"
BRACKETS = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
LLAMA = (
    "{{ bos_token }}{{ '<|h|>system<|/h|>\n\ntoday<|eot|>' }}"
    "{% for m in messages %}{{ '<|h|>' + m['role'] + '<|/h|>\n\n' + m['content'] + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
DONE = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "text", "decoded"),
    [
        (CHATML, DONE, DONE),
        (SYSTEM + CHATML, DONE, DONE),
        ("{{ bos_token }}" + CHATML, DONE, "<bos>" + DONE),
        ("{{ bos_token }}" + CHATML, "<bos>" + DONE, "<bos>" + DONE),
        (BRACKETS, "[INST] 2+2? [/INST]", "<bos>[INST] 2+2? [/INST]"),
        (BRACKETS, "<bos>[INST] 2+2? [/INST]", "<bos>[INST] 2+2? [/INST]"),
    ],
)
def test_text_in_the_chat_format_is_used_as_it_is(load, caplog, template, text, decoded):
    tokenizer = special(template, "<|im_start|>", "<|im_end|>")
    (prompt,), errors = load([{"prompt": text, "answer": "4"}], tokenizer=tokenizer)
    assert errors == []
    assert tokenizer.decode(prompt.ids) == decoded
    assert [r.getMessage() for r in caplog.records] == [
        "prompts: 1 prompts are in the chat format already: used as they are, without the template"
    ]


def test_a_text_in_the_chat_format_is_the_users_message_to_others(load):
    """Exports and `explain` put a template on the conversation, and must not put it on a template."""
    tokenizer = special(SYSTEM + CHATML, "<|im_start|>", "<|im_end|>")
    (prompt,), _ = load([{"prompt": DONE, "answer": "4"}], tokenizer=tokenizer, instruction="box it")
    assert prompt.conversation == [{"role": "user", "content": "2+2?\n\nbox it"}]
    headers = special(LLAMA, "<|h|>", "<|/h|>", "<|eot|>")
    (prompt,), _ = load(
        [{"prompt": "<|h|>user<|/h|>\n\n2+2?<|eot|><|h|>assistant<|/h|>\n\n", "answer": "4"}], tokenizer=headers
    )
    assert prompt.conversation == [{"role": "user", "content": "2+2?"}]
    bare = special(BRACKETS)
    (prompt,), _ = load([{"prompt": "<bos>[INST] 2+2? [/INST]", "answer": "4"}], tokenizer=bare)
    assert prompt.conversation == [{"role": "user", "content": "2+2?"}]
    for text in ("<|im_start|>system\nno<|im_end|>\n" + DONE, DONE + "1<|im_end|>\n" + DONE):
        (prompt,), _ = load([{"prompt": text, "answer": "4"}], tokenizer=tokenizer)
        assert prompt.messages == []
        assert tokenizer.decode(prompt.ids) == text


def test_a_beginning_of_sequence_that_opens_turns(load):
    """As SmolLM2 has it: the text begins with the mark, and must not lose it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = "<|im_start|>", "<|im_end|>", SYSTEM + CHATML
    for text in (DONE, "<|im_start|>system\nno<|im_end|>\n" + DONE):
        (prompt,), _ = load([{"prompt": text, "answer": "4"}], tokenizer=tokenizer)
        assert tokenizer.decode(prompt.ids) == text
    (prompt,), _ = load([{"prompt": "2+2?", "answer": "4"}], tokenizer=tokenizer)
    assert tokenizer.decode(prompt.ids) == "<|im_start|>system\nbe<|im_end|>\n" + DONE


def test_a_question_about_a_special_token_is_a_question(load):
    tokenizer = special(CHATML, "<|im_start|>", "<|im_end|>")
    (prompt,), _ = load([{"prompt": "is <|im_start|> 4?", "answer": "4"}], tokenizer=tokenizer)
    assert tokenizer.decode(prompt.ids) == DONE.replace("2+2?", "is <|im_start|> 4?")


def test_an_instruction_goes_in_front_of_the_templates_end(load):
    tokenizer = special(CHATML, "<|im_start|>", "<|im_end|>")
    (prompt,), _ = load([{"prompt": DONE, "answer": "4"}], tokenizer=tokenizer, instruction="box it")
    assert tokenizer.decode(prompt.ids) == DONE.replace("2+2?", "2+2?\n\nbox it")
    (prompt,), _ = load(
        [{"prompt": "[INST] 2+2? [/INST]", "answer": "4"}], tokenizer=special(BRACKETS), instruction="x"
    )
    assert tokenizer.decode(prompt.ids) == "<bos>[INST] 2+2?\n\nx [/INST]"
    cut = DONE.removesuffix("<|im_start|>assistant\n")
    _, errors = load([{"prompt": cut, "answer": "4"}], tokenizer=tokenizer, instruction="box it")
    assert [e.reason for e in errors] == ["chat-format"]


@pytest.mark.parametrize(
    ("template", "chat", "text", "decoded"),
    [
        (None, "auto", "<bos>2+2?", "<bos>2+2?"),
        (CHATML, "never", "<bos>2+2?", "<bos>2+2?"),
        (CHATML, "never", "2+2?", "<bos>2+2?"),
        ("{{ bos_token }}" + CHATML, "auto", "<bos>2+2?", "<bos>" + DONE),
        ("{{ bos_token }}" + CHATML, "auto", "2+2?", "<bos>" + DONE),
        (CHATML, "auto", "2+2?<eos>", DONE.replace("2+2?", "2+2?<eos>")),  # an end alone is no chat format
    ],
)
def test_one_beginning_of_sequence(load, caplog, template, chat, text, decoded):
    tokenizer = special(template, "<|im_start|>", "<|im_end|>")
    (prompt,), _ = load([{"prompt": text, "answer": "4"}], tokenizer=tokenizer, chat=chat)
    assert tokenizer.decode(prompt.ids) == decoded
    assert len(caplog.records) == ("<bos>" in text)
    assert EOS not in prompt.ids or "<eos>" in text


THINKING = CHATML + "{% if enable_thinking is defined and not enable_thinking %}{{ '<nothink>' }}{% endif %}"


def test_arguments_of_the_template(load):
    tokenizer = special(THINKING, "<|im_start|>", "<|im_end|>", "<nothink>")
    rows = [{"prompt": "2+2?", "answer": "4"}, {"prompt": [{"role": "user", "content": "2+2?"}], "answer": "5"}]
    for given, end in (({}, ""), ({"enable_thinking": True}, ""), ({"enable_thinking": False}, "<nothink>")):
        found, _ = PromptSettings(chat_template_kwargs=given).load(rows, tokenizer, None)
        assert [tokenizer.decode(p.ids) for p in found] == [DONE + end] * 2
    for given, match in (
        ({"enable_thinkin": False}, r"chat_template_kwargs\.enable_thinkin: .* does not read it"),
        ({"add_generation_prompt": False}, "set by this package"),
        ({"messages": []}, "set by this package"),
    ):
        with pytest.raises(ConfigError, match=match):
            load(rows, tokenizer=tokenizer, chat_template_kwargs=given)
    with pytest.raises(ConfigError, match="no chat template"):
        load(rows, chat_template_kwargs={"enable_thinking": False})


def test_copies_cost_one_line_and_no_templating(load, monkeypatch):
    tokenizer, asked = tiny_tokenizer(chat=True), []
    template = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: asked.append(a) or template(*a, **k))
    rows = [{"prompt": f"{i % 3}+2?", "answer": "4", "index": i} for i in range(300)]
    prompts, errors = load(rows, tokenizer=tokenizer)
    assert [p.text for p in prompts] == ["0+2?", "1+2?", "2+2?"]
    assert [(e.row, e.id, e.reason) for e in errors] == [(3, None, "repeated-prompt")]
    assert errors[0].message.startswith("297 rows")
    assert len(asked) == 4, "three prompts, and once to see what the template looks like"
    assert [e.reason for e in load([{"id": "a", **rows[0]}, {"id": "a", **rows[1]}])[1]] == ["duplicate-id"]


# Files

ROWS = [{"prompt": "1+1", "answer": "2"}, {"prompt": "2+2", "answer": "4"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("p.JSONL.GZ", gzip.compress(LINES.encode(), mtime=0)),
        ("p.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("p.csv.gz", gzip.compress(b"prompt,answer\n1+1,2\n2+2,4\n", mtime=0)),
        ("p.tsv", b"prompt\tanswer\n1+1\t2\n2+2\t4\n"),
        ("p.tsv", b'prompt\tanswer\n"1+1"\t2\n2+2\t4\n'),
        ("p.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("p.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    ],
)
def test_files_that_people_keep(load, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    prompts, errors = load(tmp_path / name)
    assert ([(p.text, p.answer) for p in prompts], errors) == ([("1+1", "2"), ("2+2", "4")], [])


def test_a_folder_of_shards(load, tmp_path, caplog):
    for i, row in enumerate(ROWS):
        pq.write_table(pa.Table.from_pylist([row, {"prompt": f"{i}", "answer": None}]), tmp_path / f"x-{i}.parquet")
    (tmp_path / "README.md").write_text("not a shard")
    prompts, errors = load(tmp_path)
    assert [p.text for p in prompts] == ["1+1", "2+2"]
    assert [e.row for e in errors] == [1, 3]
    assert "2 files are read as one, x-0.parquet to x-1.parquet" in caplog.text
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"several kinds \(\.json, \.parquet\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (json.dumps(ROWS, indent=2), r"a JSON list, not one object a line; rename it to \.json"),
        (json.dumps(ROWS), r"a JSON list, not one object a line; rename it to \.json"),
        (json.dumps({"data": ROWS}, indent=2), r"JSON over several lines, .*rename it to \.json"),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), r"JSON over several lines, .*jq -c"),
    ],
)
def test_other_json_in_a_jsonl_file_is_one_hint(load, tmp_path, content, match):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(InputError, match=match):
        load(tmp_path / "p.jsonl")


def test_a_broken_gzip_file_is_named(load, tmp_path):
    for content in (gzip.compress(LINES.encode())[:-12], LINES.encode()):
        (tmp_path / "p.jsonl.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"p\.jsonl\.gz is not a whole gzip file"):
            load(tmp_path / "p.jsonl.gz")


def test_home_is_expanded(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jsonl").write_text(LINES)
    assert len(load("~/p.jsonl")[0]) == 2


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_lines_end_at_a_newline_alone(load, tmp_path, mark):
    rows = [{"id": f"a{mark}b", "message": mark}, {"id": "c", "message": "d"}]
    write_jsonl(tmp_path / "e.jsonl", rows)
    assert read_jsonl(tmp_path / "e.jsonl") == rows
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"1{mark}+1", "answer": "2"}])
    assert load(tmp_path / "p.jsonl")[0][0].text == f"1{mark}+1"
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_plain_rows_are_read_without_a_word(load, caplog):
    caplog.set_level(logging.WARNING)
    load(ROWS)
    assert caplog.records == []
