"""Method auto, the default: whatever suits the problem's size and the time given, never worse than the plans that it starts from.

Few experts: `dp`, which is exact. Otherwise the quick methods make plans to start from, and most of the time goes to the method that is
strongest for the objective: `columns` where devices add up and their contents can be listed, the chain search for hops, `coherent` for the
seconds of tokens that stay, `anneal` for the rest. Where layers are independent, the best of all plans is taken layer by layer. Where
slots are left, `replicas` adds copies of hot experts to the best plan, and to one in as few slots as can be.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import InfeasiblePlan
from crossdock.placement.solvers import anneal, coherent, columns, dp, eplb, replicas, sweep
from crossdock.placement.solvers.constraints import broken_constraint
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search import chain, chain_search, starts
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.solution import solution_of

IntArray = NDArray[np.int64]

SWEEP_SHARE = 0.25  # of the time, before the strongest method
SINGLE_SHARE = 0.6  # of the time, before copies, where there is room for them
BASE_SHARE = 0.4  # of what is left then, for a plan with other freedom to begin with
DP_STATES = 20_000  # states above which dp may take longer than a search that finds the same


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """Anytime: the best plan that `seconds` allow. Raises `InfeasiblePlan` where none was found within the load cap."""
    return improved(problem, seconds, seed, ())


def improved(problem: Problem, seconds: float, seed: int, begun: Iterable[Solution]) -> Solution:
    """The same, from the solutions of other methods as well: never worse than any of them that keeps to the constraints."""
    deadline, known = Deadline(seconds), list(begun)
    if problem.wants_replicas and problem.mode == "home":
        known += [solver(problem, seconds, seed) for solver in (eplb.solve, eplb.solve_global)]
    found = [solution for solution in known if broken_constraint(problem, solution) is None]
    try:
        if replicas.has_room(problem):
            found.append(_with_copies(problem, deadline, seed, known))
        else:
            found.append(_of_single_copies(problem, deadline, seed, known))
    except InfeasiblePlan:
        if not found:
            raise
    best = min(reversed(found), key=lambda solution: solution.cost)  # of equal ones that of this method, which knows its bound
    return replace(best, plan=replace(best.plan, method="auto", seed=seed), seconds=deadline.elapsed_s)


def _with_copies(problem: Problem, deadline: Deadline, seed: int, given: list[Solution]) -> Solution:
    """Copies added to the best plan found without them, and to a quick one.

    Seconds want experts spread evenly, and so does a load cap on several pieces of routing; copies fill what slots are left then. The best
    of the other objectives fill some devices first.
    """
    tight = replicas.within_fewest_slots(problem)
    strong, quick = (tight, problem) if problem.objective == "seconds" or problem.also else (problem, tight)
    begin = []
    try:
        fitting = [solution for solution in given if (np.count_nonzero(solution.plan.slots_LRS >= 0, axis=2) <= strong.slots_R).all()]
        best = _of_single_copies(strong, deadline.share(1.0 / SINGLE_SHARE), seed, fitting)
        begin.append(best.plan.slots_LRS.astype(np.int64))
    except InfeasiblePlan:
        pass  # copies may keep to a load cap that single experts cannot keep to, and are tried on the other plan
    begin.append(replicas.base(quick, seed, deadline.share(1.0 / BASE_SHARE)))
    return replicas.best_of(problem, begin, seed, deadline, "auto")


def _of_single_copies(problem: Problem, deadline: Deadline, seed: int, given: list[Solution]) -> Solution:
    """The best plan with one copy of each expert, from the single-copy plans among those given."""
    known = [solution.plan.device_of_LE().astype(np.int64) for solution in given if not solution.plan.has_replicas]
    known = [device_LE for device_LE in known if _keeps_pins(problem, device_LE)]
    if coherent.is_about(problem):
        return _of_staying(problem, seed, deadline, known)
    if not dp.unsuited(problem) and dp._num_states(problem) <= DP_STATES:
        return _relabelled(problem, dp.solve(problem, deadline.left_s, seed), seed, deadline)
    if problem.objective == "hops":
        return _of_chain(problem, seed, deadline, known)
    return _of_layers(problem, seed, deadline, known)


def _of_chain(problem: Problem, seed: int, deadline: Deadline, known: list[IntArray]) -> Solution:
    found, stopped_by = chain_search.search(problem, seed, deadline, (starts.random(problem, seed), *known))
    chain.check_load_cap(found)
    return solution_of(problem, found.device_LE, method="auto", seed=seed, seconds=deadline.elapsed_s, stopped_by=stopped_by)


def _of_staying(problem: Problem, seed: int, deadline: Deadline, known: list[IntArray]) -> Solution:
    device_LE, stopped_by = coherent.search(problem, seed, deadline, known)
    return solution_of(problem, device_LE, method="auto", seed=seed, seconds=deadline.elapsed_s, stopped_by=stopped_by)


def _of_layers(problem: Problem, seed: int, deadline: Deadline, known: list[IntArray]) -> Solution:
    plans = [starts.contiguous(problem), starts.random(problem, seed), starts.balanced(problem), starts.clustered(problem), *known]
    exchanged_L = sweep.exchanged_layers(problem, seed, deadline.share(1.0 / SWEEP_SHARE))
    plans.append(np.stack([placed.device_I[: problem.num_experts] for placed in exchanged_L]))
    bound = None
    if columns.unsuited(problem):
        placed_L, stopped_by = anneal.search_layers(problem, seed, deadline, plans)
    else:
        answers = columns.solve_layers(problem, deadline)
        bound = sum(answer.bound for answer in answers) / (problem.affinity.num_tokens * problem.num_layers)
        found = [plans[0][number] if answer.device_E is None else answer.device_E for number, answer in enumerate(answers)]
        met = [np.stack(found)] if problem.also else [*plans, np.stack(found)]  # the others do not know the loads of other routing
        placed_L, stopped_by = anneal.best_of(problem, met), "seconds" if deadline.passed else "done"
    anneal.check_load_cap(problem, placed_L)
    device_LE = np.stack([placed.device_I[: problem.num_experts] for placed in placed_L])
    return solution_of(problem, device_LE, method="auto", seed=seed, seconds=deadline.elapsed_s, stopped_by=stopped_by, bound=bound)


def _keeps_pins(problem: Problem, device_LE: IntArray) -> bool:
    return all(device_LE[pin.layer, pin.expert] == pin.device for pin in problem.constraints.pins)


def _relabelled(problem: Problem, solution: Solution, seed: int, deadline: Deadline) -> Solution:
    device_LE = solution.plan.device_of_LE().astype(np.int64)
    return solution_of(problem, device_LE, method="auto", seed=seed, seconds=deadline.elapsed_s, stopped_by="optimal", proven=True)
