"""The built site, as a reader meets it: in a real browser, without a network."""

import functools
import http.server
import shutil
import threading
from pathlib import Path

import pytest

HTML = Path(__file__).resolve().parents[2] / "_build" / "html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WCAG = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install it to test the pages"),
    pytest.mark.skipif(not (HTML / "index.html").exists(), reason="the site is not built: run `make book`"),
]

# the indices that Sphinx generates are not pages that anybody wrote
PAGES = sorted(
    str(path.relative_to(HTML)) for folder in ("book", "notebooks") for path in (HTML / folder).glob("*.html")
)
CHAPTERS = [page for page in PAGES if page.startswith("notebooks/")]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def site():
    handler = functools.partial(QuietHandler, directory=str(HTML))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page()
    page.set_default_timeout(20_000)
    yield page
    page.close()


def settled(page, url):
    """Open `url` and wait until its formulas are set."""
    page.goto(url, wait_until="load")
    page.wait_for_function(
        "!window.MathJax?.startup?.promise || window.MathJax.startup.promise.then(() => true)"
    )


@pytest.mark.parametrize("path", PAGES)
def test_page_is_whole(page, site, path):
    """No console error, no failed or foreign request, every image there and described, every formula set."""
    errors, requests = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.on("response", lambda answer: errors.append(answer.url) if answer.status >= 400 else None)
    settled(page, site + path)
    assert errors == []
    assert [url for url in requests if not url.startswith((site, "data:"))] == []
    broken = page.evaluate(
        "[...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt.trim()).map(i => i.src)"
    )
    assert broken == []
    formulas = page.evaluate("document.querySelectorAll('.math').length")
    assert page.evaluate("document.querySelectorAll('mjx-container').length") >= formulas
    assert page.evaluate("document.querySelectorAll('mjx-merror').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_page_is_accessible(browser, site, path, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(color_scheme=scheme)
    settled(page, site + path)
    violations = Axe().run(page, options=WCAG).response["violations"]
    page.close()
    serious = [
        (violation["id"], node["html"][:120], node.get("failureSummary", "")[:200])
        for violation in violations
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"][:3]
    ]
    assert serious == []


@pytest.mark.parametrize("path", PAGES)
def test_page_fits_a_phone(browser, site, path):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    settled(page, site + path)
    width = page.evaluate("document.documentElement.scrollWidth")
    size = page.evaluate("parseFloat(getComputedStyle(document.querySelector('article p')).fontSize)")
    page.close()
    assert width <= 390, "the page scrolls sideways"
    assert size >= 14


@pytest.mark.parametrize("path", CHAPTERS)
def test_chapter_opens_on_colab(page, site, path):
    settled(page, site + path)
    links = page.eval_on_selector_all("a[href*='colab']", "links => links.map(link => link.href)")
    notebook = path.removesuffix(".html") + ".ipynb"
    assert links == [f"https://colab.research.google.com/github/salnb/salnb/blob/main/{notebook}"]


@pytest.mark.parametrize("path", CHAPTERS)
def test_folded_cells_open(page, site, path):
    settled(page, site + path)
    folded = page.locator("details.hide:not([open])")
    assert folded.count() >= 1
    folded.first.locator("summary").click()
    assert page.locator("details.hide[open] .highlight").first.is_visible()


def test_search_finds_grad_cam(page, site):
    settled(page, site + "book/index.html")
    page.keyboard.press("Control+k")
    page.locator(
        ".search-button__search-container input[type=search], #pst-search-dialog input[type=search]"
    ).first.fill("Grad-CAM")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results a")
    found = page.eval_on_selector_all("#search-results a", "links => links.map(link => link.href)")
    assert any("04-grad-cam" in link for link in found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_color_schemes_differ_and_pictures_stay_readable(browser, site, scheme):
    """Text contrast is axe's job above; here: the scheme is obeyed."""
    page = browser.new_page(color_scheme=scheme)
    settled(page, site + "book/index.html")
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()
    red, green, blue = (int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(",")[:3])
    assert (red + green + blue > 600) == (scheme == "light")
