"""Mends what the packages which build the pages put on each of them: defects, and weight."""

import html
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sphinx.application import Sphinx

_ICON = re.compile(r'class="[^"]*\b(?P<style>fa-solid|fas|fa-brands|fab) (?P<name>fa-[a-z-]+)')
_IMAGE = re.compile(r'<img (?P<rest>[^>]*src="(?P<file>[^"]*_images/[^"]+)"[^>]*>)')
# Sphinx links pictures of a given width, and their link would hold the other
_LINKED = re.compile(r'<a class="reference internal image-reference"[^>]*>\s*(<img [^>]*>)\s*</a>')
_OUTPUT = re.compile(
    r'(<div class="output [^"]*highlight[^"]*")(>\s*<div class="highlight">\s*<pre>(.*?)</pre>)', re.DOTALL
)
_TAG = re.compile(r"<[^>]+>")
# characters of a line: what fills a phone at a good size, and what may still shrink to fit one
_NARROWEST, _WIDEST_TABLE = 56, 92
_SCRIPT = re.compile(r'<script (?P<head>[^>]*)src="(?P<file>[^"?]+)[^>]*></script>')
# the text waits for styles: for none of extensions that are not used, and for no script on the same line
_THEBE_STYLE = re.compile(r"<link [^>]*sphinx-thebe\.css[^>]*>\s*")
_DESIGN_STYLE = re.compile(r"<link [^>]*sphinx-design\.min\.css[^>]*>\s*")
_EARLY_SCRIPT = re.compile(r'<link rel="preload" as="script"[^>]*>\s*')
_GLYPH = re.compile(r"(?:\.fa-[a-z0-9-]+::?before,?)+\{content:[^{}]*\}")  # of the icons' font
_UNFOLD = '<summary><span class="toctree-toggle"'
_NEWEST = r"version = \"main\""  # in the set-up cell, as JSON
_OPTIONS = "documentation_options.js"  # what the other scripts are told; a few lines
_OF_SEARCH = ("searchtools.js", "language_data.js", "searchindex.js")


def mend(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Drop an unused extension's scripts, give bibliography entries roles that fit, let pictures open."""
    # declared twice, its `const` is a JavaScript error on every page; and nothing here uses it
    context["script_files"] = [file for file in context.get("script_files", []) if not _is_thebe(file)]
    if "body" in context:
        # an ARIA list may hold list items only, which is what screen readers then announce
        body = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')
        body = _LINKED.sub(r"\1", body)
        body = _IMAGE.sub(r'<a class="enlarge" href="\g<file>"><img loading="lazy" \g<rest></a>', body)
        context["body"] = _OUTPUT.sub(_with_width, body)


def _with_width(found: re.Match[str]) -> str:
    """What is printed says how many characters wide it is, so that the style can make it fit.

    Lines that are longer than any table wrap instead: to fit a phone, they would be too small to read.
    """
    widths = map(len, html.unescape(_TAG.sub("", found[3])).splitlines())
    width = max((width for width in widths if width <= _WIDEST_TABLE), default=0)
    return f'{found[1]} style="--characters: {max(width, _NARROWEST)}"{found[2]}'


def _is_thebe(file: Any) -> bool:
    body = getattr(file, "attributes", {}).get("body") or ""
    return "THEBE_JS_URL" in body or "sphinx-thebe.js" in str(getattr(file, "filename", ""))


def lighten(app: Sphinx, failed: Exception | None) -> None:
    """Leave on each page only what it needs, and let no script keep its text waiting.

    The theme brings a library of all icons, 1.5 MB of script, of which the pages show a dozen, and a rule of
    style for each of them; and the index of the search, which only the page of its results reads.
    """
    if failed or app.builder.format != "html":
        return
    folder = Path(app.outdir)
    drawings = (folder / "_static/scripts/fontawesome.js").read_text(encoding="utf-8")
    options = (folder / "_static" / _OPTIONS).read_text(encoding="utf-8")
    used = set()
    for path in folder.rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        used |= {found["name"] for found in _ICON.finditer(page)}
        searching = path.name == "search.html"
        page = _SCRIPT.sub(lambda found, s=searching: _script(found, options, s), page)
        page = _EARLY_SCRIPT.sub("", _THEBE_STYLE.sub("", page))
        if 'class="sd-' not in page:
            page = _DESIGN_STYLE.sub("", page)
        # what unfolds a part of the list of pages has no name otherwise
        page = page.replace(_UNFOLD, _UNFOLD.replace(">", ' aria-label="show the pages of this part">', 1))
        path.write_text(page, encoding="utf-8")
    with (folder / "_static/salnb.css").open("a", encoding="utf-8") as style:
        style.write("\n".join(_rule(name, drawings) for name in sorted(used)) + "\n")
    theme = folder / "_static/styles/pydata-sphinx-theme.css"
    theme.write_text(_GLYPH.sub("", theme.read_text(encoding="utf-8")), encoding="utf-8")
    for file in (folder / "_static/scripts").glob("fontawesome.js*"):
        file.unlink()


def pin(app: Sphinx, failed: Exception | None) -> None:
    """Let a downloaded notebook install the version of the package that its page was built from."""
    git = ["git", "-C", app.srcdir, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    if failed or app.builder.format != "html" or not commit:
        return
    for path in (Path(app.outdir) / "_sources" / "notebooks").glob("*.ipynb"):
        notebook = path.read_text(encoding="utf-8")
        path.write_text(notebook.replace(_NEWEST, _NEWEST.replace("main", commit)), encoding="utf-8")


def _script(found: re.Match[str], options: str, searching: bool) -> str:
    name = found["file"].rsplit("/", 1)[-1]
    if name == "fontawesome.js" or (name in _OF_SEARCH and not searching):
        return ""
    if name == _OPTIONS:
        return f"<script>{options}</script>"
    if searching or "defer" in found[0]:
        return found[0]
    return found[0].replace("<script ", "<script defer ")


def _rule(name: str, drawings: str) -> str:
    drawing = rf'"?{name.removeprefix("fa-")}"?:\[(\d+),(\d+),\[[^\]]*\],"\w+","([^"]+)"'
    # regular icons come first, solid ones last
    width, height, path = re.findall(rf"[{{,]{drawing}", drawings)[-1]
    svg = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}'><path d='{path}'/></svg>"
    return f'.{name} {{ --icon: url("data:image/svg+xml,{quote(svg)}"); }}'


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx, after the extensions whose output is mended."""
    app.connect("html-page-context", mend, priority=900)
    app.connect("build-finished", lighten)
    app.connect("build-finished", pin)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
