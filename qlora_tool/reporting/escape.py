"""Text of anybody's making, as it may stand in a page."""

from __future__ import annotations

import html

from qlora_tool.errors import printable


def escaped(text: object, longest: int | None = None) -> str:
    """A text for an element or an attribute of a page: nothing in it is markup, and characters that act are shown as
    their codes.

    Args:
        longest: how many characters are shown at most; None: all.
    """
    return html.escape(printable(str(text), longest), quote=True)
