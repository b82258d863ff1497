"""Text that comes from others: names are checked, sentences are cut and cleaned.

A name with a line break could forge lines of a log or of /metrics. A long sentence in a gRPC status
would not fit into HTTP/2 headers, and the reader would get no status at all.

Not covered: which names a plan may have (`admission.py`).
"""

from __future__ import annotations

MOST_BYTES = 2000
"""Longest status in UTF-8; in the headers of HTTP/2 it may be three times as long."""
MOST_NAMES = 8
"""A sentence lists so many ranks or networks by name."""
CUT = " ... (cut)"


def clean(text: str) -> str:
    """Return text in one line: characters that cannot be printed become spaces."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def sentence(text: str, characters: int = MOST_BYTES) -> str:
    """Return text in one line: `characters` of it, and `MOST_BYTES` bytes, at most."""
    shown = clean(text[:characters])
    encoded = shown.encode("utf-8", "replace")
    if len(encoded) > MOST_BYTES:
        shown = encoded[: MOST_BYTES - len(CUT)].decode("utf-8", "ignore")
    return shown if len(shown) == len(text) else shown + CUT


def listed(names: list[str]) -> str:
    """Return names with commas between them, the first `MOST_NAMES` of them."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
