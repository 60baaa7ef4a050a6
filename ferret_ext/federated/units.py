"""Numbers in words."""

from __future__ import annotations


def in_words(size: float) -> str:
    """Bytes with a unit that suits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:,.0f} B"
