"""The command: installs what is compared, runs all of it side by side and prints one table for each place and case.

    python -m benchmarks.peers [--only NAME,...] [--hosts one|2x2|all] [--install-only] [--short] [--json] [--out FILE]

Systems: crossdock, naive, deepspeed_autoep, deepspeed_moe, megatron, torchtitan, transformers; each runs in an environment of its own
under `--environments`, made from package registries at the first use. Cases: `--kinds` layer, model, scmoe; `--dtypes` fp32, bf16;
`--routings` balanced, zipf. Hosts: `one` is 4 ranks over the loopback, `2x2` two emulated nodes with two ranks each (root: it makes
namespaces), at each of `--rates` (the model at the middle one).

A step is forward and backward of one MoE layer with SwiGLU experts, top-2 (or of a small model of such layers), no optimizer, no reduction
of dense gradients. All systems get the same weights, tokens and gradients; outputs, input gradients and gradients of an expert matrix are
held against one process in float64. What a row is and what was patched to make it run stands in its adapter, and beside it in the JSON.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command_line import one_line_errors
from benchmarks.measure import commit, machine, print_table
from benchmarks.netlab import Lab
from benchmarks.peers.case import DTYPES, Case, Sizes, make_case
from benchmarks.peers.crew import Hosts
from benchmarks.peers.environments import DEFAULT_FOLDER, SYSTEMS, NotInstalled, install, versions_of
from benchmarks.peers.rounds import EXPERTS_ALONE, Outcome, Stage
from benchmarks.peers.scmoe import COLUMNS as SCMOE_COLUMNS
from benchmarks.peers.scmoe import run_overlap, scmoe_rows
from benchmarks.peers.table import COLUMNS, Place, bound_of, rows_of, verdict
from crossdock.atomic import write_json

NODES = 2
LAYER = Sizes()
MODEL = Sizes(model_width=256, expert_width=704, num_layers=4)
SHORT_LAYER = Sizes(tokens=128, model_width=64, expert_width=96)
SHORT_MODEL = Sizes(tokens=128, model_width=64, expert_width=96, num_layers=2, num_heads=4, sequence=32, vocabulary=64)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The cases asked for, made one at a time; a model routes by itself, and has one routing."""
    for kind in [kind for kind in options.kinds if kind != "scmoe"]:
        sizes = {"layer": SHORT_LAYER if options.short else LAYER, "model": SHORT_MODEL if options.short else MODEL}[kind]
        for dtype in options.dtypes:
            for routing in options.routings if kind == "layer" else ["learnt"]:
                yield make_case(kind, dtype, routing, sizes)


@contextlib.contextmanager
def hosts_of(name: str, rate: float) -> Iterator[Hosts]:
    """This host, or a laboratory of emulated ones for the length of the block."""
    if name == "one":
        yield Hosts()
    else:
        with Lab(NODES, rate) as lab:
            yield Hosts(lab)


def rates_of(case: Case, hosts: Hosts, options: argparse.Namespace) -> list[float | None]:
    """The rates at which a case is measured: every one for the layer, the middle one for the model."""
    if hosts.lab is None:
        return [None]
    return list(options.rates) if case.kind == "layer" else [sorted(options.rates)[len(options.rates) // 2]]


def measure(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows, a list for each place and case, printed as they come."""
    for name in options.hosts:
        with hosts_of(name, options.rates[0]) as hosts, Stage(options.only, options.environments, hosts, LAYER.ranks) as stage:
            for case in cases(options):
                with stage.built(case) as outcomes:
                    for rate in rates_of(case, hosts, options):
                        if hosts.lab is not None:
                            hosts.lab.set_rate(rate)
                        stage.measure(outcomes, options.rounds)
                        yield finished(Place(name, rate, case.name), outcomes, case, hosts, options)


def finished(place: Place, outcomes: Sequence[Outcome], case: Case, hosts: Hosts, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one place and case, with their bound and verdict; printed unless JSON alone was asked for."""
    experts = [outcome for outcome in outcomes if outcome.variant.name == EXPERTS_ALONE]
    outcomes = [outcome for outcome in outcomes if outcome.variant.name != EXPERTS_ALONE]
    rows = rows_of(place, outcomes, case)
    bound: dict[str, float | None] = {}
    if case.kind == "layer":
        experts_s = statistics.median(experts[0].step_s) if experts and experts[0].step_s else None
        bound = bound_of(case, hosts.num_nodes, place.rate_bit_per_s, experts_s)
    for row in rows:
        row |= bound
    if not options.json:
        shown = "" if place.rate_bit_per_s is None else f" at {place.rate_bit_per_s / 1e6:.0f} Mbit/s"
        limits = ", ".join(f"{name} {value:.4f}" for name, value in bound.items() if value is not None)
        print_table(rows, f"{place.case}, hosts {place.hosts}{shown}: {verdict(rows)}. {limits}", COLUMNS)
    return rows


def listed(known: Sequence[str]) -> Any:
    """A type for argparse: names of `known`, separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; choose from {', '.join(known)}")
        return names

    return parse


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--only", type=listed(list(SYSTEMS)), default=list(SYSTEMS), help="systems (default: all)")
    made.add_argument("--hosts", choices=["one", "2x2", "all"], default="all")
    made.add_argument("--rates", type=lambda text: [float(part) for part in text.split(",")], default=[1e9, 500e6, 250e6], help="bit/s")
    made.add_argument("--kinds", type=listed(["layer", "model", "scmoe"]), default=["layer", "model", "scmoe"])
    made.add_argument("--dtypes", type=listed(list(DTYPES)), default=list(DTYPES))
    made.add_argument("--routings", type=listed(["balanced", "zipf"]), default=["balanced", "zipf"])
    made.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    made.add_argument("--environments", type=Path, default=DEFAULT_FOLDER, help="where environments are made (default: %(default)s)")
    made.add_argument("--install-only", action="store_true", help="make the environments and stop")
    made.add_argument("--short", action="store_true", help="tiny sizes, 3 rounds: shows that it runs")
    made.add_argument("--json", action="store_true", help="print JSON alone")
    made.add_argument("--out", type=Path, help="also write the JSON document here")
    return made


def install_all(options: argparse.Namespace) -> dict[str, str]:
    """Make every environment asked for: versions by system, or why it is not there."""
    found = {}
    for name in options.only:
        try:
            install(SYSTEMS[name], options.environments)
            found[name] = versions_of(SYSTEMS[name], options.environments)
        except NotInstalled as error:
            found[name] = f"not installed: {error}"
    return found


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.hosts = ["one", "2x2"] if options.hosts == "all" else [options.hosts]
    if options.short:
        options.rounds = 3
    versions = install_all(options)
    if options.install_only:
        for name, text in versions.items():
            print(f"{name}: {text or 'runs in this environment'}")
        return int(any(text.startswith("not installed") for text in versions.values()))
    document = begun(options, versions)
    if {"layer", "model"} & set(options.kinds):
        for rows in measure(options):
            document["rows"] += rows
            save(document, options)
    if "scmoe" in options.kinds and "2x2" in options.hosts:
        document["scmoe"] = scmoe_rows(run_overlap(options.rates, options.short))
        if not options.json:
            print_table(document["scmoe"], "ScMoE beside top-2 and a shared expert of equal FLOPs: changed mathematics", SCMOE_COLUMNS)
        save(document, options)
    if options.json:
        print(json.dumps(document, indent=2, allow_nan=False))
    return 0


def begun(options: argparse.Namespace, versions: dict[str, str]) -> dict[str, Any]:
    """The document before anything has been measured."""
    sizes = {"layer": SHORT_LAYER, "model": SHORT_MODEL} if options.short else {"layer": LAYER, "model": MODEL}
    return {
        "machine": machine(),
        "commit": commit(),
        "what": "MoE layers of several systems side by side, forward and backward",
        "versions": versions,
        "sizes": {kind: dataclasses.asdict(size) for kind, size in sizes.items() if kind in options.kinds},
        "rows": [],
        "scmoe": [],
    }


def save(document: dict[str, Any], options: argparse.Namespace) -> None:
    """Write what has been measured so far: a long run that is cut off leaves its finished cases."""
    if options.out is not None:
        write_json(options.out, document)


if __name__ == "__main__":
    sys.exit(main())
