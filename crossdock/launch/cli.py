"""The `crossdock` command: reads its arguments, calls the rooms, and turns errors into one line and an exit code.

Everything heavy is imported inside the commands: `crossdock --help` and `crossdock plan --help` answer in a quarter of a second.
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from crossdock.errors import CrossdockError, OutOfMemory, UsageError, presentable
from crossdock.launch.commands.checkpoint import checkpoint_app
from crossdock.launch.commands.launch import launch_app
from crossdock.launch.commands.maps import plan_app
from crossdock.launch.commands.trace import trace_app
from crossdock.placement.commands.output import AsJson, print_json

INTERRUPTED = 130
# typer has brought its own copy of click since 0.26; before, this class was click's
_ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="crossdock",
    help="Train mixture-of-experts models across devices, and plan where their experts live.",
    epilog="Begin with: crossdock demo. Every command has --help with an example.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(name="config", help="Show, check and describe run configurations.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(plan_app, name="plan")
app.add_typer(trace_app, name="trace")
app.add_typer(launch_app, name="launch")
app.add_typer(config_app, name="config")
app.add_typer(checkpoint_app, name="checkpoint")

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A run's YAML file, or the name of a shipped one (tiny, small, demo).", show_default=False)
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="A.B=C", help="Keys to set, after YAML's rules.", show_default=False)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.", callback=lambda value: _checked_device(value))]
OnRay = Annotated[bool, typer.Option("--ray", help="On --ranks actors of a Ray cluster; in a Ray job this is so by itself.")]


def _print_version(asked: bool) -> None:
    """Crossdock's version, and torch's as its package says it: torch itself takes a second to import."""
    if not asked:
        return
    from importlib import metadata

    from crossdock import __version__

    with contextlib.suppress(metadata.PackageNotFoundError):
        print(f"crossdock {__version__} (torch {metadata.version('torch')})")
        raise typer.Exit
    print(f"crossdock {__version__} (no torch)")
    raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions of Crossdock and torch, and end.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="The run directory; a run that stands there is replaced.")] = Path("runs/demo"),
    as_json: AsJson = False,
) -> None:
    """Train a small ScMoE model on 2 ranks, plan where its experts live, train on, compare predictions with counts.

    Offline, on the CPU, in well under a minute. It is `crossdock train demo` with a table at the end.

    Example: crossdock demo
    """
    from crossdock.launch.local.nursery import ranks_ahead

    with ranks_ahead() as nursery:
        from crossdock.launch.commands.demo import run_demo

        raise typer.Exit(run_demo(out, overrides or (), as_json, nursery))


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration, groups, plan and memory of each rank; start nothing.")
    ] = False,
    world_size: Annotated[
        int | None, typer.Option("--world-size", min=1, help="With --dry-run: as if on so many ranks.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="stdout is one JSON object alone: it always is, but for --dry-run.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Choose how tokens move from the first measured steps, and print why (adapt.mode=start).")
    ] = False,
    profile_steps: Annotated[
        str | None, typer.Option("--profile-steps", metavar="A:B", help="Write a Chrome trace of steps A to B for every rank.")
    ] = None,
) -> None:
    """Train a model. Under torchrun it joins the other ranks; alone it starts local ranks itself.

    Example: crossdock train configs/tiny.yaml train.steps=50 plan=plan.json

    Example: torchrun --nproc-per-node 4 -m crossdock train configs/small.yaml parallel.expert=4

    Example: crossdock train configs/small.yaml parallel.expert=8 --dry-run --world-size 64

    Example: crossdock train configs/tiny.yaml --explain --profile-steps 10:12
    """
    asked = [*(overrides or ()), *_asked(explain, profile_steps)]
    if dry_run:
        from crossdock.launch import start
        from crossdock.launch.config import read_config

        run_config = read_config(config, asked)
        _print_dry_run(run_config, start.dry_run(run_config, world_size), as_json)
        return
    if world_size is not None:
        raise UsageError("--world-size goes with --dry-run; launchers bring their number of ranks, parallel.ranks starts local ones")
    from crossdock.launch.local.nursery import ranks_ahead
    from crossdock.launch.ranks.worker_env import in_ray_job, worker_env

    if in_ray_job() and worker_env() is None:  # the cluster's nodes do it
        from crossdock.launch.commands.launch import train_on_ray

        raise typer.Exit(train_on_ray(config, asked))
    with ranks_ahead() as nursery:  # the ranks import torch while we do
        from crossdock.launch import start
        from crossdock.launch.config import read_config

        raise typer.Exit(start.train(read_config(config, asked), nursery))


@app.command()
def probe(
    out: Annotated[Path, typer.Option("--out", help="Where the measured topology goes.")] = Path("topology.yaml"),
    ranks: Annotated[int, typer.Option("--ranks", min=1, max=256, help="Ranks to start where no launcher did.")] = 2,
    device: Device = "auto",
    on_ray: OnRay = False,
    as_json: AsJson = False,
) -> None:
    """Measure links, latencies and GEMM speed of the ranks' devices, and write them as a topology.

    Example: crossdock probe --ranks 4 --out topology.yaml

    Example: mpirun -n 4 crossdock probe --out topology.yaml
    """
    from crossdock.launch.local.nursery import ranks_ahead

    with ranks_ahead() as nursery:
        from crossdock.launch import start

        raise typer.Exit(start.probe(out, ranks, device, on_ray, as_json, nursery))


@app.command()
def doctor(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where runs are to write; its disk is tried.")] = Path("runs"),
    ranks: Annotated[int, typer.Option("--ranks", min=1, max=256, help="Ranks to start and compare where no launcher did.")] = 1,
    device: Device = "auto",
    on_ray: OnRay = False,
    as_json: AsJson = False,
) -> None:
    """Say what this machine offers a run, and what is wrong: versions, cores, memory, devices, network, access, disk, clock.

    Started by torchrun, mpirun, srun or on Ray it asks every rank, and says what differs between them.

    Example: crossdock doctor

    Example: torchrun --nproc-per-node 2 -m crossdock doctor --run-dir /shared/runs
    """
    from crossdock.launch.commands.doctor import run_doctor

    raise typer.Exit(run_doctor(run_dir, ranks, device, on_ray, as_json))


@app.command()
def status(
    directory: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    otherwise: Annotated[
        int | None, typer.Option("--otherwise", min=0, max=255, help="Exit code to give where the run has left no result.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how a run ended, and end with its exit code: launchers lose it, its result.json does not.

    Example: crossdock status runs/tiny
    """
    from crossdock.launch.commands.launch import status as ending

    line, result = ending(directory, otherwise)
    if as_json:
        print_json(result)
    else:
        print(line)
    raise typer.Exit(result["exit_code"])


@config_app.command("show")
def config_show(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved configuration: every key with its value.

    Example: crossdock config show configs/tiny.yaml model.num_experts=16
    """
    from crossdock.launch.config import read_config

    _print_config(read_config(config, overrides or ()), as_json)


@config_app.command("check")
def config_check(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a configuration with the topology and the plan that it names, and say how large the model is.

    Example: crossdock config check configs/tiny.yaml
    """
    from crossdock.launch import start
    from crossdock.launch.config import read_config

    run_config = read_config(config, overrides or ())
    start.check_inputs(run_config)
    facts = start.model_facts(run_config)
    if as_json:
        print_json({"ok": True, **facts})
    else:
        print(f"{config}: ok;", ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in facts.items()))


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a run's YAML, for editors.

    Example: crossdock config schema > crossdock.schema.json
    """
    from crossdock.launch.config import schema

    print_json(schema(), indent=2)


def _checked_device(value: str) -> str:
    if value not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device is {value!r}; choose auto, cpu or cuda")
    return value


def _asked(explain: bool, profile_steps: str | None) -> list[str]:
    """Options of `train` as overrides of the configuration. Raises `UsageError` for steps that are none."""
    overrides = ["adapt.explain=true"] if explain else []
    if profile_steps is not None:
        first, separator, last = profile_steps.partition(":")
        if not (first.isdigit() and (last.isdigit() or not separator)):
            raise UsageError(f"--profile-steps {profile_steps!r} is not of the form A:B, as in --profile-steps 10:12, or A alone")
        overrides += [f"profile.first={int(first)}", f"profile.last={int(last or first)}"]
    return overrides


def _print_config(run_config: Any, as_json: bool) -> None:
    from crossdock import strict_yaml
    from crossdock.launch.config import resolved

    if as_json:
        print_json(resolved(run_config))
    else:
        sys.stdout.write(strict_yaml.dump(resolved(run_config)))


def _print_dry_run(run_config: Any, facts: dict[str, Any], as_json: bool) -> None:
    from crossdock.launch.config import resolved
    from crossdock.launch.dry_run import comment

    if as_json:
        print_json({**resolved(run_config), "dry_run": facts})
    else:
        _print_config(run_config, as_json=False)
        sys.stdout.write(comment(facts))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0, or that of the error which stands in one line on stderr.

    A traceback appears for bugs alone (exit code 1).
    """
    try:
        if (text := _help(arguments)) is not None:
            print(text, flush=True)
            return 0
        returned = _commands()(args=list(arguments), standalone_mode=False, prog_name="crossdock")
        sys.stdout.flush()
        return returned if isinstance(returned, int) else 0
    except _ClickException as failure:
        if type(failure).__name__ == "NoArgsIsHelpError":
            print(failure.format_message())
            return UsageError.exit_code
        return _complain(failure.format_message().replace("\n", " "), UsageError.exit_code)
    except CrossdockError as failure:
        return _complain(str(failure), failure.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", INTERRUPTED)
    except MemoryError:
        return _complain("out of memory; use a smaller input or a larger machine", OutOfMemory.exit_code)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        traceback.print_exc()
        return _complain("this is a bug in Crossdock; please report it with the lines above", 1)


def _help(arguments: Sequence[str]) -> str | None:
    """What `crossdock COMMANDS --help` prints, or None where something else was asked.

    Typer would parse the arguments first, and load pydantic for it, which takes longer than everything else that help needs.
    """
    if not arguments or arguments[-1] != "--help":
        return None
    command = _commands()
    context = typer.Context(command, info_name="crossdock")
    for name in arguments[:-1]:
        command = getattr(command, "commands", {}).get(name)
        if command is None:
            return None
        context = typer.Context(command, info_name=name, parent=context)
    return str(command.get_help(context))


def _commands() -> Any:
    """The tree of all commands: lists show the first sentence of each in full, arguments are capitals, a number within bounds is an N."""
    waiting: list[Any] = [tree := typer.main.get_command(app)]
    while waiting:
        command = waiting.pop()
        waiting.extend(getattr(command, "commands", {}).values())
        command.short_help = re.split(r"(?<=\.)\s", command.help, maxsplit=1)[0].replace("\n", " ")
        for parameter in command.params:
            if parameter.metavar is None and parameter.param_type_name == "argument":
                parameter.metavar = parameter.name.upper()
            elif parameter.metavar is None and (getattr(parameter, "min", None), getattr(parameter, "max", None)) != (None, None):
                parameter.metavar = "N"
    return tree


def _complain(message: str, exit_code: int) -> int:
    print(f"crossdock: error: {presentable(message)}", file=sys.stderr)
    return exit_code


def main() -> None:
    """The console script."""
    # DeepSpeed's launcher puts each rank's number before our arguments, and into the environment as well
    sys.exit(run([argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]))
