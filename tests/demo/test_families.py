"""Generators and checkers of the task families: true derivations pass, every kind of corruption is caught."""

import random

import pytest

from latentrevise.demo import families, family_of, get_family, make_prompts, split_of
from latentrevise.demo.chain import ChainFamily
from latentrevise.demo.family import Trace, evaluate
from latentrevise.demo.joint import ZIPF_EXPONENT, JointFamily, JointProblem
from latentrevise.demo.rule import RULES, RuleFamily, apply, fitting
from latentrevise.errors import ConfigError, InputError

JOINT = [name for name, family in families().items() if isinstance(family, JointFamily)]

CHAIN_PROMPT = "q = 862 ; V = q + 924 ; w = V * 7 ; x = w - q ; ? x"
CHAIN_STEPS = ["V = 862 + 924 = 786 ;", "w = 786 * 7 = 502 ;", "x = 502 - 862 = 640 ;"]
CHAIN_BOX = "so \\boxed{ 640 }"

# 32 - 42 = -10 = 90 (mod 100), 94 - 42 = 52, 45 - 42 = 3: only rule T fits.
RULE_PROMPT = "32 ? = 90 ; 94 ? = 52 ; 45 ?"
RULE_CHECK, RULE_SO, RULE_APPLY, RULE_BOX = "check T ; 32 - 42 = 90 ;", "so T ;", "45 - 42 = 3 ;", "so \\boxed{ 3 }"


def judge(family, prompt, continuation, answer, prefix=""):
    return family.check(prompt, prefix, continuation, answer)


def text(*parts):
    return " ".join(parts)


@pytest.mark.parametrize("name", list(families()))
@pytest.mark.parametrize("mining", [False, True])
def test_prompt_states_the_whole_problem(name, mining):
    family, rng = get_family(name), random.Random(1)
    for _ in range(200):
        problem = family.sample_problem(rng, mining=mining)
        parsed = family.parse(family.prompt_text(problem))
        assert parsed == problem
        assert family.answer(parsed) == family.answer(problem)


@pytest.mark.parametrize("name", list(families()))
def test_straight_solution_is_valid_however_it_is_cut(name):
    family, rng = get_family(name), random.Random(2)
    for _ in range(50):
        problem = family.sample_problem(rng)
        words = family.solution(problem)
        for cut in range(len(words) - 3):
            found = judge(
                family, family.prompt_text(problem), text(*words[cut:]), family.answer(problem), text(*words[:cut])
            )
            assert found.valid, (words, cut, found)
            assert found.reason is None
            assert all(step.ok for step in found.steps)


@pytest.mark.parametrize("name", list(families()))
def test_training_traces_are_valid_unless_they_answer_early(name):
    family, rng = get_family(name), random.Random(3)
    reasons = []
    for _ in range(600):
        problem = family.sample_problem(rng)
        trace = family.sample_trace(problem, rng)
        assert trace.words[-1] == "<eos>"
        found = judge(family, family.prompt_text(problem), text(*trace.words), family.answer(problem))
        assert found.correct, trace
        reasons.append(found.reason)
    early = {"rule": {None, "rule_not_checked", "not_applied"}, "chain": {None, "missing_step"}}
    assert set(reasons) == early.get(name, {None, "rule_not_checked"})
    assert 0.7 < reasons.count(None) / len(reasons) < 0.95


def test_chain_slips_carry_no_loss():
    family, rng = ChainFamily(), random.Random(4)
    slips = 0
    for _ in range(400):
        problem = family.sample_problem(rng)
        trace = family.sample_trace(problem, rng)
        for step in judge(family, family.prompt_text(problem), text(*trace.words), family.answer(problem)).steps:
            if not step.ok:
                slips += 1
                assert not trace.loss[step.end - 2], (trace, step)
    assert slips > 40


def test_rule_traces_predict_no_wrong_rule_and_few_right_ones():
    family, rng = RuleFamily(), random.Random(5)
    flags = {True: [], False: []}
    for _ in range(400):
        problem = family.sample_problem(rng)
        trace = family.sample_trace(problem, rng)
        for first, second, predicted in zip(trace.words, trace.words[1:], trace.loss[1:], strict=False):
            if first == "check":
                flags[second == problem.rule].append(predicted)
    assert len(flags[False]) > 100
    assert not any(flags[False])
    assert 0.1 < sum(flags[True]) / len(flags[True]) < 0.3


@pytest.mark.parametrize("name", list(families()))
def test_drills_are_true_and_predict_something(name):
    family, rng = get_family(name), random.Random(6)
    for _ in range(300):
        drill = family.drill(rng)
        assert any(drill.loss)
        for i in range(len(drill.words) - 5):
            match drill.words[i : i + 6]:
                case (left, ("+" | "-" | "*") as op, right, "=", result, ";"):
                    assert evaluate(int(left), op, int(right), family.modulus) == int(result)
                case ("?", "check", rule, ";", "so", "\\boxed{"):
                    assert int(drill.words[i + 6]) == apply(rule, int(drill.words[i - 1]))
        if isinstance(family, JointFamily) and "check" in drill.words:
            names = [word for word in drill.words if word in family.constants]
            answered = range(len(drill.words) - 1 - family.answer_words, len(drill.words) - 1)
            assert [drill.words[i] for i in answered] == family.results(names, int(drill.words[0]))
            assert drill.words[-1] == "}"
            assert [i for i, predicted in enumerate(drill.loss) if predicted] == list(answered)


# -- chain: corruptions ------------------------------------------------------------------------------------------------


def test_chain_accepts_the_example_and_lists_its_steps():
    found = judge(ChainFamily(), CHAIN_PROMPT, text(*CHAIN_STEPS, CHAIN_BOX), "640")
    assert found.valid
    assert found.answer == "640"
    assert [step.text for step in found.steps] == CHAIN_STEPS
    assert [(step.start, step.end) for step in found.steps] == [(0, 8), (8, 16), (16, 24)]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_chain_missing_step(missing):
    steps = [s for i, s in enumerate(CHAIN_STEPS) if i != missing]
    found = judge(ChainFamily(), CHAIN_PROMPT, text(*steps, CHAIN_BOX), "640")
    assert (found.valid, found.correct, found.reason) == (False, True, "missing_step")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("= 786 ;", "= 787 ;"),  # wrong result
        ("862 + 924", "862 - 924"),  # wrong operator
        ("862 + 924", "863 + 923"),  # right sum of the wrong operands
        ("w = 786 * 7 = 502", "w = 786 * 8 = 288"),  # true equation, not the problem's
        ("V = 862 + 924 = 786 ;", "V = 862 + 924 = 786 ; V = 862 + 924 = 785 ;"),  # the last word on V is false
    ],
)
def test_chain_false_step(old, new):
    steps = text(*CHAIN_STEPS, CHAIN_BOX)
    assert old in steps
    found = judge(ChainFamily(), CHAIN_PROMPT, steps.replace(old, new, 1), "640")
    assert (found.valid, found.correct, found.reason) == (False, True, "false_step")
    assert not all(step.ok for step in found.steps)


def test_chain_corrected_slip_is_valid():
    slip = "V = 862 + 924 = 796 ; wait , check"
    found = judge(ChainFamily(), CHAIN_PROMPT, text(*CHAIN_STEPS, CHAIN_BOX), "640", prefix=slip)
    assert found.valid
    assert [step.ok for step in found.steps] == [False, True, True, True]


def test_chain_step_completed_across_the_cut_counts():
    words = text(*CHAIN_STEPS, CHAIN_BOX).split()
    assert judge(ChainFamily(), CHAIN_PROMPT, text(*words[5:]), "640", prefix=text(*words[:5])).valid


def test_chain_smuggled_answer():
    """The gold answer enters as a forged result or as nothing at all; nothing derives it."""
    forged = text(*CHAIN_STEPS[:2], "x = 502 - 861 = 640 ;", CHAIN_BOX)
    for smuggled in (CHAIN_BOX, text(CHAIN_STEPS[0], CHAIN_BOX), forged):
        found = judge(ChainFamily(), CHAIN_PROMPT, smuggled, "640")
        assert found.correct
        assert not found.valid


def test_chain_steps_after_the_answer_do_not_count():
    found = judge(ChainFamily(), CHAIN_PROMPT, text(*CHAIN_STEPS[:2], CHAIN_BOX, CHAIN_STEPS[2]), "640")
    assert found.reason == "missing_step"


def test_chain_needs_only_what_the_query_depends_on():
    prompt = CHAIN_PROMPT.replace("? x", "? w")
    found = judge(ChainFamily(), prompt, text(*CHAIN_STEPS[:2], "so \\boxed{ 502 }"), "502")
    assert found.valid


# -- rule: corruptions -------------------------------------------------------------------------------------------------


def test_rule_accepts_the_example_and_lists_its_steps():
    found = judge(RuleFamily(), RULE_PROMPT, text(RULE_CHECK, RULE_SO, RULE_APPLY, RULE_BOX), "3")
    assert found.valid
    assert [step.text for step in found.steps] == ["check T ;", "32 - 42 = 90 ;", "so T ;", "45 - 42 = 3 ;"]
    assert [(step.start, step.end) for step in found.steps] == [(0, 3), (3, 9), (9, 12), (12, 18)]


def test_rule_may_be_checked_on_the_second_example():
    found = judge(RuleFamily(), RULE_PROMPT, text("check T ; 94 - 42 = 52 ;", RULE_APPLY, RULE_BOX), "3")
    assert found.valid


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((RULE_BOX,), "rule_not_checked"),  # smuggled: the bare answer
        (("check T ;", RULE_BOX), "rule_not_checked"),  # smuggled: named, neither checked nor applied
        (("check B ; 32 + 78 = 10 ;", RULE_SO, RULE_APPLY, RULE_BOX), "rule_not_checked"),  # another rule checked
        (("check B ; 32 - 42 = 90 ;", RULE_SO, RULE_APPLY, RULE_BOX), "rule_not_checked"),  # one named, another used
        (("check T ; 45 - 42 = 3 ;", RULE_SO, RULE_APPLY, RULE_BOX), "rule_not_checked"),  # not on an example
        (("check T ; 32 - 42 = 91 ;", RULE_SO, RULE_APPLY, RULE_BOX), "rule_not_checked"),  # falsely checked
        ((RULE_CHECK, "so B ;", RULE_APPLY, RULE_BOX), "wrong_rule"),
        ((RULE_CHECK, RULE_SO, RULE_BOX), "not_applied"),  # the answer isn't derived
        ((RULE_CHECK, RULE_SO, "45 - 42 = 13 ;", RULE_BOX), "not_applied"),
        ((RULE_CHECK, RULE_SO, "45 + 58 = 3 ;", RULE_BOX), "not_applied"),  # true, but not by the rule
        ((RULE_CHECK, RULE_SO, RULE_BOX, RULE_APPLY), "not_applied"),  # after the answer
        ((RULE_CHECK, "32 + 78 = 11 ;", RULE_SO, RULE_APPLY, RULE_BOX), "false_step"),
    ],
)
def test_rule_corruptions(parts, reason):
    found = judge(RuleFamily(), RULE_PROMPT, text(*parts), "3")
    assert (found.valid, found.correct, found.reason) == (False, True, reason)


def test_rule_judges_equations_of_the_continuation_only():
    wrong_try = "check B ; 32 + 78 = 11 ;"  # 32 + 78 is 10
    rest = text("wait ,", RULE_CHECK, RULE_SO, RULE_APPLY, RULE_BOX)
    assert judge(RuleFamily(), RULE_PROMPT, rest, "3", prefix=wrong_try).valid
    assert judge(RuleFamily(), RULE_PROMPT, text(wrong_try, rest), "3").reason == "false_step"
    # An equation that ends in the continuation is the continuation's.
    found = judge(RuleFamily(), RULE_PROMPT, text("11 ;", rest), "3", prefix="check B ; 32 + 78 =")
    assert found.reason == "false_step"


def test_rule_abandoned_wrong_rule_is_valid():
    found = judge(
        RuleFamily(), RULE_PROMPT, text("check B ; 32 + 78 = 10 ; wait ,", RULE_CHECK, RULE_APPLY, RULE_BOX), "3"
    )
    assert found.valid
    assert [step.ok for step in found.steps] == [False, True, True, True, True]


def test_rules_are_distinct_bijections():
    tables = {tuple(apply(rule, x) for x in range(100)) for rule in RULES}
    assert len(tables) == len(RULES) == 24
    assert all(len(set(table)) == 100 for table in tables)


def test_every_rule_can_be_the_only_one_that_fits():
    family, rng = RuleFamily(), random.Random(7)
    for rule in RULES:
        problem = family.sample_problem(rng, rule=rule)
        assert fitting(problem.examples) == [rule]


def test_training_rules_follow_the_zipf_law_and_mined_ones_do_not():
    family, rng = RuleFamily(), random.Random(8)
    trained = [family.sample_problem(rng).rule for _ in range(1500)]
    mined = [family.sample_problem(rng, mining=True).rule for _ in range(1500)]
    assert 0.4 < trained.count("A") / 1500 < 0.55
    assert all(0.02 < mined.count(rule) / 1500 < 0.07 for rule in RULES)


# -- joint decisions ---------------------------------------------------------------------------------------------------

# 61 + 73 = 134 = 34 (mod 100): A6; 94 + 70 = 164 = 64: B3.  Asked: 5 + 73 = 78, 78 + 70 = 148 = 48.
PAIR_PROMPT = "61 ?A = 34 ; 94 ?B = 64 ; 5 ?A ?B"
PAIR_NAMED, PAIR_TESTS, PAIR_SO = "check A6 , B3 ;", "61 + 73 = 34 ; 94 + 70 = 64 ;", "so A6 , B3 ;"
PAIR_APPLY, PAIR_BOX = "5 + 73 = 78 ; 78 + 70 = 48 ;", "so \\boxed{ 48 }"


def test_pair_accepts_the_example_and_lists_its_steps():
    whole = text(PAIR_NAMED, PAIR_TESTS, PAIR_SO, PAIR_APPLY, PAIR_BOX)
    family = get_family("pair")
    assert text(*family.solution(family.parse(PAIR_PROMPT))) == whole
    found = judge(family, PAIR_PROMPT, whole, "48")
    assert found.valid
    assert [(step.start, step.end) for step in found.steps] == [(0, 5), (5, 11), (11, 17), (17, 22), (22, 28), (28, 34)]
    assert text(*(step.text for step in found.steps)) == text(PAIR_NAMED, PAIR_TESTS, PAIR_SO, PAIR_APPLY)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((PAIR_BOX,), "rule_not_checked"),  # smuggled: the bare answer
        ((PAIR_NAMED, PAIR_BOX), "rule_not_checked"),  # smuggled: named, neither tested nor applied
        ((PAIR_NAMED, "61 + 73 = 34 ;", PAIR_SO, PAIR_APPLY, PAIR_BOX), "rule_not_checked"),  # one of two tested
        ((PAIR_NAMED, "94 + 70 = 64 ;", PAIR_SO, PAIR_APPLY, PAIR_BOX), "rule_not_checked"),
        (("check A6 , B4 ;", PAIR_TESTS, PAIR_SO, PAIR_APPLY, PAIR_BOX), "rule_not_checked"),  # named other rules
        ((PAIR_NAMED, "61 + 73 = 35 ; 94 + 70 = 64 ;", PAIR_SO, PAIR_APPLY, PAIR_BOX), "rule_not_checked"),
        ((PAIR_NAMED, PAIR_TESTS, "so A6 , B4 ;", PAIR_APPLY, PAIR_BOX), "wrong_rule"),
        ((PAIR_NAMED, PAIR_TESTS, PAIR_SO, PAIR_BOX), "not_applied"),
        ((PAIR_NAMED, PAIR_TESTS, PAIR_SO, "5 + 73 = 78 ;", PAIR_BOX), "not_applied"),  # only one of the rules
        ((PAIR_NAMED, PAIR_TESTS, PAIR_SO, "5 + 73 = 78 ; 78 + 71 = 48 ;", PAIR_BOX), "not_applied"),
        ((PAIR_NAMED, PAIR_TESTS, PAIR_SO, "5 + 43 = 48 ;", PAIR_BOX), "not_applied"),  # true, but not by the rules
        ((PAIR_NAMED, PAIR_TESTS, PAIR_SO, PAIR_BOX, PAIR_APPLY), "not_applied"),  # after the answer
        ((PAIR_NAMED, PAIR_TESTS, "5 + 73 = 79 ;", PAIR_APPLY, PAIR_BOX), "false_step"),
    ],
)
def test_pair_corruptions(parts, reason):
    found = judge(get_family("pair"), PAIR_PROMPT, text(*parts), "48")
    assert (found.valid, found.correct, found.reason) == (False, True, reason)


def test_pair_judges_equations_of_the_continuation_only():
    wrong_try = "check A1 , B1 ; 61 + 22 = 84 ; wait ,"  # 61 + 22 is 83
    rest = text(PAIR_NAMED, PAIR_TESTS, PAIR_SO, PAIR_APPLY, PAIR_BOX)
    assert judge(get_family("pair"), PAIR_PROMPT, rest, "48", prefix=wrong_try).valid
    assert judge(get_family("pair"), PAIR_PROMPT, text(wrong_try, rest), "48").reason == "false_step"
    assert judge(get_family("pair"), PAIR_PROMPT, text(wrong_try.replace("84", "83"), rest), "48").valid


@pytest.mark.parametrize("name", JOINT)
def test_one_example_tells_a_rule_and_all_rules_are_needed(name):
    family, rng = get_family(name), random.Random(7)
    for names in family.names:
        assert len({family.constants[n] for n in names}) == len(names)
    for _ in range(50):
        problem = family.sample_problem(rng)
        for i, names in enumerate(family.names):
            for other in set(names) - {problem.names[i]}:
                wrong = (*problem.names[:i], other, *problem.names[i + 1 :])
                reached, right = family.results(wrong, problem.query), family.answer(problem).split()
                # With partial credit the other numbers stay right.
                differ = [i] if len(right) > 1 else [0]
                assert [j for j, (a, b) in enumerate(zip(reached, right, strict=True)) if a != b] == differ


@pytest.mark.parametrize("name", JOINT)
def test_predicted_names_do_not_depend_on_the_problem(name):
    """They follow the Zipf law, whatever the right names are; otherwise the model would learn to infer them."""
    family, rng = get_family(name), random.Random(8)
    for rank in (0, 5):
        names = tuple(names[rank] for names in family.names)
        examples = tuple((x, family.combine([n], x)) for x, n in enumerate(names, start=20))
        problem = JointProblem(examples, 7, names)
        drawn = []
        for _ in range(1500):
            trace = family.sample_trace(problem, rng)
            start = 0
            for i, word in enumerate(trace.words):
                start = i if word in ("check", "so") else start
                if word in family.names[0] and trace.words[start] == "check" and trace.loss[i]:
                    drawn.append(word)
        zipf = [k**-ZIPF_EXPONENT for k in range(1, len(family.names[0]) + 1)]
        assert len(drawn) > 500
        for k in (0, 5):
            assert drawn.count(family.names[0][k]) / len(drawn) == pytest.approx(zipf[k] / sum(zipf), abs=0.05)


# The rules K1 and L1 add 33 and 66: 18 + 33 = 51, 69 + 66 = 135 = 35 (mod 100).  Asked: 7 + 33 = 40, 7 + 66 = 73.
PARTIAL_PROMPT = "18 ?K = 51 ; 69 ?L = 35 ; 7 ?K ?L"
PARTIAL = "check K1 , L1 ; 18 + 33 = 51 ; 69 + 66 = 35 ; so K1 , L1 ; 7 + 33 = 40 ; 7 + 66 = 73 ;"


def test_partial_credit_has_a_number_for_each_rule():
    family = get_family("partial")
    whole = text(PARTIAL, "so \\boxed{ 40 73 }")
    assert text(*family.solution(family.parse(PARTIAL_PROMPT))) == whole
    found = judge(family, PARTIAL_PROMPT, whole, "40 73")
    assert found.valid
    assert found.answer == "40 73"
    for box in ("40 74", "73 40", "41 73"):
        assert judge(family, PARTIAL_PROMPT, text(PARTIAL, f"so \\boxed{{ {box} }}"), "40 73").reason == "wrong_answer"
    for box in ("40", "40 73 5", "40 ; 73"):
        assert judge(family, PARTIAL_PROMPT, text(PARTIAL, f"so \\boxed{{ {box} }}"), "40 73").reason == "no_answer"
    # Applied one after the other, as in the other families, or but one of them.
    for applied in ("40 + 66 = 6 ;", ""):
        short = text(PARTIAL.replace("7 + 66 = 73 ;", applied), "so \\boxed{ 40 73 }")
        assert judge(family, PARTIAL_PROMPT, short, "40 73").reason == "not_applied"


def test_filler_stands_between_the_names():
    family = get_family("far")
    prompt = make_prompts(family, 1)[0]["prompt"]
    problem = family.parse(prompt)
    named = family.solution(problem)[: family.solution(problem).index(";") + 1]
    query = f"{problem.query} ?H ?J ,"
    assert text(*named) == f"check {problem.names[0]} , {query} {query} {query} {query} {problem.names[1]} ;"
    other = text(*family.solution(problem)).replace(query, query.replace(str(problem.query), "100"), 1)
    assert judge(family, prompt, other, family.answer(problem)).reason == "rule_not_checked"


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "prompt", "derivation", "gold"),
    [
        (ChainFamily(), CHAIN_PROMPT, text(*CHAIN_STEPS), "640"),
        (RuleFamily(), RULE_PROMPT, text(RULE_CHECK, RULE_SO, RULE_APPLY), "3"),
        (get_family("pair"), PAIR_PROMPT, text(PAIR_NAMED, PAIR_TESTS, PAIR_SO, PAIR_APPLY), "48"),
    ],
)
def test_answers(family, prompt, derivation, gold):
    def found(box, answer=gold):
        return judge(family, prompt, text(derivation, box), answer)

    assert found(f"so \\boxed{{ {gold} }}", f" {gold} ").valid
    assert found("so \\boxed{ 17 }").reason == "wrong_answer"
    for incomplete in ("", f"so \\boxed{{ {gold}", f"so {gold} }}", "so \\boxed{ so }"):
        assert found(incomplete).reason == "no_answer"
        assert found(incomplete).answer is None
    # A wrong target that is reached is "correct" for that target, never valid.
    reached = found("so \\boxed{ 17 }", "17")
    assert (reached.correct, reached.valid, reached.reason) == (True, False, "wrong_answer")
    # The answer must be sampled; one that was fed doesn't count.
    fed = judge(family, prompt, "; so", gold, prefix=text(derivation, f"so \\boxed{{ {gold} }}"))
    assert fed.reason == "no_answer"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "What is 2 + 2 ?",
        "q = 862 ; V = z + 924 ; ? V",  # unknown operand
        "q = 862 ; q = q + 1 ; ? q",  # defined twice
        "q = 862 ; V = q / 2 ; ? V",
        "q = 1000 ; ? q",
        "q = 862 ; V = q + 924 ; ? w",
        "32 ? = 90 ; 94 ? = 52 ; 45",
        "32 ? = 90 ; 94 ? = 53 ; 45 ?",  # no rule fits
        "32 ? = 90 ; 32 ? = 90 ; 145 ?",
        "61 ?A = 34 ; 5 ?A",  # an example is missing
        "61 ?A = 34 ; 94 ?B = 64 ; 5 ?A",  # asks for one of two
        "61 ?A = 34 ; 94 ?B = 64 ; ?A ?B",
        "61 ?A = 34 ; 94 ?B = 64 ; 10 ?A ?B",  # queries are smaller
        "61 ?A = 34 ; 94 ?B = 95 ; 5 ?A ?B",  # no rule fits
        "94 ?B = 64 ; 61 ?A = 34 ; 5 ?A ?B",
        "61 ?A = 34 ; 94 ?B = 164 ; 5 ?A ?B",
    ],
)
def test_foreign_prompts_are_refused_by_name(prompt):
    assert family_of(prompt) is None
    for family in families().values():
        with pytest.raises(InputError, match=f"demo family '{family.name}'"):
            judge(family, prompt, "so \\boxed{ 1 }", "1")


def test_ambiguous_examples_are_refused():
    rng = random.Random(9)
    while True:  # two rules that agree on an input: 51 * x and x - 50 do on every odd one
        x = rng.randrange(100)
        if len(fitting(((x, apply("A", x)),))) > 1:
            break
    prompt = f"{x} ? = {apply('A', x)} ; {x} ? = {apply('A', x)} ; 1 ?"
    with pytest.raises(InputError, match="rules fit"):
        RuleFamily().parse(prompt)


def test_family_of_recognises_prompts():
    for name, family in families().items():
        for row in make_prompts(family, 5):
            assert family_of(row["prompt"]).name == name


def test_unknown_family_is_named():
    with pytest.raises(ConfigError, match=r"'sums'.*rule, chain"):
        get_family("sums")


def test_trace_needs_a_flag_a_word():
    with pytest.raises(ValueError, match="2 words, 1 flags"):
        Trace(("a", "b"), (True,))


@pytest.mark.parametrize("name", list(families()))
def test_splits_never_share_a_prompt(name):
    family = get_family(name)
    develop = make_prompts(family, 150, split="develop", seed=3)
    report = make_prompts(family, 150, split="report", seed=3)
    again = make_prompts(family, 150, split="report", seed=3)
    other = make_prompts(family, 150, split="report", seed=4)
    assert report == again
    assert report[:40] == make_prompts(family, 40, split="report", seed=3)
    assert report != other
    prompts = [row["prompt"] for row in develop + report]
    assert len(set(prompts)) == 300
    assert len({row["id"] for row in develop + report + other}) == 450
    assert {split_of(row["prompt"]) for row in report} == {"report"}
    for row in report:
        assert row["answer"] == family.answer(family.parse(row["prompt"]))


def test_mined_chains_have_four_to_six_steps():
    family = ChainFamily()
    steps = {len(family.parse(row["prompt"]).needed) for row in make_prompts(family, 60)}
    assert steps == {4, 5, 6}


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="'test': choose one of train, develop, report"):
        make_prompts(get_family("rule"), 1, split="test")
