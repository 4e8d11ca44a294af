"""Every reason the kernel can give has a name, a sentence and a way forward."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meshbridge.observe.reasons import drop_reason

ABI = Path(__file__).parents[3] / "bpf" / "abi.h"


def kernel_reasons() -> list[tuple[str, int]]:
    body = re.search(r"enum drop_reason \{(.*?)\};", ABI.read_text(), re.DOTALL)
    assert body
    return [(name, int(number)) for name, number in re.findall(r"^\s*(DROP_\w+) = (\d+)", body[1], re.MULTILINE)]


@pytest.mark.parametrize(("name", "number"), [pair for pair in kernel_reasons() if pair[1]])
def test_every_reason_of_the_kernel_is_explained(name: str, number: int) -> None:
    reason = drop_reason(number)
    assert reason.number == number
    assert not reason.name.startswith("REASON_"), f"{name} has no sentence in meshbridge/observe/reasons.py"
    assert reason.text
    assert reason.meaning
    assert reason.fix


def test_names_and_texts_are_told_apart() -> None:
    reasons = [drop_reason(number) for _, number in kernel_reasons()]
    assert len({reason.name for reason in reasons}) == len({reason.text for reason in reasons}) == len(reasons)
