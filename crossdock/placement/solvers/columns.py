"""Method columns: each layer as a set partitioning program over everything that one device could hold; exact, with its proof.

For objective devices and equal devices. The copies that a device receives depend on its own experts alone, so a layer's plan is a choice of
R sets of experts, one for each device, that hold every expert once:

    x[A] in {0, 1}           some device holds exactly the experts A; A ranges over all sets that fit, keep the load cap and honour the pins
    held once, for each e    sum over A that contain e of x[A] = 1
    all devices, once        sum over A of x[A] = R
    minimise                 sum over A of x[A] * (tokens that use an expert of A)

The linear relaxation is solved by column generation, pricing all sets at once, and is tight to a fraction of a per cent on real routing.
The program that is left then needs only the sets whose reduced cost is below the distance from the relaxation to the best plan known.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.records.plan import EMPTY
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.search.price import Layer, layer_of
from crossdock.placement.solvers.search.resplit import improved, lookup
from crossdock.placement.solvers.solution import solution_of

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MAX_COLUMNS = 1_000_000
FIRST_COLUMNS = 30  # cheapest sets of every expert that the first relaxation knows
MORE_COLUMNS = 300  # sets of most negative reduced cost that each round adds
MAX_PROGRAM = 20_000  # most sets of an integer program
KEPT_COLUMNS = 100_000  # tables up to this size are kept from the relaxation to the integer program
STIRS = 60  # of the local search between the two
_CHUNK = 1 << 14  # token sets that are multiplied at once


@dataclass(frozen=True, eq=False)
class Columns:
    """All that one device may hold in a layer: `member_CS` int64 [C, S], padded with E; `cost_C` tokens that use any of them."""

    num_experts: int
    num_devices: int
    member_CS: IntArray
    cost_C: FloatArray

    def matrix(self, chosen_X: IntArray) -> sparse.csc_array:
        """The rows of the program for some columns: experts, then the number of devices."""
        member_XS = self.member_CS[chosen_X]
        column = np.repeat(np.arange(len(chosen_X)), member_XS.shape[1])
        real = member_XS.ravel() < self.num_experts
        row = np.concatenate([member_XS.ravel()[real], np.full(len(chosen_X), self.num_experts)])
        column = np.concatenate([column[real], np.arange(len(chosen_X))])
        return sparse.csc_array((np.ones(len(row)), (row, column)), shape=(self.num_experts + 1, len(chosen_X)))

    @property
    def right_side(self) -> FloatArray:
        return np.append(np.ones(self.num_experts), float(self.num_devices))

    def reduced(self, dual_Y: FloatArray) -> FloatArray:
        """[C]: cost less the duals of the members and of the device count."""
        dual_E = np.append(dual_Y[:-1], 0.0)
        return np.asarray(self.cost_C - dual_E[self.member_CS].sum(axis=1) - dual_Y[-1])


@dataclass(frozen=True, eq=False)
class LayerAnswer:
    """One layer: the device of each expert (None where no plan was found), tokens' copies under it, and a proven bound on them."""

    device_E: IntArray | None
    copies: float
    bound: float


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """Solve every layer to proven optimality, or as near as `seconds` allow; nothing is random, `seed` changes nothing.

    Raises `UsageError` where the objective or the size does not suit, `InfeasiblePlan`, with a proof, where the load cap cannot be met.
    """
    check(problem)
    deadline = Deadline(seconds)
    answers = solve_layers(problem, deadline)
    missing = [layer for layer, answer in enumerate(answers) if answer.device_E is None]
    if missing:
        raise InfeasiblePlan(
            f"method columns found no plan for layer {missing[0]} in {seconds:g} s; give more --seconds or use method anneal"
        )
    tokens = problem.affinity.num_tokens * problem.num_layers
    return solution_of(
        problem,
        np.stack([answer.device_E for answer in answers if answer.device_E is not None]),
        method="columns",
        seed=seed,
        seconds=deadline.elapsed_s,
        stopped_by="seconds" if deadline.passed else "done",
        bound=sum(answer.bound for answer in answers) / tokens,
    )


def check(problem: Problem) -> None:
    """Raise `UsageError` where the method cannot take the problem."""
    if why := unsuited(problem):
        raise UsageError(f"method columns {why}; use method anneal")


def unsuited(problem: Problem) -> str:
    """Why the method cannot take the problem, or nothing."""
    if problem.objective != "devices":
        return f"is for objective devices, not {problem.objective}"
    if len(set(problem.slots_R.tolist())) > 1:
        return "needs equally many slots on every device"
    count = sum(comb(problem.num_experts, size) for size in _sizes(problem))
    return f"would enumerate {count:,} sets of experts, above {MAX_COLUMNS:,}" if count > MAX_COLUMNS else ""


def solve_layers(problem: Problem, deadline: Deadline, *, bounds_only: bool = False) -> list[LayerAnswer]:
    """Every layer's answer: relaxations and first programs of all layers, then what the time left proves. Layers after the first whose turn
    does not come in time have no plan and no bound."""
    answers: list[LayerAnswer] = []
    relaxed: list[tuple[Columns, FloatArray] | None] = []
    for number in range(problem.num_layers):
        if number and deadline.passed:
            answers.append(LayerAnswer(None, np.inf, 0.0))
            relaxed.append(None)
            continue
        columns = _columns(problem, layer_of(problem, number))
        share = deadline.share(2.0 * (problem.num_layers - number))
        dual_Y, x_C, bound = _relaxation(columns, problem, number)
        relaxed.append((columns, dual_Y) if len(columns.cost_C) <= KEPT_COLUMNS else None)
        answers.append(LayerAnswer(None, np.inf, bound) if bounds_only else _rounded(columns, x_C, bound, problem, number, share))
    for number in sorted(range(problem.num_layers), key=lambda number: answers[number].copies - answers[number].bound):
        answer = answers[number]
        if bounds_only or deadline.passed or answer.copies <= answer.bound:
            continue
        columns, dual_Y = relaxed[number] or _again(problem, number)
        reduced_C = columns.reduced(dual_Y)
        needed_X = np.flatnonzero(reduced_C <= answer.copies - answer.bound + 1.0)
        complete = len(needed_X) <= MAX_PROGRAM
        chosen_X = needed_X if complete else _nearest(reduced_C, MAX_PROGRAM)
        answers[number] = _better(answer, _program(columns, chosen_X, answer.bound, deadline, problem, number, complete=complete))
    return answers


def _sizes(problem: Problem) -> range:
    """How many experts one device may hold: enough that the other devices can take the rest."""
    slots = int(problem.slots_R[0])
    return range(max(0, problem.num_experts - (problem.num_devices - 1) * slots), slots + 1)


def _columns(problem: Problem, layer: Layer) -> Columns:
    E, R, slots = problem.num_experts, problem.num_devices, int(problem.slots_R[0])
    pinned_E = layer.pinned_I[:E]
    cap = problem.constraints.load_cap
    loads = (
        [] if cap is None else [(load_LE[layer.number], cap * load_LE[layer.number].sum() / R * (1 + 1e-12)) for load_LE in problem.loads]
    )
    members, costs = [], []
    for size in _sizes(problem):
        member_CS, cost_C = _touched(layer, E, size)
        keep_C = np.ones(len(member_CS), dtype=bool)
        for load_E, most in loads:
            keep_C &= load_E[member_CS].sum(axis=1) <= most
        for device in np.unique(pinned_E[pinned_E != EMPTY]):
            of_device_C = (pinned_E[member_CS] == device).sum(axis=1)
            keep_C &= (of_device_C == 0) | (of_device_C == (pinned_E == device).sum())
        pinned_CS = np.where(pinned_E[member_CS] == EMPTY, -1, pinned_E[member_CS])
        if size:
            keep_C &= np.where(pinned_CS < 0, R, pinned_CS).min(axis=1, initial=R) >= np.where(
                (pinned_CS >= 0).any(axis=1), pinned_CS.max(axis=1), 0
            )
        members.append(np.pad(member_CS[keep_C], ((0, 0), (0, slots - size)), constant_values=E))
        costs.append(cost_C[keep_C])
    return Columns(E, R, np.concatenate(members), np.concatenate(costs))


def _touched(layer: Layer, num_experts: int, size: int) -> tuple[IntArray, FloatArray]:
    """All sets of `size` experts and the tokens that use any expert of each: all tokens less those that avoid both halves of the set."""
    if size == 0:
        return np.zeros((1, 0), dtype=np.int64), np.zeros(1)
    member_CS, half = _subsets(num_experts, size), size // 2
    left_XH, right_YH = _subsets(num_experts, half), _subsets(num_experts, size - half)
    exact: type[np.floating[Any]] = np.float32 if layer.count_U.sum() < 2**24 else np.float64  # whole numbers
    avoid_XY = np.zeros((len(left_XH), len(right_YH)), dtype=exact)
    member_UK = np.minimum(layer.member_UK, num_experts)
    for first in range(0, len(member_UK), _CHUNK):
        part_UK, count_U = member_UK[first : first + _CHUNK], layer.count_U[first : first + _CHUNK].astype(exact)
        absent_UE = np.ones((len(part_UK), num_experts + 1), dtype=exact)
        np.put_along_axis(absent_UE, part_UK, 0.0, axis=1)
        avoid_XY += _avoided(absent_UE, left_XH).T @ (_avoided(absent_UE, right_YH) * count_U[:, None])
    left_C, right_C = _rank(left_XH, member_CS[:, :half], num_experts), _rank(right_YH, member_CS[:, half:], num_experts)
    return member_CS, layer.count_U.sum() - avoid_XY[left_C, right_C].astype(np.float64)


@lru_cache(maxsize=8)
def _subsets(num_experts: int, size: int) -> IntArray:
    """[C, size]: all sets of so many experts, in lexicographic order."""
    return np.array(list(itertools.combinations(range(num_experts), size)), dtype=np.int64).reshape(comb(num_experts, size), size)


def _avoided(absent_UE: NDArray[Any], member_XH: IntArray) -> NDArray[Any]:
    """[U, X]: 1 where a token set avoids all members of a set of experts."""
    avoided_UX = np.ones((len(absent_UE), len(member_XH)), dtype=absent_UE.dtype)
    for expert_X in member_XH.T:
        avoided_UX *= absent_UE[:, expert_X]
    return avoided_UX


def _rank(all_XH: IntArray, wanted_CH: IntArray, num_experts: int) -> IntArray:
    """Where each wanted set stands among all sets of its size, which are in lexicographic order."""
    weight_H = num_experts ** np.arange(all_XH.shape[1])[::-1]
    return np.searchsorted(all_XH @ weight_H, wanted_CH @ weight_H)


def _relaxation(columns: Columns, problem: Problem, number: int) -> tuple[FloatArray, FloatArray, float]:
    """The linear relaxation: its optimal duals, the columns' values, and its value, made safe against the solver's tolerances."""
    E, R = columns.num_experts, columns.num_devices
    order_C = np.argsort(columns.cost_C, kind="stable")
    known_C = np.zeros(len(columns.cost_C), dtype=bool)
    for expert in range(E):
        holding = order_C[(columns.member_CS[order_C] == expert).any(axis=1)]
        known_C[holding[:FIRST_COLUMNS]] = True
    ruinous = 2.0 * R * (columns.cost_C.max(initial=0.0) + 1.0)
    slack = sparse.csc_array(np.hstack([np.eye(E + 1), -np.eye(E + 1)[:, -1:]]))
    while True:
        known_X = np.flatnonzero(known_C)
        answer = linprog(
            np.concatenate([columns.cost_C[known_X], np.full(E + 2, ruinous)]),
            A_eq=sparse.hstack([columns.matrix(known_X), slack], format="csc"),
            b_eq=columns.right_side,
            method="highs-ds",
            options={"presolve": False},
        )
        assert answer.x is not None, answer.message  # artificial columns make the program feasible, and costs are positive
        dual_Y = np.asarray(answer.eqlin.marginals)
        reduced_C = columns.reduced(dual_Y)
        entering = np.flatnonzero((reduced_C < -1e-7 * ruinous / R) & ~known_C)
        if not len(entering):
            break
        known_C[entering[_nearest(reduced_C[entering], MORE_COLUMNS)]] = True
    if answer.x[len(known_X) :].sum() > 1e-6:
        cap = problem.constraints.load_cap
        raise InfeasiblePlan(
            f"layer {number}: no placement of its {E} experts on {R} devices of {problem.slots_R[0]} slots keeps to "
            + (f"load cap {cap:g}" if cap is not None else "the pins")
            + " (proven); give a higher --load-cap, more slots or fewer pins"
        )
    value = float(dual_Y @ columns.right_side + R * min(0.0, float(reduced_C.min(initial=0.0))))
    bound = float(np.ceil(value - 1e-6))  # copies are whole
    x_C = np.zeros(len(columns.cost_C))
    x_C[known_X] = answer.x[: len(known_X)]
    return dual_Y, x_C, bound


def _rounded(columns: Columns, x_C: FloatArray, bound: float, problem: Problem, number: int, deadline: Deadline) -> LayerAnswer:
    """A plan from the relaxation: its largest columns that do not overlap, the rest filled up, then the local search of `resplit.py`."""
    E, R, slots = columns.num_experts, columns.num_devices, columns.member_CS.shape[1]
    taken_E = np.zeros(E + 1, dtype=bool)
    sets: list[IntArray] = []
    for column in np.argsort(-x_C, kind="stable")[: np.count_nonzero(x_C)]:
        member_S = columns.member_CS[column]
        if len(sets) < R and not taken_E[member_S].any():
            taken_E[member_S[member_S < E]] = True
            sets.append(member_S)
    held_RS = np.full((R, slots), E, dtype=np.int64)
    held_RS[: len(sets)] = np.array(sets, dtype=np.int64).reshape(-1, slots)
    left = np.flatnonzero(~taken_E[:E])
    free = np.flatnonzero(held_RS.ravel() == E)[::-1]  # the devices without a set first
    held_RS.ravel()[free[: len(left)]] = left
    cost_of = lookup(columns.member_CS, columns.cost_C, E)
    rng = np.random.default_rng(number)
    held_RS, copies = improved(held_RS, cost_of, STIRS, rng, bound, deadline)
    if not np.isfinite(copies):
        return LayerAnswer(None, np.inf, bound)
    return LayerAnswer(_named(problem, number, list(held_RS)), copies, min(bound, copies))


def _program(
    columns: Columns, chosen_X: IntArray, bound: float, deadline: Deadline, problem: Problem, number: int, *, complete: bool = False
) -> LayerAnswer:
    """The integer program over some columns; with `complete` it holds every column that a better plan could use."""
    answer = milp(
        columns.cost_C[chosen_X],
        constraints=LinearConstraint(columns.matrix(chosen_X), columns.right_side, columns.right_side),
        integrality=np.ones(len(chosen_X), dtype=np.int64),
        bounds=Bounds(0, columns.num_devices),  # above 1 for the empty set alone
        options={"time_limit": max(deadline.left_s, 0.05), "mip_rel_gap": 0.0},
    )
    if complete and answer.mip_dual_bound is not None:
        bound = max(bound, min(float(answer.mip_dual_bound), answer.fun if answer.fun is not None else np.inf))
    if answer.x is None:
        return LayerAnswer(None, np.inf, bound)
    used_X = np.repeat(chosen_X, np.rint(answer.x).astype(np.int64))
    device_E = _named(problem, number, [columns.member_CS[column] for column in used_X])
    return LayerAnswer(device_E, float(columns.cost_C[used_X].sum()), bound)


def _named(problem: Problem, number: int, sets: list[IntArray]) -> IntArray:
    """Devices for the chosen sets: pinned ones where they must be, the others on the devices left, by their smallest expert."""
    pinned_E = layer_of(problem, number).pinned_I[: problem.num_experts]
    device_E = np.full(problem.num_experts, EMPTY, dtype=np.int64)
    members = [members_S[members_S < problem.num_experts] for members_S in sets]
    wanted = [int(pinned_E[member].max(initial=EMPTY)) for member in members]
    left = [device for device in range(problem.num_devices) if device not in wanted]
    for member, device in sorted(zip(members, wanted, strict=True), key=lambda pair: int(pair[0].min(initial=problem.num_experts))):
        device_E[member] = device if device != EMPTY else left.pop(0)
    return device_E


def _better(answer: LayerAnswer, other: LayerAnswer) -> LayerAnswer:
    bound = max(answer.bound, other.bound)
    best = min(answer, other, key=lambda found: found.copies)
    return LayerAnswer(best.device_E, best.copies, min(bound, best.copies))


def _again(problem: Problem, number: int) -> tuple[Columns, FloatArray]:
    """Columns and duals of a layer too large to be kept while the others were solved."""
    columns = _columns(problem, layer_of(problem, number))
    return columns, _relaxation(columns, problem, number)[0]


def _nearest(reduced_C: FloatArray, most: int) -> IntArray:
    """Positions of the smallest reduced costs, ascending."""
    if len(reduced_C) <= most:
        return np.arange(len(reduced_C))
    return np.sort(np.argpartition(reduced_C, most)[:most])
