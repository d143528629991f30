"""The types as users' programs see them, and the names that an interactive session is offered."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import latentrevise

PROGRAMS = Path(__file__).parent / "typing"
ROOT = Path(latentrevise.__file__).resolve().parents[1]


def check(tool: str, folder: Path, *files: str) -> tuple[str, set[int]]:
    """What the checker says of a user's files outside the repository, and the lines in which it finds errors."""
    command = {
        "mypy": [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(folder / "c")],
        "pyright": [sys.executable, "-m", "pyright", "--pythonpath", sys.executable],
    }[tool]
    for file in files:
        shutil.copy(PROGRAMS / file, folder)
    (folder / "pyrightconfig.json").write_text(f'{{"typeCheckingMode": "standard", "extraPaths": ["{ROOT}"]}}')
    env = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run([*command, *files], cwd=folder, env=env, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    return said, {int(line) for line in re.findall(r"\.py:(\d+)(?::\d+)*:? (?:- )?error", said)}


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_users_programs_are_typed_and_mistakes_found(tool, tmp_path):
    pytest.importorskip(tool)
    said, lines = check(tool, tmp_path, "loss.py", "revise.py")
    assert not lines, said
    said, lines = check(tool, tmp_path, "wrong.py")
    text = (PROGRAMS / "wrong.py").read_text().splitlines()
    assert lines == {i for i, line in enumerate(text, 1) if line.endswith("# wrong")}, said


def test_the_names_are_offered_before_they_are_used():
    code = (
        "import latentrevise, sys; print(*dir(latentrevise)); assert 'torch' not in sys.modules; latentrevise.kernels"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {*latentrevise.__all__, "kernels"} <= set(done.stdout.split())
    with pytest.raises(AttributeError, match="nope"):
        latentrevise.nope  # noqa: B018
