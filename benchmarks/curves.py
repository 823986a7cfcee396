"""Line charts as SVG text, for results that are kept in the repository: panels side by side, a mean line and a band for each curve."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import mean

COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#a16207")
PANEL_WIDTH, PANEL_HEIGHT = 420, 300
LEFT, TOP, RIGHT, BOTTOM = 62, 28, 16, 48


@dataclass(frozen=True)
class Curve:
    """Points of one curve: x, and over the repeats the mean, lowest and highest y."""

    x: tuple[float, ...]
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, x: Sequence[float], repeats: Sequence[Sequence[float]]) -> "Curve":
        """From the y values of every repeat, each as long as `x`."""
        columns = list(zip(*repeats, strict=True))
        assert len(columns) == len(x), f"{len(columns)} values for {len(x)} points"
        return cls(tuple(x), *(tuple(combine(column) for column in columns) for combine in (mean, min, max)))


@dataclass(frozen=True)
class Axis:
    """Where values lie between its ends, and where it is labelled; a logarithmic one at the powers of its base."""

    low: float
    high: float
    logarithmic_base: float | None = None

    def share(self, value: float) -> float:
        if self.logarithmic_base is None:
            return (value - self.low) / (self.high - self.low)
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        if self.logarithmic_base is None:
            return _ticks(self.low, self.high)
        base = self.logarithmic_base
        first, last = math.ceil(math.log(self.low, base) - 1e-9), math.floor(math.log(self.high, base) + 1e-9)
        return [base**power for power in range(first, last + 1)]


def figure(panels: Mapping[str, Mapping[str, Curve]], y_label: str, logarithmic: bool = False) -> str:
    """An SVG document: one panel for each x label, its curves by name, one scale of y for all; `logarithmic` in both directions."""
    every = [curve for curves in panels.values() for curve in curves.values()]
    low, high = min(min(curve.low) for curve in every), max(max(curve.high) for curve in every)
    y_axis = Axis(low / 1.25, high * 1.25, 10.0) if logarithmic else Axis(*_padded(low, high))
    width, height = len(panels) * PANEL_WIDTH, PANEL_HEIGHT
    names = dict.fromkeys(name for curves in panels.values() for name in curves)
    colour_of = dict(zip(names, COLOURS, strict=False))
    body: list[str] = []
    for number, (label, curves) in enumerate(panels.items()):
        ends = min(min(curve.x) for curve in curves.values()), max(max(curve.x) for curve in curves.values())
        x_axis = Axis(*ends, 2.0) if logarithmic else Axis(0.0, ends[1])
        body += _panel(number, label, curves, colour_of, y_label, x_axis, y_axis)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return "\n".join(
        [f'{head} font-family="sans-serif" font-size="11">', '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>\n"]
    )


def _panel(
    number: int, x_label: str, curves: Mapping[str, Curve], colour_of: Mapping[str, str], y_label: str, x_axis: Axis, y_axis: Axis
) -> Iterator[str]:
    left, right = number * PANEL_WIDTH + LEFT, (number + 1) * PANEL_WIDTH - RIGHT
    top, bottom = TOP, PANEL_HEIGHT - BOTTOM

    def across(x: float) -> float:
        return left + x_axis.share(x) * (right - left)

    def down(y: float) -> float:
        return bottom - y_axis.share(y) * (bottom - top)

    for y in y_axis.ticks():
        yield f'<line x1="{left}" x2="{right}" y1="{down(y):.1f}" y2="{down(y):.1f}" stroke="#e5e7eb"/>'
        yield f'<text x="{left - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
    for x in x_axis.ticks():
        yield f'<text x="{across(x):.1f}" y="{bottom + 15}" text-anchor="middle">{x:g}</text>'
    yield f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="#111827"/>'
    yield f'<text x="{(left + right) / 2:.1f}" y="{bottom + 34}" text-anchor="middle">{escape(x_label)}</text>'
    if number == 0:
        middle = (top + bottom) / 2
        yield f'<text transform="translate(14,{middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    # Names stand where no curve is: losses fall from the left, times on logarithmic axes rise to the right.
    names_x, anchor = (right - 4, "end") if y_axis.logarithmic_base is None else (left + 8, "start")
    for place, (name, curve) in enumerate(curves.items()):
        colour = colour_of[name]
        there = [f"{across(x):.1f},{down(y):.1f}" for x, y in zip(curve.x, curve.high, strict=True)]
        back = [f"{across(x):.1f},{down(y):.1f}" for x, y in zip(reversed(curve.x), reversed(curve.low), strict=True)]
        line = [f"{across(x):.1f},{down(y):.1f}" for x, y in zip(curve.x, curve.middle, strict=True)]
        yield f'<polygon points="{" ".join(there + back)}" fill="{colour}" fill-opacity="0.15"/>'
        yield f'<polyline points="{" ".join(line)}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        yield f'<text x="{names_x}" y="{top + 14 + 15 * place}" text-anchor="{anchor}" fill="{colour}">{escape(name)}</text>'


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from `low` to `high`."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]
