"""Where a completion says its answer, and that what the strategies put in front of one fits."""

import dataclasses

import pytest

from latentrevise.adapters.core import AdapterSettings
from latentrevise.errors import ConfigError
from latentrevise.recovery.evaluate import EvalConfig
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.recovery.verdicts import before_answer
from latentrevise.train.rlvr import RLVRSettings
from latentrevise.verify.patterns import NAMES, AnswerPattern, way_of_answering
from latentrevise.verify.verifier import Verifier


@pytest.mark.parametrize(
    ("pattern", "completion", "answer"),
    [
        ("answer-line", "steps\nAnswer: 34", "34"),
        ("answer-line", "**Answer:** $34$.\n", "$34$."),
        ("answer-line", "Answer: 1\nno\nFinal answer: \\boxed{2}", "\\boxed{2}"),
        ("answer-line", "the answer: is it 4?\nso on", "is it 4?"),
        ("answer-line", "no answer here: 5", None),
        ("gsm8k", "1 + 1 = 2\n#### 2", "2"),
        ("gsm8k", "#### 1,000 \n", "1,000"),
        ("gsm8k", "### 2", None),
        ("the-answer-is", "So the answer is 3.5. Next", "3.5"),
        ("the-answer-is", "The final answer is $\\frac{1}{2}$. I hope it is correct.", "$\\frac{1}{2}$"),
        ("the-answer-is", "The answer is: 7", "7"),
        ("the-answer-is", "the answer isn't 7", None),
        (r"<answer>\s*(.*?)\s*</answer>", "<answer>3</answer> <answer> 4 </answer>", "4"),
        (r"=> \S+", "=> 5", "=> 5"),
        ("boxed", "\\boxed{4} #### 5", "4"),
    ],
)
def test_answers_are_found(pattern, completion, answer):
    found = AnswerPattern(pattern).find(completion)
    assert (found and found.answer) == answer
    if found and pattern != "answer-line":
        assert completion[found.start :].find(found.answer) >= 0


@pytest.mark.parametrize(
    ("pattern", "completion", "verdict"),
    [
        ("answer-line", "so\nAnswer: 34.", "correct"),
        ("answer-line", "so\nAnswer: \\boxed{34}", "correct"),
        ("answer-line", "so\n**Answer: 34**", "correct"),
        ("answer-line", "\\boxed{34}", "wrong"),
        ("gsm8k", "#### 34 dollars", "correct"),
        ("gsm8k", "34", "wrong"),
        ("the-answer-is", "Thus the answer is $34$.", "correct"),
        ("the-answer-is", "the answer is 34 or 35", "wrong"),
        (r"(?i)result: (.+)", "Result: 68/2", "correct"),
    ],
)
def test_verdicts_by_pattern(pattern, completion, verdict):
    with Verifier(answer_pattern=pattern, command=["/nonexistent"]) as it:
        assert it.verify([("34", completion)])[0].verdict == verdict


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_in_front_of_an_answer_is_read_again(name):
    pattern = AnswerPattern(name)
    if name != "boxed":  # its template is the paper's, and scores answers outside of a box
        assert pattern.find("steps" + pattern.template() + "42").answer == "42"
    assert way_of_answering(pattern.template()) in ("in \\boxed{}", f"behind `{pattern.template().strip()}`")
    assert ("boxed" in way_of_answering(pattern.template())) == (name == "boxed")
    assert pattern.find("steps only") is None
    assert pattern.instruction
    assert RecoverConfig(answer_pattern=name).pattern().template() == pattern.template()


@pytest.mark.parametrize(
    "settings", [RecoverConfig, EvalConfig, RLVRSettings, lambda **kw: AdapterSettings(model="m", **kw)]
)
@pytest.mark.parametrize("bad", ["(", "boxd", "(a)(b)", "gsm-8k"])
def test_a_pattern_that_is_none_is_refused(settings, bad):
    with pytest.raises(ConfigError, match="answer_pattern"):
        settings(answer_pattern=bad)


def test_the_template_must_fit():
    with pytest.raises(ConfigError, match="make them fit"):
        RecoverConfig(answer_pattern="gsm8k", answer_template="\nAnswer: ")
    with pytest.raises(ConfigError, match="answer_template"):
        RecoverConfig(answer_pattern=r"=> (.+)")
    assert RecoverConfig(answer_pattern=r"=> (.+)", answer_template="\n=> ").answer_template == "\n=> "
    repair = dataclasses.replace(RLVRSettings().repair, answer_template="Answer: ")
    with pytest.raises(ConfigError, match="make them fit"):
        RLVRSettings(answer_pattern="gsm8k", repair=repair)


def test_training_and_its_evaluation_read_answers_one_way():
    with pytest.raises(ConfigError, match="once"):
        RLVRSettings(answer_pattern="gsm8k", evaluation=EvalConfig(answer_pattern="answer-line"))
    RLVRSettings(answer_pattern="gsm8k", evaluation=EvalConfig(answer_pattern="gsm8k"))


class Words:
    def encode(self, text, add_special_tokens=False):
        return text.split()


def test_the_steps_end_where_the_answer_is_introduced():
    ids = list(range(9))
    assert before_answer(Words(), ids, "a b c #### 5", AnswerPattern("gsm8k")) == 3
    assert before_answer(Words(), ids, "a b \\boxed{5}", AnswerPattern()) == 2
    assert before_answer(Words(), ids, "x= \\boxed{1} and y= \\boxed{2}", AnswerPattern()) == 1
    assert before_answer(Words(), ids, "a b c", AnswerPattern("answer-line")) == 3
