"""The README's example runs as it stands, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from latentrevise import cli
from latentrevise.errors import ConfigError

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    found = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    nll = [float(x) for x in re.findall(r"\d+\.\d+", found.stdout.splitlines()[0])]
    assert len(nll) == 11
    assert nll[-1] < nll[0], "the example should show the gold answer becoming likelier"


def test_the_module_is_the_command():
    found = subprocess.run([sys.executable, "-m", "latentrevise", "doctor"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "latentrevise" in found.stdout.lower()


@pytest.mark.parametrize("words", [["recover", "--help"], ["export", "--help"], ["demo", "--help"], ["--help"]])
def test_the_commands_exist(words):
    found = CliRunner().invoke(cli.app, words)
    assert found.exit_code == 0, found.output
    assert "Usage" in found.output


def test_bench_hands_its_words_on(tmp_path):
    def bench(*words):
        command = [sys.executable, "-m", "latentrevise", "bench", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    listed = bench()
    assert listed.returncode == 0, listed.stderr
    assert "vertex_oracle" in listed.stdout
    assert "python -m benchmarks" in bench("--help").stdout
    unknown = bench("nothing", "--json", "x.json")
    assert unknown.returncode == 2
    assert "unknown benchmark nothing" in unknown.stderr


def test_bench_says_where_the_benchmarks_are(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "latentrevise" / "cli" / "__init__.py"))
    with pytest.raises(ConfigError, match=r"not part of the installed package.*pip install -e"):
        cli.app(["bench", "recovery"], standalone_mode=False)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / link).exists(), link
