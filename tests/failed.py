"""Zero-hit prompts with their failed rollouts, as a strategy is handed them, without running the pipeline."""

from __future__ import annotations

from dataclasses import replace

from latentrevise.data.boundary import Boundary
from latentrevise.data.records import Prompt, Rollout, row_seed
from latentrevise.demo import Family, make_prompts
from latentrevise.engines import HFEngine, Request, SamplingParams
from latentrevise.model.policy import Policy
from latentrevise.strategies import Cut, Tools, Work


def tools_for(model, tokenizer, boundary=";", **sampling):
    """The tools of a run with that model and step boundary."""
    params = SamplingParams(**{"max_new_tokens": 40, **sampling})
    return Tools(
        Policy(model, tokenizer),
        HFEngine(model, tokenizer),
        tokenizer,
        params,
        4096,
        boundary and Boundary(boundary, tokenizer),
    )


def rollout(name, ids, tokenizer):
    return Rollout("p", name, tuple(ids), tokenizer.decode(list(ids)), None, "wrong", "stop", (0.0,) * len(ids))


def work_of(prompt_ids, rollouts, template, answer, tokenizer, seed=0):
    """One prompt by its tokens, its failed rollouts by theirs; the first one is the one to revise."""
    failed = tuple(rollout(f"p/{j}", ids, tokenizer) for j, ids in enumerate(rollouts))
    cut = Cut("p/0", failed[0].completion_ids[:1], failed[0].completion_ids[1:])
    prompt = Prompt("p", tokenizer.decode(list(prompt_ids)), tuple(prompt_ids), "unread")
    return Work(prompt, tokenizer.decode(list(answer)), failed, (cut,), tuple(answer), tuple(template), seed)


def zero_hit(family: Family, tools: Tools, prompts: int, rollouts: int, seed: int) -> list[Work]:
    """Prompts of the develop split none of whose rollouts gives the right answer."""

    def encode(text):
        return tuple(tools.tokenizer.encode(text, add_special_tokens=False))

    rows = make_prompts(family, prompts, split="develop", seed=seed)
    params = replace(tools.sampling, n=rollouts, max_new_tokens=family.settings.max_new_tokens)
    found = tools.engine.generate([Request(encode(row["prompt"]), seed=row_seed(0, row["id"])) for row in rows], params)
    work = []
    for row, completions in zip(rows, found, strict=True):
        failed = []
        for j, completion in enumerate(completions):
            text = tools.tokenizer.decode(list(completion.ids), skip_special_tokens=True)
            if family.check(row["prompt"], "", text, row["answer"]).correct:
                break
            name = f"{row['id']}/{j}"
            failed.append(Rollout(row["id"], name, completion.ids, text, None, "wrong", completion.finish_reason, ()))
        else:
            prompt = Prompt(row["id"], row["prompt"], encode(row["prompt"]), row["answer"])
            cut = Cut(failed[0].sample_id, failed[0].completion_ids[:1], failed[0].completion_ids[1:])
            template = encode(family.settings.answer_template)
            work.append(Work(prompt, row["answer"], tuple(failed), (cut,), encode(row["answer"]), template, seed))
    return work
