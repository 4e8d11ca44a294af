"""kubectl for tests: apply, read, wait and run things in pods, with errors that show why."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from host import Host, run

PROGRAM = Path(sys.executable).parent / "kubectl"
Object = dict[str, Any]


@dataclass(frozen=True)
class Kubectl:
    """Runs in the network of ``host``, since nothing of the cluster is reachable from the machine."""

    host: Host
    kubeconfig: Path

    def __call__(self, *arguments: str, stdin: str = "", check: bool = True, timeout_s: float = 60) -> str:
        """What a command prints."""
        return self.done(*arguments, stdin=stdin, check=check, timeout_s=timeout_s).stdout

    def command(self, *arguments: str) -> list[str]:
        """The command as it is run on the machine."""
        return self.host.in_network(PROGRAM, "--kubeconfig", self.kubeconfig, *arguments)

    def done(
        self, *arguments: str, stdin: str = "", check: bool = True, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments)
        cache = {"HOME": str(self.kubeconfig.parent), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        return run(command, stdin=stdin, check=check, timeout_s=timeout_s, where="kubectl", env=cache)

    def apply(self, *documents: str | Path | Object) -> None:
        """Apply files as they are, YAML text, or objects."""
        for each in documents:
            if isinstance(each, Path):
                self("apply", "-f", str(each))
            else:
                self.apply_all([each] if isinstance(each, dict) else [o for o in yaml.safe_load_all(each) if o])

    def apply_all(self, objects: Iterable[Object]) -> None:
        """The same for many at once, whatever their size."""
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(listed), timeout_s=120)

    def get(self, what: str, name: str, namespace: str = "") -> Object:
        """One object."""
        where = ["-n", namespace] if namespace else []
        found: Object = json.loads(self("get", what, name, *where, "-o", "json"))
        return found

    def items(self, what: str, namespace: str = "", selector: str = "") -> list[Object]:
        """The objects of a namespace, or of all."""
        chosen = ["-l", selector] if selector else []
        where = ["-n", namespace] if namespace else ["-A"]
        found: list[Object] = json.loads(self("get", what, *where, *chosen, "-o", "json"))["items"]
        return found

    def exists(self, what: str, name: str, namespace: str = "") -> bool:
        where = ["-n", namespace] if namespace else []
        return bool(self("get", what, name, *where, "--ignore-not-found", "-o", "name").strip())

    def delete(self, what: str, name: str, namespace: str = "", *, wait: bool = True) -> None:
        where = ["-n", namespace] if namespace else []
        self("delete", what, name, *where, "--ignore-not-found", f"--wait={str(wait).lower()}", timeout_s=120)

    def exec(
        self, pod: str, namespace: str, *command: str, container: str = "", stdin: str = "", timeout_s: float = 60,
        check: bool = True,
    ) -> str:  # fmt: skip
        """Run a command in a pod; what it prints."""
        chosen = ["-c", container] if container else []
        interactive = ["-i"] if stdin else []
        return self(
            "exec", *interactive, "-n", namespace, pod, *chosen, "--", *command, stdin=stdin, timeout_s=timeout_s,
            check=check,
        )  # fmt: skip

    def roll_out(self, what: str, namespace: str, timeout_s: float = 120) -> None:
        """Return when a Deployment or DaemonSet is as wanted; else say what its pods wait for."""
        done = self.done(
            "rollout", "status", what, "-n", namespace, f"--timeout={int(timeout_s)}s", timeout_s=timeout_s + 10,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{what} of {namespace} is not rolled out: {done.stderr}\n{self.state(namespace)}"

    def wait_for_pods(self, namespace: str, selector: str, count: int = 1, timeout_s: float = 120) -> list[Object]:
        """The pods, when exactly ``count`` are there and all are ready."""
        found: list[Object] = []

        def ready() -> bool:
            found[:] = self.items("pods", namespace, selector)
            return len(found) == count and all(map(is_ready, found))

        wait_until(ready, f"{count} pods {selector} of {namespace} are ready", timeout_s, lambda: self.state(namespace))
        return found

    def state(self, namespace: str) -> str:
        """What a person would look at: pods, events, and the last words of containers that are not ready."""
        told = [self("get", "pods", "-n", namespace, "-o", "wide", check=False)]
        told.append(self("get", "events", "-n", namespace, "--sort-by=.lastTimestamp", check=False)[-3000:])
        for pod in json.loads(self("get", "pods", "-n", namespace, "-o", "json", check=False) or "{}").get("items", []):
            if not is_ready(pod):
                name = pod["metadata"]["name"]
                logs = self("logs", "-n", namespace, name, "--all-containers", "--prefix", "--tail=15", check=False)
                told.append(f"logs of {name}:\n{logs[-3000:]}")
        return "\n".join(told)


def is_ready(pod: Object) -> bool:
    if "deletionTimestamp" in pod["metadata"]:
        return False
    conditions = pod.get("status", {}).get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def starts(pod: Object) -> list[datetime.datetime]:
    """When each running container of a pod started."""
    status = pod.get("status", {})
    all_of_it = [*status.get("containerStatuses", []), *status.get("initContainerStatuses", [])]
    running = [each["state"]["running"] for each in all_of_it if "running" in each.get("state", {})]
    return [datetime.datetime.fromisoformat(each["startedAt"]) for each in running]


def wait_until(
    condition: Callable[[], bool], what: str, timeout_s: float = 60, explain: Callable[[], str] = lambda: ""
) -> None:
    """Return when something is so; else an AssertionError says what was waited for, and explains."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"not so after {timeout_s:.0f} s: {what}\n{explain()}"
        time.sleep(0.3)
