"""The strategies that ask the policy in words: what they ask, what they make of its reply, what that is charged."""

import dataclasses
from collections import deque
from contextlib import nullcontext

import pytest

from latentrevise import RecoverConfig
from latentrevise.data.boundary import Boundary
from latentrevise.data.records import Prompt
from latentrevise.demo import model_dir
from latentrevise.engines import Completion, SamplingParams
from latentrevise.errors import ConfigError
from latentrevise.model.loading import load_model
from latentrevise.model.policy import Policy
from latentrevise.strategies import Cut, Tools, build
from latentrevise.strategies.evocot import EvoCoTConfig, stages
from latentrevise.strategies.intervene import InterveneConfig
from latentrevise.strategies.retry import RetryConfig
from latentrevise.strategies.self_hint import SelfHintConfig
from latentrevise.strategies.step_checked import StepCheckedConfig
from tests.failed import tools_for, work_of
from tests.tiny import tiny_model, tiny_tokenizer

MODEL, TOKENIZER = tiny_model("qwen3", vocab=97, seed=3), tiny_tokenizer()


def encode(text):
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


class Scripted:
    """An engine that replies what it is told to, in order, and keeps what it was asked."""

    limit, shares_prefixes = None, True

    def __init__(self, *replies):
        self.replies, self.asked = deque(replies), []

    def reusing(self):
        return nullcontext()

    def generate(self, requests, params, progress=None):
        each = params if isinstance(params, list) else [params] * len(requests)
        self.asked += [(TOKENIZER.decode(list(r.ids)), p) for r, p in zip(requests, each, strict=True)]
        return [[Completion(encode(self.replies.popleft()), None, "stop") for _ in range(p.n)] for p in each]


def scripted(*replies, tokenizer=TOKENIZER, boundary=None):
    params = SamplingParams(max_new_tokens=40, temperature=0.7)
    return Tools(
        Policy(MODEL, TOKENIZER),
        Scripted(*replies),
        tokenizer,
        params,
        None,
        boundary and Boundary(boundary, tokenizer),
    )


def piece(question="abc", failed=("d;e;=8",), target="9"):
    work = work_of(encode(question), [encode(text) for text in failed], encode("="), encode(target), TOKENIZER)
    return dataclasses.replace(work, prompt=dataclasses.replace(work.prompt, text=question))


def propose(name, tools, work, samples=4, **settings):
    (own,) = build(name, RecoverConfig(**settings)).propose(tools, [work], samples)
    return own


HINTS = SelfHintConfig(rationale="R{prompt}{answer}", hint="H{prompt}{answer}{rationale}", solve="{prompt}S{hint}")


def test_a_hint_is_written_from_the_answer_and_the_question_sampled_behind_it():
    tools = scripted("why", "use x", "it is 9", "use x", "use y")
    own = propose("self-hint", tools, piece(), samples=3, self_hint=HINTS)
    (rationale, greedy), (hint, drawn) = tools.engine.asked
    assert (rationale, greedy.temperature, greedy.n) == ("Rabc9", 0.0, 1)
    assert (hint, drawn.temperature, drawn.n, drawn.max_new_tokens) == ("Habc9why", 0.7, 4, 40)
    # Equal hints are one; the one that names the answer is not used.
    assert [(TOKENIZER.decode(list(p.context_ids)), p.n) for p in own] == [("abcSuse x", 2), ("abcSuse y", 1)]
    assert all(p.plain_ids == () for p in own), "nothing of the hint stands in the row"
    assert own[0].compute.forward == len("Rabc9") + len("Habc9why")
    assert own[0].compute.decoded == sum(len(x) + 1 for x in ("why", "use x", "it is 9", "use x", "use y"))
    assert own[1].compute.passes == 0
    assert [p.uncached for p in own] == [len("abcSuse x")] * 2


def test_without_a_usable_hint_the_question_is_sampled_and_the_search_still_charged():
    tools = scripted("why", "9", "", " ", "9!")
    (own,) = propose("self-hint", tools, piece(), self_hint=HINTS)
    assert (own.n, own.context_ids, own.plain_ids) == (4, (), ())
    assert own.compute.decoded > 0
    (named,) = propose(
        "self-hint",
        scripted("9"),
        piece("a 9"),
        self_hint=dataclasses.replace(HINTS, rationale="", hints=1, hint="{prompt}{answer}"),
    )
    assert TOKENIZER.decode(list(named.context_ids)) == "a 9S9", "what the question says itself gives nothing away"


def test_hints_go_through_the_chat_template_behind_the_messages_before_the_question():
    tokenizer = tiny_tokenizer(chat=True)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    ids = tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    work = dataclasses.replace(piece(), prompt=Prompt("p", "s\nq", ids, "9", {}, messages))
    tools = scripted("why", "x", tokenizer=tokenizer)
    (own,) = propose("self-hint", tools, work, self_hint=dataclasses.replace(HINTS, hints=1))
    assert [text for text, _ in tools.engine.asked] == [
        "[system]s\n[user]Rq9\n[assistant]",
        "[system]s\n[user]Hq9why\n[assistant]",
    ]
    assert TOKENIZER.decode(list(own.context_ids)) == "[system]s\n[user]qSx\n[assistant]"


def test_templates_name_their_places():
    with pytest.raises(ConfigError, match=r"SelfHintConfig.hint .*\{rationale\}"):
        SelfHintConfig(hint="{prompt}{answer}")
    with pytest.raises(ConfigError, match="hints = 0"):
        SelfHintConfig(hints=0)


@pytest.mark.parametrize("name", ["explain", "self-hint"])
def test_a_model_that_reads_words_of_its_task_alone_is_not_asked_in_others(name):
    model, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    ids = tokenizer.encode("32 ? = 90 ; 94 ? = 52 ; 45 ?", add_special_tokens=False)
    work = work_of(ids, [ids[:4]], tokenizer.encode("so \\boxed{"), tokenizer.encode("3"), tokenizer)
    with pytest.raises(ConfigError, match=rf"{name.replace('-', '_')}\.\w+: .*no token for .*answer.*worked example"):
        propose(name, tools_for(model, tokenizer), work)


def test_retry_shows_each_chosen_attempt_and_reads_no_answer():
    settings = RetryConfig(shown="{prompt}A{attempt}", told="{prompt}W{attempt}")
    work = piece(failed=("d;=8", "e;=7"))
    work = dataclasses.replace(work, cuts=(*work.cuts, Cut("p/1", work.failed[1].completion_ids[:1], (5,))))
    for name, mark in (("retry", "A"), ("retry-told", "W")):
        own = propose(name, scripted(), dataclasses.replace(work, target="unread"), samples=3, retry=settings)
        assert [(TOKENIZER.decode(list(p.context_ids)), p.n, p.parent) for p in own] == [
            (f"abc{mark}d;=8", 2, "p/0"),
            (f"abc{mark}e;=7", 1, "p/1"),
        ]
        assert not build(name, RecoverConfig(retry=settings)).uses_answer


ASKED = InterveneConfig(locate="L{prompt}{answer}{steps}", correct="C{prompt}{answer}{step}", corrections=3)


def false_when_e(prompt, before, step):
    """The step checker of these tests: false is a step of an ``e`` behind one of a ``d``; of ``u`` it can't say."""
    return None if "u" in step else not ("e" in step and "d" in before)


def test_the_first_wrong_step_gives_way_to_corrections():
    tools = scripted("Step 2.", "x;", "e;", "y;", boundary=";")
    own = propose("intervene", tools, piece(failed=("d;e;fboxed8",)), samples=3, intervene=ASKED)
    (located, one), (corrected, several) = tools.engine.asked
    assert located == "Labc91. d;\n2. e;\n3. f"
    assert corrected == "Cabc9e;d;", "behind the steps before it"
    assert (one.n, one.temperature, several.n, several.temperature) == (1, 0.0, 3, 0.7)
    assert ";" in several.stop
    # The wrong step itself is no correction; the others share the samples.
    assert [(TOKENIZER.decode(list(p.plain_ids)), p.n) for p in own] == [("d;x;", 2), ("d;y;", 1)]
    assert all(p.original_ids == encode("d;") and p.parent == "p/0" and not p.context_ids for p in own)
    assert own[0].compute.forward == len(located) + len(corrected)
    assert own[0].compute.decoded == len("Step 2.") + 1 + len("x;e;y;")


@pytest.mark.parametrize("reply", ["4", "0", "none of them"])
def test_a_step_that_is_not_there_leaves_the_question(reply):
    (own,) = propose("intervene", scripted(reply, boundary=";"), piece(failed=("d;e;fboxed8",)), intervene=ASKED)
    assert (own.n, own.plain_ids, own.context_ids) == (4, (), ())
    assert own.compute.decoded == len(reply) + 1


def test_a_step_checker_names_the_step_in_the_models_place():
    name = "tests.test_strategies_asking:false_when_e"
    tools = scripted("x;", "boxed9;", "y;", boundary=";")
    own = propose("intervene", tools, piece(failed=("e;du;eu;e;gboxed8",)), intervene=ASKED, step_checker=name)
    assert [text for text, _ in tools.engine.asked] == ["Cabc9e;e;du;eu;"]
    # A correction that opens the answer is none.
    assert [TOKENIZER.decode(list(p.plain_ids)) for p in own] == ["e;du;eu;x;", "e;du;eu;y;"]
    (none,) = propose(
        "intervene", scripted(boundary=";"), piece(failed=("e;d;boxed8",)), step_checker=name, intervene=ASKED
    )
    assert (none.n, none.plain_ids, none.compute.passes) == (4, (), 0)
    with pytest.raises(ConfigError, match=r"step_checker = 'tests.nowhere:x' can't be imported"):
        build("intervene", RecoverConfig(step_checker="tests.nowhere:x"))


def test_rationales_lose_their_steps_from_the_end_the_longest_first():
    config = EvoCoTConfig(template="E{prompt}{answer}", rationales=3, stages=2)
    tools = scripted("a;b;c;d;boxed9", "a;x;boxed9", "a;y;boxed8", boundary=";")
    own = propose("evocot", tools, piece(), evocot=config)
    assert [(text, p.n, p.temperature) for text, p in tools.engine.asked] == [("Eabc9", 3, 0.7)]
    # The second's only start is the first's shortest; the third comes to another answer.
    assert [(TOKENIZER.decode(list(p.plain_ids)), p.n, p.uncached) for p in own] == [("a;", 2, 2), ("a;b;c;", 2, 6)][
        ::-1
    ]
    assert own[0].compute.passes == len("Eabc9") + len("a;b;c;d;boxed9a;x;boxed9a;y;boxed8") + 3
    (none,) = propose("evocot", scripted("b", "c", "boxed9", boundary=";"), piece(), evocot=config)
    assert (none.n, none.plain_ids) == (4, ())


@pytest.mark.parametrize(
    ("steps", "most", "kept"), [(0, 4, []), (1, 4, []), (2, 4, [1]), (3, 4, [2, 1]), (9, 1, [8]), (9, 3, [8, 4, 1])]
)
def test_stages_go_from_all_steps_but_one_down_to_one(steps, most, kept):
    assert stages(steps, most) == kept


def test_a_false_step_is_sampled_again_and_a_rollout_without_one_that_holds_given_up():
    name = "tests.test_strategies_asking:false_when_e"
    # Two rollouts, in rounds: the first takes d, then e (false) twice and is given up; the second goes on.
    tools = scripted("d;", "a;", "e;", "du;", "e;", "eu;", "c", boundary=";")
    tools = dataclasses.replace(tools, sampling=dataclasses.replace(tools.sampling, n=1))
    own = propose("step-checked", tools, piece(), samples=2, step_checker=name, step_checked=StepCheckedConfig(tries=2))
    asked = [text for text, _ in tools.engine.asked]
    assert asked == ["abc", "abc", "abcd;", "abca;", "abcd;", "abca;du;", "abca;du;eu;"]
    assert all(";" in params.stop and params.temperature == 0.7 for _, params in tools.engine.asked)
    (start,) = own
    assert (TOKENIZER.decode(list(start.plain_ids)), start.n, start.uncached) == ("a;du;eu;c", 2, 0)
    # All that was decoded, the steps turned away too, and the end of the last; nothing was run otherwise.
    assert (start.compute.forward, start.compute.decoded) == (0, len("d;a;e;du;e;eu;c") + 1)


def test_rollouts_stop_where_the_answer_opens_or_no_room_is_left():
    name = "tests.test_strategies_asking:false_when_e"
    tools = scripted("a;", "boxed9;", boundary=";")
    (start,) = propose("step-checked", tools, piece(), samples=1, step_checker=name)
    assert TOKENIZER.decode(list(start.plain_ids)) == "a;"
    long = scripted(*["a" * 18 + ";"] * 9, boundary=";")
    (start,) = propose("step-checked", long, piece(), samples=1, step_checker=name)
    assert len(start.plain_ids) == 2 * 19 + 19, (
        "of 40 tokens that a rollout may have, the step that reaches them is the last"
    )
    with pytest.raises(ConfigError, match=r"step-checked needs a step_checker.*leave the strategy out"):
        build("step-checked", RecoverConfig())
