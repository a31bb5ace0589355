"""Every port of a run that has a number: one block, checked before use, printed."""

from __future__ import annotations

from dataclasses import dataclass, fields

from miles_lite.cluster.network import ephemeral_range, listening

DEFAULT_BASE = 6379
WORKER_PORTS = 1000  # one for each process that Ray runs on a host


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP, the same on all hosts."""

    gcs: int  # of the head: Ray's directory of the cluster
    meeting: int  # of the head: where workers say hello
    ray_client: int  # of the head, unused
    dashboard: int  # of the head, on its loopback
    node_manager: int
    object_manager: int
    runtime_env_agent: int
    agent_grpc: int
    agent_http: int
    metrics: int
    first_worker: int
    last_worker: int

    @classmethod
    def of(cls, base: int) -> Ports:
        """Raises ValueError where the system gives the same numbers to whoever asks for any."""
        numbers = {entry.name: base + index for index, entry in enumerate(fields(cls))}
        numbers["last_worker"] = numbers["first_worker"] + WORKER_PORTS - 1
        ports = cls(**numbers)
        low, high = ephemeral_range()
        if base < 1024 or ports.last_worker > 65535 or (base <= high and ports.last_worker >= low):
            raise ValueError(
                f"ports {base} to {ports.last_worker}: choose a PORT_BASE from 1024 on, so that "
                f"they lie below 65536 and outside {low} to {high}, which any program may be given"
            )
        return ports

    def lines(self, address: str) -> list[str]:
        """The map, for people who open firewalls."""
        _, high = ephemeral_range()
        shown = [
            ("meeting of the hosts", f"{address}:{self.meeting}"),
            ("Ray's directory (GCS)", f"{address}:{self.gcs}"),
            ("Ray, on every host", f"{self.node_manager} to {self.metrics}"),
            ("processes of Ray", f"{self.first_worker} to {self.last_worker}"),
            ("gloo, NCCL, engines", f"20000 to {high}, chosen by the system or at random"),
            ("on the head's loopback", f"{self.ray_client}, {self.dashboard}"),
        ]
        return [f"  {what:24}{where}" for what, where in shown]


def taken(ports: Ports) -> list[str]:
    """Who listens where we want to, a sentence each."""
    found = listening(ports.gcs, ports.last_worker)
    return [f"port {port} is taken by {who}" for port, who in sorted(found.items())]
