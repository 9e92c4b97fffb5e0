"""Text in the pages that HLAT writes."""

from __future__ import annotations

import html

from hlat.observe.terminal import escaped


def escape(text: str) -> str:
    """The text for HTML, also in an attribute; its control characters are shown, and turn nothing around."""
    return html.escape(escaped(text))
