"""Traffic under strategies: what each layer of a trace sends under a dispatch and gathered experts, and the evaluator under all of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from crossdock.placement.costs.cost import BlockCost, Dispatch, Workload, step_seconds
from crossdock.placement.costs.evaluate import Evaluation, evaluate
from crossdock.placement.records.plan import Plan, choose_replica
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.strategies.choice import Traffic
from crossdock.placement.strategies.gather import gathered_plan, weight_hops
from crossdock.placement.strategies.strategy import Strategy

Gathered = tuple[int, ...]


def traffic_of(
    trace: Trace,
    plan: Plan,
    topology: Topology,
    workload: Workload,
    dispatch: Dispatch,
    gathered_L: Sequence[Gathered],
    weight_element_bytes: int,
) -> tuple[Traffic, ...]:
    """What each layer sends in one micro-batch of `workload.tokens_per_rank` tokens a device, with its own set of gathered experts.

    The rows are the evaluator's, of the plan that has the gathered experts everywhere.
    """
    seen = gathered_plan(plan, gathered_L) if any(gathered_L) else plan
    evaluation = evaluate(trace, seen, topology, dataclasses.replace(workload, dispatch=dispatch))
    scale = workload.tokens_per_rank * topology.num_devices / trace.num_tokens
    expert_bytes = workload.expert_parameters * weight_element_bytes
    device_LRE = choose_replica(plan, topology.node_of_R) // plan.slots_per_device
    return tuple(
        Traffic(
            dispatch,
            gathered,
            evaluation.hops_HLRR[:, layer] * scale,
            evaluation.rows_LR[layer] * scale,
            _weight_hops(device_LRE[layer], topology, gathered, expert_bytes),
        )
        for layer, gathered in enumerate(gathered_L)
    )


def evaluate_strategies(trace: Trace, plan: Plan, topology: Topology, workload: Workload, strategies: Sequence[Strategy]) -> Evaluation:
    """The evaluator's replay with each layer under its own dispatch and gathered experts. Its seconds know no chunks.

    `strategies` holds one for each layer of the plan.
    """
    gathered_L = [strategy.gathered for strategy in strategies]
    seen = gathered_plan(plan, gathered_L) if any(gathered_L) else plan
    dispatches = sorted({strategy.dispatch for strategy in strategies})
    whole = evaluate(trace, seen, topology, dataclasses.replace(workload, dispatch=dispatches[0]), trained=plan)
    if len(dispatches) == 1:
        return whole
    num_hops = 2 if "hierarchical" in dispatches else 1
    hops_HLRR = np.zeros((num_hops, *whole.copies_LRR.shape), dtype=whole.copies_LRR.dtype)
    copies_LRR, block_L = np.array(whole.copies_LRR), {name: np.array(values) for name, values in vars(whole.block).items()}
    bytes_by_class = np.zeros(len(whole.bytes_by_class), dtype=np.int64 if whole.exact else np.float64)
    for dispatch in dispatches:
        layers = [layer for layer, strategy in enumerate(strategies) if strategy.dispatch == dispatch]
        part = evaluate(
            dataclasses.replace(trace, experts_TLK=trace.experts_TLK[:, layers], weights_TLK=None),
            Plan(seen.slots_LRS[layers], seen.num_experts, seen.mode),
            topology,
            dataclasses.replace(workload, dispatch=dispatch),
        )
        copies_LRR[layers] = part.copies_LRR
        hops_HLRR[: len(part.hops_HLRR), layers] = part.hops_HLRR
        bytes_by_class += np.array(part.bytes_by_class)
        for name, values in vars(part.block).items():
            block_L[name][layers] = values
    block = BlockCost(**block_L)
    first, second, third = bytes_by_class.tolist()
    return dataclasses.replace(
        whole,
        copies_LRR=copies_LRR,
        hops_HLRR=hops_HLRR,
        bytes_by_class=(first, second, third),
        block=block,
        step_s=step_seconds(block, workload) + whole.gradient_s,
    )


def load_RE(trace: Trace, layer: int, num_devices: int, workload: Workload) -> np.ndarray:
    """float64 [R, E]: rows of one micro-batch by home and expert."""
    assert trace.home_T is not None, "the load by home needs a trace that knows homes"
    counts_RE = np.zeros((num_devices, trace.num_experts + 1))
    choice_TK = np.minimum(trace.experts_TLK[:, layer], trace.num_experts)  # a dropped one goes to one column more
    np.add.at(counts_RE, (np.repeat(trace.home_T, trace.top_k), choice_TK.reshape(-1)), 1.0)
    return counts_RE[:, :-1] * (workload.tokens_per_rank * num_devices / trace.num_tokens)


def _weight_hops(device_RE: np.ndarray, topology: Topology, gathered: Gathered, expert_bytes: int) -> np.ndarray:
    """float64 [G, R, R]: bytes of weights; no hop at all where nothing is gathered."""
    num_devices = topology.num_devices
    hops = [hop for hop in weight_hops(device_RE, topology.node_of_R, gathered) if hop]
    bytes_GRR = np.zeros((len(hops), num_devices, num_devices))
    for number, hop in enumerate(hops):
        for transfer in hop:
            bytes_GRR[number, transfer.source, transfer.target] += expert_bytes
    return bytes_GRR
