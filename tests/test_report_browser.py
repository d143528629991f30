"""The report driven in a real browser: Playwright (`pip install playwright`) with the system's Chromium."""

import shutil
from pathlib import Path

import pytest

from latentrevise.report import write_report
from tests.test_report import RunBuilder, write_tokenizer

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    write_tokenizer(root / "model")
    builder = RunBuilder(root / "rule", prompts=130)
    for arm in ("latent", "latent-plausible", "resample"):
        builder.add_arm(arm)
    return write_report([builder.finish(root / "model")], root / "out")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["desktop-light", "phone-dark"])
def page(request, browser, report):
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda sent: None if sent.url.startswith("file:") else problems.append(sent.url))
    page.goto(report.as_uri())
    page.wait_for_selector(".cases tbody tr")
    yield page
    assert not problems
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    context.close()


def shown(page) -> list[str]:
    return page.eval_on_selector_all(".cases tbody tr", "rows => rows.map(row => row.dataset.prompt)")


def test_every_prompt_is_listed_and_more_are_shown_on_demand(page):
    assert page.inner_text("[data-part=count]") == "130 of 130 prompts"
    assert len(shown(page)) == 100
    page.click("[data-part=more]")
    assert shown(page) == [f"p{index:03d}" for index in range(130)]


def test_filters_and_sorting(page):
    page.select_option("[data-part=arm]", "latent")
    page.select_option("[data-part=outcome]", "valid")
    few = shown(page)
    assert 0 < len(few) < 60
    signs = page.eval_on_selector_all(".cases tbody tr", "rows => rows.map(r => r.cells[2].innerText[0])")
    assert set(signs) == {"✓"}
    page.select_option("[data-part=outcome]", "")
    page.select_option("[data-part=guard]", "prefix-leak")
    assert 0 < len(shown(page)) < 130
    page.select_option("[data-part=guard]", "")
    page.fill("[data-part=text]", "alert(")
    assert "p000" in shown(page), "the prompt with markup in it is found by its text"
    page.fill("[data-part=text]", "")
    page.click(".cases thead button >> text=latent >> nth=0")
    order = page.eval_on_selector_all(
        ".cases tbody tr", "rows => rows.map(r => '✓○≈✗'.indexOf(r.cells[2].innerText[0]))"
    )
    assert order == sorted(order)


def test_a_case_opens_with_two_strategies_side_by_side(page):
    page.click('tr[data-prompt="p003"] button')
    page.wait_for_selector(".case-view .pane")
    chosen = page.eval_on_selector_all(".pane select", "all => all.map(one => one.value)")
    assert len(set(chosen)) == 2
    page.select_option(".pane select >> nth=1", "latent-plausible")
    assert page.locator(".pane >> nth=1").locator("table.heat").count() == 1
    assert "p003" in page.url
    page.reload()
    page.wait_for_selector(".case-view .pane")
    assert page.inner_text(".case-view h4") == "p003", "a link leads to its case"


def test_markup_in_texts_stays_text(page):
    page.click('tr[data-prompt="p000"] button')
    page.wait_for_selector(".case-view .pane")
    assert '<script>alert("1")</script>' in page.inner_text(".case-view pre >> nth=0")
    assert page.locator(".case-view script").count() == 0
