"""``python -m benchmarks [NAME ...]``."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import cubins, estimates, harness, ops, screening
from latentrevise.data.storage import atomic_write

DESCRIPTIONS = {
    "vertex_oracle": "argmin of gradients over the embedding table",
    "linear_logprob": "log-probs from hidden states with their gradient, signed coefficients",
    "plausible_vertices": "tokens above a probability floor",
    "softmax_mixture": "dense softmax projection",
    "mixture_embed": "sparse mixtures of table rows",
    "hull_step": "one Frank-Wolfe step, two normalised gradients",
    "entropic_step": "one mirror-descent step on candidate sets",
    "screening": "rows a token that the Triton oracle's bfloat16 pass leaves to be scored exactly",
    "revise": "one step of the reviser against the obvious implementation, on models of real shapes",
    "recovery": "zero-hit prompts recovered by every strategy on the checkable families, against equal compute",
    "iterates": "recovery from the iterate after each step of the published method, right and wrong targets (Figure 3)",
    "training": "SFT on recovered and other rows, RLVR with and without repair, on the bundled families",
    "training_real": "LoRA SFT and RLVR of the model of 135M on rows that the study of word problems recovered",
    "rlvr_cost": "seconds and memory of an RLVR step with repair, against n = 8 and n = 16",
    "engines": "tokens a second of hf and vLLM, from ids and from embeddings; scoring by the policy and by vLLM",
    "forks": "greedy forks of one rollout by the hf engine, seconds against one request",
    "training_memory": "peak memory of a training step over the model, TRL's head against linear_logprob",
    "verifier": "verdicts against math-verify and other graders on pairs of gold and answer; errors, pairs a second",
    "checkers": "the arithmetic checker: right derivations kept, mutated ones caught",
    "gate": "the implicit-value gate on the bundled families: does the answer's score rank branches that succeed?",
    "guards": "the leak guards on finished runs of the recovery study: what each, and all together, keep and let by",
    "chaos": "processes that share a run, killed at random: are the rows an undisturbed run's, and is nothing left?",
    "joint": "one run by one process, by two Ray workers, by two processes that share it: seconds, and the same rows",
    "scale": "a million prompts through scheduler, leases and part files, the work simulated: overhead, memory, resume",
    "plan": "what `latentrevise plan` says of the bundled families, over what they then take",
    "fuzz": "hostile prompt rows through the loader, pathological expressions through the verifier",
    "budgets": "mining and strategies in rounds that leave out solved prompts, against as many samples for each",
    "rejection": "would samples that look hopeless by the answer's score be worth stopping? saving and loss",
    "estimates": "upper bounds on an H100 from the compiled kernels: operations, bytes, issue slots (no GPU needed)",
    "cubins": "compile every Triton and CUDA kernel for sm_80 and sm_90; registers, stack, spills (no GPU needed)",
}
# Import transformers, which kernels are measured without.
MODELS = (
    "revise",
    "engines",
    "forks",
    "training_memory",
    "rlvr_cost",
    "verifier",
    "chaos",
    "joint",
    "scale",
    "plan",
    "fuzz",
    "budgets",
    "rejection",
)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    shown = {"-h", "--help"} & set(argv)
    models = {name: import_module(f"benchmarks.{name}") for name in MODELS if name in argv or shown}
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run; none: list them")
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--T", type=int, nargs="+", help="tokens")
    parser.add_argument("--d", type=int, nargs="+", help="dimensions")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of rounds a task (at least 3 rounds)")
    parser.add_argument("--rounds", type=int, default=5, help="revise, engines, rlvr_cost: of each measurement")
    parser.add_argument("--backend", nargs="+", help="time these backends instead of the one the dispatch chooses")
    parser.add_argument("--only", nargs="+", help="only implementations whose names hold one of these; cubins: ops")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--layers", type=int, help="revise, forks: fewer than the model has; the result says so")
    study = parser.add_argument_group("recovery, iterates, training, training_real")
    study.add_argument("--out", type=Path, help="folder of its runs, taken up again; none: NAME-study or NAME-quick")
    study.add_argument("--quick", action="store_true", help="one family, model and seed, few prompts: minutes")
    study.add_argument(
        "--variants",
        action="store_true",
        help="recovery: the harder families instead (far, pair64, partial); of gsm: ablations",
    )
    study.add_argument("--rivals", action="store_true", help="recovery, training: what people would use instead")
    study.add_argument(
        "--families",
        nargs="+",
        help="task families; none: the study's own; gsm, gsm6, gsm7, gsm8: word problems",
    )
    study.add_argument("--strategies", nargs="+", help="recovery; training_real: arms; none: the study's own")
    study.add_argument(
        "--models", type=int, nargs="+", help="training seeds; recovery: of the start, 0 is bundled, others are trained"
    )
    study.add_argument("--seeds", type=int, nargs="+", help="of prompts and sampling")
    study.add_argument("--mined", type=int, help="prompts mined in each run")
    study.add_argument("--jobs", type=int, help="runs side by side; none: one a core; 0 (training): pool what is there")
    study.add_argument("--runs", type=Path, nargs="+", help="checkers, guards, training_real: directories of runs")
    study.add_argument("--publish", action="store_true", help="write the table and figure into docs/ and results/")
    for name, module in models.items():
        module.add_options(parser.add_argument_group(name))
    options = parser.parse_args(argv)
    unknown = set(options.names) - set(DESCRIPTIONS)
    if unknown:
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; choose from {', '.join(DESCRIPTIONS)}")
    if not options.names:
        for name, what in DESCRIPTIONS.items():
            print(f"{name:20} {what}")
        return 0
    status, documents = 0, []
    for name in options.names:
        if name == "cubins":
            document, bad = cubins.main(options.only or ())
            status |= bad
        elif name in models:
            document = models[name].main(options)
        elif name in ("checkers", "gate", "guards"):
            document = import_module(f"benchmarks.{name}").main(options)
        elif name == "estimates":
            document = estimates.main()
        elif name == "screening":
            document = screening.main(options)
        elif name in ("recovery", "iterates", "training", "training_real"):
            # And with it all of the pipeline, which kernels are measured without.
            chosen = vars(options) | {"out": options.out or folder(name, options)}
            document = import_module(f"benchmarks.{name}").main(argparse.Namespace(**chosen))
        else:
            document = measure(name, options)
            status |= any(failure.startswith("latentrevise") for failure in document["failed"])
        documents.append(document)
    if options.json:
        write(options.json, documents[0] if len(documents) == 1 else documents)
    return status


def folder(name: str, options: argparse.Namespace) -> Path:
    """Where a study's runs go unless it is said. A smaller or another plan has other runs under the same names."""
    study = import_module("benchmarks.recovery").study_of(options) if name == "recovery" else name
    return Path(f"{name}-quick" if options.quick else f"{study}-study")


def measure(name: str, options: argparse.Namespace) -> dict:
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    sizes = ops.Sizes(
        T=tuple(options.T or ((256, 2048, 16384) if gpu else (16, 256, 1024))),
        d=tuple(options.d or ((896, 2048, 4096) if gpu else (896, 2048))),
        V=options.vocab,
        dtypes=tuple(getattr(torch, dtype) for dtype in options.dtype or ["float32", "bfloat16"]),
        device=device,
        budget_s=options.budget,
        compile=not options.no_compile,
        backends=tuple(options.backend or [None]),
        only=tuple(options.only or ()),
    )
    report = harness.Report.start(name, device)
    print(f"{name} on {report.device}, {report.threads} threads, load {report.load_average}")

    def show(line: str) -> None:
        print(line, flush=True)
        if options.json and len(options.names) == 1:  # what there is, should the rest not come
            write(options.json, report.to_json())

    ops.run(name, sizes, report, show)
    if options.only and not (report.rows or report.failed):
        raise SystemExit(f"--only {' '.join(options.only)}: no implementation of {name} has such a name")
    print(harness.table(report.rows))
    return report.to_json()


def write(path: Path, document: object) -> None:
    """Whole or not at all; unlike ``write_json`` with NaN, where something could not be measured."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
