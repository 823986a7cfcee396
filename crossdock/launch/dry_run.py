"""What a run would be, said before any rank starts: its groups, its plan, and the memory of every rank; on a machine with no device."""

from typing import Any

import numpy as np

from crossdock.launch.config import RunConfig
from crossdock.launch.request import check_replan, check_world, read_inputs
from crossdock.placement.records.plan import Plan
from crossdock.runtime.data import sequences_per_rank
from crossdock.runtime.training.metrics import readable_bytes

KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers", "total")


def describe(config: RunConfig, world_size: int, launcher: str | None = None) -> dict[str, Any]:
    """`{world_size, groups, plan, transport, tokens_per_micro_batch, memory}` of a run on `world_size` ranks that `launcher` starts (None:
    any); raises what its ranks would raise before the first step.

    memory has an entry for each rank of an expert group; copies of the group are alike. Bytes hold where tokens spread evenly over experts.
    """
    from crossdock.models.memory import Zero, rank_memory
    from crossdock.runtime.training.steps import device_shares_LER

    inputs, num_ranks, model = read_inputs(config), config.parallel.expert, config.model
    check_replan(config)
    check_world(config, world_size, launcher)
    tokens = sequences_per_rank(config.train.batch_sequences, world_size, config.train.accumulate) * config.data.seq_len
    plan = inputs.plan
    if plan is None and model.num_moe_layers:
        plan = Plan.contiguous(model.num_moe_layers, model.num_experts, num_ranks)
    node_of_R = tuple(range(num_ranks)) if inputs.topology is None else inputs.topology.node_of_R
    share_LER = np.zeros((0, model.num_experts, num_ranks)) if plan is None else device_shares_LER(plan, node_of_R)
    rows_LR = share_LER.mean(axis=1) * tokens * num_ranks * model.top_k
    zero = None
    if config.engine == "deepspeed":
        zero = Zero(config.deepspeed.stage, world_size, world_size // num_ranks, config.deepspeed.bucket_elements)
    fsdp_ranks = world_size if config.parallel.dense_sharding == "fsdp2" else 1
    memory = []
    for rank in range(num_ranks):
        visitors = 0 if plan is None else _visitors(plan, rank, model.gathered_experts)
        experts = 0 if plan is None else int(plan.held_LR[:, rank].sum())
        needed = rank_memory(
            model,
            config.precision.compute,
            experts,
            tokens,
            config.data.seq_len,
            rows_LR[:, rank].tolist(),
            visitors,
            config.dispatch == "flat",
            zero,
            fsdp_ranks,
        )
        memory.append({"expert_rank": rank, **needed.as_json()})
    return {
        "world_size": world_size,
        "groups": _groups(world_size, num_ranks, None if inputs.topology is None else inputs.topology.node_of_R),
        "plan": None if plan is None else _plan(plan),
        "transport": config.parallel.transport,
        "tokens_per_micro_batch": tokens,
        "memory": memory,
    }


def _groups(world_size: int, num_ranks: int, node_of_R: tuple[int, ...] | None) -> dict[str, Any]:
    """The ranks of every expert group, the copies of every expert rank, and the nodes where a topology declares them."""
    starts = range(0, world_size, num_ranks)
    nodes = None
    if node_of_R is not None:
        num_nodes = len(set(node_of_R))
        nodes = [node_of_R[rank % num_ranks] + num_nodes * (rank // num_ranks) for rank in range(world_size)]
    return {
        "expert_groups": [list(range(start, start + num_ranks)) for start in starts],
        "copies": [list(range(rank, world_size, num_ranks)) for rank in range(num_ranks)],
        "node_of_rank": nodes,
    }


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "method": plan.method,
        "hash": plan.digest,
        "layers": plan.num_layers,
        "slots_per_rank": plan.slots_per_device,
        "experts_per_rank": [{"fewest": int(held_L.min()), "most": int(held_L.max())} for held_L in plan.held_LR.T],
    }


def _visitors(plan: Plan, rank: int, gathered: list[int]) -> int:
    """Over all layers, how many gathered experts `rank` holds no copy of."""
    return sum(expert not in plan.slots_LRS[layer, rank] for layer in range(plan.num_layers) for expert in gathered)


def comment(facts: dict[str, Any]) -> str:
    """The same for people, as comments below the configuration's YAML."""
    groups, plan = facts["groups"], facts["plan"]
    size, num_groups = len(groups["expert_groups"][0]), len(groups["expert_groups"])
    lines = [_counted(facts["world_size"], "rank")]
    if plan is not None:
        lines[0] += f" in {_counted(num_groups, 'expert group')} of {size}: {_spans(groups['expert_groups'])}"
    if groups["node_of_rank"] is not None:
        lines.append(f"{_counted(len(set(groups['node_of_rank'])), 'node')}, as the topology declares them")
    if facts["transport"] == "mpi":
        lines.append("tokens travel over MPI: start the ranks by mpirun")
    spread = ""
    if plan is not None:
        fewest, most = (choose(held[name] for held in plan["experts_per_rank"]) for name, choose in (("fewest", min), ("most", max)))
        held = _counted(most, "expert") if fewest == most else f"{fewest} to {most} experts"
        layers = "the MoE layer" if plan["layers"] == 1 else f"each of {plan['layers']} MoE layers"
        lines.append(f"plan {plan['method'] or 'given'} ({plan['hash'][:12]}): {held} a rank in {layers}")
        spread = ", spread evenly over the experts"
    lines.append(f"memory of a rank for {facts['tokens_per_micro_batch']:,} tokens a micro-batch{spread}:")
    alike = _alike(facts["memory"])
    title = "expert rank" if len(alike) > 1 else ""
    lines.append("  " + title.ljust(14) + "".join(kind.rjust(13) for kind in KINDS))
    for ranks, row in alike:
        name = ranks if len(alike) > 1 else "every rank"
        lines.append("  " + name.ljust(14) + "".join(readable_bytes(row[kind]).rjust(13) for kind in KINDS))
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _alike(memory: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Runs of neighbouring expert ranks that need the same, as `3-5`, each with what one of them needs."""
    runs: list[list[dict[str, Any]]] = []
    for row in memory:
        if runs and all(row[kind] == runs[-1][0][kind] for kind in KINDS):
            runs[-1].append(row)
        else:
            runs.append([row])
    return [(_spans([[row["expert_rank"] for row in run]]), run[0]) for run in runs]


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _spans(groups: list[list[int]]) -> str:
    shown = [str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups]
    return ", ".join(shown) if len(shown) <= 4 else f"{shown[0]}, {shown[1]}, ..., {shown[-1]}"
