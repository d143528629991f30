"""The examples run as they stand: the notebook cell by cell, the loop for two steps."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(*command: str) -> str:
    found = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=None)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.mark.slow
def test_the_notebook_leads_from_a_failure_to_a_valid_row(tmp_path):
    notebook = json.loads((EXAMPLES / "recover.ipynb").read_text(encoding="utf-8"))
    code = "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    script = tmp_path / "recover.py"
    script.write_text("import matplotlib\nmatplotlib.use('Agg')\n" + code, encoding="utf-8")
    printed = run(str(script))
    assert re.search(r"^  correct valid ", printed, re.MULTILINE)
    assert printed.rstrip().splitlines()[-1].startswith("plausible {'prompt'")
    pictures = [o for cell in notebook["cells"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 2, "the notebook is stored with its pictures"


@pytest.mark.slow
def test_the_loop_revives_dead_groups():
    lines = run(str(EXAMPLES / "custom_loop.py"), "--steps", "3").strip().splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 1", "step 2"]
    told = [dict(re.findall(r"(\w+) ([\d.]+)", line.split(": ", 1)[1])) for line in lines]
    assert sum(float(step["zero_hit"]) for step in told) >= 3
    assert sum(float(step["recovered"]) for step in told) >= 1
