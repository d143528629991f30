"""What a demo model knows: pass rates on held-out prompts, and the skills that a recovery builds on."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from latentrevise.demo.chain import MAX_STEPS, ChainFamily
from latentrevise.demo.data import make_prompts, split_of
from latentrevise.demo.family import Family
from latentrevise.demo.joint import JointFamily
from latentrevise.demo.rule import RULES, RuleFamily

# transformers' own annotations reject calls such as model.generate(...), so models are not annotated more closely.
Model = Any


@torch.inference_mode()
def sample(
    model: Model, tokenizer: PreTrainedTokenizerFast, family: Family, prompts: list[str], n: int, seed: int
) -> list[list[str]]:
    """``n`` completions a prompt as text, at the family's recommended temperature.  Seeds torch's global generator."""
    torch.manual_seed(seed)
    out: list[list[str]] = []
    for start in range(0, len(prompts), 64):
        chunk = tokenizer(prompts[start : start + 64], return_tensors="pt", padding=True, return_token_type_ids=False)
        ids = model.generate(
            **chunk,
            do_sample=True,
            temperature=family.settings.temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=n,
            max_new_tokens=family.settings.max_new_tokens,
        )
        texts = tokenizer.batch_decode(ids[:, chunk["input_ids"].shape[1] :], skip_special_tokens=True)
        out += [texts[i : i + n] for i in range(0, len(texts), n)]
    return out


def hits(
    model: Model, tokenizer: PreTrainedTokenizerFast, family: Family, rows: list[dict[str, str]], n: int = 16
) -> dict[str, float]:
    """Shares of right answers and of valid derivations over ``n`` samples a prompt row, and of zero-hit prompts."""
    samples = sample(model, tokenizer, family, [row["prompt"] for row in rows], n, seed=0)
    found = [
        [family.check(row["prompt"], "", text, row["answer"]) for text in texts]
        for row, texts in zip(rows, samples, strict=True)
    ]
    total = len(rows) * n
    return {
        "accuracy": round(sum(d.correct for ds in found for d in ds) / total, 4),
        "valid": round(sum(d.valid for ds in found for d in ds) / total, 4),
        "zero_hit": round(sum(not any(d.correct for d in ds) for ds in found) / len(rows), 4),
        "prompts": len(rows),
        "samples_per_prompt": n,
    }


def problems(family: Family, n: int, seed: int, **options: Any) -> list[dict[str, str]]:
    """Rows of ``n`` problems of the ``develop`` split; ``options`` go to the family's sample_problem."""
    rng = random.Random(f"{family.name}/evaluation/{seed}/{sorted(options.items())}")
    rows: list[dict[str, str]] = []
    while len(rows) < n:
        problem = family.sample_problem(rng, **options)
        prompt = family.prompt_text(problem)
        if split_of(prompt) == "develop":
            rows.append({"id": str(len(rows)), "prompt": prompt, "answer": family.answer(problem)})
    return rows


@torch.inference_mode()
def implicit_knowledge(
    model: Model, tokenizer: PreTrainedTokenizerFast, family: RuleFamily, n: int
) -> dict[str, float]:
    """What the rule model knows without writing it down, on ``n`` uniform problems.

    ``implicit_accuracy``: share in which the gold answer is the most probable token after ``check R ; so \\boxed{``
    with the right rule R.  ``implicit_probability``: its mean probability.  ``implicit_rank_first``: share in which R
    gives the gold answer a higher log-probability than any other rule does.  ``right_rule_proposed``: mean probability
    of R after ``check``.  ``right_rule_plausible``: share in which that is at least 1e-4.
    """
    rows = problems(family, n, seed=1, mining=True)
    ids_of = tokenizer.get_vocab()
    template = [ids_of[word] for word in family.settings.answer_template.split()]
    check, boundary = ids_of["check"], ids_of[family.settings.step_boundary]
    totals = {
        "implicit_accuracy": 0.0,
        "implicit_probability": 0.0,
        "implicit_rank_first": 0.0,
        "right_rule_proposed": 0.0,
        "right_rule_plausible": 0.0,
    }
    for row in rows:
        prompt = [ids_of[word] for word in row["prompt"].split()]
        gold = ids_of[row["answer"]]
        right = list(RULES).index(family.parse(row["prompt"]).rule)
        branches = torch.tensor([[*prompt, check, ids_of[rule], boundary, *template] for rule in RULES])
        logp = model(input_ids=branches).logits.log_softmax(-1)
        after = logp[:, -1]
        proposed = logp[right, len(prompt), branches[right, len(prompt) + 1]].exp().item()
        totals["implicit_accuracy"] += after[right].argmax().item() == gold
        totals["implicit_probability"] += after[right, gold].exp().item()
        totals["implicit_rank_first"] += after[:, gold].argmax().item() == right
        totals["right_rule_proposed"] += proposed
        totals["right_rule_plausible"] += proposed >= 1e-4
    return {key: round(value / n, 4) for key, value in totals.items()}


@torch.inference_mode()
def joint_knowledge(model: Model, tokenizer: PreTrainedTokenizerFast, family: JointFamily, n: int) -> dict[str, float]:
    """What a model of joint decisions knows without writing it down, on ``n`` problems.

    ``implicit_accuracy`` and ``implicit_logprob``: share in which the gold answer's tokens are the most probable after
    the right names and ``so \\boxed{``, and its mean log-probability (nats).  ``one_wrong_accuracy`` and
    ``one_wrong_logprob``: the same with the name of one decision, each in turn, replaced by another.
    ``right_name_proposed``: mean probability of a decision's right name.  ``forced_valid``: share of valid derivations
    in 4 samples that continue the right names.
    """
    rng = random.Random(f"{family.name}/names")
    rows = problems(family, n, seed=1, mining=True)
    ids_of = tokenizer.get_vocab()
    figures: list[list[float]] = []
    forced: list[tuple[dict[str, str], str]] = []
    for row in rows:
        problem = family.parse(row["prompt"])
        proposals = [problem.names]
        for i, names in enumerate(family.names):
            other = rng.choice([name for name in names if name != problem.names[i]])
            proposals.append((*problem.names[:i], other, *problem.names[i + 1 :]))
        steps = [" ".join(family.proposal(family.question(problem.query), names)) for names in proposals]
        forced.append((row, steps[0]))
        gold = row["answer"].split()
        words = [f"{row['prompt']} {step} {family.settings.answer_template}".split() + gold[:-1] for step in steps]
        logp = model(input_ids=torch.tensor([[ids_of[w] for w in ws] for ws in words])).logits.log_softmax(-1)
        targets = torch.tensor([ids_of[word] for word in gold])
        answers = logp[:, -len(gold) :]
        best = (answers.argmax(-1) == targets).all(-1).double()
        after = answers[:, torch.arange(len(gold)), targets].double().sum(-1)
        own = [logp[0, words[0].index(name) - 1, ids_of[name]].exp().item() for name in problem.names]
        figures.append(
            [best[0].item(), after[0].item(), best[1:].mean().item(), after[1:].mean().item(), sum(own) / len(own)]
        )
    keys = "implicit_accuracy", "implicit_logprob", "one_wrong_accuracy", "one_wrong_logprob", "right_name_proposed"
    means = {key: round(sum(column) / n, 4) for key, column in zip(keys, zip(*figures, strict=True), strict=True)}
    samples = sample(model, tokenizer, family, [f"{row['prompt']} {step}" for row, step in forced], 4, seed=0)
    valid = [
        family.check(row["prompt"], step, text, row["answer"]).valid
        for (row, step), texts in zip(forced, samples, strict=True)
        for text in texts
    ]
    return means | {"forced_valid": round(sum(valid) / len(valid), 4)}


def evaluate_model(model: Model, tokenizer: PreTrainedTokenizerFast, family: Family, n: int) -> dict[str, Any]:
    """The figures written to training.json, on ``n`` problems of the ``develop`` split (half as many for each number of
    steps of a chain), 16 samples each."""
    model.eval()
    result: dict[str, Any] = {"mined": hits(model, tokenizer, family, make_prompts(family, n, split="develop"))}
    if isinstance(family, RuleFamily):
        result["trained"] = hits(model, tokenizer, family, problems(family, n, seed=0))
        result |= implicit_knowledge(model, tokenizer, family, 2 * n)
    elif isinstance(family, ChainFamily):
        result["steps"] = {
            str(steps): hits(model, tokenizer, family, problems(family, (n + 1) // 2, seed=0, steps=steps))
            for steps in range(1, MAX_STEPS + 1)
        }
    elif isinstance(family, JointFamily):
        result |= joint_knowledge(model, tokenizer, family, n)
    model.train()
    return result
