"""The reviser and `linear_logprob` in a plain PyTorch RL loop: GRPO on the bundled task *rule*, dead groups revived.

    python examples/custom_loop.py

What is latentrevise's here: `Reviser` turns a failed rollout into a revised prefix, `linear_logprob` gives log-probs
without `[N, V]` logits, `Verifier` judges. All else is PyTorch and transformers: take the pieces into a loop of yours.
"""

from __future__ import annotations

import argparse

import torch

from latentrevise import FailedRollout, ReviseConfig, Reviser
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.kernels import linear_logprob
from latentrevise.model.loading import load_model
from latentrevise.verify.verifier import Verifier

GROUP, TEMPERATURE, CLIP = 8, 1.0, 0.2


def sample(model, tokenizer, n: int, new_tokens: int, **inputs) -> list[list[int]]:
    """`n` completions of one prompt, as token ids or as embeddings; the end of sequence is cut off."""
    with torch.no_grad():
        rows = model.generate(
            **inputs, do_sample=True, temperature=TEMPERATURE, top_k=0, num_return_sequences=n,
            max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    found = []
    for row in rows[:, start:].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        found.append(row[:stop])
    return found


def logprobs(model, prompt: list[int], completions: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of each completion token behind the prompt, `[B, S]`, and their mask."""
    width = max(map(len, completions))
    ids = torch.tensor([[*prompt, *c, *[0] * (width - len(c))] for c in completions])
    labels = torch.tensor([[*c, *[-100] * (width - len(c))] for c in completions])
    hidden = model.model(input_ids=ids).last_hidden_state[:, len(prompt) - 1 : -1]
    return linear_logprob(hidden, model.lm_head.weight, labels, ignore_index=-100), labels != -100


def main(steps: int, prompts: int, seed: int) -> list[dict[str, float]]:
    torch.manual_seed(seed)
    family = get_family("rule")
    model, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    # On this task the optimiser needs tokens that the model finds plausible; `ReviseConfig()` is the published method.
    config = ReviseConfig.answer_only(
        hull="plausible", solver="entropic", step_rule="constant", step_size=2.0, reduction="mean", stop_guide=None,
        special_vertices=False, iterate="best", rounding="argmax",
    )  # fmt: skip
    reviser = Reviser(model, config, tokenizer)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    rows, template, length = make_prompts(family, prompts, split="train", seed=seed), family.settings, 40
    history = []
    with Verifier() as verifier:
        for step in range(steps):
            told, losses = {"reward": 0.0, "zero_hit": 0.0, "recovered": 0.0}, []
            for row in rows[step * 4 % prompts : step * 4 % prompts + 4]:
                prompt = encode(row["prompt"])
                group = sample(model, tokenizer, GROUP, length, input_ids=torch.tensor([prompt]))
                rewards = judge(verifier, tokenizer, row["answer"], group)
                told["reward"] += float(rewards.mean()) / 4
                if not rewards.any():  # GRPO would learn nothing from this group
                    told["zero_hit"] += 1
                    failed = max(group, key=len)
                    cut = max(1, round(template.prefix_fraction * len(failed)))
                    (revision,) = reviser.revise(
                        [
                            FailedRollout(
                                prompt,
                                failed[:cut],
                                failed[cut:],
                                encode(row["answer"]),
                                template_ids=encode(template.answer_template),
                            )
                        ]
                    )
                    prefix = revision.text_ids(reviser.hull, "heaviest").tolist()
                    tails = sample(model, tokenizer, GROUP, length, input_ids=torch.tensor([prompt + prefix]))
                    right = judge(verifier, tokenizer, row["answer"], tails).nonzero().flatten().tolist()
                    if right:
                        told["recovered"] += 1
                        group[group.index(failed)] = prefix + tails[right[0]]
                        rewards = judge(verifier, tokenizer, row["answer"], group)
                if rewards.any() and not rewards.all():
                    advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
                    found, mask = logprobs(model, prompt, group)
                    ratio = torch.exp(found - found.detach())
                    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                    gain = torch.min(ratio * advantage[:, None], clipped * advantage[:, None])
                    losses.append(-(gain * mask).sum() / mask.sum())
            if losses:
                optimizer.zero_grad()
                torch.stack(losses).mean().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            history.append(told)
            print(f"step {step}: " + ", ".join(f"{name} {value:.2f}" for name, value in told.items()), flush=True)
    return history


def judge(verifier: Verifier, tokenizer, answer: str, completions: list[list[int]]) -> torch.Tensor:
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
    return torch.tensor([float(j.verdict == "correct") for j in verifier.verify([(answer, text) for text in texts])])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.steps, options.prompts, options.seed)
