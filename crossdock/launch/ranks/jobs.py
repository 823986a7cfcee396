"""The jobs that ranks do together once they have joined: each is `(request, env, mesh) -> fields of its JSON object`."""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crossdock import __version__, atomic
from crossdock.errors import BadConfig
from crossdock.launch.config import RunConfig, resolved, save_resolved
from crossdock.launch.ranks.progress import watched
from crossdock.launch.ranks.redaction import recorded, redacted
from crossdock.launch.ranks.worker_env import WorkerEnv
from crossdock.launch.request import Request, check_vocabulary, read_inputs, run_directory
from crossdock.models.transformer import Transformer
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.trace import concatenate
from crossdock.runtime.adaptation.capture import Capture
from crossdock.runtime.adaptation.probe import probe as measure
from crossdock.runtime.checkpoints import checkpoint
from crossdock.runtime.data import Corpus, Sampler, load_corpus
from crossdock.runtime.optimization.engine import Engine
from crossdock.runtime.optimization.fsdp import shard_dense
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.training.metrics import RunDirectory
from crossdock.runtime.training.train import train as run_training
from crossdock.runtime.training.training import Training
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.mesh import Mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}

Job = Callable[[Request, WorkerEnv, Mesh], dict[str, Any]]


def build_model(config: RunConfig, mesh: Mesh, plan: Plan | None) -> Transformer:
    """The configured model on this rank, its experts where `plan` puts them."""
    dtype = DTYPES[config.precision.compute]
    return Transformer(config.model, mesh, plan, dtype, config.train.seed, dispatch=config.dispatch, wire=config.precision.wire)


def build_for_training(config: RunConfig, mesh: Mesh, plan: Plan | None) -> Transformer:
    """The configured model, its dense parameters in parts where the configuration asks for that and there is somebody to share with."""
    model = build_model(config, mesh, plan)
    if config.parallel.dense_sharding == "fsdp2" and mesh.world_size > 1:
        shard_dense(model, model.blocks, {parameter for moe in model.moe_layers for parameter in moe.parameters()}, mesh)
    return model


def read_corpus(config: RunConfig) -> Corpus:
    """The configured corpus; raises `BadConfig` where its tokens do not fit the model's vocabulary."""
    corpus = load_corpus(config.data)
    check_vocabulary(config, corpus.vocab_size)
    return corpus


def train(request: Request, env: WorkerEnv, mesh: Mesh) -> dict[str, Any]:
    """Train to the target step in the run directory that `prepare_directory` has made ready."""
    config, inputs = request.config, read_inputs(request.config)
    resume = collectives.broadcast_object(request.arguments.get("resume"), mesh)
    directory = RunDirectory(run_directory(config))
    if mesh.rank == 0:
        save_resolved(config, directory.config)
        atomic.write_json(directory.environment, describe_environment(env, mesh))
    plan = inputs.plan
    if plan is None and config.model.num_moe_layers:
        plan = Plan.contiguous(config.model.num_moe_layers, config.model.num_experts, mesh.expert_parallel)
    corpus = read_corpus(config)
    collectives.check_same(given(config, plan, corpus), mesh)
    model = build_for_training(config, mesh, plan)
    if config.fault.inject is not None:
        from crossdock.launch.ranks.faults import inject

        inject(Path(config.fault.inject), mesh.rank)
    with watched(config, mesh.rank) as progress:
        result = run_training(
            Training(
                model=model,
                mesh=mesh,
                plan=plan,
                corpus=corpus,
                seq_len=config.data.seq_len,
                directory=directory,
                config=config.train,
                engine=config.engine,
                deepspeed=config.deepspeed,
                capture=config.capture,
                replan=config.replan,
                adapt=config.adapt,
                profile=config.profile,
                checkpoint=config.checkpoint,
                topology=inputs.topology,
                forecast=inputs.forecast,
                progress=progress,
                resume=bool(resume),
                keep_plan=config.plan is not None,
            )
        )
    return result.as_json()


def given(config: RunConfig, plan: Plan | None, corpus: Corpus) -> dict[str, str]:
    """What all ranks must have been given alike, by name: ranks that differ in it would train apart, and say nothing."""
    values = {f"settings {section}": json.dumps(value, sort_keys=True) for section, value in resolved(config).items() if section != "plan"}
    return {**values, "plans": "none" if plan is None else plan.digest, "data": corpus.digest}


def describe_environment(env: WorkerEnv, mesh: Mesh) -> dict[str, Any]:
    """What `env.json` records: versions, machine, launcher, nodes, and the variables that a run depends on, without secrets."""
    facts = {
        "crossdock": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "device": "cpu" if mesh.device.type == "cpu" else torch.cuda.get_device_name(mesh.device),
        "launcher": env.launcher,
        "transport": mesh.carrier.name,
        "world_size": env.world_size,
        "node_of_rank": list(mesh.node_of_rank),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": recorded(os.environ),
    }
    return {name: redacted(value, name) for name, value in facts.items()}


def probe(request: Request, env: WorkerEnv, mesh: Mesh) -> dict[str, Any]:
    """Measure the mesh; the topology's file is in `yaml`, for whoever asked: rank 0 may be on another host."""
    topology = measure(mesh)
    links = {
        name: float(topology.bytes_per_s_RR[topology.link_class_RR == number].min())
        for number, name in ((1, "same_node"), (2, "other_node"))
        if (topology.link_class_RR == number).any()
    }
    return {
        "yaml": topology.as_yaml(),
        "devices": topology.num_devices,
        "nodes": topology.num_nodes,
        "flop_per_s": float(topology.flop_per_s_R.min()),
        **{f"{name}_bytes_per_s": value for name, value in links.items()},
        "digest": topology.digest,
    }


def capture(request: Request, env: WorkerEnv, mesh: Mesh) -> dict[str, Any]:
    """Route `arguments.steps` batches of held-out text through the model, and write the trace to `arguments.out`."""
    config, arguments = request.config, request.arguments
    if config.model.num_moe_layers == 0:
        raise BadConfig("model.block dense routes nothing; choose another block")
    plan = read_inputs(config).plan
    model = build_model(config, mesh, plan)
    loaded = "a model of random weights"
    if arguments["checkpoint"] is not None:
        folder, manifest, passed_over = checkpoint.latest(checkpoints_in(Path(arguments["checkpoint"])), mesh)
        engine_plan = plan or Plan.contiguous(config.model.num_moe_layers, config.model.num_experts, mesh.expert_parallel)
        checkpoint.restore(folder, manifest, Engine(model, mesh, engine_plan, config.train.optimizer), passed_over)
        loaded = str(folder)
    corpus = read_corpus(config)
    sampler = Sampler(corpus.held_out, config.data.seq_len, corpus.vocab_size, config.train.seed, corpus.source)
    recorder = Capture(config.model.num_moe_layers, config.model.num_experts, config.capture.weights, f"{loaded} on {corpus.source}")
    model.eval()
    batches = sampler.evaluation(arguments["steps"], config.train.batch_sequences, rank=mesh.rank, world_size=mesh.world_size)
    with torch.no_grad():
        for step, batch in enumerate(batches):
            token_QP = torch.as_tensor(batch.token_BQ, device=mesh.device)
            token_T = token_QP.flatten()
            recorder.begin(token_T, torch.as_tensor(batch.sequence_B).repeat_interleave(config.data.seq_len))
            model(token_QP, StepContext(config.train.seed, step, False, token_T, batch.first_token, (recorder.listener,)))
    traces = recorder.gather(mesh)
    if mesh.rank != 0:
        return {}
    trace = concatenate(traces)
    trace.save(Path(arguments["out"]))
    return {
        "path": arguments["out"],
        "model": loaded,
        "tokens": trace.num_tokens,
        "layers": trace.num_layers,
        "choices_per_token": trace.top_k,
        "digest": trace.digest,
    }


def checkpoints_in(path: Path) -> Path:
    """The folder that holds checkpoints, given it, a run directory, or one checkpoint."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


JOBS: dict[str, Job] = {"train": train, "probe": probe, "capture": capture}
