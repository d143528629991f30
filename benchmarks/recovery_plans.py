"""What each recovery study runs."""

from __future__ import annotations

from dataclasses import dataclass

from latentrevise.demo import real, wordproblems
from latentrevise.strategies import names


@dataclass(frozen=True)
class Plan:
    """What a study runs where the command line does not say. models: training seeds. mined: prompts of a unit.
    further: rollouts of each prompt that is beyond reach, drawn to tell which are far (see ``recovery_strata``)."""

    families: tuple[str, ...]
    models: tuple[int, ...]
    seeds: tuple[int, ...]
    mined: int
    strategies: tuple[str, ...]
    further: int = 0


# Word problems by their number of steps: the plain name is the main study's, of longer ones there are smaller studies.
GSM = {wordproblems.NAME: real.STEPS} | {f"{wordproblems.NAME}{steps}": steps for steps in (6, 7, 8)}
# What people would use instead, on the same inputs; in a study of their own, beside two of the main one.
RIVALS = (
    *("self-hint", "retry", "retry-told", "intervene", "evocot"),
    *("step-checked", "pivot-checked", "branch-checked", "resample-new"),
)
DECISIVE = (
    *("latent", "latent-random", "branch-mass", "branch-checked", "step-checked"),
    *("resample-rho0.8", "resample"),
)
LONGER = ("latent", "branch-mass", "branch-checked", "step-checked", "resample")
PLANS = {
    "recovery": Plan(
        ("rule", "chain", "pair"),
        (0, 1),
        (0, 1, 2),
        32,
        tuple(name for name in names() if name not in RIVALS),
    ),
    "rivals": Plan(("rule", "chain", "pair"), (0, 1), (0, 1, 2), 32, (*RIVALS, "pivot", "resample")),
    "variants": Plan(
        ("far", "pair64", "partial"),
        (0,),
        (0,),
        48,
        (
            *("hint", "pivot-pair", "pivot-pair-linear", "pair-random", "pivot-beam", "pivot"),
            *("latent-plausible", "latent-window", "dart", "resample"),
        ),
    ),
    # A real language model and text, see latentrevise.demo.real: what decides on many prompts, the rest on fewer.
    "gsm": Plan(
        (wordproblems.NAME,),
        (0,),
        (4, 5, 8, 9, 10, 11, 12, 13, 14, 15),  # what 0 to 8 gave before is in gsm-*.json; 9 and more were new
        24,
        DECISIVE,
        further=240,
    ),
    **{name: Plan((name,), (0,), (4,), 16, LONGER) for name in list(GSM)[1:]},
    "gsm-rivals": Plan(
        (wordproblems.NAME,),
        (0,),
        (0, 1),
        24,
        (
            *("latent", "latent-nearest", "latent-random", "latent-plausible", "explain", "dart", "pivot"),
            *("pivot-trie", "branch-mass", *RIVALS, "resample-rho0.8", "resample-prefix", "resample"),
        ),
    ),
    "gsm-variants": Plan(
        (wordproblems.NAME,),
        (0,),
        (0,),
        24,
        (
            *("latent", "latent-adam", "latent-no-guide", "latent-no-explore", "latent-no-fluency"),
            *("latent-rho0.5", "latent-rho0.2", "latent-k5", "latent-k20", "resample"),
        ),
    ),
    "quick": Plan(("rule",), (0,), (0,), 16, ("latent-plausible", "pivot", "pivot-random", "branch-mass", "resample")),
}
