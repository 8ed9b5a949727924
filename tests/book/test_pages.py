"""The built site, as a reader meets it: in a real browser, without a network."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.sites import CompressingHandler, served
from tools.pdf import ARTICLE

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
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

ALL_IMAGES = """() => Promise.all([...document.images].map(image => {
  image.loading = 'eager';
  return image.complete || new Promise(done => { image.onload = image.onerror = done; });
}))"""
CUT_OFF = """() => [...document.querySelectorAll('article table, article pre, article div.math')]
  .filter(part => part.offsetParent)
  .map(part => part.closest('.pst-scrollable-table-container') || part)
  .filter(part => part.scrollWidth > part.clientWidth + 1
    || part.getBoundingClientRect().right > innerWidth + 1)
  .map(part => [part.tagName, part.scrollWidth, part.clientWidth, part.innerText.slice(0, 60)])"""
# words, numbers and names of tables that stand on more than one line; a hyphen may end a line
PARTED_WORDS = r"""() => [...document.querySelectorAll('article :is(td, th)')]
  .filter(cell => cell.offsetParent)
  .flatMap(cell => {
    const parted = [], nodes = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (nodes.nextNode()) {
      if (nodes.currentNode.parentElement.closest('.katex')) continue;
      for (const word of nodes.currentNode.data.matchAll(/(?<!\S)[-–+]\d[\d.,]*|[^\s\-–—]+/g)) {
        const text = document.createRange();
        text.setStart(nodes.currentNode, word.index);
        text.setEnd(nodes.currentNode, word.index + word[0].length);
        const tops = [...text.getClientRects()].filter(line => line.width > 1).map(line => line.top);
        if (Math.max(...tops) - Math.min(...tops) > 6) parted.push(word[0]);
      }
    }
    return parted;
  })"""

# of each stacked table: what stands before its cells, and the room that the longest word there leaves
STACKED = r"""() => [...document.querySelectorAll('table.stacked')].map(table => {
  const rows = [...table.tBodies[0].rows], pen = document.createElement('canvas').getContext('2d');
  const before = cell => getComputedStyle(cell, '::before');
  const left = cell => {
    pen.font = before(cell).font;
    const words = cell.dataset.label.split(' ').map(word => pen.measureText(word).width);
    return parseFloat(before(cell).width) - Math.max(...words);
  };
  return {
    display: getComputedStyle(table).display,
    names: [...table.tHead.rows[0].cells].map(cell => cell.textContent.trim().replace(/\s+/g, ' ')),
    shown: rows.map(row => [...row.cells].slice(1).map(cell => before(cell).content.replace(/^"|"$/g, ''))),
    beside: rows.flatMap(row => [...row.cells].slice(1).map(left)),
    roles: [table, ...table.querySelectorAll('thead, tbody, tr, th, td')].map(part => part.getAttribute('role')),
  };
})"""

TOO_SMALL = """() => [...document.querySelectorAll('.cell_output pre')]
  .filter(output => output.offsetParent && parseFloat(getComputedStyle(output).fontSize) < 5.5)
  .map(output => output.innerText.slice(0, 60))"""

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install it to test the pages"),
    pytest.mark.skipif(not (HTML / "index.html").exists(), reason="the site is not built: run `make book`"),
]

# old addresses, which lead on to others
REDIRECTS = sorted(
    str(path.relative_to(ROOT / "book/redirects")) for path in (ROOT / "book/redirects").rglob("*.html")
)
# the indices that Sphinx generates are not pages that anybody wrote
PAGES = sorted(
    {
        str(path.relative_to(HTML))
        for folder in ("book", "notebooks")
        for path in (HTML / folder).rglob("*.html")
    }
    - {*REDIRECTS}
)
CHAPTERS = [page for page in PAGES if page.startswith("notebooks/")]


@pytest.fixture(scope="module")
def site():
    with served(HTML) as address:
        yield address


@pytest.fixture(scope="module")
def compressed_site():
    with served(HTML, CompressingHandler) as address:
        yield address


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
    page.wait_for_function("!document.querySelector('.math') || document.documentElement.dataset.formulas")


@pytest.mark.parametrize("path", PAGES)
def test_page_is_whole(page, site, path):
    """No console error, no failed or foreign request, every image there and described, every formula set."""
    errors, requests = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.on("response", lambda answer: errors.append(answer.url) if answer.status >= 400 else None)
    settled(page, site + path)
    page.evaluate(ALL_IMAGES)
    assert errors == []
    assert [url for url in requests if not url.startswith((site, "data:"))] == []
    broken = page.evaluate(
        "[...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt.trim()).map(i => i.src)"
    )
    assert broken == []
    formulas = page.evaluate("document.querySelectorAll('.math').length")
    assert page.evaluate("document.querySelectorAll('.math .katex').length") >= formulas
    assert page.evaluate("document.querySelectorAll('.katex-error').length") == 0


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
    size = page.evaluate(
        "parseFloat(getComputedStyle(document.querySelector('article section > p, article dd > p')).fontSize)"
    )
    page.close()
    assert width <= 390, "the page scrolls sideways"
    assert size >= 14


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("path", PAGES)
def test_nothing_is_cut_off(browser, site, path, width):
    """No column of a table, no line of code, nothing printed and no formula, folds included.

    No number and no word of a table is parted; what shrinks to fit can still be read.
    """
    page = browser.new_page(viewport={"width": width, "height": 900})
    settled(page, site + path)
    page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    cut, parted, small = (page.evaluate(what) for what in (CUT_OFF, PARTED_WORDS, TOO_SMALL))
    page.close()
    assert (cut, parted, small) == ([], [], [])


@pytest.mark.parametrize("path", [page for page in PAGES if "<table" in (HTML / page).read_text()])
def test_tables_fit_on_a4(browser, site, path):
    """Between the margins of a printed page, and no word is parted."""
    page = browser.new_page(viewport={"width": 673, "height": 950})
    page.emulate_media(media="print")
    settled(page, site + path)
    ends = page.evaluate(
        "[...document.querySelectorAll('article table')].map(table => table.getBoundingClientRect().right)"
    )
    parted = page.evaluate(PARTED_WORDS)
    page.close()
    assert max(ends) <= 673
    assert parted == []


@pytest.mark.parametrize("path", [page for page in PAGES if "tag_hide-cell" in (HTML / page).read_text()])
def test_the_pdf_has_solutions_and_no_code_that_is_folded_away(browser, site, path):
    page = browser.new_page()
    settled(page, site + path)
    folds = "[...document.querySelectorAll('details.hide > summary')].map(fold => fold.textContent.trim())"
    before = page.evaluate(folds)
    page.evaluate(ARTICLE)
    after = page.evaluate(folds)
    page.close()
    assert after
    assert after == [fold for fold in before if fold.startswith("Solution")] != before


@pytest.mark.parametrize("path", [page for page in PAGES if ' stacked"' in (HTML / page).read_text()])
def test_wide_tables_are_stacked_on_a_phone_only(browser, site, path):
    """There each cell shows the name of its column, without a script too; on a desk and on paper nothing changes."""
    for width, media, scripts in ((390, "screen", False), (1280, "screen", True), (390, "print", True)):
        context = browser.new_context(viewport={"width": width, "height": 844}, java_script_enabled=scripts)
        page = context.new_page()
        page.emulate_media(media=media)
        page.goto(site + path)
        for table in page.evaluate(STACKED):
            if (width, media) == (390, "screen"):
                assert table["display"] == "block"
                assert table["shown"] == [table["names"][1:]] * len(table["shown"])
                assert min(table["beside"]) >= 0, "a name lies on its cell"
            else:
                assert table["display"] == "table"
                assert {label for row in table["shown"] for label in row} == {"none"}
            roles = {"table", "rowgroup", "row", "columnheader", "rowheader", "cell"}
            assert {*table["roles"]} == roles, "told to screen readers whatever the style"
        context.close()


@pytest.mark.parametrize("path", [page for page in PAGES if "tag_full-width" in (HTML / page).read_text()])
def test_figures_of_many_panels_are_wide(browser, site, path):
    for window, at_least in ((1280, 800), (1024, 600)):
        page = browser.new_page(viewport={"width": window, "height": 900})
        settled(page, site + path)
        page.evaluate(ALL_IMAGES)
        pictures = page.evaluate(
            "[...document.querySelectorAll('div.cell.tag_full-width img')].map(i => i.getBoundingClientRect().width)"
        )
        needed = page.evaluate("document.documentElement.scrollWidth")
        page.close()
        assert pictures
        assert min(pictures) > at_least
        assert needed <= window, "the page scrolls sideways"


@pytest.mark.parametrize("path", PAGES)
def test_page_is_light(page, site, path):
    """At most 2.5 MB with all that it loads, uncompressed; and no script that the text waits for."""
    sizes = []
    page.on("response", lambda answer: sizes.append(int(answer.headers.get("content-length", 0))))
    settled(page, site + path)
    page.evaluate(ALL_IMAGES)
    assert sum(sizes) <= 2.5e6
    waiting = page.eval_on_selector_all(
        "head script[src]", "all => all.filter(s => !s.defer && !s.async).map(s => s.src)"
    )
    assert waiting == []


@pytest.mark.parametrize("path", PAGES)
def test_page_can_soon_be_read(page, compressed_site, path):
    """What its text waits for is there within 1.5 s on a connection as slow as the browser's "Fast 3G".

    Then only the layout is left, whose time depends on what else the machine does.
    """
    slow = {"latency": 150, "downloadThroughput": 1.6e6 / 8, "uploadThroughput": 750e3 / 8}
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    session.send("Network.emulateNetworkConditions", {"offline": False, **slow})
    page.goto(compressed_site + path, wait_until="load")
    ends = page.evaluate(
        "performance.getEntriesByType('resource').filter(e => e.renderBlockingStatus === 'blocking')"
        ".map(e => e.responseEnd)"
    )
    assert ends
    assert max(ends) <= 1500


@pytest.mark.parametrize("path", PAGES)
def test_links_within_the_site_lead_somewhere(page, site, path):
    """To a page that is there, and to a place on it where one is named."""
    settled(page, site + path)
    for link in set(page.eval_on_selector_all("article a[href]", "links => links.map(a => a.href)")):
        address, _, place = link.partition("#")
        if not address.startswith(site):
            continue
        target = HTML / address.removeprefix(site)
        assert target.exists(), link
        if place and target.suffix == ".html":
            assert f'id="{place}"' in target.read_text(encoding="utf-8"), link


@pytest.mark.parametrize("path", PAGES)
def test_page_has_a_preview(page, site, path):
    """What other sites show of a link: title, description, and a picture that is there."""
    page.goto(site + path)
    found = dict(
        page.eval_on_selector_all(
            "meta[property^='og:']", "all => all.map(m => [m.attributes[0].value, m.content])"
        )
    )
    assert all(found[f"og:{name}"].strip() for name in ("title", "description", "image:alt"))
    assert found["og:url"].endswith("/" + path)
    assert (HTML / "_static" / found["og:image"].rpartition("/_static/")[2]).exists()


@pytest.mark.parametrize("path", REDIRECTS)
def test_an_old_address_leads_to_a_page(page, site, path):
    page.goto(site + path)
    page.wait_for_url(lambda url: not url.endswith(path))
    assert page.url.removeprefix(site) in PAGES


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_digit_turns_by_keyboard(browser, site, scheme):
    """Picture, maps and loss answer together, in both color schemes, and the data are under 1 MB."""
    page = browser.new_page(color_scheme=scheme)
    settled(page, site + "notebooks/11-saliency-strategy.html")
    state = """() => [...document.querySelectorAll('.turn canvas')].map(c => c.toDataURL())"""
    loss = page.locator(".turn output.loss")
    before, first = page.evaluate(state), loss.inner_text()
    page.locator(".turn input.angle").focus()
    page.keyboard.press("ArrowRight")
    turned = page.evaluate(state)
    assert all(old != new for old, new in zip(before, turned, strict=True))
    assert loss.inner_text() != first
    page.locator(".turn input.gamma").focus()
    page.keyboard.press("End")
    weighted = page.evaluate(state)
    assert weighted[0] == turned[0], "the picture does not depend on the weight"
    assert all(old != new for old, new in zip(turned[1:], weighted[1:], strict=True))
    page.locator(".turn input.angle").focus()
    page.keyboard.press("Home")
    assert page.locator(".turn input.angle + output").inner_text() == "-60 degrees"
    size = page.evaluate("document.querySelector('.turn').parentElement.innerHTML.length")
    page.close()
    assert size < 1e6


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
