"""The pictures of a comparison, as SVG: small, sharp in print, and without a network or a script. matplotlib draws them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.compare.gather import Curve
from tools.compare.methods import Comparison, Method
from tools.evaluate.intervals import Estimate
from trainers.units import GIB, in_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#222222", "#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee")
"""Black for full fine-tuning, then Paul Tol's bright scheme, which the colour-blind can tell apart."""
MARKERS = "osD^vP*X"
SIZE = (5.6, 3.7)
"""Inches of a picture: two are next to each other on a page."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A plot with what it is to be read for."""

    title: str
    words: str
    svg: str


def look(number: int) -> tuple[str, str]:
    """Return colour and marker of a comparison's method by its place."""
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def pictures(comparison: Comparison) -> list[Picture]:
    """Return the plots that the runs have values for."""
    hours = "GPU-hours" if comparison.is_on_gpu else "rank-hours"
    found = [
        _of_curves(
            comparison,
            "Loss against tokens",
            f"Held-out {comparison.loss_words} during training (with markers); in pale that of training, the mean of a twentieth of the "
            "steps.",
            "trained tokens",
            lambda curve: curve.tokens,
        ),
        _of_curves(
            comparison,
            f"Loss against {hours}",
            f"The same over what it cost: steps alone, {hours} of all ranks.",
            hours,
            lambda curve: curve.hours,
        ),
        _learn_forget(comparison),
        _against(comparison, "Quality against memory", f"A rank's peak of {_memory_of(comparison)} memory.", "GiB", _memory(comparison)),
        _against(
            comparison,
            "Quality against cost",
            "What the run took; the hollow mark at the same height is what all rates took that were tried.",
            f"{hours}{'' if comparison.price is None else f' (x {comparison.price:g} = cost)'}",
            lambda method: method.best.hours,
            lambda method: method.search_hours,
        ),
    ]
    return [picture for picture in found if picture is not None]


def _draw(name: str, plot: Callable[[Axes], None]) -> str:
    """Return the SVG element of what `plot` puts on axes; `name` keeps its ids apart from other pictures' on the page."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9}
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    plot(axes)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    prefix = re.sub(r"\W+", "-", name.lower())
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg[svg.index("<svg") :])


def _of_curves(
    comparison: Comparison, title: str, words: str, unit: str, across: Callable[[Curve], list[float] | list[int]]
) -> Picture | None:
    if not comparison.has_one_loss or not any(method.best.evaluated.loss for method in comparison.methods):
        return None

    def plot(axes: Axes) -> None:
        for number, method in enumerate(comparison.methods):
            colour, _ = look(number)
            curve = method.best.trained
            axes.plot(across(curve), smooth(curve.loss), color=colour, linewidth=0.8, alpha=0.35)
        for number, method in enumerate(comparison.methods):
            colour, marker = look(number)
            curve = method.best.evaluated
            axes.plot(across(curve), curve.loss, color=colour, marker=marker, markersize=4, linewidth=1.4, label=method.label)
        held_out = [loss for method in comparison.methods for loss in method.best.evaluated.loss]
        room = 0.08 * (max(held_out) - min(held_out) or 1.0)
        axes.set_ylim(min(held_out) - 2 * room, max(held_out) + room)
        axes.set_xlabel(unit)
        axes.set_ylabel("nats a token" if comparison.loss_words == "loss" else comparison.loss_words)
        axes.xaxis.set_major_formatter(lambda value, _place: in_digits(value))
        _legend(axes)

    return Picture(title=title, words=words, svg=_draw(title, plot))


def smooth(losses: list[float]) -> list[float]:
    """Return the mean of each loss and those before it, as many as a twentieth of all."""
    width = max(1, len(losses) // 20)
    return [sum(losses[max(0, at + 1 - width) : at + 1]) / len(losses[max(0, at + 1 - width) : at + 1]) for at in range(len(losses))]


def _learn_forget(comparison: Comparison) -> Picture | None:
    """Draw what a method has gained at the task over what it has lost elsewhere; the base is at 0, 0."""
    known = [method for method in comparison.methods if method.figures.forgetting and method.figures.score_to_base]
    if not known:
        return None

    def plot(axes: Axes) -> None:
        axes.axhline(0, color="#999999", linewidth=0.8)
        axes.axvline(0, color="#999999", linewidth=0.8)
        axes.plot(0, 0, marker="+", color="#555555", markersize=9)
        axes.annotate("base", (0, 0), (4, 4), textcoords="offset points", fontsize=8, color="#555555")
        for number, method in enumerate(comparison.methods):
            if method in known:
                _point(axes, number, method, method.figures.forgetting, method.figures.score_to_base)
        axes.set_xlabel("forgetting: loss on general text - base, nats a token")
        axes.set_ylabel(f"{comparison.metric} - base")
        _legend(axes)

    words = "Up: better at the task than the base. Left: less lost of what the base could. With intervals."
    return Picture(title="What is learned against what is forgotten", words=words, svg=_draw("plane", plot))


def _against(
    comparison: Comparison,
    title: str,
    words: str,
    unit: str,
    across: Callable[[Method], float | None],
    of_all: Callable[[Method], float] | None = None,
) -> Picture | None:
    """Draw the task's score, else the best of what there is, over what it took; methods with another set-up are left out."""
    name, quality_of = _measure(comparison)
    known = [method for method in comparison.methods if method.best.has_same_costs and across(method) and quality_of(method)]
    if not known:
        return None

    def plot(axes: Axes) -> None:
        for number, method in enumerate(comparison.methods):
            place, quality = across(method), quality_of(method)
            if method not in known or place is None or quality is None:
                continue
            if of_all is not None and len(method.tried) > 1:
                axes.plot([place, of_all(method)], [quality.value] * 2, color=look(number)[0], linewidth=0.8, linestyle=":")
                axes.plot(of_all(method), quality.value, color=look(number)[0], marker=look(number)[1], fillstyle="none", linestyle="none")
            _point(axes, number, method, Estimate(value=place, low=None, high=None, count=0), quality)
        axes.set_xlim(left=0, right=1.15 * axes.get_xlim()[1])
        axes.set_xlabel(unit)
        axes.set_ylabel(name)
        _legend(axes)

    return Picture(title=title, words=words, svg=_draw(title, plot))


def _measure(comparison: Comparison) -> tuple[str, Callable[[Method], Estimate | None]]:
    """Return the one thing that all methods are drawn by: score, accuracy of pairs, held-out loss, or the objective's own."""
    if comparison.metric:
        return comparison.metric, lambda method: method.figures.score
    if comparison.has_pairs:
        return "preference accuracy", lambda method: method.figures.accuracy
    if any(method.figures.told for method in comparison.methods):
        return "accuracy", lambda method: method.figures.told
    if any(method.figures.held_out for method in comparison.methods):
        return "held-out loss, nats a token", lambda method: method.figures.held_out
    return f"held-out {comparison.loss_words}", lambda method: method.figures.own_loss if comparison.has_one_loss else None


def _point(axes: Axes, number: int, method: Method, across: Estimate | None, up: Estimate | None) -> None:
    """Put a method's mark, with bars where there are intervals."""
    assert across is not None
    assert up is not None
    colour, marker = look(number)
    bars = [_reach(estimate) for estimate in (across, up)]
    axes.errorbar(
        across.value,
        up.value,
        xerr=bars[0],
        yerr=bars[1],
        color=colour,
        marker=marker,
        markersize=6,
        linewidth=1,
        linestyle="none",
        label=method.label,
    )


def _reach(estimate: Estimate) -> list[list[float]] | None:
    """Return how far an interval reaches down and up, as matplotlib takes it."""
    if estimate.low is None or estimate.high is None:
        return None
    return [[estimate.value - estimate.low], [estimate.high - estimate.value]]


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")


def _memory(comparison: Comparison) -> Callable[[Method], float | None]:
    key = f"{_memory_of(comparison)}_bytes_peak"
    return lambda method: None if not method.best.summary.get(key) else method.best.summary[key] / GIB


def _memory_of(comparison: Comparison) -> str:
    return "device" if all(method.best.summary.get("device_bytes_peak") for method in comparison.methods) else "host"


def chain(title: str, words: str, unit: str, points: list[tuple[str, Estimate | None]]) -> Picture | None:
    """Return a plot of values one after another, with their intervals; None where fewer than two are known."""
    known = [(name, estimate) for name, estimate in points if estimate is not None]
    if len(known) < 2:
        return None

    def plot(axes: Axes) -> None:
        axes.plot(range(len(known)), [estimate.value for _, estimate in known], color=look(1)[0], linewidth=1.2)
        for place, (_, estimate) in enumerate(known):
            axes.errorbar(place, estimate.value, yerr=_reach(estimate), fmt="o", color=look(1)[0], capsize=3)
        axes.set_xticks(range(len(known)), [name for name, _ in known])
        axes.set_ylabel(unit)

    return Picture(title=title, words=words, svg=_draw(title, plot))


def bars(title: str, words: str, values: list[tuple[str, float]], unit: str) -> Picture | None:
    """Return a bar for each value; None where all are 0."""

    def plot(axes: Axes) -> None:
        axes.bar(range(len(values)), [value for _, value in values], color=look(1)[0], width=0.6)
        axes.set_xticks(range(len(values)), [name for name, _ in values])
        axes.set_ylabel(unit)

    return Picture(title=title, words=words, svg=_draw(title, plot)) if any(value for _, value in values) else None
