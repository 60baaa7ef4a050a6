"""For mkdocs: shows the lines `name: what it is` of a docstring as a list, and not as one paragraph."""

from __future__ import annotations

import re
from typing import Any

import griffe  # type: ignore[import-not-found, unused-ignore]

NAMED = re.compile(r"^(\w+(?:, \w+)*): ", re.MULTILINE)


class ArgumentLists(griffe.Extension):  # type: ignore[misc, unused-ignore]
    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(map(listed, paragraphs))


def listed(paragraph: str) -> str:
    """A paragraph whose lines are arguments with their descriptions, as a list in Markdown."""
    if not NAMED.match(paragraph):
        return paragraph
    one_line_each = re.sub(r"\n(?! *\w+(?:, \w+)*: )\s*", " ", paragraph)
    return NAMED.sub(r"- `\1`: ", one_line_each)
