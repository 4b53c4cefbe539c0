"""The picture of a run: every attempt in order, what was merged named, with intervals.

Pure: State in, PNG bytes out. Figures are built object by object; pyplot, which keeps global state, is not used.
"""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from agent.ledger import State
from agent.records import Estimate
from agent.show import view

GREEN, GREY, RED, AMBER, INK = "#1a7f37", "#9aa1a9", "#cf222e", "#bf8700", "#24292f"
NAMED = 24
"""Accepted attempts whose names are written into the picture."""


def png(state: State) -> bytes:
    """Every attempt in order. Upper part: change of the metric since the start, with the staircase of what was
    merged; an attempt stands at the level of its incumbent plus its effect. Strip below: attempts without a number.
    """
    rows = [_plottable(r) for r in view.rows(state) if r.outcome]
    figure = Figure(figsize=(min(18.0, max(9.0, 3.0 + 0.34 * len(rows))), 5.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, strip = figure.subplots(2, 1, sharex=True, height_ratios=(11, 1))
    levels = _levels(rows)
    _staircase(upper, rows, levels)
    _points(upper, rows, levels)
    _strip(strip, rows)
    _dress(figure, upper, strip, state, rows)
    figure.draw_without_rendering()
    renderer: RendererBase = canvas.get_renderer()  # type: ignore[no-untyped-call]  # no stub for backend_agg
    _names(upper, renderer, rows, levels, up=1 if view.maximised(state) else -1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white")
    return buffer.getvalue()


def _plottable(r: view.Row) -> view.Row:
    """A row whose effect is not finite counts as one without a number."""
    return r if r.estimate is None or math.isfinite(r.estimate.effect) else dataclasses.replace(r, estimate=None)


def _reach(e: Estimate, most: float) -> tuple[float, float]:
    """Lengths of the interval below and above the effect. One pair has an infinite interval: it fills the axis."""
    return min(max(0.0, e.effect - e.low), most), min(max(0.0, e.high - e.effect), most)


def _levels(rows: list[view.Row]) -> list[float]:
    """Sum of the effects merged before each attempt, and after the last: one more than there are rows."""
    levels = [0.0]
    for r in rows:
        levels.append(levels[-1] + (r.estimate.effect if r.kind == "accepted" and r.estimate else 0.0))
    return levels


def _staircase(axes: Axes, rows: list[view.Row], levels: list[float]) -> None:
    x = [0.4, *[r.number for r in rows], (rows[-1].number if rows else 1) + 0.6]
    y = [levels[0], *levels[1:], levels[-1]]
    axes.step(x, y, where="post", color=GREEN, linewidth=2.0, alpha=0.75, zorder=2, label="merged so far (sum)")
    axes.axhline(0.0, color=INK, linewidth=0.8, linestyle=(0, (4, 4)), alpha=0.5, zorder=1)


def _points(axes: Axes, rows: list[view.Row], levels: list[float]) -> None:
    """Dots with intervals. The axis is set by the staircase and the bulk of the dots; others sit on its edge."""
    judged = [(r, base, r.estimate) for r, base in zip(rows, levels, strict=False) if r.estimate]
    bottom, top = _range(judged_values=[base + e.effect for _, base, e in judged],
                         accepted=[v for r, base, e in judged if r.kind == "accepted"
                                   for v in (base + e.low, base + e.high) if math.isfinite(v)], levels=levels)
    axes.set_ylim(bottom, top)
    for kind, colour, label, dot in (("refused", GREY, "trained, not merged", 5), ("accepted", GREEN, "merged", 7)):
        inside = [(r.number, base + e.effect, *_reach(e, top - bottom))
                  for r, base, e in judged if (r.kind == "accepted") == (kind == "accepted")
                  and bottom <= base + e.effect <= top]
        if inside:
            x, middle, down, up = map(list, zip(*inside, strict=True))
            axes.errorbar(x, middle, yerr=[down, up], fmt="o", color=colour, markersize=dot, elinewidth=1.3,
                          capsize=2.5, zorder=dot, label=label)
    for r, base, e in judged:
        y = base + e.effect
        if not bottom <= y <= top:
            above, colour = y > top, GREEN if r.kind == "accepted" else GREY
            edge = top if above else bottom
            axes.plot(r.number, edge, marker="^" if above else "v", color=colour, markersize=7, clip_on=False)
            axes.annotate(f"{e.effect:+.2g}", (r.number, edge), xytext=(0, -13 if above else 8),
                          textcoords="offset points", ha="center", fontsize=7, color=colour)


def _range(judged_values: list[float], accepted: list[float], levels: list[float]) -> tuple[float, float]:
    """Limits of the y axis: all that was merged, and those refused dots that do not dwarf it."""
    core = [0.0, *levels, *accepted]
    reach = max(0.4 * (max(core) - min(core)), 1e-3)
    sizes = sorted(map(abs, judged_values))
    if not accepted and sizes:  # nothing merged: three quarters of the dots set the scale
        reach = max(reach, 1.5 * sizes[(3 * (len(sizes) - 1)) // 4])
    near = [v for v in judged_values if min(core) - reach <= v <= max(core) + reach]
    low, high = min([*core, *near]), max([*core, *near])
    margin = 0.14 * max(high - low, 1e-3)
    return low - margin, high + margin


def _strip(axes: Axes, rows: list[view.Row]) -> None:
    for kind, colour, label in (("untrained", AMBER, "refused before training"), ("failed", RED, "failed in a run"),
                                ("refused", GREY, "lost its first pair")):
        x = [r.number for r in rows if r.kind == kind and not r.estimate]
        if x:
            axes.plot(x, [0.0] * len(x), linestyle="none", marker="x", markersize=7, markeredgewidth=2, color=colour,
                      label=label)
    axes.set_ylim(-1, 1)
    axes.set_yticks([])
    axes.set_ylabel("no\nnumber", rotation=0, ha="right", va="center", fontsize=8, color=INK)


def _dress(figure: Figure, upper: Axes, strip: Axes, state: State, rows: list[view.Row]) -> None:
    for axes in (upper, strip):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    strip.spines["left"].set_visible(False)
    upper.grid(axis="y", color="#d8dee4", linewidth=0.7)
    upper.set_axisbelow(True)
    upper.tick_params(axis="x", length=0)
    upper.set_ylabel(f"{view.metric(state)}: change since the start ({view.better(state)})", color=INK)
    strip.set_xlabel("attempt, in order", color=INK)
    strip.set_xlim(0.4, max(len(rows), 1) + 0.6 if not rows else rows[-1].number + 0.6)
    strip.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    merged = sum(r.kind == "accepted" for r in rows)
    gain = f"; final split {view.span(state.gain.effect, state.gain.low, state.gain.high)}" if state.gain else ""
    name = view.clean(str(state.campaign.get("name", "")))
    upper.set_title(f"Ratchet run {name}: {merged} of {len(rows)} attempts merged{gain}".replace("$", r"\$"),
                    loc="left", fontsize=11, color=INK)
    handles, labels = upper.get_legend_handles_labels()
    more, names = strip.get_legend_handles_labels()
    figure.legend(handles + more, labels + names, loc="outside lower right", ncols=5, frameon=False, fontsize=8)


def _names(axes: Axes, renderer: RendererBase, rows: list[view.Row], levels: list[float], up: int) -> None:
    """Write the names of the merged attempts where they cover neither each other, nor a dot, nor the staircase.

    ``up``: the better side of the staircase (1 above, -1 below), where there is most room.
    """
    points = [(r, base + r.estimate.effect, base) for r, base in zip(rows, levels, strict=False) if r.estimate]
    taken = [_bar(axes, r, base) for r, _, base in points] + _stairs(axes, rows, levels)
    frame = axes.get_window_extent()
    accepted = [(r, y) for r, y, _ in points if r.kind == "accepted"][:NAMED]
    for r, y in accepted:
        text = f"#{r.number} " + (r.title if len(r.title) <= 44 else r.title[:43].rstrip() + "…")
        label = _label(axes, text, (r.number, y))
        size = Text.get_window_extent(label, renderer)
        x0, y0 = axes.transData.transform((r.number, y))
        scale = axes.figure.dpi / 72
        boxes = [(place, _box(size, x0 + dx * scale, y0 + dy * up * scale, side))
                 for place in _PLACES for dx, dy, side in [place]]
        (dx, dy, side), box = min(boxes, key=lambda tried: _cost(tried[1], taken, frame))
        label.set_position((dx, dy * up))
        label.set_horizontalalignment(side)
        taken.append(box)


def _label(axes: Axes, text: str, at: tuple[float, float]) -> Annotation:
    """The name with a thin line to its dot; its place is set later."""
    label = axes.annotate(text.replace("$", r"\$"), at, xytext=(0, 0), textcoords="offset points", va="center",
                          fontsize=8, color=GREEN, zorder=5, path_effects=[withStroke(linewidth=3, foreground="white")],
                          arrowprops={"arrowstyle": "-", "color": GREEN, "linewidth": 0.6, "alpha": 0.6})
    label.set_in_layout(False)
    return label


def _box(size: Bbox, x: float, y: float, side: str) -> Bbox:
    """Pixels of a name of that size whose ``side`` is at x, centred on y."""
    left = x if side == "left" else x - size.width
    return Bbox.from_extents(left, y - size.height / 2, left + size.width, y + size.height / 2)


_PLACES: tuple[tuple[float, float, Literal["left", "right"]], ...] = tuple(
    (dx * flip, dy, "left" if flip > 0 else "right")
    for dy in (14.0, -14.0, 28.0, -28.0, 44.0, -44.0, 62.0, -62.0, 80.0)
    for dx in (10.0, 26.0) for flip in (-1, 1))
"""Offsets in points from the dot that are tried for a name, nearest first; positive is the better side."""


def _bar(axes: Axes, r: view.Row, base: float) -> Bbox:
    """Pixels that a dot and its interval cover."""
    assert r.estimate is not None
    low, high = axes.get_ylim()
    ends = [min(max(base + v, low), high) for v in (r.estimate.low, r.estimate.high)]
    (x, y0), (_, y1) = (axes.transData.transform((r.number, y)) for y in ends)
    return Bbox.from_extents(x - 5, min(y0, y1) - 5, x + 5, max(y0, y1) + 5)


def _stairs(axes: Axes, rows: list[view.Row], levels: list[float]) -> list[Bbox]:
    """Pixels of the staircase, level by level and step by step."""
    boxes = []
    x = [0.4, *[float(r.number) for r in rows], (rows[-1].number if rows else 1) + 0.6]
    for i, level in enumerate(levels):
        (x0, y0), (x1, _) = axes.transData.transform([(x[i], level), (x[i + 1], level)])
        before = axes.transData.transform((x[i], levels[max(0, i - 1)]))[1]
        boxes += [Bbox.from_extents(x0, y0 - 2, x1, y0 + 2),
                  Bbox.from_extents(x0 - 2, min(y0, before), x0 + 2, max(y0, before) + 1e-6)]
    return boxes


def _cost(box: Bbox, taken: list[Bbox], frame: Bbox) -> float:
    """Pixels of ``box`` that lie over something or outside the frame."""
    ends = np.array([[other.x0, other.y0, other.x1, other.y1] for other in [frame, *taken]])
    wide = np.minimum(box.x1, ends[:, 2]) - np.maximum(box.x0, ends[:, 0])
    high = np.minimum(box.y1, ends[:, 3]) - np.maximum(box.y0, ends[:, 1])
    shared = wide.clip(min=0) * high.clip(min=0)
    return float(shared[1:].sum() + box.width * box.height - shared[0])
