"""plan.svg: a rank's memory over a step, by what it is for. matplotlib draws it: a small picture that prints, without a browser."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from trainers.config.errors import plural
from trainers.plan.plan import WORDS, Plan
from trainers.units import GIB

COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")
"""Paul Tol's bright scheme, which the colour-blind can tell apart."""
NARROWEST = 0.08
"""Share of the width that a part of the step has at least, so that its name has room."""


def draw(plan: Plan, path: Path) -> None:
    """Write the picture; along the x axis a step's moments in their order, blocks as wide as each other."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib.figure import Figure

    parts = _parts(plan.moments)
    widths = _widths(parts)
    edges = list(accumulate((width for part in widths for width in part), initial=0.0))
    heights = [[moment["bytes"].get(str(kind), 0.0) / GIB for part in parts for moment in part] for kind in WORDS]
    totals = [sum(height) for height in zip(*heights, strict=True)]

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots()
    stacks = [[*height, height[-1]] for height in heights]
    axes.stackplot(edges, stacks, labels=list(WORDS.values()), colors=COLOURS, step="post", linewidth=0)
    _mark_capacities(axes, plan, max(totals))
    _mark_peak(axes, plan, edges, totals)
    _name_parts(axes, parts, widths)
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(0, 1.12 * max(axes.get_ylim()[1], max(totals)))
    axes.set_ylabel("GiB of a rank")
    again = "; (2nd): the second microbatch" if any(part[0]["microbatch"] for part in parts) else ""
    axes.set_title(f"{plan.name}: memory over a step ({plural(plan.place.size, 'rank')}, {plan.engine}){again}", fontsize=10)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8, reverse=True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def _widths(parts: list[list[dict[str, Any]]]) -> list[list[float]]:
    longest = max(len(part) for part in parts)
    return [[max(1.0, NARROWEST * longest * len(parts) / 2 / len(part))] * len(part) for part in parts]


def _mark_capacities(axes: Any, plan: Plan, highest: float) -> None:
    """Draw a line for the memory of each device that is not far above the run's."""
    for name, capacity in plan.capacity.items():
        if 0 < capacity / GIB < 4 * highest:
            axes.axhline(capacity / GIB, color="#555555", linewidth=1, linestyle="--")
            axes.annotate(f" {name}: {capacity / GIB:.4g} GiB", (0, capacity / GIB), va="bottom", fontsize=8, color="#555555")


def _mark_peak(axes: Any, plan: Plan, edges: list[float], totals: list[float]) -> None:
    at = totals.index(max(totals))
    middle = (edges[at] + edges[at + 1]) / 2
    side = "left" if middle < edges[-1] / 4 else "right" if middle > edges[-1] * 3 / 4 else "center"
    words, arrow = f"{totals[at]:,.3g} GiB: {plan.peak_at}", {"arrowstyle": "-", "linewidth": 0.8}
    axes.annotate(words, (middle, totals[at]), (0, 14), textcoords="offset points", ha=side, fontsize=9, arrowprops=arrow)


def _name_parts(axes: Any, parts: list[list[dict[str, Any]]], widths: list[list[float]]) -> None:
    borders = list(accumulate((sum(part) for part in widths), initial=0.0))
    centres = [(begin + end) / 2 for begin, end in pairwise(borders)]
    axes.set_xticks(borders, minor=True)
    axes.set_xticks(centres, [_label(part[0]) for part in parts], fontsize=8)
    axes.tick_params(axis="x", which="major", length=0)


def _parts(moments: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return moments by the part of the step that they are of: all blocks of one forward together."""
    found: list[list[dict[str, Any]]] = []
    for moment in moments:
        if moment["name"] == "after the step":
            continue
        if not found or (moment["name"], moment["microbatch"]) != (found[-1][0]["name"], found[-1][0]["microbatch"]):
            found.append([])
        found[-1].append(moment)
    return found


def _label(moment: dict[str, Any]) -> str:
    return str(moment["name"]).replace(" ", "\n") + ("\n(2nd)" if moment["microbatch"] else "")
