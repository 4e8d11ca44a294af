"""The base of every error a person may see: where it happened, what is wrong, how to fix it."""

from __future__ import annotations


class MeshBridgeError(Exception):
    """Something a person has to act on.

    Args:
        what: The fault, quoting the offending value.
        where: The object, file and line, or address it concerns.
        fix: What to do about it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        sentence = f"{self.where}: {self.what}" if self.where else self.what
        return f"{sentence}; {self.fix}" if self.fix else sentence


class SettingsError(MeshBridgeError):
    """A setting, flag or environment variable cannot be used."""
