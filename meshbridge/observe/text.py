"""Text from outside, made safe to print: names come from whoever may create a pod or a policy."""

from __future__ import annotations

import unicodedata

# Characters that move the cursor, end a line, or reorder what follows would let a name forge another line.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(text: str) -> str:
    """``text`` in which every control, format and unassigned character is written as an escape, on one line."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(char) if unicodedata.category(char) in _UNSAFE else char for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
