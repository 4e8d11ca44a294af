"""Start the cluster and leave it running, for people: up, down, kubectl, shell."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import cluster
from kubectl import PROGRAM

USAGE = """\
usage: .venv/bin/python tests/e2e/up.py COMMAND

  up            start a cluster of two nodes with Istio, and leave it running
  down          end it; nothing stays on the machine but caches
  kubectl …     kubectl on it, as its administrator
  shell HOST    a shell on control-plane, node-1 or node-2
  net COMMAND…  a program of this machine in the cluster's network, with KUBECONFIG set
  logs DIR      write all logs into a directory

examples:
  .venv/bin/python tests/e2e/up.py up
  .venv/bin/python tests/e2e/up.py kubectl get pods -A -o wide
  .venv/bin/python tests/e2e/up.py net .venv/bin/meshbridge analyze
  MESHBRIDGE_E2E_REUSE=1 make e2e     # the tests on the cluster that runs
"""


def main(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "up":
        if cluster.attach():
            print("one is running already: end it with down")
            return 1
        with cluster.only_one():
            cluster.start(lives_on=True, say=lambda what: print(f"e2e: {what}", flush=True))
        return 0
    if command == "down":
        cluster.remove_left_over()
        return 0
    if command not in ("kubectl", "shell", "net", "logs"):
        print(USAGE)
        return 0 if command in ("-h", "--help", "help") else 2
    found = cluster.attach()
    if found is None:
        print("no cluster is running: start one with up", file=sys.stderr)
        return 1
    if command == "logs":
        found.collect(Path(rest[0]))
        return 0
    if command == "kubectl":
        entered = found.control_plane.in_network(PROGRAM, "--kubeconfig", found.kubeconfig, *rest)
    elif command == "net":
        entered = found.control_plane.in_network("env", f"KUBECONFIG={found.kubeconfig}", *rest)
    else:
        host = next(each for each in found.hosts if each.name == rest[0])
        entered = host.argv(*(rest[1:] or ["bash"]))
    os.execvp(entered[0], entered)
    raise AssertionError("unreachable")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
