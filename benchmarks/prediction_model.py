"""The model of `benchmarks.prediction`: trained once on the default corpus and kept, taken up under any plan, made to favour experts."""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossdock.errors import PeerLost
from crossdock.launch.config import RunConfig, read_config, save_resolved
from crossdock.launch.ranks.jobs import build_model
from crossdock.models.moe import MoELayer
from crossdock.models.transformer import Transformer
from crossdock.placement.homing.forecast import Forecast
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.runtime.adaptation.capture import Capture
from crossdock.runtime.adaptation.choice import strategies_of
from crossdock.runtime.adaptation.windows import Measured, Window
from crossdock.runtime.checkpoints import checkpoint
from crossdock.runtime.data import Corpus
from crossdock.runtime.optimization.engine import Engine
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.training.homing import Homing
from crossdock.runtime.training.metrics import RunDirectory
from crossdock.runtime.training.steps import Step, Stepper
from crossdock.runtime.transport.mesh import Mesh

TRACE_STEPS = 16  # at the end of training: what placement is learnt from
EXPONENT = 1.2
BIAS_PASSES, BIAS_RATE = 40, 0.4


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its training; fp32 on 4 ranks, tokens that return home, de-duplicated, nothing overlapped."""

    block: str = "top_k"
    num_layers: int = 4
    model_width: int = 256
    expert_width: int = 256
    num_experts: int = 16
    sequences: int = 16  # of one rank
    sequence: int = 128
    train_steps: int = 300

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]

    def config(self, directory: Path) -> RunConfig:
        """The training run, which leaves a checkpoint and a trace in `directory`."""
        model = {
            "block": self.block,
            "moe_every": 1 if self.block in ("top_k", "shared_expert") else 2,
            "num_layers": self.num_layers,
            "model_width": self.model_width,
            "num_heads": 4,
            "num_kv_heads": 1,
            "expert_width": self.expert_width,
            "num_experts": self.num_experts,
            "top_k": 1 if self.block.startswith("dgmoe") else 2,
            "gate": {"kind": "softmax_topk"},
            "schedule": {"overlap": self.block not in ("top_k", "shared_expert")},
        }
        return RunConfig.model_validate(
            {
                "run": {"dir": str(directory)},
                "train": {
                    "steps": self.train_steps,
                    "batch_sequences": 4 * self.sequences,
                    "eval_batches": 1,
                    "optimizer": {"lr": 2e-3, "warmup_steps": min(20, self.train_steps)},
                },
                "parallel": {"expert": 4},
                "model": model,
                "data": {"seq_len": self.sequence},
                "device": "cpu",
                "capture": {"steps": min(TRACE_STEPS, self.train_steps // 2)},
                "checkpoint": {"at_end": True, "keep": 1},
            }
        )


def trained(work: Path, shape: Shape) -> RunDirectory:
    """The run directory of the trained model under `work`; trains on this machine, without emulated links, where it is not there yet.

    Raises `PeerLost` where training fails; its own words are on stderr by then.
    """
    directory = RunDirectory((work / f"model-{shape.digest}").resolve())
    if directory.result.is_file() and json.loads(directory.result.read_text())["status"] == "done":
        return directory
    config = work / f"model-{shape.digest}.yaml"
    work.mkdir(parents=True, exist_ok=True)
    save_resolved(shape.config(directory.path), config)
    print(f"training {shape} for {shape.train_steps} steps, once; it stays in {directory.path}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "crossdock", "train", str(config)], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise PeerLost(f"training the model ended with exit code {done.returncode}; its lines above say why")
    return directory


# ---- on every rank


class Trainee:
    """The trained model on this rank under one plan, and its next steps; all trainees read the same batches."""

    def __init__(
        self,
        directory: RunDirectory,
        config: RunConfig,
        corpus: Corpus,
        mesh: Mesh,
        plan: Plan,
        bias_LE: Tensor | None = None,
        homing: tuple[Forecast, Topology] | None = None,
    ) -> None:
        """bias_LE: see `favour`. homing: by what sequences are given to ranks; None: as they are read."""
        self.config, self.mesh, self.plan = config, mesh, plan
        self.model = build_model(config, mesh, plan)
        self.engine = Engine(self.model, mesh, plan, config.train.optimizer)
        folder, manifest, _ = checkpoint.latest(directory.checkpoints, mesh)
        self.state = checkpoint.restore(folder, manifest, self.engine).state.data
        homes = Homing(homing[0], self.model, mesh, homing[1]) if homing is not None else None
        self.stepper = Stepper(self.model, self.engine, corpus, config.data.seq_len, config.train, mesh, homes)
        self.number = config.train.steps
        if bias_LE is not None:
            favour(self.model, bias_LE)
        self.strategies = strategies_of(self.model, config.data.seq_len)
        self.window = self._new_window()
        self.steps: list[Step] = []

    def step(self) -> Step:
        """One optimizer step, recorded."""
        done = self.stepper.run(self.number, self.state, [self.window.capture], stop_asked=False)
        self.window.add(done.flights, done.bytes_by_class, done.step_s, done.exposed_s)
        self.number, self.state = self.number + 1, self.stepper.after(self.state)
        self.steps.append(done)
        return done

    def forget(self) -> None:
        """What was recorded so far does not count."""
        self.window, self.steps = self._new_window(), []

    def measured(self) -> Measured | None:
        """What was recorded, on rank 0, and forget it. All ranks call it."""
        found = self.window.close(self.mesh)
        self.window = self._new_window()
        return found

    def _new_window(self) -> Window:
        return Window(Capture(self.plan.num_layers, self.plan.num_experts, source="steps of benchmarks.prediction"))


def favour(model: Transformer, bias_LE: Tensor) -> None:
    """Add `bias_LE` [L, E], as it then stands, to the gates' logits in every pass: the model chooses some experts more often."""
    for layer, bias_E in zip(model.moe_layers, bias_LE, strict=True):
        _favour(layer, bias_E)


def _favour(layer: MoELayer, bias_E: Tensor) -> None:
    route: Callable[..., Any] = layer.gate._route

    def favouring(x_TD: Tensor, logits_TE: Tensor, *more: Any) -> Any:
        return route(x_TD, logits_TE + bias_E.to(logits_TE.dtype), *more)

    layer.gate._route = favouring  # type: ignore[method-assign, assignment]


def zipf_shares(num_layers: int, num_experts: int) -> Tensor:
    """float64 [L, E]: Zipf's law with EXPONENT, in an order drawn once for each layer."""
    share_E = np.arange(1, num_experts + 1) ** -EXPONENT
    random = np.random.default_rng(0)
    return torch.from_numpy(np.stack([random.permutation(share_E / share_E.sum()) for _ in range(num_layers)]))


@torch.no_grad()
def fit_zipf(trainee: "Trainee") -> Tensor:
    """float64 [L, E]: biases under which the trained model chooses experts as often as `zipf_shares` says, nearly; equal on all ranks.

    Every pass over a batch of training text moves each bias by a part of how far, in logarithms, its expert is from its share. The trainee
    keeps them, and has no more use.
    """
    config, mesh = trainee.config, trainee.mesh
    wanted_LE = zipf_shares(config.model.num_moe_layers, config.model.num_experts)
    bias_LE = torch.zeros_like(wanted_LE)
    favour(trainee.model, bias_LE)
    for number in range(BIAS_PASSES):
        batch = trainee.stepper.sampler.batch(trainee.state, config.train.batch_sequences, rank=mesh.rank, world_size=mesh.world_size)
        token_QP = torch.from_numpy(np.ascontiguousarray(batch.token_BQ))
        load_LE = trainee.model(token_QP, StepContext(config.train.seed, number, False, token_QP.reshape(-1), batch.first_token)).load_LE
        share_LE = load_LE / load_LE.sum(dim=1, keepdim=True)
        bias_LE += BIAS_RATE * (wanted_LE / share_LE.clamp(min=1e-4)).log()
        trainee.state = trainee.stepper.after(trainee.state)
    mesh.ledger.take()
    return bias_LE


def model_of(directory: RunDirectory) -> RunConfig:
    """The configuration that the model was trained with."""
    return read_config(directory.config)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options for the sizes of `Shape`."""
    parser.add_argument("--block", default=Shape.block)
    for name, default in asdict(Shape()).items():
        if isinstance(default, int):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)


def shape_of(options: argparse.Namespace, names: Sequence[str] = tuple(asdict(Shape()))) -> Shape:
    """The shape that the options ask for."""
    return Shape(**{name: getattr(options, name) for name in names})
