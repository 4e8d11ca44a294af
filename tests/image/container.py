"""Containers of the image by runc: as a kubelet runs them, without a cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
UNPRIVILEGED = 65532


@dataclass(frozen=True)
class Image:
    """``root`` is its file system, ``config`` what it says of itself."""

    archive: Path
    root: Path
    config: dict[str, Any]
    directory: Path

    def run(
        self,
        *command: str,
        user: int = UNPRIVILEGED,
        privileged: bool = False,
        mounts: Sequence[str] = (),
        timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a container: read-only, without capabilities unless privileged, with a /tmp of its own."""
        name = f"meshbridge-image-{os.getpid()}"
        bundle = self.directory / "bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        bundle.mkdir()
        subprocess.run(["runc", "spec", "--bundle", bundle], check=True)
        spec = json.loads((bundle / "config.json").read_text())
        capabilities = ["CAP_SYS_ADMIN", "CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"] if privileged else []
        spec["process"] |= {
            "terminal": False, "args": list(command), "env": self.config["config"]["Env"],
            "user": {"uid": user, "gid": user}, "noNewPrivileges": not privileged,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        }  # fmt: skip
        spec["root"] = {"path": str(self.root), "readonly": True}
        spec["mounts"] = [each for each in spec["mounts"] if each["type"] != "cgroup"]
        spec["mounts"].append(
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"]}
        )
        spec["mounts"] += [
            {"destination": path, "type": "bind", "source": path, "options": ["rbind", "rw"]} for path in mounts
        ]
        spec["linux"].pop("seccomp", None)
        spec["linux"]["resources"] = {}
        spec["linux"]["cgroupsPath"] = name
        (bundle / "config.json").write_text(json.dumps(spec))
        try:
            return subprocess.run(
                ["runc", "run", "--bundle", bundle, name],
                capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        finally:
            subprocess.run(["runc", "delete", "--force", name], capture_output=True)
