"""The README's example runs as it stands, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    found = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    nll = [float(x) for x in re.findall(r"\d+\.\d+", found.stdout.splitlines()[0])]
    assert len(nll) == 11
    assert nll[-1] < nll[0], "the example should show the gold answer becoming likelier"


@pytest.mark.parametrize(
    "words", [["recover", "--help"], ["export", "--help"], ["demo", "--help"], ["doctor"], ["--help"]]
)
def test_the_commands_exist(words):
    found = subprocess.run([sys.executable, "-m", "latentrevise", *words], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "latentrevise" in found.stdout.lower() or "Usage" in found.stdout


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / link).exists(), link
