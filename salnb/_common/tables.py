"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]], *, rule: str = " --- ") -> str:
    """A table in Markdown.

    Args:
        header: the names of the columns.
        rows: the cells of each row, in the words of `str`.
        rule: what stands below each name.

    >>> print(markdown_table(("network", "hours"), [("vgg16", 3)]))
    | network | hours |
    | --- | --- |
    | vgg16 | 3 |
    """
    head, *body = ("| " + " | ".join(map(str, row)) + " |" for row in (header, *rows))
    return "\n".join([head, "|" + f"{rule}|" * len(header), *body])
