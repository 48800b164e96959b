"""Reads a history and says whether the promises held. Needs nothing but the file."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a history shows.

    Attributes:
        accepted: jobs whose publish returned.
        completed: of those, the ones that ran to their end.
        lost: of those, the numbers of the ones that never did.
        uncertain: jobs whose publish raised; they may run or not.
        repeated: jobs that ran to their end more than once.
        executions: how many jobs were begun how often.
        without_result: completed jobs whose result is not in Redis (None: not looked for).
        faults: how often each fault was injected.
        exits: workers that ended without being told to.
        recovery_s: seconds from the kill of a worker to the next start of each job it was running: p50, p99, most.
    """

    accepted: int
    completed: int
    lost: list[int]
    uncertain: int
    repeated: int
    executions: dict[int, int]
    without_result: int | None
    faults: dict[str, int]
    exits: int
    recovery_s: dict[str, float]

    @property
    def holds(self) -> bool:
        """Whether every accepted job has run to its end, and no worker went by itself."""
        return not self.lost and not self.without_result and not self.exits

    def as_dict(self) -> dict[str, object]:
        """For ``--json``."""
        return asdict(self) | {"holds": self.holds}


def read(path: Path) -> Verdict:
    """Check the invariants of a history."""
    accepted, uncertain = set(), 0
    starts: dict[int, list[tuple[float, int]]] = defaultdict(list)
    ends: Counter[int] = Counter()
    ended: dict[int, list[float]] = defaultdict(list)
    faults: Counter[str] = Counter()
    kills: list[tuple[float, int]] = []
    exits, without_result = 0, None
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        match entry["event"]:
            case "accepted":
                accepted.add(entry["job"])
            case "uncertain":
                uncertain += 1
            case "start":
                starts[entry["job"]].append((entry["at"], entry["pid"]))
            case "end":
                ends[entry["job"]] += 1
                ended[entry["job"]].append(entry["at"])
            case "fault":
                faults[entry["kind"]] += 1
                if entry["kind"] == "kill":
                    kills.append((entry["at"], entry["pid"]))
            case "exit":
                exits += 1
            case "results":
                without_result = entry["missing"]
    recovery = sorted(_recoveries(starts, ended, kills))
    return Verdict(
        accepted=len(accepted),
        completed=sum(job in ends for job in accepted),
        lost=sorted(job for job in accepted if job not in ends),
        uncertain=uncertain,
        repeated=sum(count > 1 for count in ends.values()),
        executions=dict(sorted(Counter(len(each) for each in starts.values()).items())),
        without_result=without_result,
        faults=dict(faults),
        exits=exits,
        recovery_s={
            name: round(recovery[min(len(recovery) - 1, int(len(recovery) * part))], 2)
            for name, part in {"p50": 0.5, "p99": 0.99, "most": 1.0}.items()
        }
        if recovery
        else {},
    )


def _recoveries(
    starts: dict[int, list[tuple[float, int]]], ended: dict[int, list[float]], kills: list[tuple[float, int]]
) -> list[float]:
    """For each job that a killed worker was running: how long until it was begun again."""
    killed = defaultdict(list)
    for at, pid in kills:
        killed[pid].append(at)
    found = []
    for job, begun in starts.items():
        begun.sort()
        for (at, pid), (again, _) in pairwise(begun):
            found.extend(
                again - kill
                for kill in killed.get(pid, ())
                if at <= kill <= again and not any(at <= end <= kill for end in ended[job])
            )
    return found
