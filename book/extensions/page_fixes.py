"""Mends two defects that the packages which build the pages put on each of them."""

from typing import Any

from sphinx.application import Sphinx


def mend(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Drop the scripts of an unused live-code extension, and give bibliography entries roles that fit."""
    # declared twice, its `const` is a JavaScript error on every page; and nothing here uses it
    context["script_files"] = [file for file in context.get("script_files", []) if not _is_thebe(file)]
    if "body" in context:
        # an ARIA list may hold list items only, which is what screen readers then announce
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def _is_thebe(file: Any) -> bool:
    body = getattr(file, "attributes", {}).get("body") or ""
    return "THEBE_JS_URL" in body or "sphinx-thebe.js" in str(getattr(file, "filename", ""))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx, after the extensions whose output is mended."""
    app.connect("html-page-context", mend, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
