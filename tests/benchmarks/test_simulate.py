"""The discrete-event simulator: closed forms, a brute-force clock that ticks, and what must hold of any fair rates."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulate import Task, fair_rates, simulate


def test_one_link() -> None:
    done = simulate({"wire": 100.0}, [Task("a", 50.0, {"wire": 1.0}, latency_s=0.25)])
    assert done["a"].begin_s == 0.25
    assert done["a"].end_s == pytest.approx(0.75)


def test_two_flows_share_a_link_and_the_longer_one_has_it_alone_at_the_end() -> None:
    done = simulate({"wire": 1.0}, [Task("short", 1.0, {"wire": 1.0}), Task("long", 2.0, {"wire": 1.0})])
    assert (done["short"].end_s, done["long"].end_s) == (pytest.approx(2.0), pytest.approx(3.0))


def test_a_later_flow_slows_the_first_one() -> None:
    """One unit alone in 1 s, two more beside the second flow in 4 s, the last one alone again."""
    done = simulate({"wire": 1.0}, [Task("first", 4.0, {"wire": 1.0}), Task("second", 2.0, {"wire": 1.0}, latency_s=1.0)])
    assert done["second"].end_s == pytest.approx(5.0)
    assert done["first"].end_s == pytest.approx(6.0)


def test_two_ranks_exchange_in_both_directions_at_once() -> None:
    wires = {"0 out": 1.0, "1 in": 1.0, "1 out": 1.0, "0 in": 1.0}
    flows = [Task("there", 3.0, {"0 out": 1.0, "1 in": 1.0}), Task("back", 2.0, {"1 out": 1.0, "0 in": 1.0})]
    done = simulate(wires, flows)
    assert (done["there"].end_s, done["back"].end_s) == (pytest.approx(3.0), pytest.approx(2.0))


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_a_ring_and_an_all_to_all_fill_every_port(num_ranks: int) -> None:
    ports = {f"{rank} {way}": 10.0 for rank in range(num_ranks) for way in ("out", "in")}
    ring = [Task(f"{r}", 5.0, {f"{r} out": 1.0, f"{(r + 1) % num_ranks} in": 1.0}) for r in range(num_ranks)]
    assert {span.end_s for span in simulate(ports, ring).values()} == {0.5}
    pairs = itertools.permutations(range(num_ranks), 2)
    everybody = [Task(f"{a} to {b}", 5.0, {f"{a} out": 1.0, f"{b} in": 1.0}) for a, b in pairs]
    assert {round(span.end_s, 9) for span in simulate(ports, everybody).values()} == {round(0.5 * (num_ranks - 1), 9)}


def test_a_chain_is_a_queue() -> None:
    tasks = [Task(f"{n}", 2.0, {"server": 1.0}, after=[f"{n - 1}"] if n else [], latency_s=0.5) for n in range(4)]
    assert [span.end_s for span in simulate({"server": 1.0}, tasks).values()] == [2.5, 5.0, 7.5, 10.0]


def test_three_computing_ranks_on_two_cores() -> None:
    cores = {"cores": 2.0}
    three = [Task(f"{rank}", 1.0, {"cores": 1.0}, ceiling=1.0) for rank in range(3)]
    assert [span.end_s for span in simulate(cores, three).values()] == [pytest.approx(1.5)] * 3
    one = simulate(cores, [Task("alone", 1.0, {"cores": 1.0}, ceiling=1.0)])
    assert one["alone"].end_s == 1.0, "one rank cannot use two cores"


def test_a_bottleneck_elsewhere_leaves_room_for_others() -> None:
    """The textbook case: three flows over the first link, of which two cross the second as well, where they get a quarter each."""
    rates = fair_rates(
        {"A": 1.0, "B": 0.5}, [Task("x", 1, {"A": 1.0, "B": 1.0}), Task("y", 1, {"A": 1.0, "B": 1.0}), Task("z", 1, {"A": 1.0})]
    )
    assert rates == pytest.approx([0.25, 0.25, 0.5])


def test_pieces_of_one_task_are_as_many_tasks() -> None:
    many = simulate({"wire": 1.0}, [*(Task(f"{n}", 1.0, {"wire": 1.0}) for n in range(5)), Task("x", 3.0, {"wire": 1.0})])
    once = simulate({"wire": 1.0}, [Task("all", 1.0, {"wire": 1.0}, count=5), Task("x", 3.0, {"wire": 1.0})])
    assert once["all"].end_s == pytest.approx(many["4"].end_s)
    assert once["x"].end_s == pytest.approx(many["x"].end_s)


def test_nothing_to_do_takes_its_latency() -> None:
    wire = {"wire": 1.0}
    tasks = [Task("empty", 0.0, wire, latency_s=2.0), Task("then", 0.0, after=["empty"]), Task("busy", 9.0, wire)]
    done = simulate(wire, tasks)
    assert (done["empty"].end_s, done["then"].end_s, done["busy"].end_s) == (2.0, 2.0, 9.0)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([Task("a", 1.0, after=["b"]), Task("b", 1.0, after=["a"])], "wait for one another"),
        ([Task("a", 1.0, {"nothing": 1.0})], "nothing"),
        ([Task("a", 1.0, after=["nobody"])], "nobody"),
        ([Task("a", 1.0), Task("a", 1.0)], "one name"),
    ],
)
def test_senseless_tasks_are_refused(tasks: list[Task], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate({"wire": 1.0}, tasks)


task_lists = st.lists(
    st.tuples(
        st.floats(0.1, 3.0),  # work
        st.dictionaries(st.sampled_from(["A", "B", "C"]), st.sampled_from([0.5, 1.0, 2.0]), min_size=1),
        st.floats(0.0, 1.0),  # latency
        st.sampled_from([0.5, 2.0, math.inf]),  # ceiling
        st.lists(st.integers(0, 5), max_size=2),  # predecessors, among those before
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=6,
)
CAPACITY = {"A": 1.0, "B": 1.5, "C": 0.7}


def tasks_of(drawn: list[tuple[float, dict[str, float], float, float, list[int], int]]) -> list[Task]:
    return [
        Task(str(n), work, demand, sorted({str(p) for p in before if p < n}), latency_s, ceiling, count)
        for n, (work, demand, latency_s, ceiling, before, count) in enumerate(drawn)
    ]


def creeping_rates(tasks: list[Task], num_steps: int = 2000) -> list[float]:
    """Fair rates by raising every task by a tiny dominant share again and again, while all its resources still have room for it."""
    step = 1.0 / num_steps
    used = dict.fromkeys(CAPACITY, 0.0)
    rates = [0.0] * len(tasks)
    unit = [step / max(amount / CAPACITY[name] for name, amount in task.demand.items()) for task in tasks]
    for _ in range(num_steps):
        for n, task in enumerate(tasks):
            fits = all(used[name] + unit[n] * amount * task.count <= CAPACITY[name] + 1e-9 for name, amount in task.demand.items())
            if fits and rates[n] + unit[n] <= task.ceiling + 1e-9:
                rates[n] += unit[n]
                for name, amount in task.demand.items():
                    used[name] += unit[n] * amount * task.count
    return rates


@settings(max_examples=25, deadline=None)
@given(task_lists)
def test_rates_equal_those_of_a_creeping_fill(drawn: list[tuple[float, dict[str, float], float, float, list[int], int]]) -> None:
    tasks = tasks_of(drawn)
    for fair, crept, task in zip(fair_rates(CAPACITY, tasks), creeping_rates(tasks), tasks, strict=True):
        dominant = max(amount / CAPACITY[name] for name, amount in task.demand.items())
        assert fair * dominant == pytest.approx(crept * dominant, abs=0.02)


@settings(max_examples=15, deadline=None)
@given(task_lists)
def test_ends_equal_those_of_a_ticking_clock(drawn: list[tuple[float, dict[str, float], float, float, list[int], int]]) -> None:
    tasks, tick_s = tasks_of(drawn), 0.01
    done = simulate(CAPACITY, tasks)
    left = {task.name: task.work for task in tasks}
    ended: dict[str, float] = {}
    now_s = 0.0
    while len(ended) < len(tasks):
        ready = [t for t in tasks if t.name not in ended and all(p in ended for p in t.after)]
        running = [t for t in ready if now_s >= max((ended[p] for p in t.after), default=0.0) + t.latency_s]
        for task, rate in zip(running, fair_rates(CAPACITY, running), strict=True):
            left[task.name] -= rate * tick_s
        now_s += tick_s
        ended |= {t.name: now_s for t in running if left[t.name] <= 0}
    longest = 3 * len(tasks) * tick_s  # every event is seen up to a tick late, and a late one delays others
    assert all(abs(done[name].end_s - end_s) <= longest + 0.05 * end_s for name, end_s in ended.items())
