"""What one check found: a line for people, a record for scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from miles_lite.log import printable

Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    name: str  # of the check
    status: Status  # skipped: it could not be looked at, which is not "ok"
    detail: str  # what was found, with values
    fix: str = ""  # the way out of a warning or a failure
    hosts: tuple[str, ...] = ()  # that it is about; () for the run

    def line(self) -> str:
        if len(self.hosts) > 1:
            where = f"{len(self.hosts)} hosts: "
            if self.status in ("warning", "failed"):
                where = f"{', '.join(self.hosts)}: "
        else:
            where = "".join(f"{host}: " for host in self.hosts)
        way_out = f" -> {self.fix}" if self.fix else ""
        return printable(f"{self.status:<9}{self.name:<19}{where}{self.detail}{way_out}")


def ok(name: str, detail: str) -> Finding:
    return Finding(name, "ok", detail)


def skipped(name: str, reason: str) -> Finding:
    return Finding(name, "skipped", reason)


def graded(name: str, detail: str, failures: Sequence[str], warnings: Sequence[str]) -> Finding:
    """failures, warnings: "what is wrong -> the way out"; the gravest kind makes the status."""
    if not (told := failures or warnings):
        return ok(name, detail)
    whats, fixes = zip(*(entry.split(" -> ") for entry in told), strict=True)
    status: Status = "failed" if failures else "warning"
    whole = "; ".join([*whats, *([detail] if detail else [])])
    return Finding(name, status, whole, "; ".join(dict.fromkeys(fixes)))


def attempt(name: str, work: Callable[[], Finding | str], fix: str) -> Finding:
    """What `work` finds, or an ok of what it says; what it refuses is a failure."""
    try:
        found = work()
    except (ValueError, OSError, RuntimeError) as error:
        return Finding(name, "failed", str(error), fix)
    return found if isinstance(found, Finding) else ok(name, found)


def merged(by_host: Iterable[tuple[str, Finding]]) -> list[Finding]:
    """Findings of many hosts; those that say the same become one."""
    hosts: dict[Finding, list[str]] = {}
    for host, finding in by_host:
        hosts.setdefault(finding, []).append(host)
    order = list(dict.fromkeys(finding.name for finding in hosts))
    found = [replace(finding, hosts=tuple(names)) for finding, names in hosts.items()]
    return sorted(found, key=lambda finding: order.index(finding.name))


def as_json(experiment: str, findings: Sequence[Finding]) -> dict[str, Any]:
    counts = {
        status: sum(finding.status == status for finding in findings)
        for status in ("ok", "warning", "failed", "skipped")
    }
    records = [dataclasses.asdict(finding) for finding in findings]
    return {"experiment": experiment, "counts": counts, "findings": records}
