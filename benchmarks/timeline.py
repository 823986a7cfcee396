"""A picture of one real step: on each rank what was computed, and when tokens were on their way, forward and backward.

    recorded = record(pair)                        on every rank, one step
    svg = draw([recorded of every rank], "title")

Recorded are moments of one clock (`time.perf_counter`, one for all processes of a machine): modules begin by hooks, their backward passes
when the gradient of their output is known; waits, starts and experts come from the ledger; and a thread beside each receive notes when its
message was there, because the rank itself may look much later.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from torch import Tensor, nn

from benchmarks.block_pair import Memory, Pair
from crossdock.runtime.transport.ledger import Flight, Stage
from crossdock.runtime.transport.mesh import Group

COLOURS = {
    "attention": "#1d4ed8",
    "mlp": "#0e7490",
    "shared": "#15803d",
    "experts": "#c2410c",
    "gate": "#7e22ce",
    "rows": "#d6d3d1",
    "wait": "#ffffff",
    "dispatch": "#f59e0b",
    "combine": "#e11d48",
}
LEGEND = {
    "experts": "experts and their rows",
    "rows": "rows, norms, sums",
    "wait": "waiting",
    "dispatch": "dispatch and its gradient",
    "combine": "combine and its gradient",
}
WIDTH, LEFT, RIGHT, TOP = 1180, 112, 16, 62
LANE, GAP = 20, 8


@dataclass(frozen=True)
class Moment:
    """From here on the rank does `what`; `detail` is shown as a tip."""

    at_s: float
    what: str
    detail: str


@dataclass(frozen=True)
class Transfer:
    """Tokens of one all-to-all on their way to this rank: asked for, and all there."""

    what: str
    detail: str
    launched_s: float
    arrived_s: float


@dataclass(frozen=True)
class Recorded:
    """One step of one rank."""

    begin_s: float
    turn_s: float
    """Where forward ends and backward begins."""
    end_s: float
    moments: tuple[Moment, ...]
    transfers: tuple[Transfer, ...]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> "Recorded":
        moments = tuple(Moment(**moment) for moment in values["moments"])
        transfers = tuple(Transfer(**transfer) for transfer in values["transfers"])
        return cls(values["begin_s"], values["turn_s"], values["end_s"], moments, transfers)


class Watched:
    """A process group that notes when every message that it receives is there."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.arrivals_s: list[tuple[float, float]] = []
        """(asked for, there), in the order of asking."""

    def rank(self) -> int:
        return int(self.group.rank())

    def size(self) -> int:
        return int(self.group.size())

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        return self.group.send(tensors, peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        return _WatchedWork(self.group.recv(tensors, peer, tag), self.arrivals_s)


class _WatchedWork:
    def __init__(self, work: Any, arrivals_s: list[tuple[float, float]]) -> None:
        self._work, self._arrivals_s, self._place = work, arrivals_s, len(arrivals_s)
        arrivals_s.append((time.perf_counter(), float("nan")))
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        try:
            self._work.wait()
        except BaseException as error:  # handed to whoever waits
            self._error = error
        self._arrivals_s[self._place] = (self._arrivals_s[self._place][0], time.perf_counter())

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def record(pair: Pair) -> Recorded:
    """One step of `pair`, watched. Every rank calls this together."""
    moments: list[Moment] = []

    def note(what: str, detail: str) -> None:
        moments.append(Moment(time.perf_counter(), what, detail))

    handles = []
    for name, module in _named_modules(pair):
        what = name.split("_")[0]

        def begin(_module: nn.Module, _inputs: Any, what: str = what, name: str = name) -> None:
            note(what, f"{name} forward")

        def end(_module: nn.Module, _inputs: Any, output: Any, what: str = what, name: str = name) -> None:
            note("rows", "")
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.requires_grad:
                first.register_hook(lambda _gradient: note(what, f"{name} backward"))

        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    memory = pair.mesh.token_group
    assert isinstance(memory, Memory), "a pair's groups are memories"
    watched = Watched(memory.group)
    memory.group = watched
    pair.mesh.ledger.take()
    try:
        begin_s = time.perf_counter()
        turn_s = pair.step().turn_s
        end_s = time.perf_counter()
    finally:
        memory.group = watched.group
        for handle in handles:
            handle.remove()
    flights = pair.mesh.ledger.take()
    experts = _expert_spans(flights)
    for flight in flights:
        inside = next((span for span in experts if span[0] <= flight.wait_end_s < span[1]), None)
        moments += [
            Moment(flight.wait_begin_s, "wait", f"waiting for {_named(flight)}, {flight.kind}"),
            Moment(flight.wait_end_s, "rows", "") if inside is None else Moment(flight.wait_end_s, "experts", inside[2]),
        ]
    moments += [Moment(end_s, "rows", "") for _, end_s, _ in experts]
    moments.sort(key=lambda moment: moment.at_s)
    return Recorded(begin_s, turn_s, end_s, tuple(moments), tuple(transfers_of(flights, watched.arrivals_s)))


def _expert_spans(flights: Sequence[Flight]) -> list[tuple[float, float, str]]:
    """From the arrival of a movement's rows to the launch of what the experts made of them, rows sorted and summed included."""
    tokens = {(flight.movement, flight.stage, flight.direction): flight for flight in flights if flight.kind == "tokens"}
    spans = []
    for (movement, stage, direction), arrived in tokens.items():
        out: Stage = "combine" if direction == "forward" else "dispatch"
        left = tokens.get((movement, out, direction))
        if stage != out and left is not None:
            spans.append((arrived.wait_end_s, left.launched_s, f"experts of movement {movement} {direction}"))
    return spans


def _named_modules(pair: Pair) -> list[tuple[str, nn.Module]]:
    stages = [(name, module) for name, module in pair.block.named_children() if module in pair.block.stages]
    return [*stages, ("gate", pair.block.moe.gate)]


def _named(flight: Flight) -> str:
    return f"{flight.stage} {flight.direction} of movement {flight.movement}"


def transfers_of(flights: Sequence[Flight], arrivals_s: Sequence[tuple[float, float]]) -> list[Transfer]:
    """Each flight of tokens with the last arrival of the messages that were asked for when it was launched."""
    launched = sorted((flight for flight in flights if flight.kind == "tokens"), key=lambda flight: flight.launched_s)
    found = []
    for number, flight in enumerate(launched):
        until_s = launched[number + 1].launched_s if number + 1 < len(launched) else float("inf")
        there_s = [there_s for asked_s, there_s in arrivals_s if flight.launched_s <= asked_s < until_s]
        if there_s:
            found.append(Transfer(flight.stage, f"tokens of {_named(flight)}", flight.launched_s, max(there_s)))
    return found


# ---- drawing


def draw(ranks: Sequence[Recorded], title: str) -> str:
    """SVG: for each rank a lane of what it computed and one of what was on its way to it, over milliseconds of the step."""
    zero_s, end_s = min(rank.begin_s for rank in ranks), max(rank.end_s for rank in ranks)
    scale = (WIDTH - LEFT - RIGHT) / (end_s - zero_s)

    def across(at_s: float) -> float:
        return LEFT + (at_s - zero_s) * scale

    height = TOP + len(ranks) * (2 * LANE + 3 * GAP) + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<defs><pattern id="idle" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="5" height="5" fill="white"/><line y2="5" stroke="#dc2626" stroke-width="2"/></pattern></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13" font-weight="bold">{escape(title)}</text>',
        *_legend(),
    ]
    bottom = height - 30
    lines += _time_axis(zero_s, end_s, across, bottom)
    for number, rank in enumerate(ranks):
        top = TOP + number * (2 * LANE + 3 * GAP)
        lines.append(f'<text x="{LEFT - 8}" y="{top + 14}" text-anchor="end">rank {number} computes</text>')
        lines.append(f'<text x="{LEFT - 8}" y="{top + LANE + GAP // 2 + 14}" text-anchor="end">tokens arrive</text>')
        lines += _compute_lane(rank, across, top)
        lines += _transfer_lane(rank, across, top + LANE + GAP // 2)
        turn = across(rank.turn_s)
        lines.append(f'<path d="M{turn:.1f},{top - 3}v{2 * LANE + GAP}" stroke="#111827" stroke-dasharray="3 2" fill="none"/>')
    return "\n".join([*lines, "</svg>\n"])


def _legend() -> list[str]:
    lines, x = [], LEFT
    for what, colour in COLOURS.items():
        label = LEGEND.get(what, what)
        fill = "url(#idle)" if what == "wait" else colour
        lines.append(f'<rect x="{x}" y="28" width="12" height="12" fill="{fill}" stroke="#9ca3af" stroke-width="0.5"/>')
        lines.append(f'<text x="{x + 16}" y="38">{escape(label)}</text>')
        x += 30 + 6 * len(label)
    lines.append(f'<text x="{WIDTH - RIGHT}" y="18" text-anchor="end">narrow: queued behind others; dashed line: backward begins</text>')
    return lines


def _time_axis(zero_s: float, end_s: float, across: Any, bottom: float) -> list[str]:
    step_ms = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if (end_s - zero_s) * 1e3 / step <= 14)
    lines = []
    for tick in range(int((end_s - zero_s) * 1e3 / step_ms) + 1):
        x = across(zero_s + tick * step_ms / 1e3)
        lines.append(f'<path d="M{x:.1f},{TOP - 6}V{bottom + 4}" stroke="#e5e7eb"/>')
        lines.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick * step_ms} ms</text>')
    return lines


def _compute_lane(rank: Recorded, across: Any, top: float) -> list[str]:
    lines = []
    ends = [moment.at_s for moment in rank.moments[1:]] + [rank.end_s]
    segments = [(rank.begin_s, rank.moments[0].at_s if rank.moments else rank.end_s, Moment(rank.begin_s, "rows", ""))]
    segments += [(moment.at_s, end_s, moment) for moment, end_s in zip(rank.moments, ends, strict=True)]
    for begin_s, end_s, moment in segments:
        width = across(end_s) - across(begin_s)
        if width < 0.05:
            continue
        fill = "url(#idle)" if moment.what == "wait" else COLOURS[moment.what]
        tip = escape(f"{moment.detail or 'rows, norms, sums'}: {(end_s - begin_s) * 1e3:.2f} ms")
        lines.append(
            f'<rect x="{across(begin_s):.2f}" y="{top}" width="{width:.2f}" height="{LANE}" fill="{fill}"><title>{tip}</title></rect>'
        )
    return lines


def _transfer_lane(rank: Recorded, across: Any, top: float) -> list[str]:
    """A transfer is on the wire from its launch, or from the arrival of the one before it in the queue; before that it is pale."""
    lines, free_s = [], rank.begin_s
    for transfer in sorted(rank.transfers, key=lambda transfer: transfer.arrived_s):
        wire_s = min(max(transfer.launched_s, free_s), transfer.arrived_s)
        free_s = max(free_s, transfer.arrived_s)
        tip = escape(f"{transfer.detail}: {(transfer.arrived_s - transfer.launched_s) * 1e3:.2f} ms from launch to arrival")
        for begin_s, end_s, y, height, opacity in (
            (transfer.launched_s, wire_s, top + LANE * 0.35, LANE * 0.3, 0.3),
            (wire_s, transfer.arrived_s, top, LANE, 1.0),
        ):
            lines.append(
                f'<rect x="{across(begin_s):.2f}" y="{y:.1f}" width="{across(end_s) - across(begin_s):.2f}" height="{height:.1f}" '
                f'fill="{COLOURS[transfer.what]}" fill-opacity="{opacity}" stroke="white" stroke-width="0.4"><title>{tip}</title></rect>'
            )
    return lines
