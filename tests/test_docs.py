"""The documentation: the site builds strictly and without network, and what documents name is there."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from latentrevise.recovery.settings import RecoverConfig

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("reference/settings.md", "results.md")  # made when the site is built
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra `docs`)")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (extra `docs`)")
    out = tmp_path_factory.mktemp("site")
    # A proxy that no one listens on: whatever asks the network fails.
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, **closed, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link)[^>]+(?:src|href)=\"(https?://[^\"]+)", page.read_text(encoding="utf-8")
        )
        assert not loaded, f"{page.name} loads {loaded[0]}"


@pytest.mark.slow
def test_the_reference_lists_every_setting_and_public_name(site):
    settings = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    for field in dataclasses.fields(RecoverConfig):
        assert field.name in settings, f"{field.name} is not on the page of settings"
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in ("Reviser", "ReviseConfig", "FailedRollout", "linear_logprob", "vertex_oracle", "recover"):
        assert f">{name}<" in python or f"{name}</" in python, f"{name} is not on the page of Python"


@pytest.mark.slow
def test_every_study_is_on_the_page_of_all_rows(site):
    page = (site / "results.html").read_text(encoding="utf-8")
    for study in ("iterates", "guards", "checkers"):
        assert f"benchmarks/results/{study}.json" in page
    assert "| " not in re.sub(r"<[^>]+>", "", page), "a table was not read as one"


@pytest.mark.slow
@pytest.mark.parametrize(
    "study",
    [
        *("gsm", "gsm-scored", "gsm6", "gsm7", "gsm8", "gsm-before", "gsm-earlier", "gsm-rivals", "gsm-others"),
        *("gsm-mass", "gsm-variants"),
        *("recovery", "rivals", "variants"),
        *("training", "training-real"),
    ],
)
def test_all_rows_of_a_study_are_on_a_page(site, study):
    families = json.loads((ROOT / f"benchmarks/results/{study}.json").read_text(encoding="utf-8"))["families"]
    page = (site / "results.html").read_text(encoding="utf-8")
    for pooled in families.values():
        for name in pooled.get("strategies") or pooled["arms"]:
            assert f"<code>{name}</code>" in page, f"{name} of {study} is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if re.match(r"[a-z]+:", target) or target.endswith(GENERATED):
            continue
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_documents_name_are_there(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:latentrevise|kernels|benchmarks|csrc|tests|docs|examples)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}, which is not there"
