"""How a client presents its token. Apart from auth.py, since clients verify nothing and jwt would cost them 12 MB."""

from __future__ import annotations

from typing import Final

METADATA_KEY: Final = "authorization"


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The call metadata that presents ``token``."""
    return ((METADATA_KEY, f"Bearer {token}"),)
