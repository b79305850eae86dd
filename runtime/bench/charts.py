"""Charts as SVG: lines over an axis, and stacked horizontal bars. Plain Python, so that a report needs no plotting library.

line_chart("TTFT", [Series("p50", ((1, 20.0), (4, 31.0)))], x_label="requests/s", y_label="ms")
stacked_bars("Memory", [("weights", ...)], ...)
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

COLOURS = ("#1565c0", "#ef6c00", "#2e7d32", "#c2185b", "#5e35b1", "#00796b", "#b0bec5", "#78909c", "#c0a000")
"""Of series and parts, in this order, again from the first after the last."""
_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 34, 46
_BAR_HEIGHT, _BAR_GAP, _LABEL_WIDTH = 26, 12, 230
_LETTER = 6.4


@dataclass(frozen=True)
class Series:
    """One line: its name, and (x, y) points by x; each point may have a range (low, high) in `spread`."""

    name: str
    points: tuple[tuple[float, float], ...]
    spread: tuple[tuple[float, float], ...] = ()


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover low to high: steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * index for index in range(first, last + 1)]


def _axes(
    xs: Sequence[float],
    place: Callable[[float], float],
    y_ticks: Sequence[float],
    height: Callable[[float], float],
    x_label: str,
    y_label: str,
) -> list[str]:
    """Grid lines with their numbers, the numbers along x that have room, and both labels."""
    parts = []
    for tick in y_ticks:
        parts.append(_line(_LEFT, height(tick), _WIDTH - _RIGHT, height(tick), "#e0e0e0"))
        parts.append(_text(_LEFT - 6, height(tick) + 4, compact(tick), anchor="end"))
    for x in _apart(xs, place):
        parts.append(_text(place(x), _HEIGHT - _BOTTOM + 16, compact(x), anchor="middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label, anchor="middle"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<g transform="rotate(-90 14 {middle:.1f})">{_text(14, middle, y_label, anchor="middle")}</g>')
    return parts


def line_chart(title: str, series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Lines with a marker at each point, from zero upwards; x is on a scale of powers of two where it spans more than eightfold."""
    points = [point for line in series for point in line.points]
    tops = [high for line in series for _, high in line.spread]
    y_ticks = ticks(0.0, max([y for _, y in points] + tops))
    xs = sorted({x for x, _ in points})
    logarithmic = xs[0] > 0 and xs[-1] / xs[0] > 8

    def place(x: float) -> float:
        low, high = (math.log2(xs[0]), math.log2(xs[-1])) if logarithmic else (xs[0], xs[-1])
        value = math.log2(x) if logarithmic else x
        share = (value - low) / (high - low) if high > low else 0.5
        return _LEFT + 12 + share * (_WIDTH - _LEFT - _RIGHT - 24)

    def height(y: float) -> float:
        return _HEIGHT - _BOTTOM - y / y_ticks[-1] * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_text(_LEFT, 18, title, weight="bold"), *_axes(xs, place, y_ticks, height, x_label, y_label)]
    for index, line in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{place(x):.1f},{height(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, _), (low, high) in zip(line.points, line.spread):
            parts.append(_line(place(x), height(low), place(x), height(high), colour))
        for x, y in line.points:
            tip = html.escape(f"{line.name}: {compact(y)} at {compact(x)}")
            parts.append(
                f'<circle cx="{place(x):.1f}" cy="{height(y):.1f}" r="3.5" fill="{colour}"><title>{tip}</title></circle>'
            )
    return _svg(_WIDTH, _HEIGHT, parts) + legend([line.name for line in series])


@dataclass(frozen=True)
class Bubble:
    """A circle at (x, y) with its name beside it; its area is in proportion to `size`, None: a small one of no meaning."""

    name: str
    x: float
    y: float
    size: float | None = None
    note: str = ""
    """More of it, shown with the pointer on the circle."""


def bubble_chart(title: str, bubbles: Sequence[Bubble], *, x_label: str, y_label: str) -> str:
    """Named circles over two linear axes, x from zero, y from zero or below; a name stands at its circle where there is room."""
    x_ticks = ticks(0.0, 1.15 * max(bubble.x for bubble in bubbles))
    y_ticks = ticks(min(0.0, *(bubble.y for bubble in bubbles)), 1.1 * max(0.0, *(bubble.y for bubble in bubbles)))
    largest = max((bubble.size or 0.0 for bubble in bubbles), default=0.0) or 1.0

    def place(x: float) -> float:
        return _LEFT + x / x_ticks[-1] * (_WIDTH - _LEFT - _RIGHT)

    def height(y: float) -> float:
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_text(_LEFT, 18, title, weight="bold"), *_axes(x_ticks, place, y_ticks, height, x_label, y_label)]
    labels: list[tuple[float, float, float]] = []
    for index, bubble in enumerate(bubbles):
        x, y = place(bubble.x), height(bubble.y)
        radius = 4.0 if bubble.size is None else max(3.0, 16 * math.sqrt(bubble.size / largest))
        tip = html.escape(f"{bubble.name}: {compact(bubble.x)}, {compact(bubble.y)} {bubble.note}".rstrip())
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{COLOURS[index % len(COLOURS)]}" fill-opacity="0.6">'
            f"<title>{tip}</title></circle>"
        )
        label = (x, y - radius - 3, _LETTER * len(bubble.name))
        if all(not _overlap(label, other) for other in labels):  # the legend has the others
            labels.append(label)
            parts.append(_text(x, label[1], bubble.name, anchor="middle"))
    return _svg(_WIDTH, _HEIGHT, parts) + legend([bubble.name for bubble in bubbles])


def _overlap(one: tuple[float, float, float], two: tuple[float, float, float]) -> bool:
    """Whether two texts (middle, baseline, width) run into one another."""
    return abs(one[0] - two[0]) < (one[2] + two[2]) / 2 + 4 and abs(one[1] - two[1]) < 13


def stacked_bars(
    title: str, bars: Sequence[tuple[str, Mapping[str, float]]], *, unit: str, parts: Sequence[str]
) -> str:
    """One horizontal bar for each (label, {part: value}), all on one scale; `parts`: the order, and so the colours."""
    scale = max(sum(values.values()) for _, values in bars) or 1.0
    width = _WIDTH + _LABEL_WIDTH
    drawn = [_text(0, 18, title, weight="bold")]
    for row, (label, values) in enumerate(bars):
        top = _TOP + row * (_BAR_HEIGHT + _BAR_GAP)
        drawn.append(_text(_LABEL_WIDTH - 8, top + 17, _shortened(label), anchor="end"))
        left = float(_LABEL_WIDTH)
        for index, part in enumerate(parts):
            value = values.get(part, 0.0)
            size = value / scale * (width - _LABEL_WIDTH - 90)
            if size <= 0:
                continue
            tip = html.escape(f"{label}, {part}: {compact(value)} {unit}")
            drawn.append(
                f'<rect x="{left:.1f}" y="{top}" width="{size:.1f}" height="{_BAR_HEIGHT}" '
                f'fill="{COLOURS[index % len(COLOURS)]}"><title>{tip}</title></rect>'
            )
            if size > _LETTER * (len(compact(value)) + 1):
                drawn.append(_text(left + size / 2, top + 17, compact(value), anchor="middle", fill="#fff"))
            left += size
        drawn.append(_text(left + 6, top + 17, f"{compact(sum(values.values()))} {unit}"))
    height = _TOP + len(bars) * (_BAR_HEIGHT + _BAR_GAP)
    return _svg(width, height, drawn) + legend(parts)


def legend(names: Sequence[str]) -> str:
    """Coloured squares with names, as HTML."""
    entries = [
        f'<span style="white-space:nowrap;margin-right:14px"><span style="display:inline-block;width:10px;height:10px;'
        f'background:{COLOURS[index % len(COLOURS)]};margin-right:5px"></span>{html.escape(name)}</span>'
        for index, name in enumerate(names)
    ]
    return f'<div style="font-size:12px;margin:2px 0 18px 0">{"".join(entries)}</div>'


def compact(value: float) -> str:
    """ "12,300", "4.56" or "0.12" """
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _apart(xs: Sequence[float], place: Callable[[float], float]) -> list[float]:
    """The x values whose labels do not run into one another."""
    kept: list[float] = []
    for x in xs:
        if not kept or place(x) - place(kept[-1]) > _LETTER * (len(compact(x)) + 1):
            kept.append(x)
    return kept


def _shortened(text: str) -> str:
    most = int(_LABEL_WIDTH / _LETTER) - 2
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", fill: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}">{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" style="max-width:100%" '
        f'font-family="system-ui, sans-serif" font-size="12">{"".join(parts)}</svg>'
    )
