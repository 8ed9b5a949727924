"""Print the built site, all pages in the order of the book, as one PDF with its headings as bookmarks.

python -m tools.pdf

Expects the site in `_build/html` and Chromium; writes `_build/html/salnb.pdf`, linked from the front page.
"""

import functools
import http.server
import io
import shutil
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
FIRST = "book/index.html"
PLACE = '<span id="pdf"></span>'  # on the front page
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# a page as it looks: pictures loaded, solutions open, what was drawn kept, addresses whole; without the code
# that the page folds away above what it draws or reports
ARTICLE = """async () => {
  for (const code of document.querySelectorAll(".tag_hide-input details.hide")) code.remove();
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  const article = document.querySelector("article");
  for (const image of article.querySelectorAll("img")) {
    image.loading = "eager";
    image.src = image.src;
    image.removeAttribute("decoding");
  }
  for (const canvas of article.querySelectorAll("canvas")) {
    const image = document.createElement("img");
    image.src = canvas.toDataURL();
    image.style.width = "100%";
    canvas.replaceWith(image);
  }
  // the PDF would have an element of its structure for each token of a line of code, megabytes of them:
  // only comments, strings and keywords keep their colour
  const plain = '.highlight pre span:not([class^="c"], [class^="s"], [class^="k"])';
  for (const token of article.querySelectorAll(plain)) token.replaceWith(...token.childNodes);
  for (const input of article.querySelectorAll("input, script, button, a.headerlink")) input.remove();
  const next = document.querySelector("a.right-next");
  return [article.outerHTML, next && next.href];
}"""
_HEADINGS = """() => [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map(heading => {
  const words = heading.cloneNode(true);
  for (const twice of words.querySelectorAll(".katex-mathml")) twice.remove();
  return words.textContent.trim().replace(/\\s+/g, " ");
})"""
_STYLE = """<style>
  article { break-before: page; max-width: none; }
  details > summary { display: none; }
  figure, .cell_input, table { break-inside: avoid; }
  img { max-width: 100%; height: auto; }
</style>"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


def articles(page, address: str) -> list[str]:  # type: ignore[no-untyped-def]  # a playwright page
    """The HTML of every page of the book, in its order, from the first on."""
    found = []
    following: str | None = address
    while following:
        page.goto(following, wait_until="load")
        page.wait_for_function(
            "!document.querySelector('.math') || document.documentElement.dataset.formulas"
        )
        article, following = page.evaluate(ARTICLE)
        found.append(article)
    return found


def name_bookmarks(bookmarks, titles: list[str]) -> None:  # type: ignore[no-untyped-def]  # of pikepdf
    """Give the bookmarks the headings' words: the browser repeats some and joins lines without a space."""
    found = []
    waiting = [*reversed(bookmarks)]
    while waiting:
        found.append(waiting.pop())
        waiting += reversed(found[-1].children)
    if len(found) == len(titles):
        for bookmark, title in zip(found, titles, strict=True):
            bookmark.title = title
    else:
        print(f"{len(found)} bookmarks for {len(titles)} headings: they keep the browser's words")


def main() -> int:
    """Write the PDF; 1 if there is nothing to print it with."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None or not (HTML / FIRST).exists():
        print("make pdf needs the built site (make book) and Chromium: apt-get install chromium")
        return 1
    import pikepdf
    from playwright.sync_api import sync_playwright

    handler = functools.partial(_Quiet, directory=str(HTML))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        sync_playwright() as playwright,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(color_scheme="light")
        page.set_default_timeout(120_000)
        start = f"http://127.0.0.1:{server.server_port}/{FIRST}"
        whole = _STYLE + "".join(articles(page, start))
        page.goto(start, wait_until="load")
        page.evaluate("html => { document.body.innerHTML = html; }", whole)
        page.wait_for_function("[...document.images].every(image => image.complete)")
        headings = page.evaluate(_HEADINGS)
        printed = page.pdf(
            format="A4",
            margin={"top": "16mm", "bottom": "16mm", "left": "16mm", "right": "16mm"},
            outline=True,
            tagged=True,
        )
        chromium.close()
        server.shutdown()
    with pikepdf.open(io.BytesIO(printed)) as pdf:  # the browser writes its thousands of objects uncompressed
        with pdf.open_outline() as outline:
            name_bookmarks(outline.root, headings)
        pdf.save(HTML / "salnb.pdf", object_stream_mode=pikepdf.ObjectStreamMode.generate)
    front = HTML / FIRST
    link = '<a href="../salnb.pdf">The whole book as a PDF</a>'
    front.write_text(front.read_text(encoding="utf-8").replace(PLACE, link), encoding="utf-8")
    print(f"{HTML / 'salnb.pdf'}: {(HTML / 'salnb.pdf').stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
