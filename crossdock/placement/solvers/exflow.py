"""Method exflow: ExFlow's integer program (arXiv 2401.08383; solve_affinity.py), aggregated to counts and solved with HiGHS.

The devices are split in stages, nodes first, then devices within nodes, each stage into halves where their number is even (the original's
recursive bipartition). One stage, for the experts e of each layer l that are to be split and the parts c:

    x[l, e, c] in {0, 1}                                     expert e of layer l goes to part c
    hop[l, i, j] >= x[l, i, c] - x[l + 1, j, c], and the reverse      tokens that go from i to j leave their part
    one part, for each l, e                                  sum over c of x[l, e, c] = 1
    equal parts, for each l, c                               sum over e of x[l, e, c] = experts that part c holds
    minimise                                                 sum of tokens[l, i, j] * hop[l, i, j]

The original has one cost variable for every token and layer; tokens that choose alike are one variable here, weighed by their number, which
is the same program. It minimises hops between first choices whatever the problem's objective, and knows no load cap and no pins. The
relaxation is weak: beyond some ten experts HiGHS proves nothing, and the plan is what it found in time, or consecutive experts.
"""

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from crossdock.errors import UsageError
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.solution import solution_of

IntArray = NDArray[np.int64]

MAX_ROWS = 2_000_000  # hop rows of the first stage


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """Raises `UsageError` where the program of the first stage is too large to be built."""
    deadline = Deadline(seconds)
    pairs = np.count_nonzero(problem.affinity.transitions_LEE)
    parts = len(_halves(problem, list(range(problem.num_devices))))
    if 2 * pairs * parts > MAX_ROWS:
        raise UsageError(f"method exflow would build {2 * pairs * parts:,} rows, above {MAX_ROWS:,}; use method auto or sweep")
    device_LE = starts.contiguous(problem)  # the sizes of all parts are taken from here
    level, proven = [list(range(problem.num_devices))], True
    levels_left = _depth(problem, level[0])
    while level:
        below: list[list[int]] = []
        for number, devices in enumerate(level):
            parts_of = _halves(problem, devices)
            if len(parts_of) > 1:
                share = deadline.share(max(levels_left, 1) * (len(level) - number))
                proven = _split(problem, device_LE, parts_of, share) and proven
                below += parts_of
        level, levels_left = below, levels_left - 1
    stopped_by = "done" if proven else "seconds"
    return solution_of(problem, device_LE, method="exflow", seed=seed, seconds=deadline.elapsed_s, stopped_by=stopped_by)


def _halves(problem: Problem, devices: list[int]) -> list[list[int]]:
    """The devices in parts of whole nodes, or of one node: as many parts as the smallest prime factor of their number."""
    node_R = problem.topology.node_of_R
    nodes = sorted({node_R[device] for device in devices})
    units = [[device for device in devices if node_R[device] == node] for node in nodes] if len(nodes) > 1 else [[d] for d in devices]
    if len(units) == 1:
        return [devices]
    num_parts = next(factor for factor in range(2, len(units) + 1) if len(units) % factor == 0)
    size = len(units) // num_parts
    return [list(itertools.chain(*units[part * size : (part + 1) * size])) for part in range(num_parts)]


def _depth(problem: Problem, devices: list[int]) -> int:
    parts = _halves(problem, devices)
    return 1 + max(_depth(problem, part) for part in parts) if len(parts) > 1 else 0


def _split(problem: Problem, device_LE: IntArray, parts: list[list[int]], deadline: Deadline) -> bool:
    """Solve one stage and write it into `device_LE`, each part's experts spread over its devices in order. Whether it was proven."""
    part_of_R = np.full(problem.num_devices, -1)
    for part, devices in enumerate(parts):
        part_of_R[devices] = part
    part_LE = part_of_R[device_LE]
    members = [np.flatnonzero(part_E >= 0) for part_E in part_LE]
    chosen, proven = _program(problem, members, part_LE, len(parts), deadline)
    for layer, (member_X, part_X) in enumerate(zip(members, chosen, strict=True)):
        places = {part: iter(np.sort(device_LE[layer, part_LE[layer] == part]).tolist()) for part in range(len(parts))}
        device_LE[layer, member_X] = [next(places[part]) for part in part_X.tolist()]
    return proven


def _program(
    problem: Problem, members: list[IntArray], part_LE: IntArray, num_parts: int, deadline: Deadline
) -> tuple[list[IntArray], bool]:
    """The part of each layer's members, and whether HiGHS proved it; where it found nothing in time, the parts they are in."""
    first_L = np.concatenate([[0], np.cumsum([len(member_X) for member_X in members])])
    num_x = int(first_L[-1]) * num_parts
    tails, heads, tokens = [], [], []
    for layer in range(problem.num_layers - 1):
        flow_XX = problem.affinity.transitions_LEE[layer][np.ix_(members[layer], members[layer + 1])]
        tail_Y, head_Y = np.nonzero(flow_XX)
        tails.append(first_L[layer] + tail_Y)
        heads.append(first_L[layer + 1] + head_Y)
        tokens.append(flow_XX[tail_Y, head_Y])
    tail_Y, head_Y, token_Y = (np.concatenate(part or [np.zeros(0, dtype=np.int64)]) for part in (tails, heads, tokens))
    num_hops = len(tail_Y)
    width = num_x + num_hops
    hop_Y = num_x + np.arange(num_hops)
    rows, one_row = [], np.arange(num_hops)
    for part in range(num_parts):
        leaves = sparse.csr_array((np.ones(num_hops), (one_row, tail_Y * num_parts + part)), shape=(num_hops, width))
        arrives = sparse.csr_array((np.ones(num_hops), (one_row, head_Y * num_parts + part)), shape=(num_hops, width))
        hop = sparse.csr_array((np.ones(num_hops), (one_row, hop_Y)), shape=(num_hops, width))
        rows += [hop - leaves + arrives, hop + leaves - arrives]
    layer_X = np.repeat(np.arange(len(members)), [len(member_X) for member_X in members])
    column_XC = np.arange(num_x).reshape(-1, num_parts)
    by_member = np.repeat(np.arange(len(layer_X)), num_parts)
    one_part = sparse.csr_array((np.ones(num_x), (by_member, column_XC.ravel())), shape=(len(layer_X), width))
    size_row = (layer_X[:, None] * num_parts + np.arange(num_parts)).ravel()
    equal_parts = sparse.csr_array((np.ones(num_x), (size_row, column_XC.ravel())), shape=(len(members) * num_parts, width))
    size_LC = np.stack([np.bincount(part_E[part_E >= 0], minlength=num_parts) for part_E in part_LE])
    answer = milp(
        np.concatenate([np.zeros(num_x), token_Y]),
        constraints=[
            LinearConstraint(sparse.vstack(rows, format="csr"), 0.0, np.inf),
            LinearConstraint(one_part, 1.0, 1.0),
            LinearConstraint(equal_parts, size_LC.ravel(), size_LC.ravel()),
        ],
        integrality=np.concatenate([np.ones(num_x, dtype=np.int64), np.zeros(num_hops, dtype=np.int64)]),
        bounds=Bounds(0.0, 1.0),
        options={"time_limit": max(deadline.left_s, 0.05)},
    )
    if answer.x is None:
        return [part_E[part_E >= 0] for part_E in part_LE], False
    part_X = answer.x[:num_x].reshape(-1, num_parts).argmax(axis=1)
    return [part_X[begin:end] for begin, end in itertools.pairwise(first_L.tolist())], bool(answer.status == 0)
