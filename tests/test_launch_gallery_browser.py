"""The page of `gallery` in headless Chromium: pictures, slider, classes, curves, widths, colours; skipped without one.

One browser for all tests. It is the system's (Debian: `apt install chromium chromium-driver`), driven by Selenium.
"""

import os
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from launch.__main__ import main
from tests.gallery_runs import CLASSES, whole_directory

WIDTHS, THEMES = (1280, 390), ("light", "dark")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 60.0  # seconds, on a machine that does much else; what is waited for comes at once

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no chromium and chromedriver here (Debian: apt install chromium chromium-driver)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER, env=os.environ | {"SE_OFFLINE": "true"}))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory) -> str:
    """The page's address; it was opened once, wide and light, and the log of that is left to be read."""
    directory = whole_directory(tmp_path_factory.mktemp("gallery") / "work")
    assert main(["gallery", str(directory)]) == 0
    show(browser, address := f"file://{directory}/gallery.html", 1280, "light")
    return address


def show(browser, address: str | None, width: int, theme: str) -> None:
    """Set width and theme, and open an address: the page then tells of no error, and has drawn its curves."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    # Without motion: what scrolls smoothly is clicked at where it no longer is.
    media = [{"name": "prefers-color-scheme", "value": theme}, {"name": "prefers-reduced-motion", "value": "reduce"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    if address is not None:
        browser.get(address)
    wait(browser, "return document.querySelectorAll('.plot .main-svg').length >= 3")


def wait(browser, script: str):
    return WebDriverWait(browser, PATIENCE, 0.05).until(lambda driver: driver.execute_script(script))


def shown(browser, start: str) -> list[str]:
    """The texts that begin so of the pictures to be seen."""
    images = f"""[...document.querySelectorAll("img[alt^='{start}']")]"""
    return browser.execute_script(f"return {images}.filter(i => i.checkVisibility()).map(i => i.alt)")


def test_it_opens_without_an_error_and_all_pictures_load(browser, page):
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    found = browser.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth, i.alt])")
    assert len(found) == 2 * 3 + 2 * 24 + 1 and all(complete and width > 0 and alt for complete, width, alt in found)
    assert browser.title == "work · gallery"  # no text of a run was run
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    buttons = browser.execute_script("return [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert len(buttons) == 3 * 4 and not [title for title in buttons if "hare" in title or "loud" in title]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_screen(browser, page, width, theme):
    show(browser, None, width, theme)
    wait(browser, "return [...document.querySelectorAll('.plot .main-svg')].every(s => s.clientWidth <= innerWidth)")
    assert browser.execute_script("return innerWidth") == width
    wide = browser.execute_script("""
        const outside = element => element.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
        const scrolled = element => element.closest('.scroll, nav, .skip, .plot');
        return [...document.body.querySelectorAll('*')].filter(e => e.offsetParent && outside(e) && !scrolled(e))
            .map(e => e.outerHTML.slice(0, 200))""")
    assert wide == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    beside = browser.execute_script("""
        return [...document.querySelectorAll('.beside > div')]
            .map(e => [e.textContent.length, e.getBoundingClientRect()]).map(([n, box]) => [n, box.left, box.right])""")
    assert beside and all(length > 20 and 0 <= left < right <= width for length, left, right in beside)
    if width == max(WIDTHS):
        cut = "[...document.querySelectorAll('#evaluation .scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert browser.execute_script(f"return {cut}") == 0


def contrast(first: str, second: str) -> float:
    """Of two colours as CSS computes them, by WCAG 2.2's relative luminance."""

    def luminance(colour: str) -> float:
        channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_text_and_curves_stand_out_in_both_themes(browser, page, theme):
    """4.5 for text and 3 for lines, as WCAG 2.2 asks (1.4.3, 1.4.11)."""
    show(browser, None, 1280, theme)
    colours = browser.execute_script("""
        const of = (selector, key) => getComputedStyle(document.querySelector(selector))[key];
        return {paper: of('body', 'backgroundColor'), card: of('.card', 'backgroundColor'), ink: of('body', 'color'),
                muted: of('.muted', 'color'), link: of('nav a', 'color'), one: of('.key-0', 'backgroundColor'),
                two: of('.key-1', 'backgroundColor')}""")
    dark = contrast(colours["paper"], "rgb(0, 0, 0)") < 4
    assert dark == (theme == "dark")
    for ground in ("paper", "card"):
        assert all(contrast(colours[each], colours[ground]) >= 4.5 for each in ("ink", "muted", "link"))
        assert all(contrast(colours[each], colours[ground]) >= 3 for each in ("one", "two"))
    drawn = "return document.querySelector('#plot-loss .js-line').style.stroke"
    wait(browser, f"{drawn[:-1]}e === '{colours['one']}'")


def test_the_button_chooses_a_theme_against_the_system(browser, page):
    show(browser, None, 1280, "light")
    button, seen = browser.find_element(By.ID, "theme"), []
    for _ in range(3):
        button.click()
        seen.append((button.text, contrast(button.value_of_css_property("color"), "rgba(0, 0, 0, 1)") > 10))
    assert seen == [("Theme: light", False), ("Theme: dark", True), ("Theme: auto", False)]


def test_the_slider_moves_through_the_steps_by_keys_and_buttons(browser, page):
    slider = browser.find_element(By.ID, "training-1")
    assert browser.find_element(By.CSS_SELECTOR, "label[for=training-1]").text == "Step"
    at_the_end = ["previews of first at step 600", "previews of second at step 600"]
    assert shown(browser, "previews of") == at_the_end and slider.get_attribute("aria-valuetext") == "600"
    slider.send_keys(Keys.ARROW_LEFT)
    assert shown(browser, "previews of") == [text.replace("600", "300") for text in at_the_end]
    assert slider.get_attribute("aria-valuetext") == "300"
    slider.send_keys(Keys.HOME)
    assert shown(browser, "previews of") == [text.replace("600", "100") for text in at_the_end]
    browser.find_element(By.CSS_SELECTOR, ".viewer:has(#training-1) [data-move='1']").click()
    assert shown(browser, "previews of") == [text.replace("600", "300") for text in at_the_end]


def test_sets_and_classes_of_samples_are_chosen(browser, page):
    assert len(shown(browser, "sample ")) == 24
    slider = browser.find_element(By.ID, "sample-sets")
    assert slider.get_attribute("aria-valuetext") == "samples_later, step 600"
    slider.send_keys(Keys.ARROW_LEFT)
    assert slider.get_attribute("aria-valuetext") == "samples, step 300"
    Select(browser.find_element(By.CLASS_NAME, "classes")).select_by_visible_text(f"class 1: {CLASSES[1]}")
    assert shown(browser, "sample ") == [f"sample {i} of class 1: {CLASSES[1]}" for i in range(1, 25, 3)]
    slider.send_keys(Keys.ARROW_RIGHT)
    assert len(shown(browser, "sample ")) == 8
    Select(browser.find_element(By.CLASS_NAME, "classes")).select_by_value("")
    assert len(shown(browser, "sample ")) == 24


def test_curves_tell_their_values_under_the_pointer(browser, page):
    show(browser, None, 1280, "light")
    plot = browser.find_element(By.CSS_SELECTOR, "#plot-loss .nsewdrag")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    ActionChains(browser).move_to_element(plot).perform()
    text = wait(browser, "return document.querySelector('#plot-loss .hoverlayer')?.textContent")
    assert "first" in text and "second" in text and "1." in text


def test_another_value_and_another_axis_are_drawn(browser, page):
    show(browser, None, 1280, "light")
    Select(browser.find_element(By.CSS_SELECTOR, "[data-values=speed]")).select_by_visible_text("mfu")
    wait(browser, "return document.querySelector('#plot-speed .ytitle').textContent === 'share'")
    Select(browser.find_element(By.ID, "over")).select_by_value("h")
    wait(browser, "return document.querySelector('#plot-loss .xtitle').textContent === 'minutes of training'")
    logarithmic = browser.find_element(By.CSS_SELECTOR, "[data-log=loss]")
    for kind in ("log", "linear"):
        browser.execute_script("arguments[0].click()", logarithmic)
        assert browser.execute_script("return document.getElementById('plot-loss').layout.yaxis.type") == kind
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
