"""The report, from run directories written here in the documented layout (random but consistent data)."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from latentrevise.data.atoms import write_atoms
from latentrevise.data.records import Prompt, Rollout, RowError, Sample, Start, Verdict, write_records
from latentrevise.data.storage import stable_hash, write_json, write_jsonl
from latentrevise.errors import InputError, RunError
from latentrevise.model.compute import Compute
from latentrevise.recovery.metrics import run_metrics
from latentrevise.recovery.mined import Glance, Mined
from latentrevise.recovery.outcome import Judged, Outcome
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.report import console_table, write_report
from latentrevise.report.audits import audit_table, guard_table
from latentrevise.report.tokens import TokenTexts

WEIRD = '<script>alert("1")</script> & 5 < 7 $x_1$ \u202e {{ 7 * 7 }}'
WORDS = ["check", "so", "wait", ",", "however", ";", "=", "+", "-", *(str(number) for number in range(100))]
STEPS = 6
STRATEGIES = ("resample", "resample-prefix", "latent", "latent-plausible")
LATENT = ("latent", "latent-plausible")
HIT_RATE = {
    "resample": 0.12,
    "resample-prefix": 0.06,
    "latent": 0.45,
    "latent-plausible": 0.5,
    "latent@wrong": 0.42,
    "latent-plausible@wrong": 0.05,
    "resample@equal": 0.25,
}
VALID_SHARE = {"latent": 0.1, "latent@wrong": 0.0}


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*WORDS, "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)


class RunBuilder:
    """Writes a run as ``recover`` does: the same record classes, the same metrics, invented rows."""

    def __init__(self, path: Path, *, prompts: int = 40, checkable: bool = True, seed: int = 0):
        self.files, self.checkable = RunDirectory(path), checkable
        self.rng = np.random.default_rng(seed)
        self.outcomes: list[Outcome] = []
        self.judged = Judged()
        self.prompts = [
            Prompt(
                id=f"p{index:03d}",
                text=WEIRD if index == 0 else self.text(12),
                ids=self.tokens(12),
                answer=str(self.rng.integers(100)),
            )
            for index in range(prompts)
        ]
        write_records(self.files.prompts, self.prompts, Prompt)
        self.rollouts = {prompt.id: self.failed(prompt) for prompt in self.prompts}
        write_records(self.files.part("rollouts", 0), [row for own in self.rollouts.values() for row in own], Rollout)

    def tokens(self, length: int) -> tuple[int, ...]:
        return tuple(self.rng.integers(len(WORDS), size=length).tolist())

    def text(self, length: int) -> str:
        return " ".join(WORDS[token] for token in self.tokens(length))

    def failed(self, prompt: Prompt) -> list[Rollout]:
        rows = []
        for index in range(4):
            ids = self.tokens(int(self.rng.integers(18, 50)))
            text = " ".join(WORDS[token] for token in ids)
            logprobs = (-0.5,) * len(ids)
            rows.append(Rollout(prompt.id, f"{prompt.id}/{index}", ids, text, "7", "wrong", "stop", logprobs))
        return rows

    def trace(self) -> dict[str, Any]:
        falling = np.geomspace(9, 1.5 + self.rng.random(), STEPS + 1) + self.rng.normal(0, 0.2, STEPS + 1)
        return {
            "loss": falling.tolist(),
            "guide": falling.tolist(),
            "explore": [],
            "fluency": [],
            "gap": np.geomspace(8, 0.05 + 0.1 * self.rng.random(), STEPS).tolist(),
            "step": (2 / (np.arange(STEPS) + 2) * 0.4).tolist(),
            "entropy": np.linspace(0, 1.2 + 0.3 * self.rng.random(), STEPS + 1).tolist(),
            "chosen": STEPS,
            "stopped": "steps",
        }

    def mixture(self, original: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        weights = self.rng.dirichlet([4.0, 2, 1, 0.5, 0.2, 0.1, 0.05], size=len(original))
        weights[:, -1] = 0
        atoms = self.rng.integers(len(WORDS), size=weights.shape)
        atoms[:, 1] = original
        atoms[:, -1] = atoms[:, 0]
        return torch.tensor(atoms), torch.tensor(weights / weights.sum(1, keepdims=True))

    def add_arm(self, arm: str, *, prefix: int = 9, samples: int = 2, hit_rate: float | None = None) -> None:
        strategy, _, side = arm.partition("@")
        hit_rate = HIT_RATE[arm] if hit_rate is None else hit_rate
        starts, mixtures = [], {}
        rows: list[tuple[Start, Sample, Verdict]] = []
        for prompt in self.prompts:
            original = () if strategy == "resample" else self.tokens(prefix)
            start = Start(
                start_id=f"{arm}/{prompt.id}/0",
                prompt_id=prompt.id,
                parent_sample_id=None if strategy == "resample" else f"{prompt.id}/1",
                target="13" if side == "wrong" else prompt.answer,
                prefix_ids=original,
                plain_ids=original,
                latent=strategy == "latent",
                greedy=False,
                n=samples,
                forward_tokens=100,
                backward_tokens=50,
                decoded_tokens=0,
                seconds=0.1,
                trace=self.trace() if strategy in LATENT else None,
            )
            starts.append(start)
            if strategy in LATENT:
                mixtures[start.start_id] = self.mixture(original)
            rows += [self.continuation(arm, start, index, hit_rate / samples) for index in range(samples)]
        path = self.files.part("starts", 0, arm)
        write_records(path, starts, Start)
        write_atoms(path.with_suffix(".safetensors"), mixtures)
        write_records(self.files.part("samples", 0, arm), [sample for _, sample, _ in rows], Sample)
        write_records(self.files.part("verdicts", 0, arm), [verdict for _, _, verdict in rows], Verdict)
        revising = strategy in LATENT
        decoded = sum(len(sample.completion_ids) + 1 for _, sample, _ in rows)
        compute = Compute(900 * len(starts) * revising, 700 * len(starts) * revising, decoded, 12.25)
        outcome = Outcome(arm, strategy, revising, side == "wrong", self.judged)
        outcome.add([prompt.id for prompt in self.prompts], len(starts), compute, rows)
        self.outcomes.append(outcome)

    def continuation(self, arm: str, start: Start, index: int, rate: float) -> tuple[Start, Sample, Verdict]:
        wrong = arm.endswith("@wrong")
        hit = bool(self.rng.random() < rate)
        correct = hit and not wrong
        valid = bool(self.rng.random() < VALID_SHARE.get(arm, 0.8)) if correct and self.checkable else None
        ids = self.tokens(int(self.rng.integers(8, 40)))
        text = WEIRD + " " + " ".join(WORDS[token] for token in ids)
        sample_id = f"{start.start_id}/{index}"
        sample = Sample(start.start_id, start.prompt_id, sample_id, ids, text, "stop", (-0.4,) * len(ids), seconds=0.1)
        verdict = Verdict(
            sample_id=sample_id,
            start_id=start.start_id,
            prompt_id=start.prompt_id,
            extracted=start.target if hit else None,
            verdict="correct" if correct else "wrong",
            hits_target=hit,
            hits_wrong=hit and wrong,
            valid=valid,
            steps=[] if valid is None else [{"text": "2 + 2 = 4", "ok": True}, {"text": "4 < 3", "ok": valid}],
            guard="prefix-leak,short" if valid is False else None,
            plain_logprobs=(-1.25,) * len(ids) if correct else None,
            signals={"answer": -0.1 - self.rng.random() - 2 * (not valid)} if correct else None,
        )
        return start, sample, verdict

    def finish(self, model: Path | str = "/nowhere/model", errors: list[RowError] | None = None) -> Path:
        mined = Mined()
        for own in self.rollouts.values():
            mined.add([Glance(r.verdict, r.finish_reason, r.extracted, len(r.completion_ids)) for r in own], 0, True)
        if not any(outcome.wrong for outcome in self.outcomes):
            for outcome in self.outcomes:
                outcome.aimed = 0
        metrics = run_metrics(
            self.outcomes,
            self.judged,
            mined=mined,
            left_out=len(errors or []),
            checked=self.checkable,
        )
        write_json(self.files.metrics, metrics)
        config = {"seed": 4711, "samples": 8}
        header = {
            "format": 1,
            "config": config,
            "config_hash": stable_hash(config),
            "engine": "HFEngine",
            "model": {"path": str(model), "class": "Qwen3ForCausalLM", "parameters": 876_544},
            "versions": {"latentrevise": "0.1.0", "torch": "2.13.0"},
            "created": "2026-01-02T03:04:05Z",
        }
        write_json(self.files.header, header)
        write_jsonl(self.files.errors, errors or [])
        return self.files.path


class Page(HTMLParser):
    """The page as a browser sees it: tags with attributes, visible text, and the table rows of each arm."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: dict[str, list[str]] = {}
        self.row: list[str] | None = None
        self.hidden = False
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.hidden = self.hidden or tag in ("style", "script")
        if tag == "tr":
            self.row = self.rows.setdefault(attributes["data-arm"], []) if "data-arm" in attributes else None
        if tag in ("td", "th") and self.row is not None:
            self.row.append("")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = self.hidden and tag not in ("style", "script")
        if tag == "table":
            self.row = None

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        self.words.append(data)
        if self.row:
            self.row[-1] = " ".join((self.row[-1] + " " + data).split())


def cases_of(page: Path, key: str) -> dict[str, Any]:
    """The cases that the page embeds, unpacked."""
    found = re.search(rf'<script type="application/gzip\+base64" id="{key}-data">([^<]*)</script>', page.read_text())
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_tokenizer(root / "model")
    builder = RunBuilder(root / "rule")
    for arm in (*STRATEGIES, "latent@wrong", "latent-plausible@wrong"):
        builder.add_arm(arm)
    builder.add_arm("resample@equal", samples=12, hit_rate=0.5)
    return builder.finish(root / "model", [RowError(3, "x", "empty-prompt", "m")] * 2)


@pytest.fixture(scope="module")
def written(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([run_dir], tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page(written)


def test_report_is_one_file_without_outside_resources(written: Path, page: Page) -> None:
    assert written.name == "report.html"
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "img")]
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), (tag, name, value)
    source = written.read_text()
    assert not re.search(r"https?://|@import|url\((?!#)", source)


def test_references_inside_the_page_resolve_and_ids_are_unique(written: Path, page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {value[1:] for _, attributes in page.tags if (value := attributes.get("href"))}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", written.read_text()))
    assert wanted
    assert wanted <= set(ids)


def test_figures_are_written_as_png(written: Path) -> None:
    figures = {path.name: path.read_bytes() for path in (written.parent / "figures").iterdir()}
    names = ("recovery", "targets", "optimisation", "lengths", "markers", "guards")
    assert set(figures) == {f"rule-{name}.png" for name in names}
    assert all(content.startswith(b"\x89PNG") for content in figures.values())


def test_figures_take_their_colours_from_the_page(written: Path) -> None:
    svgs = re.findall(r"<svg.*?</svg>", written.read_text(), re.DOTALL)
    assert len(svgs) == 11  # 2 recovery, targets, lengths, 4 optimisation, 2 markers, guards
    for text in svgs:
        colours = set(re.findall(r"#[0-9a-f]{6}\b", text)) - {"#ffffff"}
        assert not colours, "a colour outside the palette would not follow the dark theme"
        assert "var(--ink)" in text
        assert 'aria-label="' in text


def test_every_number_of_the_table_is_the_metrics_number(run_dir: Path, page: Page) -> None:
    arms = json.loads((run_dir / "metrics.json").read_text())["arms"]
    assert set(page.rows) == set(arms)

    def shown(rate: list[float]) -> str:
        return "{:.1f} % {:.1f}–{:.1f}".format(*(100 * value for value in rate))

    for arm in STRATEGIES:
        values, cells = arms[arm], page.rows[arm]
        control = values["control"]
        assert cells[0] == f"{arm} 2 samples a prompt"
        assert cells[1] == str(values["prompts"])
        assert cells[2] == shown(values["recovered_rate"])
        assert cells[3] == shown(values["valid_rate"])
        assert cells[4] == shown(values["wrong_target_rate"])
        if arm in LATENT:
            assert cells[5] == f"{values['selectivity']:.1f}"
        else:
            assert cells[5] == "wrong never reached"
        assert float(cells[6].replace(" ", "")) == pytest.approx(values["compute"]["per_prompt"], rel=0.01)
        rates = [100 * control[key][0] for key in ("recovered_rate", "valid_rate")]
        assert cells[7].startswith("{:.1f} % / {:.1f} % {} samples".format(*rates, control["samples"]))
        assert ("equal:" in cells[7]) == (control["wanted"] > control["samples"])
        assert cells[8] == "12.2"
        same = values["control_seconds"]
        rates = [100 * same[key][0] for key in ("recovered_rate", "valid_rate")]
        assert cells[9] == "{:.1f} % / {:.1f} % {} samples".format(*rates, same["samples"])
    assert "equal:" in page.rows["latent"][7], "2300 passes buy more fresh rollouts than the pool has"
    for arm in set(arms) - set(STRATEGIES):
        assert page.rows[arm][2] == shown(arms[arm]["recovered_rate"])
        assert int(page.rows[arm][6].replace(" ", "")) == arms[arm]["compute"]["decoded"]


def test_header_says_what_was_run(run_dir: Path, page: Page) -> None:
    for text in (
        "4711",
        stable_hash({"seed": 4711, "samples": 8}),
        "torch 2.13.0",
        "2026-01-02T03:04:05Z",
        str(run_dir),
        "empty-prompt",
    ):
        assert text in page.text


def test_reading_notes_warn_of_steering(run_dir: Path, page: Page) -> None:
    values = json.loads((run_dir / "metrics.json").read_text())["arms"]
    assert "latent reaches a random wrong answer as often as the right one, within the intervals" in page.text
    assert "latent-plausible reaches a random wrong answer" not in page.text
    assert "resample reaches a random wrong answer" not in page.text
    latent = values["latent"]
    assert f"latent is right on {latent['recovered']} prompts, on {latent['valid']} of them with a valid" in page.text
    best = values["latent-plausible"]
    assert (
        "Highest rate with a valid derivation: latent-plausible, {:.1f} %".format(100 * best["valid_rate"][0])
        in page.text
    )
    assert re.search(r"at equal compute \([^)]+\): {:.1f} %".format(100 * best["control"]["valid_rate"][0]), page.text)


def test_every_prompt_and_strategy_can_be_opened(run_dir: Path, written: Path, page: Page) -> None:
    data = cases_of(written, "rule")
    assert data["arms"] == list(STRATEGIES)
    assert [prompt["id"] for prompt in data["prompts"]] == [f"p{index:03d}" for index in range(40)]
    order = ("valid", "unchecked", "invalid", "missed")
    for arm in STRATEGIES:
        verdicts = pq.read_table(run_dir / f"verdicts/{arm}/part-00000.parquet").to_pylist()
        samples = {r["sample_id"]: r for r in pq.read_table(run_dir / f"samples/{arm}/part-00000.parquet").to_pylist()}
        for prompt in data["prompts"]:
            own = [row for row in verdicts if row["prompt_id"] == prompt["id"]]
            kinds = [
                {True: "valid", False: "invalid", None: "unchecked"}[row["valid"]] if row["hits_target"] else "missed"
                for row in own
            ]
            entry = prompt["arms"][arm]
            assert entry["outcome"] == min(kinds, key=order.index)
            assert (entry["hits"], entry["of"]) == (sum(row["hits_target"] for row in own), len(own))
            assert entry["admitted"] == sum(row["verdict"] == "correct" and row["guard"] is None for row in own)
            assert entry["text"] == samples[entry["sample"]]["completion"]
            assert entry["parent"] in prompt["failed"] or entry["parent"] is None
    assert "Token texts are not available" not in page.text


def test_a_case_holds_heat_map_steps_and_log_probs(run_dir: Path, written: Path) -> None:
    data = cases_of(written, "rule")
    prompt = next(p for p in data["prompts"] if p["arms"]["latent"]["outcome"] == "valid")
    entry = prompt["arms"]["latent"]
    verdicts = pq.read_table(run_dir / "verdicts/latent/part-00000.parquet").to_pylist()
    start_id = next(row["start_id"] for row in verdicts if row["sample_id"] == entry["sample"])
    tensors = load_file(run_dir / "starts/latent/part-00000.safetensors")
    ids, weights = tensors[f"{start_id}.ids"], tensors[f"{start_id}.weights"]
    column = entry["heat"]["columns"][0]
    heaviest = int(weights[0].argmax())
    text, weight, _ = column["atoms"][0]
    assert data["pieces"][text] == WORDS[int(ids[0, heaviest])]
    assert weight == pytest.approx(float(weights[0, ids[0] == ids[0, heaviest]].sum()), abs=1e-4)
    assert any(kept for c in entry["heat"]["columns"] for _, _, kept in c["atoms"]), "the original token is among them"
    assert entry["steps"] == [["2 + 2 = 4", True], ["4 < 3", True]]
    assert (entry["logprob"], entry["plain"]) == (-0.4, -1.25)
    turned_away = [p["arms"]["latent"] for p in data["prompts"] if p["arms"]["latent"]["outcome"] == "invalid"]
    assert {entry["guard"] for entry in turned_away} == {"prefix-leak,short"}


def test_texts_cannot_run(written: Path, page: Page) -> None:
    """Prompts and completions are untrusted: the one script of the page is named by its digest, data is base64."""
    source = written.read_text()
    scripts = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = next(str(a["content"]) for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "innerHTML" not in scripts[0]
    assert "alert(" not in source
    assert cases_of(written, "rule")["prompts"][0]["prompt"] == WEIRD, "shown as it is, template braces included"


def test_report_is_deterministic(run_dir: Path, written: Path, tmp_path: Path) -> None:
    again = write_report([run_dir], tmp_path / "named.html")
    assert again == tmp_path / "named.html"
    assert again.read_bytes() == written.read_bytes()


def test_several_runs_have_a_section_each(tmp_path: Path) -> None:
    runs = []
    for seed, folder in enumerate(("a/rule", "b/rule", "chain")):
        builder = RunBuilder(tmp_path / folder, prompts=4, seed=seed)
        builder.add_arm("resample", hit_rate=0.0)
        runs.append(builder.finish())
    page = Page(write_report(runs, tmp_path / "out"))
    sections = [attributes["id"] for tag, attributes in page.tags if attributes.get("class") == "run"]
    assert sections == ["rule-1", "rule-2", "chain"]
    assert {path.name.rsplit("-", 1)[0] for path in (tmp_path / "out/figures").iterdir()} == set(sections)
    for text in (
        "No prompt was recovered by resample.",
        "selectivity is not known",
        "there are no traces",
        "No continuation was recovered: only failed rollouts are shown.",
        "the guards had nothing to judge",
    ):
        assert text in page.text


def test_uncheckable_derivations_are_said_to_be(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "Free text!", checkable=False)
    for arm in ("latent", "latent@wrong", "resample@equal"):
        builder.add_arm(arm)
    run = builder.finish()
    page = Page(write_report([run], tmp_path / "out"))
    assert page.rows["latent"][3] == "not checkable"
    assert " % / –" in page.rows["latent"][7]
    assert "Derivations could not be checked in this run" in page.text
    outcomes = {
        entry["outcome"]
        for p in cases_of(tmp_path / "out/report.html", "free-text")["prompts"]
        for entry in p["arms"].values()
    }
    assert outcomes == {"unchecked", "missed"}
    assert "Right answer with a valid derivation" not in page.text
    assert (tmp_path / "out/figures/free-text-recovery.png").is_file()
    assert "Token texts are not available: the model directory '/nowhere/model'" in page.text
    first = cases_of(tmp_path / "out/report.html", "free-text")["prompts"][0]["arms"]["latent"]
    assert first["prefix"].split()[0] == "#" + str(
        pq.read_table(run / "starts/latent/part-00000.parquet")["plain_ids"][0][0]
    )


def test_damaged_tokenizer_is_said_to_be(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert TokenTexts.load(str(tmp_path)).text([2, 3]) == "wait ,"
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    damaged = TokenTexts.load(str(tmp_path))
    assert "could not be loaded" in damaged.problem
    assert damaged.text([2, 3]) == "#2 #3"


def test_wrong_target_never_reached(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run", prompts=6)
    builder.add_arm("latent", hit_rate=2.0)
    builder.add_arm("latent@wrong", hit_rate=0.0)
    page = Page(write_report([builder.finish()], tmp_path / "out"))
    assert page.rows["latent"][5] == "wrong never reached"
    assert page.rows["latent"][7] == "none", "no control pool was sampled"
    assert all(
        p["arms"]["latent"]["outcome"] != "missed" for p in cases_of(tmp_path / "out/report.html", "run")["prompts"]
    )


def test_run_in_which_nothing_failed(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run", prompts=0)
    for arm in ("latent", "resample"):
        builder.add_arm(arm)
    page = Page(write_report([builder.finish()], tmp_path / "out"))
    assert "there was nothing to recover" in page.text
    assert "No strategy produced a continuation." in page.text
    assert "No text contains a word of reconsideration." in page.text
    assert not list((tmp_path / "out").glob("figures/*"))


def test_metrics_without_rows(tmp_path: Path) -> None:
    """Rows may be archived elsewhere: the table stands, the cases say why they are missing."""
    builder = RunBuilder(tmp_path / "run")
    builder.add_arm("latent")
    run = builder.finish()
    for stage in ("starts", "samples", "verdicts", "rollouts"):
        shutil.rmtree(run / stage)
    page = Page(write_report([run], tmp_path / "out"))
    assert "%" in page.rows["latent"][2]
    assert "holds the metrics of the strategies, but not their rows" in page.text
    assert "holds no rollouts and no recovered continuations" in page.text


def test_long_prefix_shows_the_positions_that_moved_most(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run", prompts=1)
    builder.add_arm("latent", prefix=60, samples=1, hit_rate=0.0)
    path = builder.files.part("starts", 0, "latent")
    start = pq.read_table(path).to_pylist()[0]
    moved = list(range(5, 53))
    ids = torch.tensor(start["prefix_ids"])[:, None]
    ids[moved] = (ids[moved] + 1) % len(WORDS)
    write_atoms(path.with_suffix(".safetensors"), {start["start_id"]: (ids, torch.ones(60, 1))})
    page = write_report([builder.finish()], tmp_path / "out")
    heat = cases_of(page, "run")["prompts"][0]["arms"]["latent"]["heat"]
    assert heat["of"] == 60
    assert [column["at"] for column in heat["columns"]] == moved


def test_a_thousand_prompts_stay_under_two_megabytes(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run", prompts=1000)
    for arm in ("resample", "resample-prefix", "latent", "latent-plausible"):
        builder.add_arm(arm, prefix=60)
    page = write_report([builder.finish()], tmp_path / "out")
    assert page.stat().st_size < 2_000_000
    data = cases_of(page, "run")
    assert len(data["prompts"]) == 1000
    assert all(set(prompt["arms"]) == set(data["arms"]) for prompt in data["prompts"])
    assert "To keep this page small" in Page(page).text


def test_figures_of_zeros_are_left_out(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run", prompts=6)
    builder.add_arm("resample", hit_rate=0.0)
    text = Page(write_report([builder.finish()], tmp_path / "out")).text
    assert "Left out, since every value is 0: right answer" in text


def test_runs_stand_beside_each_other(tmp_path: Path) -> None:
    runs = []
    for seed, arms in enumerate((("latent", "resample"), ("resample",))):
        builder = RunBuilder(tmp_path / f"run{seed}", prompts=10, seed=seed)
        for arm in arms:
            builder.add_arm(arm)
        runs.append(builder.finish())
    page = write_report(runs, tmp_path / "out")
    metrics = [json.loads((run / "metrics.json").read_text())["arms"] for run in runs]
    table = re.search(r'<section class="compare">.*?</section>', page.read_text(), re.DOTALL)
    assert table
    rows = re.findall(r"<tr><th scope=\"row\">([^<]+)</th>(.*?)</tr>", table[0], re.DOTALL)
    assert [name for name, _ in rows] == ["latent", "resample"]
    for name, cells in rows:
        for arms, cell in zip(metrics, re.findall(r"<td>(.*?)</td>", cells, re.DOTALL), strict=True):
            if name in arms:
                shown = [f"{100 * arms[name][key][0]:.1f}" for key in ("recovered_rate", "valid_rate")]
                assert cell == " / ".join(shown)
            else:
                assert "–" in cell


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "holds no run"),
        (lambda run: (run / "run.json").write_text('{"format": 99}'), "format 99"),
        (lambda run: (run / "metrics.json").unlink(), "unfinished run"),
        (lambda run: (run / "metrics.json").write_text("{"), "can't be read"),
        (lambda run: (run / "metrics.json").write_text("{}"), "has no arms"),
        (lambda run: (run / "prompts.parquet").write_bytes(b"no parquet"), "not a readable parquet file"),
        (lambda run: (run / "samples/latent/part-00000.parquet").unlink(), "has no parts"),
    ],
)
def test_damaged_runs_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    builder = RunBuilder(tmp_path / "run", prompts=3)
    builder.add_arm("latent", hit_rate=2.0)
    run = builder.finish()
    damage(run)
    with pytest.raises((RunError, InputError), match=message):
        write_report([run], tmp_path / "out")


def test_no_run_and_unwritable_output(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run directory was given"):
        write_report([], tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write"):
        write_report([run_dir], tmp_path / "file")


def printed(metrics: dict[str, Any], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(console_table(metrics))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_console_table_fits_a_terminal(run_dir: Path) -> None:
    metrics = json.loads((run_dir / "metrics.json").read_text())
    lines = printed(metrics, 80)
    assert not any("…" in line for line in lines)
    for arm in STRATEGIES:
        values = metrics["arms"][arm]
        at = next(index for index, line in enumerate(lines) if line.split()[:1] == [arm])
        rates = [values[key] for key in ("recovered_rate", "valid_rate", "wrong_target_rate")]
        assert lines[at].split()[1:4] == [f"{100 * rate[0]:.1f}" for rate in rates]
        below = lines[at + 1].split()
        assert below[:3] == [f"{100 * rate[1]:.1f}–{100 * rate[2]:.1f}" for rate in rates]
        same = [values["control_seconds"][key] for key in ("recovered_rate", "valid_rate")]
        assert below[3:] == "{:.1f} / {:.1f}".format(*(100 * rate[0] for rate in same)).split()
        assert lines[at].split()[4] == ("–" if values["selectivity"] is None else f"{values['selectivity']:.1f}")
    assert "40 zero-hit prompts of 40" in " ".join(lines)


def test_console_table_without_strategies() -> None:
    lines = printed({"prompts": 3, "zero_hit": 0, "derivations_checked": False, "arms": {}}, 80)
    assert "no strategy was run" in " ".join(lines)


GATE = {
    "prompts": 12,
    "prompts_with_both": 11,
    "branches": 300,
    "successes": 40,
    "auc": {"value": [0.97, 0.95, 0.99], "prior": [0.5, 0.4, 0.6], "posterior": [0.9, 0.8, 1.0]},
    "scoring_tokens": 6.0,
    "continuation_tokens": 30.0,
    "break_even": 0.95,
    "recommended": ["pivot"],
    "reason": "it ranks well",
}


def test_audits_are_in_the_page_and_on_the_console(run_dir: Path, page: Page, tmp_path: Path) -> None:
    assert "Implicit-value gate" not in page.text, "it was not measured"
    metrics = json.loads((run_dir / "metrics.json").read_text())
    best = metrics["guards"]["trade_off"][-1]
    assert f"{100 * best['kept']:.1f} %{100 * best['contamination']:.1f} %" in page.text  # cells of one row
    for code, points in metrics["guards"]["curves"].items():
        for point in points:
            assert f"{code}{point['threshold']:.3g}{100 * point['kept']:.1f} %" in page.text

    console = Console(width=100, file=io.StringIO())
    console.print(audit_table(metrics))
    console.print(guard_table(metrics))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for arm in STRATEGIES:
        values = metrics["arms"][arm]
        line = next(line.split() for line in shown.splitlines() if line.split()[:1] == [arm])
        assert line[1] == str(values["correct_samples"])
        assert line[2] == f"{100 * values['guarded']['valid'] / values['correct_samples']:.1f}"
        assert line[4] == f"{100 * values['guarded']['contamination'][0]:.1f}"
    assert "unfounded-answer alone" in shown

    builder = RunBuilder(tmp_path / "gated", checkable=False)
    builder.add_arm("resample")
    run = builder.finish()
    (run / "gate.json").write_text(json.dumps(GATE))
    text = Page(write_report([run], tmp_path / "out")).text
    assert "value 0.97 [0.95, 0.99]" in text
    assert "recommended: pivot (it ranks well)" in text
    assert "Leak guards" not in text, "nothing was checked"
    assert guard_table(json.loads((run / "metrics.json").read_text())) is None
