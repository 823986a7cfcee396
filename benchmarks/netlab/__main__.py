"""The command line of the laboratory: `python -m benchmarks.netlab --help`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from benchmarks.command_line import one_line_errors
from benchmarks.netlab.lab import Lab, attached_or_new, check_available
from benchmarks.netlab.owners import standing
from crossdock.errors import BadData


def _rates(text: str) -> float | list[float | None] | None:
    rates = [None if word == "none" else float(word) for word in text.split(",")]
    return rates[0] if len(rates) == 1 else rates


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.netlab", description="Emulated hosts on one machine (root, Linux).")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("up", "make a laboratory, print its name and leave it standing"),
        ("run", "any command on every host, then tear down"),
        ("torchrun", "torchrun on every host, then tear down"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--nodes", type=int, default=2)
        command.add_argument("--rate", type=_rates, help="bit/s of every link, each direction, or one for each node; none: unshaped")
        command.add_argument("--latency", type=float, default=0.0, help="s, one way")
        if name != "up":
            command.add_argument("--timeout", type=float, default=3600.0, help="s")
            command.add_argument("--lab", help="a standing laboratory, which stays")
            command.add_argument("arguments", nargs=argparse.REMAINDER, help="-- COMMAND [args], or -- SCRIPT [args] for torchrun")
        if name == "torchrun":
            command.add_argument("--ranks-per-node", type=int, default=1)
    commands.add_parser("list", help="standing laboratories")
    for name, what in (
        ("exec", "run on one host, in the foreground"),
        ("rate", "change the rate"),
        ("counters", "bytes of every host"),
        ("down", "remove it"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("lab")
        if name == "rate":
            command.add_argument("rate", type=_rates)
        if name == "exec":
            command.add_argument("node", type=int)
            command.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def _perform(options: argparse.Namespace) -> None:
    arguments = [word for number, word in enumerate(getattr(options, "arguments", [])) if number > 0 or word != "--"]
    if options.command == "list":
        print("\n".join(standing()))
    elif options.command == "up":
        check_available()
        lab = Lab(options.nodes, options.rate, latency_s=options.latency)
        try:
            lab.build()
        except BaseException:
            lab.remove()
            raise
        print(lab.name)
    elif options.command in ("run", "torchrun"):
        with attached_or_new(options.lab, options.nodes, options.rate, options.latency) as lab:
            if options.command == "run":
                outputs = lab.everywhere(arguments, timeout_s=options.timeout)
            else:
                outputs = lab.torchrun(arguments, options.ranks_per_node, timeout_s=options.timeout)
            for output in outputs:
                print(output, end="")
    else:
        _use(Lab.attach(options.lab), options, arguments)


def _use(lab: Lab, options: argparse.Namespace, arguments: Sequence[str]) -> None:
    if options.command == "down":
        lab.remove()
    elif options.command == "rate":
        lab.set_rate(options.rate)
    elif options.command == "counters":
        for node in range(lab.nodes):
            print(json.dumps({"node": node, **vars(lab.counters(node))}))
    else:
        if not 0 <= options.node < lab.nodes:
            raise BadData(f"node {options.node} of a laboratory of {lab.nodes}; choose 0 to {lab.nodes - 1}")
        command = lab.command(options.node, arguments or ["sh"])
        os.execvp(command[0], command)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    _perform(_parser().parse_args(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
