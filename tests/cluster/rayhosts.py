"""A Ray cluster of several nodes on this host, in a process of its own that does as it is told on stdin. Holds no test."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

TOKEN = secrets.token_hex(16)
ENVIRONMENT = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
SMALL = {"object_store_memory": 80_000_000, "include_dashboard": False}


class Hosts:
    """The cluster, seen from a test. Its head has no CPUs, so that every trial runs on a node that may be lost."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        root = Path(__file__).resolve().parent.parent.parent
        with (folder / "hosts.err").open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(root)},
            )
        self.address: str = self._answer()["address"]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the cluster's process has ended")

    def _ask(self, *words: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def add(self, cpus: int = 1) -> str:
        """Add a node; its id as the record shortens it."""
        return str(self._ask("add", str(cpus))["node"])

    def lose(self, node: str) -> None:
        """The node's processes are killed, as by a power cut."""
        self._ask("lose", node)

    def free(self) -> float:
        """CPUs that nothing holds."""
        return float(self._ask("free", "CPU")["free"])

    def close(self) -> None:
        """End the cluster."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 0, **SMALL})
    nodes: dict[str, Any] = {}
    print(json.dumps({"address": cluster.address}), flush=True)
    for line in sys.stdin:
        verb, word = line.split()
        if verb == "add":
            node = cluster.add_node(num_cpus=int(word), object_store_memory=SMALL["object_store_memory"])
            nodes[node.node_id[:8]] = node
            print(json.dumps({"node": node.node_id[:8]}), flush=True)
        elif verb == "free":
            print(json.dumps({"free": ray.available_resources().get(word, 0.0)}), flush=True)
        else:
            cluster.remove_node(nodes.pop(word), allow_graceful=False)
            print(json.dumps({"lost": word}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
