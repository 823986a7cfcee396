"""The scaling report: the simulator fitted to measured points, its error on points it has not seen, and what it says up to 2,048 devices.

What is known is given: link rates, rows, routing, the machine's cores. What is fitted, all positive, by least squares of the logarithm of
simulated over measured seconds: the part of its rate that a link gives to rows between two nodes (headers and acknowledgements take the
rest), what is lost where the flows of many nodes meet, and the processor's time for each phase, each message and each byte. A point's
error is that of a fit from which its whole topology was left out.
"""

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from benchmarks.curves import Curve, figure
from benchmarks.measure import commit, machine, print_table
from benchmarks.scaling_page import MEASURED_COLUMNS, page
from benchmarks.simulate import simulate
from benchmarks.simulate_layer import Cluster, Layer, all_to_all_tasks, step_s
from crossdock.atomic import write_json, write_text
from crossdock.errors import BadData, MissingInput

Row = Mapping[str, Any]
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
LOOPBACK_BYTES_PER_S = 1e10  # inside an emulated node bytes cost processor time, which is fitted, and no wire
START = {
    "link_share": 0.95,
    "contention": 0.1,
    "core_s_per_phase": 1e-3,
    "core_s_per_message": 1e-4,
    "core_s_per_byte": 1e-9,
    "exchange_s": 1e-4,
}

# A cluster of today: NVLink inside nodes of 8, one 400 Gbit/s card for each device (the figures of Topology.uniform), half of the peak in
# the experts. What a message costs the sending port is an assumption, and the report shows how the answer depends on it.
GPU = Cluster(
    nodes=1,
    devices_per_node=8,
    nic_bytes_per_s=4.0e10,
    local_bytes_per_s=3.6e11,
    nic_per_device=True,
    nic_message_s=3e-6,
    local_message_s=1e-6,
    exchange_s=1e-5,
    latency_s=1e-5,
    flop_per_s=2.5e14,
)
A100 = dataclasses.replace(GPU, nic_bytes_per_s=2.5e10, local_bytes_per_s=3.0e11, flop_per_s=1.5e14)  # NVLink 3, 200 Gbit/s each
GPU_LAYER = Layer(tokens=4096, model_width=2048, expert_width=1408, top_k=4, element_bytes=2, kv_width=512)


@dataclasses.dataclass(frozen=True)
class Fit:
    """What was fitted; see `START` for the names and this module for the meaning."""

    link_share: float
    contention: float
    core_s_per_phase: float
    core_s_per_message: float
    core_s_per_byte: float
    exchange_s: float

    def cluster(self, row: Row, cores: int) -> Cluster:
        """The emulated cluster of a measured row: all nodes share the machine's cores."""
        return self.nodes_of_cores(row["nodes"], row["ranks_per_node"], row["link_bit_per_s"], cores / row["nodes"], row["latency_s"])

    def nodes_of_cores(self, nodes: int, ranks: int, link_bit_per_s: float, cores_per_node: float, latency_s: float = 0.0) -> Cluster:
        return Cluster(
            nodes,
            ranks,
            self.link_share * link_bit_per_s / 8,
            LOOPBACK_BYTES_PER_S,
            contention=self.contention,
            exchange_s=self.exchange_s,
            latency_s=latency_s,
            cores_per_node=cores_per_node,
            core_s_per_byte=self.core_s_per_byte,
            core_s_per_message=self.core_s_per_message,
            core_s_per_phase=self.core_s_per_phase,
        )


def fit(rows: Sequence[Row], shape: Layer, cores: int, start: Fit | None = None) -> Fit:
    """The costs with which simulated seconds come nearest to measured ones."""
    names = list(START)
    first = np.log([getattr(start, name) if start else value for name, value in START.items()])

    def residuals(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
        guess = Fit(**dict(zip(names, np.exp(logarithms).tolist(), strict=True)))
        return np.log([step_s(guess.cluster(row, cores), shape, row["strategy"]) / row["step_s"] for row in rows])

    lower = np.log([0.3 if name == "link_share" else 1e-12 for name in names])
    upper = np.log([{"link_share": 1.0, "contention": 0.9}.get(name, 1.0) for name in names])
    begin = np.clip(first, lower + 1e-6, upper - 1e-6)
    solved = least_squares(residuals, begin, bounds=(lower, upper), loss="soft_l1", f_scale=0.1)
    return Fit(**dict(zip(names, np.exp(solved.x).tolist(), strict=True)))


def with_errors(rows: Sequence[Row], shape: Layer, cores: int, fitted: Fit) -> list[dict[str, Any]]:
    """Each row with its simulated seconds: by the fit to all rows, and by one that has not seen the row's topology."""
    topologies = sorted({(row["nodes"], row["ranks_per_node"]) for row in rows})
    unseen = {
        left_out: fit([row for row in rows if (row["nodes"], row["ranks_per_node"]) != left_out], shape, cores, fitted)
        for left_out in topologies
    }
    extended = []
    for row in rows:
        blind = unseen[row["nodes"], row["ranks_per_node"]]
        simulated_s = step_s(fitted.cluster(row, cores), shape, row["strategy"])
        unseen_s = step_s(blind.cluster(row, cores), shape, row["strategy"])
        extended.append({**row, "simulated_s": simulated_s, "unseen_s": unseen_s, "unseen_error": unseen_s / row["step_s"] - 1})
    return extended


def predictions(cluster_of: Callable[[int], Cluster], layer_of: Callable[[int], Layer], strategies: Sequence[str]) -> list[dict[str, Any]]:
    """Seconds of one layer's step for every number of devices."""
    return [
        {"devices": devices, **{f"{name}_s": step_s(cluster_of(devices), layer_of(devices), name) for name in strategies}}
        for devices in DEVICES
    ]


def all_to_all_speedups(message_s: Sequence[float], payloads_bytes: Sequence[int], devices: int = 2048) -> list[dict[str, Any]]:
    """How much faster than the linear all-to-all Tutel's 2DH is in this model, by payload of a device, for several message costs."""
    rows = []
    for cost_s in message_s:
        cluster = dataclasses.replace(A100, nodes=devices // 8, nic_message_s=cost_s)
        for payload_bytes in payloads_bytes:
            linear, two_dimensional = (
                simulate(*all_to_all_tasks(cluster, payload_bytes, kind))["step"].end_s for kind in ("linear", "two_dimensional")
            )
            rows.append(
                {
                    "devices": devices,
                    "message_s": cost_s,
                    "payload_bytes": payload_bytes,
                    "linear_s": linear,
                    "two_dimensional_s": two_dimensional,
                    "speedup": linear / two_dimensional,
                }
            )
    return rows


def curves_of(rows: Sequence[Row]) -> dict[str, Curve]:
    """One curve for each column of seconds."""
    devices = [float(row["devices"]) for row in rows]
    return {name.removesuffix("_s"): Curve.of(devices, [[row[name] for row in rows]]) for name in rows[0] if name.endswith("_s")}


def load(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], Layer, int, list[str]]:
    """Rows of all files, which must have one shape, their shape and cores, and the commits that measured them.

    Raises `MissingInput` and `BadData`.
    """
    documents = []
    for path in paths:
        try:
            documents.append(json.loads(path.read_text()))
        except FileNotFoundError:
            raise MissingInput(f"{path} does not exist; `python -m benchmarks.scaling measure --out {path}` writes it") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BadData(f"{path} is not what `measure` wrote: {error}") from None
    settings = {(json.dumps(document.get("shape"), sort_keys=True), document.get("cores")) for document in documents}
    if len(settings) != 1 or None in next(iter(settings)):
        raise BadData(f"{len(settings)} different shapes or machines in {len(paths)} files; report points that were measured alike")
    rows = [row for document in documents for row in document["rows"]]
    if len({(row["nodes"], row["ranks_per_node"]) for row in rows}) < 2:
        raise BadData("points of one topology alone; measure two or more, so that the model's error can be told on one it has not seen")
    commits = dict.fromkeys(document.get("commit", "unknown") for document in documents)
    return rows, Layer(**documents[0]["shape"]), documents[0]["cores"], list(commits)


def write_report(measured: Sequence[Path], out: Path | None, json_only: bool) -> None:
    """Fit, predict and print; with `out` (NAME.md) also NAME.json and NAME.svg beside it."""
    rows, shape, cores, commits = load(measured)
    fitted = fit(rows, shape, cores)
    points = with_errors(rows, shape, cores, fitted)
    errors = sorted(abs(point["unseen_error"]) for point in points)

    def of_cores(devices: int) -> Cluster:
        return fitted.nodes_of_cores(devices // 8, 8, 10e9, cores_per_node=8.0)

    def gpus(devices: int) -> Cluster:
        return dataclasses.replace(GPU, nodes=devices // 8)

    def layer_of(top_k: int) -> Callable[[int], Layer]:
        return lambda devices: dataclasses.replace(GPU_LAYER, num_experts=max(64, devices), top_k=top_k)

    moved, kept = ("flat", "deduplicated", "hierarchical", "gather"), ("flat", "hierarchical", "gather", "coherent")
    document: dict[str, Any] = {
        "machine": machine(),
        "commit": commit(),
        "measured_at": commits,
        "fit": dataclasses.asdict(fitted),
        "shape": dataclasses.asdict(shape),
        "predicted": {"layer": dataclasses.asdict(GPU_LAYER), "gpu": _finite(dataclasses.asdict(GPU))},
        "unseen_error": {"median": statistics.median(errors), "mean": statistics.mean(errors), "highest": errors[-1]},
        "rows": points,
        "cores_top4": predictions(of_cores, layer_of(4), moved),
        "gpus_top4": predictions(gpus, layer_of(4), moved),
        "gpus_top1": predictions(gpus, layer_of(1), kept),
        "tutel": all_to_all_speedups((1e-6, 3e-6, 1e-5), (2**20, 2**25, 2**28)),
        "hiermoe": hiermoe_rows(),
    }
    if json_only:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    else:
        print_table(points, "measured and simulated", MEASURED_COLUMNS)
        for name in ("cores_top4", "gpus_top4", "gpus_top1", "tutel", "hiermoe"):
            print_table(document[name], name)
    if out is not None:
        panels = {
            "devices: 8 cores and 10 Gbit/s a node, top-4": curves_of(document["cores_top4"]),
            "devices: 8 GPUs a node, top-4": curves_of(document["gpus_top4"]),
            "devices: 8 GPUs a node, top-1": curves_of(document["gpus_top1"]),
        }
        write_text(out.with_suffix(".svg"), figure(panels, "s of one layer, forward and backward", logarithmic=True))
        write_json(out.with_suffix(".json"), document)
        write_text(out, page(document, len(measured), cores, out))


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no infinity: what is not limited is null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def hiermoe_rows() -> list[dict[str, Any]]:
    """The all-to-alls of a top-8 layer on 4 nodes x 8 devices: what HierMoE measured on such a cluster."""
    cluster = dataclasses.replace(A100, nodes=4, flop_per_s=float("inf"))
    rows = []
    for name, num_experts, model_width in (("128 experts, width 2048", 128, 2048), ("256 experts, width 7168", 256, 7168)):
        layer = dataclasses.replace(GPU_LAYER, num_experts=num_experts, model_width=model_width, top_k=8)
        seconds = {strategy: step_s(cluster, layer, strategy) for strategy in ("flat", "deduplicated", "hierarchical")}
        rows.append(
            {"layer": name, **{f"{key}_s": value for key, value in seconds.items()}, "speedup": seconds["flat"] / seconds["hierarchical"]}
        )
    return rows
