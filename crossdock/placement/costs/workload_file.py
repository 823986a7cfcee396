"""Reads a workload from its own file, or from the YAML of a training run, whose sizes say the same: `--workload CONFIG|FILE`.

Placement does not know the launcher, so the few keys that it needs are read here with the run configuration's own defaults; a test holds
the two equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from crossdock import strict_yaml
from crossdock.errors import BadConfig
from crossdock.placement.costs.coherent import Context
from crossdock.placement.costs.cost import DISPATCHES, WIRE_NAMES, Dispatch, WireName, Workload
from crossdock.strict_yaml import Document

_RUN_SECTIONS = ("model", "train", "parallel", "data", "precision")
_EXPERT_MATRICES = {"swiglu": 3, "gelu": 2}


@dataclass(frozen=True)
class ModelShape:
    """What a plan must agree with: MoE layers, experts and the devices of an expert-parallel group."""

    num_layers: int
    num_experts: int
    num_devices: int


class Routed(NamedTuple):
    """How a kind of block uses its MoE layer: what `models.kinds` says, as far as a plan is concerned."""

    sharing: int
    """Blocks that share one MoE layer; 0 where there is none."""
    turns: int
    """How often a forward pass routes each token in a layer; every turn travels like a micro-batch of its own."""


BLOCKS = {
    "dense": Routed(0, 1),
    "top_k": Routed(1, 1),
    "shared_expert": Routed(1, 1),
    "scmoe": Routed(1, 1),
    "dgmoe": Routed(1, 2),
    "dgmoe_share": Routed(2, 4),
}


def load_workload(path: Path) -> Workload:
    """The workload that a file describes. Raises `MissingInput` and `BadConfig`."""
    document = strict_yaml.load(path)
    if not is_run(document):
        return Workload.load(path)
    keys = _Keys(document)
    width = keys.integer("model.model_width", 128)
    mlp_width = keys.integer("model.mlp_width", -(-8 * width // 24) * 8)
    expert_parallel = keys.integer("parallel.expert", 1)
    micro_batches = keys.integer("train.accumulate", 1)
    num_ranks = keys.integer("parallel.ranks", expert_parallel)
    sequences = keys.integer("train.batch_sequences", 32) // (num_ranks * micro_batches)
    if sequences < 1:
        raise BadConfig(
            f"{path}: train.batch_sequences gives less than one sequence to each of {num_ranks} ranks x {micro_batches} micro-batches; "
            "raise it"
        )
    compute = keys.choice("precision.compute", ("fp32", "bf16", "fp64"), "fp32")
    return Workload(
        tokens_per_rank=sequences * keys.integer("data.seq_len", 128),
        model_width=width,
        expert_width=keys.integer("model.expert_width", mlp_width),
        wire=cast(WireName, keys.choice("precision.wire", WIRE_NAMES, compute)),
        expert_matrices=_EXPERT_MATRICES[keys.choice("model.activation", _EXPERT_MATRICES, "swiglu")],
        dispatch=cast(Dispatch, keys.choice("dispatch", DISPATCHES, "deduplicated")),
        gradient_bytes=8 if compute == "fp64" else 4,
        micro_batches=micro_batches * BLOCKS[keys.choice("model.block", BLOCKS, "scmoe")].turns,
    )


def load_context(path: Path) -> Context:
    """What attention asks of the links where tokens stay: keys and values of a run's model; nothing is known from a workload file."""
    document = strict_yaml.load(path)
    if not is_run(document):
        return Context()
    keys = _Keys(document)
    heads = keys.integer("model.num_heads", 4)
    kv_heads = keys.integer("model.num_kv_heads", heads)
    head_width = keys.integer("model.head_dim", keys.integer("model.model_width", 128) // heads)
    element_bytes = {"fp32": 4, "bf16": 2, "fp64": 8}[keys.choice("precision.compute", ("fp32", "bf16", "fp64"), "fp32")]
    return Context(2 * kv_heads * head_width * element_bytes, attentions=keys.integer("model.moe_every", 2))


def load_shape(path: Path) -> ModelShape:
    """The shape of the plan that a run asks for. Raises `MissingInput` and `BadConfig`."""
    keys = _Keys(strict_yaml.load(path))
    sharing = BLOCKS[keys.choice("model.block", BLOCKS, "scmoe")].sharing
    num_blocks = keys.integer("model.num_layers", 4) // keys.integer("model.moe_every", 2)
    return ModelShape(num_blocks // sharing if sharing else 0, keys.integer("model.num_experts", 8), keys.integer("parallel.expert", 1))


def is_run(document: Document) -> bool:
    """Whether a document is the configuration of a run: it has at least one of a run's sections."""
    return isinstance(document.value, Mapping) and any(isinstance(document.value.get(name), Mapping) for name in _RUN_SECTIONS)


class _Keys:
    """Typed look-ups by dotted name, with a default where the key is absent or null."""

    def __init__(self, document: Document) -> None:
        self.document = document

    def value(self, name: str) -> Any:
        value: Any = self.document.value
        for part in name.split("."):
            if not isinstance(value, Mapping):
                return None
            value = value.get(part)
        return value

    def integer(self, name: str, default: int) -> int:
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadConfig(f"{self._where(name)}: `{name}` is {value!r}; give an integer of at least 1")
        return value

    def choice(self, name: str, choices: Any, default: str) -> str:
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, str) or value not in choices:
            raise BadConfig(f"{self._where(name)}: `{name}` is {value!r}; choose from {', '.join(choices)}")
        return str(value)

    def _where(self, name: str) -> str:
        return self.document.where(tuple(name.split(".")))
