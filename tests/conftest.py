"""What all tests share: root-only tests are errors in CI and skip with a reason elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("redirect_harness")

REPO = Path(__file__).parent.parent


def missing_for_root_tests() -> str:
    """Why root-only tests cannot run here; empty when they can."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.ismount("/sys/fs/bpf"):
        return "needs bpffs: mount -t bpf bpf /sys/fs/bpf"
    if not Path("/usr/lib/python3/dist-packages/bcc").is_dir():
        return "needs Debian's python3-bpfcc: run scripts/setup dev"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") is None:
        return
    if reason := missing_for_root_tests():
        if os.environ.get("CI"):
            pytest.fail(f"cannot run in CI: {reason}", pytrace=False)
        pytest.skip(reason)
