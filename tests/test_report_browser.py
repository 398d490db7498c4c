"""Both pages in a real browser: accessible, readable on a phone and by keyboard, alone (`make test-browser`).

Pictures of them are left in dist/.
"""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Experiment
from reports import Figures, comparison_page

pytest.importorskip("selenium", reason="`make test-browser` installs selenium")
pytest.importorskip("axe_core_python", reason="`make test-browser` installs axe-core")

import axe_core_python
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.action_chains import ActionChains

pytestmark = pytest.mark.browser
AXE = Path(axe_core_python.__file__).parent / "axe.min.js"
SIZES = [390, 1440]
PAGES = ["report", "of one seed", "comparison"]
SCHEMES = ["light", "dark"]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory, evaluated: Experiment) -> dict[str, str]:
    """Addresses of pages: a report with everything on it (three seeds, a record, a baseline, an illegal evaluator), one
    as the laptop default makes it, and a comparison with everything on it."""
    folder = tmp_path_factory.mktemp("pages")
    full, plain = (Figures(folder / name, evaluated) for name in ("full", "plain"))
    full.add_seeds({42: 0.002, 2025: -0.001})
    full.params["report"] = {"record": "r1150", "baseline": "r549"}
    found = {}
    for name, html in zip(PAGES, (full.page(), plain.page(), comparison_page()), strict=True):
        path = folder / f"{name.replace(' ', '-')}.html"
        path.write_text(html)
        found[name] = path.as_uri()
    return found


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest, addresses: dict[str, str]) -> str:
    """The address of each page in turn."""
    return addresses[request.param]


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    """A headless Chromium that cannot reach any network."""
    options = ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--proxy-server=127.0.0.1:9"):
        options.add_argument(argument)
    driver = Chrome(options=options, service=ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def _show(chrome: Chrome, page: str, width: int, scheme: str) -> None:
    """Load the page anew on a screen of that width and colour scheme."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    chrome.get(page)


def _open_everything(chrome: Chrome) -> None:
    chrome.execute_script("document.querySelectorAll('details').forEach(details => details.open = true)")


def _picture(chrome: Chrome, name: str) -> None:
    width, height = chrome.execute_script("const e = document.documentElement; return [e.scrollWidth, e.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    taken = chrome.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path = REPOSITORY / f"dist/{name}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(base64.b64decode(taken["data"]))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", SIZES)
def test_axe_finds_nothing_serious(chrome: Chrome, page: str, width: int, scheme: str) -> None:
    """WCAG 2.1 A and AA and best practices, contrast included, with every fold open."""
    _show(chrome, page, width, scheme)
    _picture(chrome, f"{Path(page).stem}-{width}-{scheme}")
    _open_everything(chrome)
    chrome.execute_script(AXE.read_text(encoding="utf-8"))
    found = chrome.execute_async_script("axe.run().then(arguments[0])")
    judged = {rule["id"] for rule in found["passes"]}
    assert "color-contrast" in judged
    # The comparison has no table that is longer than its region.
    assert "scrollable-region-focusable" in judged or "comparison" in page
    assert [_fault(fault) for fault in found["violations"]] == []
    # Inside a drawing axe sees no background: the ticks have the colours of the notes around them.
    unjudged = [node["html"] for rule in found["incomplete"] for node in rule["nodes"]]
    assert all(html.startswith('<text class="tick"') for html in unjudged), unjudged


def _fault(fault: dict[str, Any]) -> str:
    return f"{fault['impact']}: {fault['id']}: {fault['nodes'][0]['html'][:120]}"


@pytest.mark.parametrize("width", [320, *SIZES])
def test_the_page_never_scrolls_sideways(chrome: Chrome, page: str, width: int) -> None:
    _show(chrome, page, width, "light")
    _open_everything(chrome)
    assert chrome.execute_script("return document.documentElement.scrollWidth") <= width


# The numbers that can be seen of the tables beside the charts: where a cell ends beyond the edge of its region.
CUT_OFF = """
return [...document.querySelectorAll('.scroll:not(.tall)')].flatMap(region => {
  const edge = region.getBoundingClientRect().right + 0.5
  return [...region.querySelectorAll('td, th')].filter(cell => cell.getBoundingClientRect().right > edge)
    .map(cell => region.getAttribute('aria-label') + ': ' + cell.innerText)
})
"""


@pytest.mark.parametrize("width", [360, *SIZES])
def test_no_number_of_a_table_is_cut_off(chrome: Chrome, page: str, width: int) -> None:
    _show(chrome, page, width, "light")
    _open_everything(chrome)
    assert chrome.execute_script(CUT_OFF) == []


def test_nothing_is_fetched(chrome: Chrome, page: str) -> None:
    _show(chrome, page, 1280, "light")
    assert chrome.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_colour_scheme_is_the_readers(chrome: Chrome, page: str) -> None:
    backgrounds = []
    for scheme in SCHEMES:
        _show(chrome, page, 1280, scheme)
        colour = chrome.execute_script("return getComputedStyle(document.body).backgroundColor")
        backgrounds.append(sum(int(part) for part in re.findall(r"\d+", colour)))
    light, dark = backgrounds
    assert dark < 100 < 650 < light


def test_a_keyboard_reaches_all_there_is_to_reach(chrome: Chrome, page: str) -> None:
    _show(chrome, page, 1280, "light")
    wanted = chrome.execute_script("return document.querySelectorAll('a, summary, [tabindex=\"0\"]').length")
    closed = "'details:not([open]) [tabindex=\"0\"], details:not([open]) details summary'"
    hidden = chrome.execute_script(f"return document.querySelectorAll({closed}).length")
    reached = set()
    for _ in range(wanted - hidden):
        _press(chrome, Keys.TAB)
        place, outline = chrome.execute_script(
            "const e = document.activeElement;"
            "return [[...document.querySelectorAll('*')].indexOf(e), getComputedStyle(e).outlineStyle]"
        )
        assert outline == "solid"
        reached.add(place)
    assert len(reached) == wanted - hidden


def test_the_first_stop_skips_to_the_content(chrome: Chrome, page: str) -> None:
    _show(chrome, page, 360, "light")
    _press(chrome, Keys.TAB)
    link = chrome.switch_to.active_element
    assert link.text.startswith("Skip to the ")
    assert link.rect["x"] >= 0
    _press(chrome, Keys.ENTER)
    assert chrome.switch_to.active_element.get_attribute("id") == "main"


def test_a_fold_opens_by_keyboard(chrome: Chrome, page: str) -> None:
    _show(chrome, page, 1280, "light")
    chrome.execute_script("document.querySelector('.chart summary').focus()")
    _press(chrome, Keys.ENTER)
    assert chrome.execute_script("return document.querySelector('.chart details').open")


def _press(chrome: Chrome, key: str) -> None:
    ActionChains(chrome).send_keys(key).perform()
