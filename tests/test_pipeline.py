"""The whole job on a bundled model: rows that agree with each other, resumption, and every step as a command."""

import dataclasses
import json
import random
import time

import pytest

from latentrevise import RecoverConfig, recover
from latentrevise.config import to_dict
from latentrevise.data.atoms import read_atoms
from latentrevise.data.boundary import Boundary
from latentrevise.data.records import Prompt, Rollout, Sample, Start, Trajectory, Verdict, read_records
from latentrevise.data.storage import read_signed, write_jsonl
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.engines import HFEngine
from latentrevise.errors import ConfigError, InputError, RunError
from latentrevise.model.loading import load_model
from latentrevise.recovery.cases import chosen_cuts
from latentrevise.recovery.guards import wilson
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.progress import Progress
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.schedule import Joint
from latentrevise.recovery.settings import RoundsConfig
from latentrevise.recovery.stages import continuations
from latentrevise.recovery.targets import Target
from tests.commands import begin, command
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def rule():
    family = get_family("rule")
    model, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    return family, model, tokenizer


def small(**changes):
    """The demo's settings, cut to a few seconds: six prompts a part, so that there are several parts."""
    base = demo_config(get_family("rule"))
    return dataclasses.replace(
        base, **{"rollouts": 4, "samples": 4, "revised_rollouts": 2, "chunk": 6, "equal_compute_cap": 8, **changes}
    )


@pytest.fixture(scope="module")
def finished(rule, tmp_path_factory):
    family, model, tokenizer = rule
    out = tmp_path_factory.mktemp("run") / "out"
    prompts = make_prompts(family, 20, split="develop", seed=3)
    return recover(model, tokenizer, prompts, small(), out), prompts


def content(out):
    """Everything a run computes, without what a clock wrote."""
    found = {}
    for path in sorted(out.rglob("*.parquet")):
        kinds = {"rollouts": Rollout, "targets.parquet": Target, "starts": Start, "samples": Sample}
        kinds |= {"verdicts": Verdict, "prompts.parquet": Prompt, "trajectories.parquet": Trajectory}
        kind = kinds[path.relative_to(out).parts[0]]
        rows = [dataclasses.asdict(row) for row in read_records(path, kind)]
        found[str(path.relative_to(out))] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    for path in sorted(out.rglob("*.safetensors")):
        found[str(path.relative_to(out))] = {
            k: (ids.tolist(), weights.tolist()) for k, (ids, weights) in read_atoms(path)[0].items()
        }
    return found


def test_rows_agree_with_each_other(finished, rule):
    recovered, prompts = finished
    family, _, tokenizer = rule
    out, metrics = recovered.out, recovered.metrics
    rollouts = read_records(out / "rollouts", Rollout)
    assert len(rollouts) == 4 * len(prompts)
    gold = {row["id"]: row["answer"] for row in prompts}
    text = {row["id"]: row["prompt"] for row in prompts}
    for rollout in rollouts:
        assert rollout.verdict == ("correct" if rollout.extracted == gold[rollout.prompt_id] else "wrong")
        assert len(rollout.sampling_logprobs) == len(rollout.completion_ids)
    zero_hit = {p for p in gold if not any(r.verdict == "correct" for r in rollouts if r.prompt_id == p)}
    assert metrics["zero_hit"] == len(zero_hit) > 3
    for arm, figures in metrics["arms"].items():
        starts = {s.start_id: s for s in read_records(out / "starts" / arm, Start)}
        samples = {s.sample_id: s for s in read_records(out / "samples" / arm, Sample)}
        verdicts = read_records(out / "verdicts" / arm, Verdict)
        assert {s.prompt_id for s in samples.values()} <= zero_hit
        assert set(samples) == {v.sample_id for v in verdicts}
        reached = {v.prompt_id for v in verdicts if samples[v.sample_id].completion and v.hits_target}
        for verdict in verdicts:
            start = starts[verdict.start_id]
            said = verdict.extracted
            assert verdict.hits_target == (said == start.target)
            assert (start.target == gold[verdict.prompt_id]) == (figures["target"] == "gold")
            if verdict.verdict == "correct":
                prefix = tokenizer.decode(list(start.plain_ids), skip_special_tokens=True)
                completion = samples[verdict.sample_id].completion
                checked = family.check(text[verdict.prompt_id], prefix, completion, gold[verdict.prompt_id])
                assert verdict.valid == checked.valid
        assert figures["recovered"] == len(reached)
        assert figures["recovered_rate"] == pytest.approx(wilson(len(reached), figures["prompts"]))
        forward = sum(s.forward_tokens for s in starts.values())
        backward = sum(s.backward_tokens for s in starts.values())
        decoded = sum(s.decoded_tokens for s in starts.values())
        decoded += sum(len(s.completion_ids) + (s.finish_reason == "stop") for s in samples.values())
        assert figures["compute"]["per_prompt"] == pytest.approx(
            (forward + 2 * backward + decoded) / figures["prompts"]
        )


def test_compute_is_charged_to_those_who_spend_it(finished):
    arms = finished[0].metrics["arms"]
    assert arms["latent"]["compute"]["backward"] > 0
    for name in ("latent", "pivot"):
        assert arms[name + "@wrong"]["target"] == "wrong"
    assert arms["branch-mass"]["compute"]["forward"] > arms["branch-mass"]["compute"]["backward"] == 0
    for name in ("resample", "resample-prefix", "resample@equal"):
        assert (arms[name]["compute"]["forward"], arms[name]["compute"]["backward"]) == (0, 0)
        assert name + "@wrong" not in arms
    pool = arms["resample@equal"]
    assert pool["samples_per_prompt"] == 8, "the cap of this test's settings"


def test_an_engine_that_does_not_share_prefixes_is_charged_for_all_of_each_request(rule, tmp_path, monkeypatch):
    _, model, tokenizer = rule
    prompts = make_prompts(get_family("rule"), 8, split="develop", seed=3)
    monkeypatch.setattr(HFEngine, "shares_prefixes", False)
    names = ("latent", "resample-prefix", "resample")
    config = small(strategies=names, audit=False, equal_compute=False)
    out = recover(model, tokenizer, prompts, config, tmp_path / "out").out
    lengths = {p.id: len(p.ids) for p in read_records(out / "prompts.parquet", Prompt)}
    for name in names:
        starts = read_records(out / "starts" / name, Start)
        assert starts
        for start in starts:
            whole = lengths[start.prompt_id] + len(start.plain_ids)
            assert start.forward_tokens > whole if name == "latent" else start.forward_tokens == whole


def test_trajectories_carry_both_streams(finished, rule):
    recovered, _ = finished
    rows = recovered.trajectories
    assert list(rows) == read_records(recovered.out / "trajectories.parquet", Trajectory)
    assert rows, "nothing was recovered, so this test shows nothing"
    atoms = read_atoms(recovered.out / "atoms.safetensors")[0]
    for row in rows:
        assert row.verdict == "correct"
        assert row.extracted_answer == row.answer
        assert len(row.sampling_logprobs) == len(row.plain_logprobs) == len(row.completion_ids)
        if row.strategy != "latent":
            # What was fed is what the row says, so both streams are one.
            assert row.plain_logprobs == pytest.approx(row.sampling_logprobs, abs=1e-3)
        if row.strategy.startswith("latent"):
            ids, weights = atoms[row.start_id]
            assert len(ids) == len(row.plain_prefix_ids)
            assert ids.gather(1, weights.argmax(1, keepdim=True)).flatten().tolist() == list(row.plain_prefix_ids)


def test_parts_that_are_lost_are_computed_again_and_are_the_same(finished, rule):
    recovered, _ = finished
    _, model, tokenizer = rule
    before, rows = content(recovered.out), list(recovered.trajectories)
    lost = [p for p in recovered.out.rglob("part-*.parquet") if random.Random(p.name + p.parent.name).random() < 0.4]
    assert len(lost) > 5
    for path in lost:
        path.unlink()
    (recovered.out / "trajectories.parquet").unlink()
    (recovered.out / ".part-00000.parquet.1.tmp").write_bytes(b"half a file")
    again = Recovery(model, tokenizer, small(), recovered.out, progress=False).recover()
    assert content(recovered.out) == before
    assert list(again.trajectories) == rows


def test_another_run_is_refused(finished, rule):
    recovered, _ = finished
    _, model, tokenizer = rule
    with pytest.raises(RunError, match=r"config\.samples: 4 there, 6 now"):
        Recovery(model, tokenizer, small(samples=6), recovered.out)
    with pytest.raises(RunError, match="other prompts"):
        recover(model, tokenizer, [{"prompt": "1 ?", "answer": "2"}], small(), recovered.out)
    other = tiny_model("qwen3", vocab=len(tokenizer), seed=1)
    with pytest.raises(RunError, match="fingerprint"):
        Recovery(other, tokenizer, small(), recovered.out)
    strange = recovered.out.parent / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"thesis\.tex"):
        Recovery(model, tokenizer, small(), strange)


def without_seconds(found):
    if isinstance(found, dict):
        return {name: without_seconds(value) for name, value in found.items() if "seconds" not in name}
    return [without_seconds(value) for value in found] if isinstance(found, list) else found


def test_strategies_are_added_to_a_run_without_mining_again(rule, tmp_path):
    """Its rows and figures are then those of a run that had them from the start; the control grows with the cost."""
    family, model, tokenizer = rule
    prompts = make_prompts(family, 10, split="develop", seed=3)
    every = ("resample", "pivot", "branch-mass")
    whole = recover(model, tokenizer, prompts, small(strategies=every), tmp_path / "whole")
    out = tmp_path / "grown"
    first = recover(model, tokenizer, prompts, small(strategies=every[:1]), out)
    assert read_signed(out / "control.json", "")["samples"] == 5
    kept = {path: path.stat().st_mtime_ns for path in [*out.glob("rollouts/*"), *out.glob("samples/resample/*")]}
    assert first.metrics["arms"].keys() == {"resample", "resample@equal"}

    joint = Recovery(model, tokenizer, small(strategies=every), out, progress=False, scheduler=Joint(0, 2))
    with pytest.raises(RunError, match="without --shard"):
        joint.recover(prompts)
    with pytest.raises(RunError, match=r"config\.strategies"):
        Recovery(model, tokenizer, small(strategies=every[1:]), out)
    with pytest.raises(RunError, match="other prompts"):
        recover(model, tokenizer, prompts[:5], small(strategies=every), out)
    assert (out / "metrics.json").exists(), "nothing was touched"
    assert RunDirectory(out).read_header()["config"]["strategies"] == ["resample"]

    recover(model, tokenizer, prompts, small(strategies=every[:2]), out)
    grown = Recovery(model, tokenizer, small(strategies=every), out, progress=False).recover()  # the prompts it has
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert read_signed(out / "control.json", "")["samples"] == 8
    assert content(out) == content(whole.out)
    assert without_seconds(grown.metrics) == without_seconds(whole.metrics)
    with pytest.raises(RunError, match=r"config\.strategies"):
        Recovery(model, tokenizer, small(strategies=every[:2]), out)


def test_two_processes_do_not_share_a_run(finished, rule):
    recovered, _ = finished
    _, model, tokenizer = rule
    run = Recovery(model, tokenizer, small(), recovered.out, progress=False)
    with run.session(), pytest.raises(RunError, match="another process"):
        Recovery(model, tokenizer, small(), recovered.out, progress=False).recover()


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A prompts file and a settings file for the command line."""
    folder = tmp_path_factory.mktemp("cli")
    write_jsonl(folder / "prompts.jsonl", make_prompts(get_family("rule"), 20, split="develop", seed=4))
    config = small(rollouts=3, samples=2, chunk=4)
    (folder / "config.yaml").write_text(json.dumps(to_dict(config)))
    return folder


PLACED = ("--dtype", "float32", "--device", "cpu", "--quiet")


def recover_command(folder, out):
    return [
        "recover",
        "--model",
        model_dir("rule"),
        "--prompts",
        folder / "prompts.jsonl",
        "--config",
        folder / "config.yaml",
        "--out",
        out,
        *PLACED,
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_ten_random_instants_it_ends_with_the_same_rows(on_disk, tmp_path):
    found = command(*recover_command(on_disk, tmp_path / "undisturbed"))
    assert found.returncode == 0, found.stderr
    draw, out = random.Random(0), tmp_path / "killed"
    for _ in range(10):
        # Killing it while it starts proves little: wait for some parts, then strike.
        enough = len(list(out.rglob("part-*"))) + draw.randint(1, 5)
        process = begin(*recover_command(on_disk, out), told=str(tmp_path))
        while process.is_alive() and len(list(out.rglob("part-*"))) < enough:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        assert process.is_alive(), "the run ended before it could be killed: give it more prompts"
        process.kill()
        process.join()
    found = command(*recover_command(on_disk, out))
    assert found.returncode == 0, found.stderr
    undisturbed = content(tmp_path / "undisturbed")
    assert len(undisturbed["trajectories.parquet"]) > 0
    assert content(out) == undisturbed


@pytest.mark.slow
def test_each_step_is_a_command(on_disk, tmp_path):
    out = tmp_path / "steps"
    for words in (
        [
            "mine",
            "--model",
            model_dir("rule"),
            "--prompts",
            on_disk / "prompts.jsonl",
            "--config",
            on_disk / "config.yaml",
        ],
        ["revise"],
        ["continue"],
        ["verify"],
    ):
        found = command(*words, "--out", out, *PLACED)
        assert found.returncode == 0, (words, found.stderr)
    assert "trajectories" in found.stdout
    assert json.loads((out / "metrics.json").read_text())["zero_hit"] > 0
    assert (out / "report").exists()
    found = command(*recover_command(on_disk, tmp_path / "other"), "--engine", "vlm")
    assert found.returncode == 1
    assert "there are hf" in found.stderr
    found = command("revise", "--out", tmp_path / "nothing", *PLACED)
    assert found.returncode == 1
    assert "holds no run" in found.stderr


def test_steps_out_of_order_say_what_is_missing(rule, tmp_path):
    family, model, tokenizer = rule
    run = Recovery(model, tokenizer, small(), tmp_path / "out", progress=False)
    with pytest.raises(RunError, match="no prompts yet"):
        run.revise()
    with pytest.raises(RunError, match="no prompts yet"):
        run.mine()
    run.mine(make_prompts(family, 8, split="develop", seed=9))
    with pytest.raises(RunError, match="latentrevise revise"):
        run.sample()


def test_bad_rows_are_left_out_and_counted(rule, tmp_path):
    family, model, tokenizer = rule
    rows = [*make_prompts(family, 4, split="develop", seed=5), {"id": "x", "prompt": "", "answer": "3"}]
    recovered = recover(model, tokenizer, rows, small(audit=False, equal_compute=False), tmp_path / "out")
    assert recovered.metrics["rows_left_out"] == 1
    (line,) = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "empty-prompt"
    with pytest.raises(InputError, match="no usable prompt"):
        recover(model, tokenizer, [{"prompt": "", "answer": "3"}], small(), tmp_path / "none")


def test_a_run_in_which_nothing_failed(tmp_path):
    """A model that is always right leaves nothing to recover, and the run says so."""
    model, tokenizer = tiny_model("qwen3", vocab=97, seed=0), tiny_tokenizer()
    config = RecoverConfig(
        rollouts=2,
        samples=2,
        max_new_tokens=4,
        chat="never",
        answer_template="w3 w4",
        strategies=("latent", "resample"),
    )
    run = Recovery(model, tokenizer, config, tmp_path / "out", progress=False)
    run.job.verifier.verify = lambda pairs: [_correct() for _ in pairs]
    recovered = run.recover([{"prompt": "w1 w2", "answer": "5"}])
    assert recovered.metrics["zero_hit"] == 0
    assert len(recovered.trajectories) == 0


def _correct():
    from latentrevise.verify.verifier import Judgement

    return Judgement("correct", "5")


def test_rollouts_too_short_to_be_cut_are_counted(tmp_path):
    model, tokenizer = tiny_model("qwen3", vocab=97, seed=0), tiny_tokenizer()
    config = RecoverConfig(
        rollouts=2, samples=2, max_new_tokens=1, chat="never", answer_template="w3", strategies=("resample",)
    )
    recovered = recover(model, tokenizer, [{"prompt": "w1 w2", "answer": "5"}], config, tmp_path / "out")
    assert (recovered.metrics["zero_hit"], recovered.metrics["rows_left_out"]) == (0, 1)
    (line,) = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "short-rollouts"


def test_what_the_model_has_no_positions_for_is_not_sampled(tmp_path, caplog):
    """A revised prefix in front of as many new tokens as a rollout may have can be more than the model has."""
    model, tokenizer = tiny_model("qwen3", vocab=97, seed=0, max_position_embeddings=40), tiny_tokenizer()
    config = RecoverConfig(
        rollouts=2,
        samples=2,
        max_new_tokens=24,
        prefix_fraction=0.9,
        chat="never",
        answer_template="=",
        strategies=("resample-prefix",),
        equal_compute=False,
    )
    out = tmp_path / "out"
    recovered = recover(model, tokenizer, [{"prompt": "what is 2 + 3?", "answer": "5"}], config, out)
    assert recovered.metrics["zero_hit"] == 1
    assert "2 of 2 rollouts hold no answer by answer_pattern = 'boxed'" in caplog.text
    (prompt,) = read_records(out / "prompts.parquet", Prompt)
    (start, *_) = (row for path in (out / "starts").rglob("*.parquet") for row in read_records(path, Start))
    rows = [row for path in (out / "samples").rglob("*.parquet") for row in read_records(path, Sample)]
    room = 40 - len(prompt.ids) - len(start.plain_ids)
    assert 0 < room < 24
    assert max(len(row.completion_ids) for row in rows) == room
    run = Recovery(model, tokenizer, config, out, progress=False)
    full = dataclasses.replace(start, plain_ids=(5,) * (40 - len(prompt.ids)))
    assert continuations(run.job, [full], {}, {prompt.id: prompt}, RoundsConfig(), Progress()) == [[]]
    assert "1 of 1 starts fill all positions" in caplog.text


def test_a_gold_that_is_parsed_one_time_and_not_the_next_does_not_lose_a_run(rule, tmp_path):
    _, model, tokenizer = rule
    rows = [{"id": name, "prompt": "1 ? = 2 ; 2 ?", "answer": answer} for name, answer in (("a", "3"), ("b", "x^2"))]
    run = Recovery(model, tokenizer, small(), tmp_path / "out", progress=False)
    for troubles in ([None, None], [None, "it can't be parsed in time"], [None, None]):
        run.job.verifier.check_golds = lambda golds, troubles=troubles: troubles
        run.job.take_prompts(rows)
        assert [p.id for p in run.prompts] == ["a", "b"]
    run.job.verifier.check_golds = lambda golds: [None for _ in golds]
    with pytest.raises(RunError, match="other prompts"):
        run.job.take_prompts([rows[1]])


def test_an_undecided_prompt_is_not_called_zero_hit(tmp_path):
    from latentrevise.verify.verifier import Judgement

    model, tokenizer = tiny_model("qwen3", vocab=97, seed=0), tiny_tokenizer()
    config = RecoverConfig(
        rollouts=2, samples=2, max_new_tokens=4, chat="never", answer_template="w3 w4", strategies=("resample",)
    )
    run = Recovery(model, tokenizer, config, tmp_path / "out", progress=False)
    run.job.verifier.verify = lambda pairs: [Judgement("wrong" if i else "unknown", None) for i in range(len(pairs))]
    recovered = run.recover([{"prompt": "w1 w2", "answer": "5"}])
    assert (recovered.metrics["zero_hit"], recovered.metrics["undecided"]) == (0, 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"strategies": ("latnet",)}, "unknown strategy 'latnet'"),
        ({"strategies": ()}, "at least one"),
        ({"revised_rollouts": 9}, "raise `samples`"),
        ({"prefix_fraction": 1.0}, "prefix_fraction"),
        ({"rollouts": 0}, "rollouts"),
    ],
)
def test_bad_settings(change, match):
    with pytest.raises(ConfigError, match=match):
        RecoverConfig(**change)


def test_a_checker_that_is_not_there_and_a_boundary_no_token_has(rule, tmp_path):
    _, model, tokenizer = rule
    with pytest.raises(ConfigError, match=r"package\.module:function"):
        Recovery(model, tokenizer, small(checker="nowhere"), tmp_path / "a")
    with pytest.raises(ConfigError, match="has no tokens for it"):
        Recovery(model, tokenizer, small(prefix_boundary="§"), tmp_path / "b")


def test_the_cut_is_behind_a_boundary_and_leaves_both_sides():
    tokenizer = tiny_tokenizer()
    word, end = tokenizer.convert_tokens_to_ids(["a", ";"])
    boundary = Boundary(";", tokenizer)

    def cut(ids):
        failed = [Rollout("p", "s", tuple(ids), "", None, "wrong", "stop", ())]
        (found,) = chosen_cuts(failed, 1, 0.0, boundary, seed=0)
        return found

    assert cut([word, word, end, word, end, word]).prefix_ids == (word, word, end)
    assert cut([word, word, end]).prefix_ids == (word,), (
        "a boundary at the very end would leave nothing to move away from"
    )
    both = cut([word, word])
    assert (len(both.prefix_ids), len(both.continuation_ids)) == (1, 1)


def test_a_model_that_was_moved_is_the_same_model(tmp_path):
    header = {"config": {"seed": 0}, "model": {"path": "here", "fingerprint": "a"}, "versions": {}, "created": "today"}
    run, prompts = RunDirectory(tmp_path), [Prompt("p", "1+1", (1,), "2")]
    assert not run.check(header)
    run.begin(header, prompts, [])
    assert run.check(header | {"model": {"path": "there", "fingerprint": "a"}, "created": "later"})
    assert run.read_header() == {"format": 1, **header, "model": {"path": "there", "fingerprint": "a"}}
    with pytest.raises(RunError, match=r"model\.fingerprint: 'a' there, 'b' now"):
        run.check(header | {"model": {"path": "here", "fingerprint": "b"}})


def test_answers_are_read_by_the_pattern_everywhere(rule, tmp_path):
    _, model, tokenizer = rule
    prompts = make_prompts(get_family("rule"), 8, split="develop", seed=3)
    plain = {"audit": False, "equal_compute": False, "strategies": ("pivot", "resample-prefix"), "revised_rollouts": 1}
    found = []
    for name, pattern in (("box", "boxed"), ("own", r"\\boxed\{ ([^}]*) \}")):
        recover(model, tokenizer, prompts, small(**plain, answer_pattern=pattern), tmp_path / name)
        found.append(content(tmp_path / name))
        found[-1].pop("trajectories.parquet")  # names the settings
    assert found[0] == found[1]
    assert any(row["verdict"] == "correct" for row in found[0]["rollouts/part-00000.parquet"])
    blind = small(**plain, answer_pattern="gsm8k", answer_template="#### ")
    run = Recovery(model, tokenizer, blind, tmp_path / "blind")
    run.mine(prompts)
    assert {r.extracted for own in run.rollouts().values() for r in own} == {None}
    assert run.job.template_ids == tuple(tokenizer.encode("#### ", add_special_tokens=False))
