"""Where steps end: a text or an expression over what tokens decode to, against a count over whole decoded prefixes."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from latentrevise import RecoverConfig
from latentrevise.config import from_dict, load_config, to_dict
from latentrevise.data.boundary import Boundary, Regex, pieces
from latentrevise.demo import model_dir
from latentrevise.engines import HFEngine, Request, SamplingParams
from latentrevise.engines.base import Completion
from latentrevise.engines.vllm_setup import upto_stop
from latentrevise.errors import ConfigError
from latentrevise.model.loading import load_model
from latentrevise.strategies import build
from latentrevise.strategies.candidates import ForkConfig, Reader, find_forks, score
from tests.failed import tools_for, work_of
from tests.tiny import tiny_model, tiny_tokenizer


def byte_tokenizer():
    """Byte-level BPE: one token a byte, and some of several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), (".", "Ċ"), ("Ġ", "T"), ("ĠT", "h"), ("!", "?"), ("ð", "Ł")]
    table = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(table, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BYTES = byte_tokenizer()
RULE = load_model(model_dir("rule"), dtype="float32", device="cpu")


def brute_force(tokenizer, ids, expression):
    """Decode every prefix whole; a step ends with the first one that is as long as the text up to a match's end."""
    wholes = [tokenizer.decode(ids[: n + 1]).rstrip("\ufffd") for n in range(len(ids))] or [""]
    lengths = list(map(len, wholes))
    matched = re.finditer(expression, wholes[-1])
    return sorted({next(n for n, length in enumerate(lengths, 1) if length >= m.end()) for m in matched if m.end()})


TEXTS = ["1.5 + 2 = 3.5. Then é😀。\n\nThis!? It… is.\n\n\n", "😀😀.", ". .\n.\n\n", "日本。日本", ""]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "expression", [r"\.", r"\.(?=\s)", r"\n\n", r"[.!?。](?!\d)", r"(?<=[.。])\s+", "é|😀", r". T", r"(?m)$(?<=\n)"]
)
def test_ends_are_those_of_the_decoded_text(text, expression):
    ids = BYTES.encode(text)
    assert Boundary(Regex(expression), BYTES).ends(ids) == brute_force(BYTES, ids, expression)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("what", [".", ". ", "\n\n", "😀", "é😀。", " Th"])
def test_a_text_ends_wherever_it_does(text, what):
    ids = BYTES.encode(text)
    assert Boundary(what, BYTES).ends(ids) == brute_force(BYTES, ids, f"(?<={re.escape(what)})")


def test_broken_characters_hide_no_boundary():
    alone = BYTES.convert_tokens_to_ids(["ð", "a", ".", "ł", "ł", "ł", "ł", "ł", ".", "ð"])
    assert "".join(pieces(BYTES.decode, alone)) == BYTES.decode(alone)
    assert Boundary(".", BYTES).ends(alone) == [3, 9]


def test_a_text_within_one_token_ends_where_single_tokens_said():
    """What a boundary was before: a token whose own text holds it."""
    _, tokenizer = RULE
    draw = torch.Generator().manual_seed(0)
    for words, what in ((tokenizer, ";"), (tokenizer, "wait"), (BYTES, "."), (BYTES, "\n"), (tiny_tokenizer(), "+")):
        ids = torch.randint(len(words), (400,), generator=draw).tolist()
        assert Boundary(what, words).ends(ids) == [
            i + 1 for i, token in enumerate(ids) if what in words.decode([token])
        ]


def test_a_step_that_goes_on_ends_at_the_next_boundary():
    def first(what, before, ids, **least):
        return Boundary(what, BYTES).first(BYTES.encode(before), BYTES.encode(ids), **least)

    assert first(".", "a.", "b.c.") == 2
    assert first(".", "a", "bc") is None
    assert first(". ", "a.", " b") == 1, "it may begin before"
    assert first(Regex(r"\.(?=\s)"), "1.", "5 b. c") == 4
    assert first(Regex(r"\.(?=\s)"), "1.", " b. c") == 3
    assert first(Regex(r"\.(?=\s)"), "1.", " b. c", least=0) == 0
    text, expression = Boundary(". ", BYTES), Boundary(Regex(r"\."), BYTES)
    assert [text.closes(BYTES.encode(ids)) for ids in ("a. ", "a.", "")] == [True, False, False]
    assert not expression.closes(BYTES.encode("a.")), "what follows may decide"


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("§", r"'§': the tokenizer has no tokens for it \(it reads '<unk>'\)"),
        ("\n", "has no tokens"),
        ("", "empty text"),
        ({"regex": "(a"}, r"prefix_boundary\.regex = '\(a' is no regular expression: .*position 0"),
        ({"regex": r"\s*"}, "matches the empty text"),
        ({"regex": "a", "flags": 1}, r"unknown setting prefix_boundary\.flags"),
        ({}, r"prefix_boundary: give its regex"),
        (5, "must be of type str"),
    ],
)
def test_what_is_wrong_with_a_setting_is_said(setting, match):
    with pytest.raises(ConfigError, match=match):
        Boundary.of(from_dict(RecoverConfig, {"prefix_boundary": setting}).prefix_boundary, RULE[1])


def test_settings_are_read_and_recorded(tmp_path):
    sentence = Regex(r"[.!?](?=\s)")
    path = tmp_path / "settings.yaml"
    path.write_text("prefix_boundary: {regex: '[.!?](?=\\s)'}\n")
    assert load_config(RecoverConfig, path).prefix_boundary == sentence
    for override in (r"prefix_boundary.regex=[.!?](?=\s)", r"prefix_boundary={regex: '[.!?](?=\s)'}"):
        found = load_config(RecoverConfig, None, [override])
        assert found.prefix_boundary == sentence
        assert from_dict(RecoverConfig, to_dict(found)) == found
    recorded = to_dict(found)["prefix_boundary"]
    ids = BYTES.encode("1.5 a. b")
    assert Boundary.of(recorded, BYTES).ends(ids) == [6]
    for text, read in ((";", ";"), (r"\n", "\n"), (". ", ". "), ("null", None)):
        assert load_config(RecoverConfig, None, [f"prefix_boundary={text}"]).prefix_boundary == read


def test_sampling_goes_one_token_past_a_match():
    """As a plain run of the same seed, up to there; vLLM's is cut to the same."""
    model, tokenizer = tiny_model("qwen3", vocab=97, seed=3), tiny_tokenizer()
    engine, requests = HFEngine(model, tokenizer), [Request((5, 6, 7), seed=i) for i in range(12)]
    plain = SamplingParams(max_new_tokens=40)
    stopping = replace(plain, stop_pattern=r"[a-m](?=[^a-m])")
    ended = 0
    for (whole,), (cut,) in zip(engine.generate(requests, plain), engine.generate(requests, stopping), strict=True):
        texts = [tokenizer.decode(list(whole.ids[: n + 1])) for n in range(len(whole.ids))]
        found = next((n for n, text in enumerate(texts, 1) if re.search(r"[a-m][^a-m]", text)), None)
        assert cut.ids == whole.ids[:found]
        again = upto_stop(tokenizer, stopping, whole)
        assert replace(again, logprobs=None) == replace(cut, logprobs=None)
        assert again.logprobs == pytest.approx(cut.logprobs, abs=1e-4)
        ended += found is not None and cut.finish_reason == "stop" and cut.end is None
    assert ended >= 6
    unfinished = Completion((5,), None, "length")
    assert upto_stop(tokenizer, stopping, unfinished) is upto_stop(tokenizer, plain, unfinished) is unfinished


def test_branches_of_an_expression_are_those_of_the_text_that_it_stands_for():
    """The same forks, values and charges but for the token that is looked ahead, where both mean one place."""
    model, tokenizer = tiny_model("qwen3", vocab=97, seed=3), tiny_tokenizer()

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    work = work_of(encode("12+3"), [encode("ab;cde;fg"), encode("a;;b;c")], encode("="), encode("4"), tokenizer)
    values = {}
    for what in (";", Regex(";")):
        tools = replace(tools_for(model, tokenizer), boundary=Boundary(what, tokenizer))
        reader, config = Reader(tools, work.template_ids, ("boxed",)), ForkConfig(p_min=0.008, step_tokens=6)
        found = find_forks(tools, reader, [work], [work.failed], config)
        (scored,) = score(tools, reader, [work], found, config.step_tokens)
        values[what] = [(fork.at, fork.token, round(fork.value, 3)) for fork in scored.forks]
        assert scored.forks
    assert values[";"] == values[Regex(";")]
    assert any(tokenizer.decode([token]) == ";" for _, token, _ in values[";"]), "a forced boundary is tried, too"


def test_every_strategy_with_steps_takes_an_expression():
    """Proposals of the bundled model with ``;`` as a text and as an expression begin alike."""
    model, tokenizer = RULE

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    failed = [encode("check A ; 32 - 50 = 82 ; wait , so \\boxed{ 3"), encode("check B ; 32 + 2 = 34 ; so \\boxed{ 5")]
    work = work_of(encode("32 ? = 90 ; 94 ? = 52 ; 45 ?"), failed, encode("so \\boxed{"), encode("7"), tokenizer)
    settings = RecoverConfig(step_checker=f"{__name__}:holds")
    for name in ("pivot", "pivot-pair", "latent-window", "step-checked", "intervene"):
        if name == "intervene":
            settings = replace(
                settings, intervene=replace(settings.intervene, correct="{prompt} = {answer} ; {prompt}")
            )
        made = []
        for what in (";", Regex(r";(?=\s|$)")):
            tools = replace(tools_for(model, tokenizer), boundary=Boundary(what, tokenizer))
            (own,) = build(name, settings).propose(tools, [work], 4)
            made.append([(p.plain_ids, p.original_ids, p.n) for p in own])
        assert made[0] == made[1], name


def holds(question, before, step):
    """A step checker: a step has a number and its end."""
    return step.rstrip().endswith(";") or None if any(c.isdigit() for c in step) else None


def test_a_solution_is_cut_where_sentences_end():
    tools = SimpleNamespace(tokenizer=BYTES, boundary=Boundary(Regex(r"\.(?=\s)"), BYTES))
    item = SimpleNamespace(prompt=SimpleNamespace(id="p", meta={"solution": "3.5 is half. So 7. \\boxed{7}"}))
    ((own,),) = build("hint", RecoverConfig()).propose(tools, [item], 1)
    assert BYTES.decode(own.plain_ids) == "3.5 is half."
