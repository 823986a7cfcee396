"""Every block x gate x dispatcher x plan x schedule: n ranks equal one rank, and one rank equals the slow reference; all gradients.

The default run takes a sample in which every two options of two different kinds meet at least once; `make test-slow` takes every block with
every gate, dispatcher and plan, the rest by chance, on four ranks and two nodes.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from crossdock.models import blocks
from crossdock.models.moe import MoELayer
from crossdock.runtime.dispatch import reference
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.dispatcher import DISPATCHERS
from crossdock.runtime.experts.overlap import Schedule
from tests.models.step import Case, Outcome, check_equal, run_step
from tests.pool import Pool

BLOCKS: dict[str, dict[str, Any]] = {
    "top_k": {"block": "top_k"},
    "top_k_every": {"block": "top_k", "moe_every": 1},
    "shared": {"block": "shared_expert"},
    "shared_every": {"block": "shared_expert", "moe_every": 1},
    "scmoe_every": {"block": "scmoe", "moe_every": 1, "shortcut": {"coefficient": "cg2"}},
    **{
        f"scmoe_pos{position}_{coefficient}": {"block": "scmoe", "shortcut": {"position": position, "coefficient": coefficient}}
        for position in (1, 2, 3)
        for coefficient in ("direct", "cg1", "cg2")
    },
    **{f"dgmoe_pos{position}": {"block": "dgmoe", "shortcut": {"position": position}} for position in (1, 2, 3)},
    "dgmoe_every": {"block": "dgmoe", "moe_every": 1},
    "dgmoe_share": {"block": "dgmoe_share", "num_layers": 4},
    "dgmoe_share_every": {"block": "dgmoe_share", "moe_every": 1},
}
GATES: dict[str, dict[str, Any]] = {
    "noisy_top1": {"top_k": 1, "gate": {"kind": "noisy_topk"}},
    "noisy_top2": {"top_k": 2, "gate": {"kind": "noisy_topk"}},
    "switch": {"top_k": 1, "gate": {"kind": "switch", "jitter": 0.2}},
    "gshard": {"top_k": 2, "gate": {"kind": "gshard"}},
    "softmax_top2": {"top_k": 2, "gate": {"kind": "softmax_topk"}},
    "deepseek": {"top_k": 2, "gate": {"kind": "deepseek_v3", "num_groups": 2, "top_groups": 2, "sequence_loss": 0.1}},
}
CAPACITIES: dict[str, dict[str, Any]] = {
    "dropless": {"policy": "dropless"},
    "position": {"policy": "fixed", "factor": 0.75},
    "probability": {"policy": "fixed", "factor": 0.75, "order": "probability"},
    "batch": {"policy": "fixed", "factor": 0.75, "order": "batch", "group_tokens": 12},
    "batch_max": {"policy": "batch_max", "factor": 0.6},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "overlapped": {},
    "sequential": {"overlap": False},
    "chunked": {"forward_chunks": 3, "backward_chunks": 2},
}
PLANS = ["contiguous", "random", "uneven", "copies"]
OPTIONS = {
    "block": list(BLOCKS),
    "gate": list(GATES),
    "capacity": list(CAPACITIES),
    "dispatch": sorted(DISPATCHERS),
    "plan": PLANS,
    "schedule": list(SCHEDULES),
}
Picked = dict[str, str]


def pairwise(seed: int) -> list[Picked]:
    """Few combinations of OPTIONS in which every two options meet: each new one is the best of some drawn at random."""
    draw = random.Random(seed)
    names = list(OPTIONS)

    def pairs(picked: Picked) -> set[tuple[str, str, str, str]]:
        return {(a, picked[a], b, picked[b]) for a, b in itertools.combinations(names, 2)}

    missing = {(a, one, b, other) for a, b in itertools.combinations(names, 2) for one, other in itertools.product(OPTIONS[a], OPTIONS[b])}
    chosen = []
    while missing:
        a, one, b, other = min(missing)  # one pair that is missing for certain, the rest by chance
        drawn = [{name: draw.choice(options) for name, options in OPTIONS.items()} | {a: one, b: other} for _ in range(30)]
        best = max(drawn, key=lambda picked: len(pairs(picked) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def case_of(picked: Picked, expert_parallel: int, nodes: tuple[int, ...]) -> Case:
    gate = GATES[picked["gate"]]
    model = BLOCKS[picked["block"]] | gate | {"gate": gate["gate"] | {"capacity": CAPACITIES[picked["capacity"]]}}
    model |= {"schedule": SCHEDULES[picked["schedule"]]}
    return Case(model, expert_parallel, picked["plan"], picked["dispatch"], sequences=2 * len(nodes), nodes=nodes)


def name_of(picked: Picked) -> str:
    return "-".join(picked.values())


def run_slowly(
    _schedule: Schedule, moe: MoELayer, x_TD: Tensor, assignment: Assignment, stages: Sequence[Callable[[Any], Any]], stream: Any
) -> tuple[Any, Tensor]:
    """`overlap.run` on one rank with nothing but loops: the stages, then the routed experts, token by token."""
    assert moe.mesh.world_size == 1
    for stage in stages:
        stream = stage(stream)

    def expert(number: int, x_D: Tensor) -> Tensor:
        gate_D, up_D = (moe.bank.inner[number] @ x_D).chunk(2)
        return (F.silu(gate_D) * up_D) @ moe.bank.outer[number]

    return stream, reference.moe(x_TD, assignment, expert)


ALONE: dict[str, tuple[Outcome, Outcome]] = {}


def check(ranks: Pool, world_size: int, case: Case) -> None:
    """n ranks against one, and one (once per model) against the reference."""
    alone = replace(case, expert_parallel=1, plan="contiguous", dispatch="flat", nodes=None)
    if repr(alone) not in ALONE:
        fast = run_step(0, 1, alone)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "run", run_slowly)
            slow = run_step(0, 1, alone)
        check_equal([fast], slow, 1)
        ALONE[repr(alone)] = fast, slow
    fast, slow = ALONE[repr(alone)]
    outcomes = ranks.run(world_size, run_step, case)
    check_equal(outcomes, slow, case.expert_parallel)
    assert all(gradient.isfinite().all() for gradient in slow.dense.values())
    assert any(gradient.any() for gradient in slow.experts.values())


@pytest.mark.parametrize("picked", pairwise(seed=1), ids=name_of)
def test_every_pair_of_options(ranks: Pool, picked: Picked) -> None:
    check(ranks, 2, case_of(picked, expert_parallel=2, nodes=(0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", sorted(DISPATCHERS))
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_combination(ranks: Pool, block: str, gate: str, dispatch: str) -> None:
    draw = random.Random(f"{block} {gate} {dispatch}")
    for plan in PLANS:
        capacity, schedule = draw.choice(list(CAPACITIES)), draw.choice(list(SCHEDULES))
        picked = {"block": block, "gate": gate, "capacity": capacity, "dispatch": dispatch, "plan": plan, "schedule": schedule}
        check(ranks, 4, case_of(picked, expert_parallel=4, nodes=(0, 0, 1, 1)))


def test_the_sample_is_complete() -> None:
    sample = pairwise(seed=1)
    met = {(a, picked[a], b, picked[b]) for picked in sample for a, b in itertools.combinations(OPTIONS, 2)}
    assert len(met) == sum(len(OPTIONS[a]) * len(OPTIONS[b]) for a, b in itertools.combinations(OPTIONS, 2))
