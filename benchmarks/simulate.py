"""A discrete-event simulator of work that shares links and cores: tasks with dependencies, latencies and max-min fair rates.

    done = simulate({"wire": 1e8}, [Task("a", 1e8, {"wire": 1.0}), Task("b", 2e8, {"wire": 1.0}, latency_s=0.01)])
    done["b"].end_s

A task is an amount of work (bytes, seconds of compute, ...). Each unit of it takes so much of each resource; a resource offers so much a
second. Between two events (a task begins or ends) all rates are constant, and fair in the sense of dominant resources: the rates of all
running tasks rise together, each measured by the share it takes of its scarcest resource, and a task stops rising when one of its
resources is full (max-min fairness by progressive filling, as TCP flows of equal length share links; for one resource it is processor
sharing). A queue that serves one after the other is a chain of tasks. Pure: no clock, no randomness.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ROUNDING = 1e-12  # of the work or of a resource: what is left below this is arithmetic's fault


@dataclass(frozen=True)
class Task:
    """`count` equal pieces of work side by side, each of `work` units, that begin `latency_s` after all of `after` have ended.

    demand: units of each resource that one unit of work takes. ceiling: the fastest rate of one piece, units of work a second.
    """

    name: str
    work: float
    demand: Mapping[str, float] = field(default_factory=dict)
    after: Sequence[str] = ()
    latency_s: float = 0.0
    ceiling: float = math.inf
    count: int = 1

    def __post_init__(self) -> None:
        assert self.work >= 0, f"{self.name}: work {self.work}"
        assert self.latency_s >= 0, f"{self.name}: latency {self.latency_s}"
        assert self.ceiling > 0, f"{self.name}: ceiling {self.ceiling}"
        assert self.count >= 1, f"{self.name}: count {self.count}"
        assert all(amount >= 0 for amount in self.demand.values()), f"{self.name}: demand {self.demand}"


@dataclass(frozen=True)
class Span:
    """When a task's work ran, in seconds; its latency lies before."""

    begin_s: float
    end_s: float


def simulate(capacity_per_s: Mapping[str, float], tasks: Sequence[Task]) -> dict[str, Span]:
    """Run all tasks from time 0; returns the span of each.

    capacity_per_s: what each resource offers. Raises `ValueError` for two tasks of one name, a resource or a predecessor that does not
    exist, and for tasks that wait for one another in a circle.
    """
    by_name = _checked(capacity_per_s, tasks)
    followers: dict[str, list[str]] = defaultdict(list)
    missing = {task.name: len(set(task.after)) for task in tasks}
    for task in tasks:
        for name in set(task.after):
            followers[name].append(task.name)
    coming = [(task.latency_s, number, task.name) for number, task in enumerate(tasks) if not task.after]
    heapq.heapify(coming)
    order = {task.name: number for number, task in enumerate(tasks)}
    left: dict[str, float] = {}  # running tasks, and the work that each piece still has to do
    begun: dict[str, float] = {}
    done: dict[str, Span] = {}
    now_s = 0.0
    while coming or left:
        rate = dict(zip(left, fair_rates(capacity_per_s, [by_name[name] for name in left]), strict=True))
        ends_s = {name: now_s + (work / rate[name] if work > 0 else 0.0) for name, work in left.items()}
        next_s = min(min(ends_s.values(), default=math.inf), coming[0][0] if coming else math.inf)
        for name in list(left):
            if ends_s[name] <= next_s + ROUNDING * max(1.0, next_s):
                del left[name]
                done[name] = Span(begun[name], next_s)
                for follower in followers[name]:
                    missing[follower] -= 1
                    if missing[follower] == 0:
                        heapq.heappush(coming, (next_s + by_name[follower].latency_s, order[follower], follower))
            else:
                left[name] -= rate[name] * (next_s - now_s)
        now_s = next_s
        while coming and coming[0][0] <= now_s:
            _, _, name = heapq.heappop(coming)
            left[name], begun[name] = by_name[name].work, now_s
    if len(done) < len(tasks):
        raise ValueError(f"tasks wait for one another: {sorted(set(by_name) - set(done))[:8]}")
    return done


def fair_rates(capacity_per_s: Mapping[str, float], tasks: Sequence[Task]) -> list[float]:
    """Units of work a second of each piece of each of these running tasks; infinite where nothing limits it."""
    rates = [task.ceiling for task in tasks]
    # Seconds of the scarcest resource that a unit of work takes; the dominant share of a task is its rate times that.
    dominant = [max((amount / capacity_per_s[name] for name, amount in task.demand.items()), default=0.0) for task in tasks]
    rising = [number for number, scarcest in enumerate(dominant) if scarcest > 0]
    use = {
        number: {
            name: amount / capacity_per_s[name] * tasks[number].count / dominant[number] for name, amount in tasks[number].demand.items()
        }
        for number in rising
    }
    free = dict.fromkeys(capacity_per_s, 1.0)
    level = 0.0
    while rising:
        used = dict.fromkeys(capacity_per_s, 0.0)
        for number in rising:
            for name, share in use[number].items():
                used[name] += share
        room = min(free[name] / share for name, share in used.items() if share > 0)
        lowest_ceiling = min(tasks[number].ceiling * dominant[number] for number in rising)
        step = max(0.0, min(room, lowest_ceiling - level))
        level += step
        for name, share in used.items():
            free[name] -= step * share
        full = {name for name, share in used.items() if share > 0 and free[name] <= ROUNDING}
        still = []
        for number in rising:
            if tasks[number].ceiling * dominant[number] <= level * (1 + ROUNDING) or any(use[number].get(name, 0.0) > 0 for name in full):
                rates[number] = level / dominant[number]
            else:
                still.append(number)
        rising = still
    return rates


def _checked(capacity_per_s: Mapping[str, float], tasks: Sequence[Task]) -> dict[str, Task]:
    by_name = {task.name: task for task in tasks}
    if len(by_name) < len(tasks):
        raise ValueError("two tasks have one name")
    if not all(amount > 0 for amount in capacity_per_s.values()):
        raise ValueError(f"a resource offers nothing: {capacity_per_s}")
    for task in tasks:
        unknown = [name for name in task.demand if name not in capacity_per_s] + [name for name in task.after if name not in by_name]
        if unknown:
            raise ValueError(f"task {task.name!r} names {unknown[0]!r}, which does not exist")
    return by_name
