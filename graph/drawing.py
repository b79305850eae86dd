"""Drawings: boxes and edges as an SVG, in layers from top to bottom, with repeated parts folded into one frame "x N".

boxes in topological order -> fold repeats -> ranks (rows) -> order within rows -> x positions -> SVG

The layout is the layered one of Sugiyama, Tagawa and Toda (1981): long edges get a place in every row that they cross, rows
are ordered by the mean position of their neighbours, and positions within a row solve a least-squares problem exactly.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

MAX_BOXES = 400
"""Boxes that are drawn at most, after folding."""

COLOURS = {
    "input": ("#eceff1", "#607d8b"),
    "output": ("#eceff1", "#607d8b"),
    "attention": ("#ffe0b2", "#ef6c00"),
    "linear": ("#bbdefb", "#1565c0"),
    "experts": ("#d1c4e9", "#5e35b1"),
    "norm": ("#c8e6c9", "#2e7d32"),
    "position": ("#fff9c4", "#c0a000"),
    "gate": ("#f8bbd0", "#c2185b"),
    "lookup": ("#b2dfdb", "#00796b"),
    "segment": ("#bbdefb", "#1565c0"),
    "other": ("#ffffff", "#9e9e9e"),
}
"""Kind of a box -> (fill, stroke)."""

_ROW_HEIGHT, _BOX_HEIGHT, _GAP, _MARGIN = 58, 36, 18, 24
_TITLE_WIDTH, _DETAIL_WIDTH, _LANE_WIDTH = 7.6, 6.8, 10


@dataclass(frozen=True)
class Box:
    """One box: a bold title, a second line, a kind of COLOURS, the numbers of the boxes that it reads, and a tooltip."""

    title: str
    detail: str
    kind: str
    inputs: tuple[int, ...] = ()
    tooltip: str = ""


@dataclass(frozen=True)
class Fold:
    """A repeat: `count` copies of `period` boxes, the first copy at box number `start`."""

    start: int
    period: int
    count: int

    @property
    def end(self) -> int:
        """The first box number after the last copy."""
        return self.start + self.period * self.count


# -------------------------------------------------------------------------------------------------------------- folding
def find_folds(boxes: Sequence[Box]) -> list[Fold]:
    """Repeats that do not overlap, by start; the one that hides most boxes is taken first, two small copies are left alone.

    Copies agree in titles, details, kinds and edges, apart from what the first copy reads in place of a copy before it.
    """
    names = [(box.title, box.detail, box.kind) for box in boxes]
    folds: list[Fold] = []
    todo = [(0, len(boxes))]
    while todo:
        begin, end = todo.pop()
        best = _best_fold(boxes, names, begin, end)
        if best is not None:
            folds.append(best)
            todo += [(begin, best.start), (best.end, end)]
    return sorted(folds, key=lambda fold: fold.start)


def _best_fold(boxes: Sequence[Box], names: list[tuple[str, str, str]], begin: int, end: int) -> Fold | None:
    best, most_hidden = None, 3
    for period in range(2, (end - begin) // 2 + 1):
        run = 0
        for i in range(begin, end - period + 1):
            if i < end - period and names[i] == names[i + period] and _same_edges(boxes, i, period):
                run += 1
                continue
            if run:
                start, length = i - run, run
                while start > begin and length < run + period and names[start - 1] == names[start - 1 + period]:
                    start, length = start - 1, length + 1
                count = length // period + 1
                if (count - 1) * period > most_hidden and (count > 2 or period >= 8):
                    best, most_hidden = Fold(start, period, count), (count - 1) * period
            run = 0
    return best


def _same_edges(boxes: Sequence[Box], i: int, period: int) -> bool:
    first, second = boxes[i].inputs, boxes[i + period].inputs
    return len(first) == len(second) and all(b in (a, a + period) for a, b in zip(first, second))


def _shown(boxes: Sequence[Box], folds: Sequence[Fold]) -> tuple[list[Box], list[int | None]]:
    """The boxes that remain, and for each the number of its fold; edges from later copies come from the first."""
    kept: list[int] = []
    section: list[int | None] = []
    place: dict[int, int] = {}
    owner = {i: f for f, fold in enumerate(folds) for i in range(fold.start, fold.end)}
    for i in range(len(boxes)):
        f = owner.get(i)
        if f is not None and i >= folds[f].start + folds[f].period:
            place[i] = place[folds[f].start + (i - folds[f].start) % folds[f].period]
            continue
        place[i] = len(kept)
        kept.append(i)
        section.append(f)
    shown = [replace(boxes[i], inputs=tuple(dict.fromkeys(place[j] for j in boxes[i].inputs))) for i in kept]
    return shown, section


# --------------------------------------------------------------------------------------------------------------- layout
@dataclass
class _Point:
    """A box, or the place where a long edge crosses a row (box None)."""

    box: int | None
    rank: int
    width: float
    above: list[int] = field(default_factory=list)
    below: list[int] = field(default_factory=list)
    x: float = 0.0


def _ranks(boxes: Sequence[Box], section: Sequence[int | None]) -> list[int]:
    """Rows by longest path; a fold has rows of its own, so that nothing else stands in its frame."""
    ranks: list[int] = []
    base = 0
    for i, box in enumerate(boxes):
        if i and section[i] != section[i - 1]:
            base = max(ranks) + 1
        ranks.append(max([base, *(ranks[j] + 1 for j in box.inputs)]))
    for i in reversed(range(len(boxes))):  # what reads nothing moves down to its first reader
        readers = [j for j in range(i + 1, len(boxes)) if i in boxes[j].inputs and section[j] == section[i]]
        outside = any(i in boxes[j].inputs and section[j] != section[i] for j in range(i + 1, len(boxes)))
        if not boxes[i].inputs and readers and not outside:
            ranks[i] = min(ranks[j] for j in readers) - 1
    return ranks


def _width(box: Box) -> float:
    return 18 + max(_TITLE_WIDTH * len(box.title), _DETAIL_WIDTH * len(box.detail))


def _points(boxes: Sequence[Box], ranks: Sequence[int]) -> tuple[list[_Point], dict[tuple[int, int], list[int]]]:
    """All points, and each edge (from box, to box) as the points that it goes through."""
    points = [_Point(i, ranks[i], _width(box)) for i, box in enumerate(boxes)]
    paths: dict[tuple[int, int], list[int]] = {}
    lanes: dict[tuple[int, int], int] = {}  # one lane per source and row: edges to several readers share it
    for i, box in enumerate(boxes):
        for j in box.inputs:
            path = [j]
            for rank in range(ranks[j] + 1, ranks[i]):
                if (j, rank) not in lanes:
                    lanes[j, rank] = len(points)
                    points.append(_Point(None, rank, _LANE_WIDTH))
                path.append(lanes[j, rank])
            path.append(i)
            paths[j, i] = path
            for a, b in zip(path, path[1:]):
                if b not in points[a].below:
                    points[a].below.append(b)
                    points[b].above.append(a)
    return points, paths


def _order(points: list[_Point]) -> list[list[int]]:
    """Points of each row from left to right, by barycenters in alternating sweeps."""
    rows: list[list[int]] = [[] for _ in range(max(point.rank for point in points) + 1)]
    for index, point in enumerate(points):
        rows[point.rank].append(index)
    for sweep in range(8):
        down = sweep % 2 == 0
        position = {index: k for row in rows for k, index in enumerate(row)}
        for row in rows if down else reversed(rows):
            mean: dict[int, float] = {}
            for index in row:
                near = points[index].above if down else points[index].below
                mean[index] = sum(position[n] for n in near) / len(near) if near else position[index]
            row.sort(key=lambda index: mean[index])
            position.update({index: k for k, index in enumerate(row)})
    return rows


def _place(points: list[_Point], rows: Sequence[Sequence[int]]) -> None:
    """x positions: each point near the mean of its neighbours, none overlapping; long edges are kept straight."""
    for row in rows:
        left = 0.0
        for index in row:
            points[index].x = left + points[index].width / 2
            left += points[index].width + _GAP
    for sweep in range(160):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted, weight = [], []
            for index in row:
                point = points[index]
                pulls = [(points[n].x, _pull(point, points[n])) for n in point.above + point.below]
                total = sum(pull for _, pull in pulls)
                wanted.append(sum(x * pull for x, pull in pulls) / total if total else point.x)
                weight.append(total or 1.0)
            for index, x in zip(row, _separate(wanted, weight, [points[index].width for index in row])):
                points[index].x = x


def _pull(a: _Point, b: _Point) -> float:
    """How strongly an edge wants to be straight: most between two lanes, least between two boxes (Gansner et al. 1993)."""
    return (1.0, 2.0, 8.0)[(a.box is None) + (b.box is None)]


def _separate(wanted: list[float], weight: list[float], widths: list[float]) -> list[float]:
    """Least-squares positions that keep the order and the gaps: isotonic regression by pooling adjacent violators."""
    shift, shifts = 0.0, []
    for k, width in enumerate(widths):
        shift += 0.0 if k == 0 else (widths[k - 1] + width) / 2 + _GAP
        shifts.append(shift)
    pools: list[tuple[float, float, int]] = []  # (mean, weight, members)
    for target, mass, offset in zip(wanted, weight, shifts):
        pool = (target - offset, mass, 1)
        while pools and pools[-1][0] >= pool[0]:
            mean, before, members = pools.pop()
            total = before + pool[1]
            pool = ((mean * before + pool[0] * pool[1]) / total, total, members + pool[2])
        pools.append(pool)
    flat = [mean for mean, _, members in pools for _ in range(members)]
    return [x + offset for x, offset in zip(flat, shifts)]


# ------------------------------------------------------------------------------------------------------------------ SVG
def draw(boxes: Sequence[Box], *, label: str = "graph") -> str:
    """The boxes as an SVG document. Repeats are folded; beyond MAX_BOXES boxes a note takes the drawing's place."""
    folds = find_folds(boxes)
    shown, section = _shown(boxes, folds)
    if not shown or len(shown) > MAX_BOXES:
        why = "nothing to draw" if not shown else f"{len(shown)} boxes are too many to draw (limit {MAX_BOXES})"
        return _document(420, 40, label, [_text(12, 24, why, "normal", 12)])
    ranks = _ranks(shown, section)
    points, paths = _points(shown, ranks)
    _place(points, _order(points))
    left = min(point.x - point.width / 2 for point in points) - _MARGIN - (24 if folds else 0)
    for point in points:
        point.x -= left
    width = max(point.x + point.width / 2 for point in points) + _MARGIN + (60 if folds else 0)
    height = _y(max(ranks)) + _BOX_HEIGHT / 2 + _MARGIN
    parts = [_frame(f, fold, points, section) for f, fold in enumerate(folds)]
    parts += [_edge([points[p] for p in path]) for path in paths.values()]
    parts += [_box(shown[p.box], p) for p in points if p.box is not None]
    return _document(width, height, label, parts)


def _y(rank: int) -> float:
    return _MARGIN + _BOX_HEIGHT / 2 + rank * _ROW_HEIGHT


def _document(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" font-family="Helvetica, Arial, sans-serif">'
        f"<title>{html.escape(label)}</title>"
        '<rect width="100%" height="100%" fill="#ffffff"/>' + "".join(parts) + "</svg>"
    )


def _text(x: float, y: float, text: str, weight: str, size: int, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="#263238">{html.escape(text)}</text>'
    )


def _frame(number: int, fold: Fold, points: Sequence[_Point], section: Sequence[int | None]) -> str:
    inside = [p for p in points if p.box is not None and section[p.box] == number]
    left = min(p.x - p.width / 2 for p in inside) - 14
    right = max(p.x + p.width / 2 for p in inside) + 14
    top, bottom = _y(min(p.rank for p in inside)) - 27, _y(max(p.rank for p in inside)) + 27
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" rx="10" '
        'fill="#f5f7fa" stroke="#90a4ae" stroke-dasharray="5 4"/>'
        + _text(right + 8, (top + bottom) / 2 + 6, f"× {fold.count}", "bold", 16)
    )


def _edge(path: Sequence[_Point]) -> str:
    """A curve from the bottom of the first box to the top of the last, straight down where it crosses rows."""
    half = _BOX_HEIGHT / 2
    x, y = path[0].x, _y(path[0].rank) + half
    commands = [f"M{x:.1f} {y:.1f}"]
    for k, point in enumerate(path[1:], start=1):
        top = _y(point.rank) - half
        last = k == len(path) - 1
        end = top - (4 if last else 0)
        bend = (end - y) / 2
        commands.append(f"C{x:.1f} {y + bend:.1f} {point.x:.1f} {end - bend:.1f} {point.x:.1f} {end:.1f}")
        x, y = point.x, end
        if not last:
            y = top + _BOX_HEIGHT
            commands.append(f"L{x:.1f} {y:.1f}")
    head = f"M{x - 3.5:.1f} {y - 2:.1f}L{x + 3.5:.1f} {y - 2:.1f}L{x:.1f} {y + 4:.1f}Z"
    return f'<path d="{"".join(commands)}" fill="none" stroke="#78909c"/><path d="{head}" fill="#78909c"/>'


def _box(box: Box, point: _Point) -> str:
    fill, stroke = COLOURS[box.kind]
    y = _y(point.rank)
    return (
        f"<g><title>{html.escape(box.tooltip or box.title)}</title>"
        f'<rect x="{point.x - point.width / 2:.1f}" y="{y - _BOX_HEIGHT / 2:.1f}" width="{point.width:.1f}" '
        f'height="{_BOX_HEIGHT}" rx="5" fill="{fill}" stroke="{stroke}"/>'
        + _text(point.x, y - 3 if box.detail else y + 4, box.title, "bold", 12, "middle")
        + (_text(point.x, y + 12, box.detail, "normal", 11, "middle") if box.detail else "")
        + "</g>"
    )
