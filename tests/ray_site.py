"""A real Ray cluster of several nodes on one machine, for the tests: a head without slots, and nodes to kill."""

from __future__ import annotations

import contextlib
from typing import Any


class RaySite:
    """A head and ``nodes`` raylets of ``cpus`` CPUs each."""

    def __init__(self, nodes: int = 2, cpus: int = 1) -> None:
        from ray.cluster_utils import Cluster
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes: list[Any] = [self.cluster.add_node(num_cpus=cpus) for _ in range(nodes)]
        self.address = str(self.cluster.address)

    def add(self, cpus: int = 1) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=cpus))

    def kill(self, node_id: str) -> None:
        """Kill the raylet of a node as a crash of the machine would. ``node_id``: its first letters."""
        node = next(node for node in self.nodes if node.node_id.startswith(node_id))
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def stop(self) -> None:
        import ray
        with contextlib.suppress(Exception):
            ray.shutdown()
        self.cluster.shutdown()
