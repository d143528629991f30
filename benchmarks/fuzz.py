"""``python -m benchmarks fuzz``: hostile prompt rows through the loader, pathological expressions through the verifier.

Rows: hypothesis draws good rows and bad ones of each kind in ``KINDS``; each draw is given as Python objects, JSONL
(with broken lines, perhaps compressed), JSON and CSV or TSV, and counts in each form; beside them parquet with columns
of odd types, and files with bytes changed. Whatever comes, each row is read (and stored and read again as it was), or
is refused with its number, a reason and a remedy; or the file is, by its name. Anything else is a failure, and ends the
benchmark.

Expressions: the verdicts of good pairs alone, and in batches that pathological ones are strewn over. They must be the
same; no pathological pair may be correct that is not; and the seconds say what the bad ones cost the good.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import harness
from benchmarks.hostile_expressions import expressions
from latentrevise.data.prompts import load_prompts
from latentrevise.data.records import Prompt, read_records, write_records
from latentrevise.data.storage import read_jsonl, write_jsonl
from latentrevise.errors import InputError
from latentrevise.verify.verifier import Verifier

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
ROWS_A_FILE = 40

Row = Any  # of a file: most are dictionaries, the worst are not

# What nobody expects in a cell.
_BROKEN = ["\x00", "\x1b[31m", "\ud800", "\udfff1", "\u2028", "\ufeff7", "\r\n", "\t", "   ", "", "'\"", "\\", "a\x0bb"]
_ODD_GOLDS = [
    "{[1, 2]}", "{{1,2}}", "{[]: 1}", "[1, [2]]", "['a', 'b']", "[", "]", "{", "}{", "\\boxed{", "\\boxed{}", "$",
    "\\frac{", "\\frac{1}{0}", "1/0", "0^0", "####", "#### ", "The answer is", "<answer></answer>", "**", "nan", "None",
    "N/A", "1e999", "-" * 3000, "**" * 3000, "\\boxed{" * 500 + "1" + "}" * 500, "(" * 3000, "1" * 5000,
    "0." + "9" * 5000,
    "\\text{" * 60, "b'7'", "[" + "-" * 3000 + "1]", "{'answer': {'value': ['7']}}", '{"ground_truth": null}',
    "é" * 3000,
]  # fmt: skip
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(),  # NaN and infinities too
    st.text(max_size=20),
    st.sampled_from(_BROKEN + _ODD_GOLDS),
)
_VALUES = st.recursive(
    _LEAVES, lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=6), inside, max_size=4)
)
_QUESTIONS = st.integers(0, 10**6).map(lambda n: f"{n}+{n}=")
_GOOD = st.integers(0, 10**6).map(lambda n: {"prompt": f"{n}+{n}=", "answer": str(2 * n)})
_ROLES = st.sampled_from(["user", "assistant", "system", "", 3, None])
_MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": _ROLES, "content": _VALUES, "tool_calls": _VALUES}), max_size=3
)


def _deep(levels: int, leaf: Any) -> Any:
    for level in range(levels):
        leaf = [leaf] if level % 2 else {"x": leaf}
    return leaf


def _changed(**cells: st.SearchStrategy[Any]) -> st.SearchStrategy[Row]:
    """A good row with these cells in place of its own."""
    return st.builds(lambda good, own: good | own, _GOOD, st.fixed_dictionaries(cells))  # type: ignore[arg-type]


_HUGE = st.sampled_from(["7" * 30_000, "a b " * 8_000, "\\frac{" * 5_000, "[" * 30_000, '"' * 30_000])
KINDS: dict[str, st.SearchStrategy[Row]] = {
    "good": _GOOD,
    "missing field": st.sampled_from([{"prompt": "1+1="}, {"answer": "2"}, {}, {"question": "1+1=", "gold": "2"}]),
    "wrong type of prompt": _changed(prompt=_VALUES),
    "wrong type of answer": _changed(answer=_VALUES),
    "not a number": _changed(answer=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e308, 5e-324])),
    "huge number": _changed(answer=st.sampled_from([10**4000, 10**5000, -(10**6000)])),
    "huge text": st.one_of(_changed(prompt=_HUGE), _changed(answer=_HUGE), _changed(note=_HUGE)),
    "surrogates": st.one_of(*(_changed(**{name: st.text(st.characters(categories=("Cs", "Ll")), min_size=1)})
                              for name in ("prompt", "answer", "id", "note"))),
    "duplicate id": _changed(id=st.sampled_from(["a", "b", 1, "1"])),
    "odd id": _changed(id=_VALUES),
    "repeated": st.just({"prompt": "1+1=", "answer": "2"}),
    "nested": _changed(note=st.integers(0, 400).map(lambda n: _deep(n, 1))),
    "nested answer": _changed(answer=st.integers(0, 400).map(lambda n: _deep(n, "7"))),
    "empty": _changed(prompt=st.sampled_from(["", " ", [], {}, None]), answer=st.sampled_from(["", " ", [], None])),
    "control characters": _changed(prompt=st.sampled_from(_BROKEN), answer=st.sampled_from(_BROKEN)),
    "messages": _changed(prompt=_MESSAGES | _MESSAGES.map(lambda m: json.dumps(m)) | _MESSAGES.map(str)),
    "odd answer": _changed(answer=st.sampled_from(_ODD_GOLDS)),
    "text as answer": _changed(answer=st.text(max_size=60)),
    "not a row": _VALUES.filter(lambda value: not isinstance(value, dict)),
}  # fmt: skip
_LINES = st.sampled_from(  # of JSONL, as bytes
    [b"{", b'{"prompt": "1"', b"[1, 2", b"nul", b"\xff\xfe", b'{"prompt": "\xc3", "answer": "1"}', b"[" * 5000, b"\x00",
     b'{"prompt": "1", "answer": ' + b"9" * 5000 + b"}", b'{"a":' * 3000, b"'prompt'",
     b'{"prompt": NaN, "answer": -Infinity}',
     b'{"prompt": "\\ud800", "answer": "1"}', b'{"prompt": "1", "prompt": "2", "answer": "1", "answer": "3"}'],
)  # fmt: skip
_ARROW: dict[str, st.SearchStrategy[pa.Array]] = {  # columns of four rows
    "binary": st.just(pa.array([b"7", b"\xff", None, b""])),
    "timestamp": st.sampled_from(["ms", "us", "ns"]).map(lambda u: pa.array([0, 1, 2**62, None], pa.timestamp(u))),
    "duration": st.sampled_from(["ms", "us", "ns"]).map(lambda u: pa.array([0, 1, 2**62, None], pa.duration(u))),
    "time": st.just(pa.array([0, 1, 10**9, None], pa.time64("ns"))),
    "date": st.sampled_from([0, 2**20, 2**30]).map(lambda days: pa.array([0, 1, days, None], pa.date32())),
    "decimal": st.just(pa.array([Decimal("1.50"), Decimal(0), Decimal("1e30"), None], pa.decimal256(60, 10))),
    "half": st.just(pa.array([1.5, float("nan"), float("inf"), None], pa.float32()).cast(pa.float16())),
    "dictionary": st.just(pa.array(["7", "8", None, ""]).dictionary_encode()),
    "map": st.just(pa.array([[("a", 1)], [], None, [("answer", 2)]], pa.map_(pa.string(), pa.int64()))),
    "struct": st.just(pa.array([{"ground_truth": "7"}, {"ground_truth": None}, None, {"ground_truth": "x"}])),
    "list": st.just(pa.array([["7"], ["7", "8"], [], None])),
    "null": st.just(pa.nulls(4)),
    "boolean": st.just(pa.array([True, False, None, True])),
    "unsigned": st.just(pa.array([0, 2**64 - 1, None, 7], pa.uint64())),
}


@dataclass
class Tally:
    """What became of rows, by their kind: ``read``, the reason of a refusal, or ``file`` where all of it was."""

    rows: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    files: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0  # seconds for one file

    def note(self, kind: str, outcome: str) -> None:
        self.rows[kind] += 1
        self.outcomes.setdefault(kind, Counter())[outcome] += 1


class Fuzz:
    """Checks what ``load_prompts`` makes of hostile sources; raises AssertionError at the first that it should not."""

    def __init__(self, tokenizer: Any, verifier: Verifier, folder: Path) -> None:
        self.tokenizer, self.verifier, self.folder, self.tally = tokenizer, verifier, folder, Tally()

    def load(self, source: Any, form: str, kinds: dict[int, str] | None) -> None:
        """kinds: of the rows, by their number; None where bytes were changed, so that nothing is known of rows."""
        began = time.perf_counter()
        self.tally.files[form] += 1
        try:
            prompts, errors = load_prompts(source, tokenizer=self.tokenizer, verifier=self.verifier)
        except InputError as error:
            _expect_told(str(error), source)
            for kind in (kinds or {}).values():
                self.tally.note(kind, "file")
            return
        finally:
            self.tally.slowest = max(self.tally.slowest, time.perf_counter() - began)
        for error in errors:
            assert error.reason, f"no reason is named: {error}"
            assert ";" in error.message, f"no remedy is named: {error}"
            assert len(error.message) < 3000, f"a message of {len(error.message)} characters"
        assert all(prompt.id and prompt.text and prompt.ids and prompt.answer for prompt in prompts)
        if form == "python":
            self._stored(prompts, errors)
        if kinds is None:
            return
        repeats = sum(int(e.message.split()[0]) for e in errors if e.reason == "repeated-prompt")
        refused = {e.row: e.reason for e in errors if e.reason != "repeated-prompt"}
        assert len(refused) == sum(e.reason != "repeated-prompt" for e in errors), "a row is refused twice"
        assert refused.keys() <= kinds.keys(), "a row that is none is refused"
        told = len(prompts) + repeats + len(refused)
        assert told == len(kinds), f"{len(kinds)} rows, {told} of them read or refused"
        for number, kind in kinds.items():
            self.tally.note(kind, refused.get(number, "read"))

    def _stored(self, prompts: list[Prompt], errors: Sequence[Any]) -> None:
        """What is read must go into the files of a run and come out of them."""
        write_records(self.folder / "stored.parquet", prompts, Prompt)
        assert read_records(self.folder / "stored.parquet", Prompt) == prompts
        write_jsonl(self.folder / "errors.jsonl", errors)
        assert len(read_jsonl(self.folder / "errors.jsonl")) == len(errors)

    # The forms that rows come in

    def written(self, rows: list[tuple[str, Row]], broken: list[bytes], flag: bool) -> None:
        """The same rows in each form."""
        self.python(rows)
        self.jsonl(rows, broken, zipped=flag)
        self.json(rows)
        self.csv(rows, "excel" if flag else "excel-tab")

    def python(self, rows: list[tuple[str, Row]]) -> None:
        self.load([row for _, row in rows], "python", dict(enumerate(kind for kind, _ in rows)))

    def jsonl(self, rows: list[tuple[str, Row]], broken: list[bytes], zipped: bool) -> None:
        lines = [(kind, _json(row)) for kind, row in rows] + [("broken line", line) for line in broken]
        random.Random(len(lines)).shuffle(lines)
        lines = [(kind, line) for kind, line in lines if line is not None]
        path = self.folder / ("rows.jsonl.gz" if zipped else "rows.jsonl")
        data = b"\n".join(line for _, line in lines)
        path.write_bytes(gzip.compress(data) if zipped else data)
        self.load(path, "jsonl", {number: kind for number, (kind, _) in enumerate(lines, 1)})

    def json(self, rows: list[tuple[str, Row]]) -> None:
        kept = [(kind, line) for kind, line in ((kind, _json(row)) for kind, row in rows) if line is not None]
        path = self.folder / "rows.json"
        path.write_bytes(b"[" + b",".join(line for _, line in kept) + b"]")
        self.load(path, "json", dict(enumerate(kind for kind, _ in kept)))

    def csv(self, rows: list[tuple[str, Row]], dialect: str) -> None:
        cells = [(kind, row) for kind, row in rows if isinstance(row, dict)]
        text = io.StringIO()
        writer = csv.DictWriter(text, ["prompt", "answer", "id", "note"], dialect=dialect, extrasaction="ignore")
        writer.writeheader()
        kinds = []
        for kind, row in cells:
            try:
                writer.writerow({key: str(value) for key, value in row.items()})
                kinds.append(kind)
            except (ValueError, csv.Error):  # what CSV itself cannot hold, such as numbers that Python does not write
                continue
        path = self.folder / ("rows.csv" if dialect == "excel" else "rows.tsv")
        path.write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))
        self.load(path, path.suffix[1:], dict(enumerate(kinds)))

    def parquet(self, name: str, column: pa.Array, place: str) -> None:
        cells = {"prompt": pa.array(["1+1=", "2+2=", "3+3=", "4+4="]), "answer": pa.array(["2", "4", "6", "8"])}
        path = self.folder / "rows.parquet"
        pq.write_table(pa.table(cells | {place: column}), path)
        self.load(path, "parquet", dict.fromkeys(range(4), f"parquet: {name}"))

    def damaged(self, suffix: str, position: float, new: bytes) -> None:
        """One of the files that were written last, with some bytes changed."""
        path = self.folder / f"rows.{suffix}"
        if path.exists() and (data := path.read_bytes()):
            at = int(position * len(data))
            path.write_bytes(data[:at] + new + data[at + len(new) // 2 :])
            self.load(path, "damaged", None)

    def run(self, files: int, number: int) -> Tally:
        """Hypothesis draws ``files`` files by this seed; a failure comes with the smallest that shows it."""
        kind = st.sampled_from(list(KINDS)).flatmap(lambda name: st.tuples(st.just(name), KINDS[name]))
        rows = st.lists(kind, min_size=ROWS_A_FILE // 2, max_size=ROWS_A_FILE)
        arrow = st.sampled_from(list(_ARROW)).flatmap(lambda name: st.tuples(st.just(name), _ARROW[name]))
        places, suffixes = (
            st.sampled_from(["prompt", "answer", "id", "note"]),
            ["jsonl", "json", "csv", "tsv", "parquet"],
        )
        forms: list[st.SearchStrategy[tuple[Any, ...]]] = [
            st.tuples(st.just(self.written), rows, st.lists(_LINES, max_size=4), st.booleans()),
            st.tuples(st.just(self.written), rows, st.lists(_LINES, max_size=4), st.booleans()),
            arrow.flatmap(lambda pair: st.tuples(st.just(self.parquet), st.just(pair[0]), st.just(pair[1]), places)),
            st.tuples(st.just(self.damaged), st.sampled_from(suffixes), st.floats(0, 0.999), st.binary(max_size=8)),
        ]

        @seed(number)
        @settings(max_examples=files, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.one_of(forms))
        def check(drawn: tuple[Any, ...]) -> None:
            form: Callable[..., None] = drawn[0]
            form(*drawn[1:])

        check()
        return self.tally


def _expect_told(message: str, source: Any) -> None:
    assert not isinstance(source, Path) or str(source) in message, f"no file is named: {message}"
    assert ";" in message, f"no remedy is named: {message}"


def _json(row: Row) -> bytes | None:
    """The row as a line; None for what JSON cannot write."""
    try:
        return json.dumps(row).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return None


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--rows", type=int, default=100_000, help="hostile rows, at least")
    group.add_argument("--expressions", type=int, default=1000, help="pathological expressions; 0: none")
    group.add_argument("--timeout", type=float, default=5.0, help="seconds for one pair; 5 is what runs have")
    group.add_argument("--good", type=int, default=3000, help="ordinary expressions that they stand among")


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, so that nothing is unknown to it, and a chat template for messages."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<eos>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    found.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    return found


def main(options: argparse.Namespace) -> dict[str, Any]:
    document: dict[str, Any] = {
        **harness.heading("fuzz"),
    }
    began, tally, number = time.perf_counter(), Tally(), (options.seeds or [0])[0]
    with tempfile.TemporaryDirectory(prefix="latentrevise-fuzz-") as place, Verifier(1.0, 1) as verifier:
        fuzz = Fuzz(tokenizer(), verifier, Path(place))
        while (done := sum(fuzz.tally.rows.values())) < options.rows:
            tally = fuzz.run(max(20, min(500, (options.rows - done) // 60)), number)
            number += 1
            print(f"{sum(tally.rows.values()):,} rows in {sum(tally.files.values()):,} files", flush=True)
    document["rows"] = {
        "rows": sum(tally.rows.values()),
        "files": dict(tally.files),
        "seconds": time.perf_counter() - began,
        "slowest_file_seconds": tally.slowest,
        "crashes": 0,  # the first ends the benchmark
        "outcomes": {kind: dict(found.most_common()) for kind, found in sorted(tally.outcomes.items())},
    }
    for kind, found in document["rows"]["outcomes"].items():
        print(f"{kind:24} {sum(found.values()):>7,}  {', '.join(f'{name} {n:,}' for name, n in found.items())}")
    if options.expressions:
        document["expressions"] = found = expressions(options.expressions, options.good, options.timeout, workers=2)
        for name, count in found["verdicts"].items():
            print(f"{name:24} {', '.join(f'{verdict} {n}' for verdict, n in count.items())}")
        print(
            f"good pairs a second: {found['good_per_second_alone']:.0f} alone,"
            f" {found['good_per_second_among_bad']:.0f} among bad ones; {found['seconds_a_bad_pair']:.2f} s a bad pair"
        )
    if options.publish:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document
