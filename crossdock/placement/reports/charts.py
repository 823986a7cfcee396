"""Charts as SVG text: heat maps, lines and bars. Colours are CSS classes, so that a page decides them for light, dark and print.

Every chart is drawn 420 units wide, about a phone's width, and scales up from there; numbers on axes are shortened for people.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray

WIDTH = 420.0
FONT = 11.0
MAX_LABELLED_CELLS = 16  # columns up to which cells carry numbers
MAX_POINTS = 400
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """A named line: y at x, of equal length. `points` draws marks in place of a line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    points: bool = False


@dataclass(frozen=True)
class Marker:
    """A vertical line at x with a label."""

    x: float
    label: str


def heat_map(values: ArrayLike, *, title: str, rows: str, columns: str, most: float, centre: float | None = None) -> str:
    """A matrix of cells, shaded from 0 to `most`; with a `centre`, values above and below it get two colours and `most` is the distance.

    Cells of a centred map carry two decimals.
    """
    cell = np.asarray(values, dtype=np.float64)
    num_rows, num_columns = cell.shape
    left, top = 34.0, 36.0
    width = (WIDTH - left - 4) / num_columns
    height = min(max(width, 12.0), 26.0) if num_rows <= MAX_LABELLED_CELLS else max(6.0, min(18.0, 640.0 / num_rows))
    labelled = num_columns <= MAX_LABELLED_CELLS and height >= 12
    parts = [_text(2, 12, f"{rows} \N{DOWNWARDS ARROW}  {columns} \N{RIGHTWARDS ARROW}", "quiet")]
    parts += [_text(left + (column + 0.5) * width, top - 6, str(column), "quiet", "middle") for column in _some(num_columns, 16)]
    shown_rows = _some(num_rows, 32 if height >= 12 else 16)
    parts += [_text(left - 5, top + (row + 0.5) * height + 4, str(row), "quiet", "end") for row in shown_rows]
    for (row, column), value in np.ndenumerate(cell):
        shade, kind = _shade(float(value), most, centre)
        x, y = left + column * width, top + row * height
        number = readable(float(value)) if centre is None else f"{value:.2f}"
        label = f"{rows} {row}, {columns} {column}: {number}"
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}" class="{kind}" fill-opacity="{shade:.3f}">'
            f"<title>{escape(label)}</title></rect>"
        )
        if labelled:
            ink = "on-dark" if shade > 0.55 else "on-light"
            parts.append(_text(x + width / 2 - 0.5, y + height / 2 + 3.5, number, f"{ink} cell", "middle"))
    return _svg(parts, top + num_rows * height + 4, title)


def line_chart(series: Sequence[Series], *, title: str, x_label: str, markers: Sequence[Marker] = (), from_zero: bool = False) -> str:
    """Lines over a common x axis, with a legend above and marked events."""
    drawn = [_thinned(one) for one in series if len(one.x)]
    left, right, top, bottom, height = 46.0, 16.0, 46.0, 34.0, 260.0
    x_low, x_high = _range([x for one in drawn for x in one.x], False)
    y_low, y_high = _range([y for one in drawn for y in one.y], from_zero)

    def at_x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (WIDTH - left - right)

    def at_y(value: float) -> float:
        return height - bottom - (value - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = []
    for tick, label in labelled(ticks(y_low, y_high)):
        parts.append(f'<line x1="{left}" x2="{WIDTH - right}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}" class="grid"/>')
        parts.append(_text(left - 5, at_y(tick) + 4, label, "quiet", "end"))
    parts += [_text(at_x(tick), height - bottom + 15, label, "quiet", "middle") for tick, label in labelled(ticks(x_low, x_high))]
    parts.append(_text(WIDTH - right, height - 5, x_label, "quiet", "end"))
    for marker in markers:
        if x_low <= marker.x <= x_high:
            anchor, shift = ("end", -4) if at_x(marker.x) > WIDTH * 0.6 else ("start", 4)
            parts.append(f'<line x1="{at_x(marker.x):.1f}" x2="{at_x(marker.x):.1f}" y1="{top - 14}" y2="{height - bottom}" class="mark"/>')
            parts.append(_text(at_x(marker.x) + shift, top - 7, marker.label, "marked", anchor))
    legend_x = left
    for number, one in enumerate(drawn):
        colour = f"s{number % 4}"
        points = [(at_x(x), at_y(y)) for x, y in zip(one.x, one.y, strict=True)]
        if one.points:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="dot {colour}"/>' for x, y in points]
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{path}" class="line {colour}"/>')
        parts.append(f'<rect x="{legend_x:.1f}" y="7" width="10" height="10" class="fill {colour}"/>')
        parts.append(_text(legend_x + 14, 16, one.name, ""))
        legend_x += 14 + 6.4 * len(one.name) + 16
    return _svg(parts, height, title)


def bar_chart(groups: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, title: str, unit: str) -> str:
    """Horizontal bars in named groups, each bar with its name and number: [(group, [(bar, value), ...]), ...]."""
    most = max([value for _, bars in groups for _, value in bars], default=0.0) or 1.0
    left, y = 104.0, 14.0
    parts = []
    for group, bars in groups:
        parts.append(_text(2, y, group, "strong"))
        y += 8
        for number, (name, value) in enumerate(bars):
            length = max(value, 0.0) / most * (WIDTH - left - 78)
            parts.append(_text(left - 6, y + 11, name, "quiet", "end"))
            parts.append(f'<rect x="{left}" y="{y:.1f}" width="{max(length, 0.5):.1f}" height="14" class="fill s{number % 4}"/>')
            parts.append(_text(left + length + 5, y + 11, f"{readable(value, 2)} {unit}", ""))
            y += 18
        y += 20
    return _svg(parts, max(y - 14, 20.0), title)


def readable(value: float, digits: int = 1) -> str:
    """A number in at most about six characters: 1.2k, 3.4M, 0.02."""
    size = abs(value)
    if size >= 1e15 or not math.isfinite(value):
        return f"{value:.1e}"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (limit if letter != 'k' else 1e3):.{digits}f}{letter}"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    if size >= 1:
        return f"{value:.{max(digits, 1)}f}"
    return f"{value:.2g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Each value with its number, in as few digits as tell all of them apart."""
    for digits in range(1, 5):
        labels = [readable(value, digits) for value in values]
        if len(set(labels)) == len(labels):
            break
    return list(zip(values, labels, strict=True))


def _shade(value: float, most: float, centre: float | None) -> tuple[float, str]:
    distance = value if centre is None else value - centre
    shade = min(abs(distance) / most, 1.0) if most > 0 else 0.0
    return shade, "heat" if centre is None else "hot" if distance >= 0 else "cool"


def _range(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    low = min(low, 0.0) if from_zero else low
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    return low, high


def _thinned(series: Series) -> Series:
    """The same line with at most MAX_POINTS points: means of equal parts."""
    pairs = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    if len(pairs) <= MAX_POINTS or series.points:
        return Series(series.name, [x for x, _ in pairs], [y for _, y in pairs], series.points)
    parts = np.array_split(np.array(pairs, dtype=np.float64), MAX_POINTS)
    mean: list[FloatArray] = [part.mean(axis=0) for part in parts]
    return Series(series.name, [float(x) for x, _ in mean], [float(y) for _, y in mean])


def _some(count: int, most: int) -> range:
    return range(0, count, max(1, -(-count // most)))


def _text(x: float, y: float, content: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def _svg(parts: Sequence[str], height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}" font-size="{FONT}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
