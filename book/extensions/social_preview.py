"""What other sites show of a page that is linked there: title, first sentences, the picture of the idea."""

from html import escape
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

PICTURE = "_static/idea.jpeg"
_ALT = "A bird and its saliency map, the turned picture and its map, and the difference of the two maps."
_LONGEST = 200  # letters of a description, of which most sites show no more


def describe(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Add the Open Graph properties of a page that somebody wrote."""
    if doctree is None:
        return
    text = " ".join(next((p.astext() for p in doctree.findall(nodes.paragraph)), "").split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rpartition(" ")[0] + " …"
    base = app.config.html_baseurl
    properties = {
        "og:type": "article",
        "og:site_name": app.config.project,
        "og:title": app.env.titles[page].astext(),
        "og:description": text,
        "og:url": base + app.builder.get_target_uri(page),
        "og:image": base + PICTURE,
        "og:image:alt": _ALT,
    }
    tags = [f'<meta property="{name}" content="{escape(value)}">' for name, value in properties.items()]
    tags.append('<meta name="twitter:card" content="summary_large_image">')
    context["metatags"] = "\n".join([context.get("metatags", ""), *tags])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("html-page-context", describe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
