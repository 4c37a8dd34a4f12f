"""The report in a real headless browser: filters, sorting, keyboard, phone, hostile texts, and without JavaScript."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cpu.report_fakes import FINGERPRINT, HOSTILE, fill

from nsa_autotune.db.store import TuningStore
from nsa_autotune.report.build import build_report
from nsa_autotune.report.page import render_page, write_page

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e .[browser]")
chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
driver = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    chromium is None or driver is None, reason="chromium and its chromedriver are not installed (apt: chromium-driver)"
)

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PHONE, DESK = (390, 844), (1300, 900)
FORWARD = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-24-h100-80gb-hbm3-forward.json"

Browser = Any  # selenium is optional, and so are its types
Open = Callable[..., Browser]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with TuningStore("sqlite://", import_shipped=False) as store:
        fill(store)
        report = build_report(store, benches=(FORWARD,))
    return write_page(tmp_path_factory.mktemp("report"), render_page(report))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(chromium)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def opened(browser: Browser, page: Path) -> Iterator[Open]:
    """Opens the page at a size of the window; at the end nothing may stand in the console."""

    def open_page(size: tuple[int, int] = DESK, script: bool = True, path: Path = page) -> Browser:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        browser.get(f"file://{path}")
        return browser

    yield open_page
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert browser.get_log("browser") == []


def js(browser: Browser, script: str) -> Any:
    return browser.execute_script(f"return {script}")


def count_shown(browser: Browser, selector: str) -> int:
    return int(
        js(browser, f"[...document.querySelectorAll({selector!r})].filter(e => e.getClientRects().length).length")
    )


def choose(browser: Browser, name: str, text: str) -> None:
    script = """
        const box = document.querySelector(`select[name=${arguments[0]}]`);
        box.value = [...box.options].find((option) => option.text === arguments[1]).value;
        box.dispatchEvent(new Event("change", { bubbles: true }));
    """
    browser.execute_script(script, name, text)


def column(browser: Browser, name: str, table: int) -> list[str]:
    cells = f"[...document.querySelectorAll('.table')[{table}].querySelectorAll('[data-t=\"{name}\"]')]"
    return list(js(browser, f"{cells}.map(cell => cell.dataset.v ?? cell.textContent)"))


def test_each_filter_acts_on_every_part(opened: Open) -> None:
    browser = opened()
    assert count_shown(browser, "tbody tr[data-k]") == 5
    choose(browser, "family", "win_attn_fwd")
    assert count_shown(browser, "tbody tr[data-k]") == 1
    assert count_shown(browser, ".search") == 1
    assert count_shown(browser, "#roofline .mark") == 1
    assert count_shown(browser, "#speedups .mark") == 0
    assert js(browser, "document.querySelector('output').textContent") == "1 of 5 winners shown"
    choose(browser, "family", "(whole attention)")
    choose(browser, "seq", "32k")
    assert count_shown(browser, "#speedups .mark") == 9
    assert count_shown(browser, "#winners .table") == 0 and count_shown(browser, "#searches .search") == 0
    for name, text, rows in (("gpu", HOSTILE, 1), ("dtype", "fp16", 1), ("policy", "eager-cold", 3)):
        js(browser, "document.querySelector('.filters button').click()")
        browser.execute_async_script("setTimeout(arguments[0], 20)")
        assert count_shown(browser, "tbody tr[data-k]") == 5
        choose(browser, name, text)
        assert count_shown(browser, "tbody tr[data-k]") == rows, name


def test_tables_sort_by_number_and_by_text(opened: Open) -> None:
    browser = opened()
    head = (
        "[...document.querySelectorAll('.table')[1].querySelectorAll('thead button')].find(b => b.textContent === '{}')"
    )
    times = [float(value) for value in column(browser, "Time", 1)]
    assert times != sorted(times) and len(times) == 4
    js(browser, head.format("Time") + ".click()")
    assert [float(value) for value in column(browser, "Time", 1)] == sorted(times)
    js(browser, head.format("Time") + ".click()")
    assert [float(value) for value in column(browser, "Time", 1)] == sorted(times, reverse=True)
    js(browser, head.format("Family") + ".click()")
    families = column(browser, "Family", 1)
    assert families == sorted(families)
    assert js(browser, "document.querySelectorAll('[aria-sort]').length") == 1


@pytest.mark.parametrize("size", [PHONE, DESK, (320, 700)], ids=str)
def test_nothing_is_wider_than_the_window(opened: Open, size: tuple[int, int]) -> None:
    browser = opened(size)
    assert js(browser, "innerWidth") == size[0]
    assert js(browser, "document.documentElement.scrollWidth") <= size[0]
    wide = "[...document.querySelectorAll('figure, .search, .filters, header, .table')]"
    assert js(browser, f"{wide}.filter(e => e.getBoundingClientRect().right > innerWidth).length") == 0


def test_a_phone_shows_every_cell_and_readable_labels(opened: Open) -> None:
    browser = opened(PHONE)
    cells = "[...document.querySelectorAll('.table tbody td, .table tbody th')].filter(e => e.getClientRects().length)"
    assert js(browser, f"{cells}.length") >= 5 * 12
    assert js(browser, f"{cells}.filter(e => e.getBoundingClientRect().right > innerWidth).length") == 0
    labels = "[...document.querySelectorAll('.plot text.tick')].map(e => e.getBoundingClientRect().height)"
    assert min(js(browser, labels)) >= 12  # px of a line


def test_the_evidence_fits_a_phone(opened: Open) -> None:
    browser = opened(PHONE)
    js(browser, "document.querySelector('.table tbody th button').click()")
    dialog = "document.querySelector('dialog[open]')"
    assert js(browser, f"{dialog}.scrollWidth <= {dialog}.clientWidth && {dialog}.scrollTop === 0")
    js(browser, f"{dialog}.querySelector('button').click()")
    assert js(browser, dialog) is None


def test_hostile_texts_do_nothing(opened: Open) -> None:
    browser = opened()
    assert browser.title == "nsa-autotune: tuning report"
    assert js(browser, "document.scripts.length") == 2
    assert js(browser, "document.querySelector('#winners summary').textContent") == HOSTILE
    js(browser, "document.querySelector('.table tbody th button').click()")
    assert HOSTILE in js(browser, "document.querySelector('dialog').textContent")
    assert js(browser, "document.querySelectorAll('dialog script').length") == 0


def test_marks_are_reached_by_keyboard_and_open_the_evidence(opened: Open) -> None:
    from selenium.webdriver.common.keys import Keys as Key

    browser = opened()
    marks = "[...document.querySelectorAll('#roofline svg.plot')].at(-1).querySelectorAll('.mark')"
    assert js(browser, f"[...{marks}].filter(m => m.tabIndex === 0).length") == 1
    js(browser, f"{marks}[0].focus()")
    first = js(browser, "document.getElementById('tip').textContent")
    browser.switch_to.active_element.send_keys(Key.ARROW_RIGHT)
    second = js(browser, "document.getElementById('tip').textContent")
    assert first != second and "TFLOP/s" in second and js(browser, f"document.activeElement === {marks}[1]")
    browser.switch_to.active_element.send_keys(Key.ENTER)
    text = js(browser, "document.querySelector('dialog[open]').textContent")
    assert FINGERPRINT["driver"] in text and "num_warps=8" in text and "tied" in text
    browser.switch_to.active_element.send_keys(Key.ESCAPE)
    assert js(browser, "document.querySelector('dialog[open]')") is None


def test_without_javascript_tables_and_figures_are_there(opened: Open) -> None:
    browser = opened(script=False)
    rows = browser.find_elements("css selector", "tbody tr[data-k]")
    assert len(rows) == 5 and all(row.is_displayed() for row in rows)
    assert not browser.find_element("css selector", ".filters").is_displayed()
    assert len(browser.find_elements("css selector", ".mark")) > 20


def test_an_empty_report_opens(opened: Open, tmp_path: Path) -> None:
    with TuningStore("sqlite://", import_shipped=False) as store:
        path = write_page(tmp_path, render_page(build_report(store)))
    assert "Nothing is here yet" in js(opened(path=path), "document.body.textContent")
