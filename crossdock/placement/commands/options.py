"""Options that several `crossdock plan` commands share, each declared once with its help."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from crossdock.placement.commands.planning import Asked

METHODS = "contiguous, random, balance, eplb, eplb_global, exflow, moetuner, dp, sweep, anneal, columns, ilp, replicas, auto"
DEFAULT_METHODS = "contiguous,random,balance,eplb,anneal,auto"

TraceOption = Annotated[Path, typer.Option("--trace", help="Routing to plan for: .npz, or .npy of [tokens, layers(, choices)].")]
TopologyOption = Annotated[str, typer.Option("--topology", help="A topology.yaml, or a preset such as 2x8-nvlink-ib.")]
ModeOption = Annotated[str, typer.Option("--mode", help="home: tokens return after every layer. coherent: they stay (top-1 only).")]
ObjectiveOption = Annotated[str, typer.Option("--objective", help="seconds, devices, nodes or hops.")]
WorkloadOption = Annotated[
    Path | None, typer.Option("--workload", help="A run's YAML or a workload file; without it a model of DeepSeek-V2-Lite's size.")
]
LoadCapOption = Annotated[float | None, typer.Option("--load-cap", help="Most load of a device in any layer, over the mean device's.")]
SlotsOption = Annotated[int | None, typer.Option("--slots", help="Slots of each device in each layer; as many as needed if left out.")]
SpareSlotsOption = Annotated[int | None, typer.Option("--spare-slots", help="Slots beyond one copy of each expert, for more of hot ones.")]
SpareBytesOption = Annotated[
    float | None, typer.Option("--spare-bytes", help="Memory of each device for such copies with optimizer state, over all layers.")
]
ReplicasOption = Annotated[int | None, typer.Option("--replicas", help="At most so many such copies in a layer.")]
AlsoTraceOption = Annotated[
    list[Path] | None, typer.Option("--also-trace", help="More routing: counted in, and the load cap holds on each; may be repeated.")
]
LoadPiecesOption = Annotated[
    int, typer.Option("--load-pieces", min=1, help="The cap holds on each of so many pieces of the routing: loads drift between texts.")
]
NodeWeightOption = Annotated[float, typer.Option("--node-weight", help="Objective hops: what one between nodes counts.")]
PinOption = Annotated[
    list[str] | None, typer.Option("--pin", metavar="LAYER:EXPERT:DEVICE", help="An expert that stays where it is; may be repeated.")
]
MemoryOption = Annotated[
    float | None, typer.Option("--memory-fraction", help="Share of each device's memory for experts and their optimizer state.")
]
BoundSecondsOption = Annotated[float, typer.Option("--bound-seconds", min=0.0, help="Time for a proven bound beyond the quick ones.")]
NumExpertsOption = Annotated[int | None, typer.Option("--num-experts", min=1, help="Experts per layer, where the trace does not say.")]
SecondsOption = Annotated[float, typer.Option("--seconds", help="Cap on the search of one method.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Same seed and same iterations: same plan.")]
EvalTraceOption = Annotated[Path | None, typer.Option("--eval-trace", help="Held-out routing to score the same plans on.")]
HomingOption = Annotated[bool, typer.Option("--homing", help="Plan experts and the homes of sequences together.")]
SequenceTokensOption = Annotated[
    int | None, typer.Option("--sequence-tokens", min=1, help="Homing: cut the trace into sequences of so many tokens.")
]
BatchSequencesOption = Annotated[
    int | None,
    typer.Option("--batch-sequences", min=1, help="Homing: sequences that are given homes together; the workload's if left out."),
]
PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.", show_default=False)]


@dataclass(frozen=True)
class ProblemOptions:
    """The options that say what is planned for; every field is one."""

    trace: TraceOption
    topology: TopologyOption
    mode: ModeOption = "home"
    objective: ObjectiveOption = "seconds"
    workload: WorkloadOption = None
    load_cap: LoadCapOption = None
    slots: SlotsOption = None
    spare_slots: SpareSlotsOption = None
    spare_bytes: SpareBytesOption = None
    replicas: ReplicasOption = None
    memory_fraction: MemoryOption = None
    pin: PinOption = None
    node_weight: NodeWeightOption = 1.0
    num_experts: NumExpertsOption = None
    eval_trace: EvalTraceOption = None

    def read(self, also_trace: Sequence[Path] | None = None, load_pieces: int = 1) -> "Asked":
        """Load the files that the options name, and hold them against one another. Raises the errors of its parts."""
        from crossdock.placement.commands.planning import Asked, constraints_of

        room = {"spare_slots": self.spare_slots, "spare_bytes": self.spare_bytes, "replicas": self.replicas}
        return Asked.read(
            self.trace,
            self.topology,
            mode=self.mode,
            objective=self.objective,
            workload_path=self.workload,
            constraints=constraints_of(self.load_cap, self.slots, self.memory_fraction, self.pin or (), **room),  # type: ignore[arg-type]
            node_weight=self.node_weight,
            also_paths=also_trace or (),
            load_pieces=load_pieces,
            num_experts=self.num_experts,
            eval_path=self.eval_trace,
        )


def with_problem_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command of `ProblemOptions` and options of its own, all of them with defaults, as one that the command line can call."""
    names = [field.name for field in fields(ProblemOptions)]
    shared = list(inspect.signature(ProblemOptions).parameters.values())
    own = list(inspect.signature(command).parameters.values())[1:]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        command(ProblemOptions(**{name: given.pop(name) for name in names}), **given)

    called.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in (*shared, *own)} | {"return": None}
    return called
