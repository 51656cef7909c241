"""The reports' drawings: lines as inline SVG, and one colour per expert."""

import colorsys
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coterie.report.comparison import Arm

# Paul Tol's "light" scheme: safe for colour-blind readers, made to lie under black text.
_TOL_LIGHT = ("#77aadd", "#ee8866", "#eedd88", "#44bb99", "#ffaabb", "#99ddff", "#bbcc33", "#aaaa00")

# Each role is drawn in a colour of its own and then handed to the page's style sheet, which knows whether
# the reader's screen is light or dark.
_INK, _FAINT, _GRID = "#010101", "#020202", "#030303"
_ARMS = tuple(f"#0{i}0404" for i in range(1, 7))
_ROLES = {_INK: "--ink", _FAINT: "--soft", _GRID: "--line", **{c: f"--arm{i}" for i, c in enumerate(_ARMS)}}
_MARKERS = "osD^vP"


def expert_colours(num_experts: int) -> list[str]:
    """One colour per expert, "#rrggbb", light enough to lie under black text.

    The first eight are safe for colour-blind readers; the rest step round the hues by the golden angle, in
    three lightnesses. Past a dozen no palette can be told apart, so the page also names experts on hover.

    >>> expert_colours(2), len(set(expert_colours(64)))
    (['#77aadd', '#ee8866'], 64)
    """
    colours = list(_TOL_LIGHT[:num_experts])
    for i in range(len(colours), num_experts):
        rgb = colorsys.hls_to_rgb((i * 0.618034) % 1, (0.74, 0.84, 0.68)[i % 3], 0.6)
        colours.append("#" + "".join(f"{round(255 * c):02x}" for c in rgb))
    return colours


def loss_curves(arms: Sequence[Arm], *, width: float = 8.0, height: float = 3.8) -> str:
    """Bits per byte over training as an SVG element to be put inside a page.

    Training is drawn faint as measured and as a smoothed line, held-out readings as points. Colours are the
    page's CSS variables `--ink`, `--soft`, `--line`, `--arm0` …; the size is the reader's.

    Args:
        arms: up to 6; those without a curve are left out.
        width, height: inches at the size of the page's text, which sets how large labels look.

    Returns: "" if no arm has a curve. The same arms give the same bytes.

    Raises:
        ValueError: more than 6 arms, or a curve with more values than steps.
    """
    if len(arms) > len(_ARMS):
        raise ValueError(f"{len(arms)} arms in one plot; use at most {len(_ARMS)}")
    drawn = [(i, arm) for i, arm in enumerate(arms) if arm.steps or arm.eval_steps]
    for _, arm in drawn:
        if len(arm.steps) != len(arm.train) or len(arm.eval_steps) != len(arm.eval):
            raise ValueError(
                f"arm {arm.label!r} has {len(arm.train)} training values at {len(arm.steps)} steps and "
                f"{len(arm.eval)} held-out values at {len(arm.eval_steps)} steps; should be equal"
            )
    if not drawn:
        return ""

    with _drawing(width, height) as (axes, svg):
        for i, arm in drawn:
            style: dict[str, Any] = {"color": _ARMS[i], "solid_capstyle": "round"}
            steps, train = np.asarray(arm.steps), np.asarray(arm.train, float)
            axes.plot(*_thin(steps, train), lw=0.8, alpha=0.28, **style)
            axes.plot(*_thin(steps, smooth(train)), lw=1.6, **style, label=None if arm.eval else arm.label)
            axes.plot(
                arm.eval_steps, arm.eval, _MARKERS[i], ms=5.5, mec="none", color=_ARMS[i], label=arm.label
            )
        axes.set_ylim(*_limits([arm for _, arm in drawn]))
        _name_axes(axes, "training step", "bits per byte")
    return _inline(svg.getvalue(), _describe(drawn))


@dataclass
class Line:
    """One labelled line of `line_plot`.

    Args:
        label: in the legend.
        x, y: its points, in order.
        low, high: a band around it, as long as y; empty for none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def line_plot(
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    points: bool = False,
    width: float = 8.0,
    height: float = 3.8,
) -> str:
    """Lines, or scattered points, as an SVG element to be put inside a page; see `loss_curves`.

    Past six lines, colours come again, dashed.

    Args:
        lines: at least one, each with at least one point.
        x, y: names of the axes.
        log_x, log_y: logarithmic axes.
        points: markers without lines.
        width, height: inches at the size of the page's text.

    >>> line_plot([Line("loss", [1, 2], [3.0, 2.0])], x="step", y="nats")[:13]
    '<svg viewBox='
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    bands = sum(len(line.low) > 0 for line in lines)
    with _drawing(width, height) as (axes, svg):
        for i, line in enumerate(lines):
            colour, again = _ARMS[i % len(_ARMS)], i // len(_ARMS)
            xs, ys = np.asarray(line.x, float), np.asarray(line.y, float)
            if points:
                marker = _MARKERS[(i + again) % len(_MARKERS)]
                axes.plot(xs, ys, marker, ms=6, mec="none", color=colour, label=line.label)
                continue
            if len(line.low):
                at, low = _thin(xs, np.asarray(line.low, float))
                high = _thin(xs, np.asarray(line.high, float))[1]
                axes.fill_between(at, low, high, color=colour, alpha=0.54 / max(bands, 3), lw=0)
            style: dict[str, Any] = {
                "ls": ("-", "--", ":")[min(again, 2)],
                "marker": "o" if len(xs) == 1 else "",
            }
            axes.plot(*_thin(xs, ys), lw=1.6, color=colour, label=line.label, **style)
        axes.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
        if not log_x and all(float(value).is_integer() for line in lines for value in line.x):
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        for axis in (axes.xaxis,) * log_x + (axes.yaxis,) * log_y:
            low, high = axis.get_view_interval()
            if high < 100 * low:  # powers of ten alone would leave such an axis almost without numbers
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")  # and written as powers they would need mathematics
        axes.minorticks_off()
        _name_axes(axes, x, y)
    ends = "; ".join(f"{line.label} ends at {line.y[-1]:.3g}" for line in lines)
    return _inline(svg.getvalue(), f"{y} over {x}: {ends}.")


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """Axes to draw on, in the page's look; the SVG is in the buffer afterwards."""
    from matplotlib import rc_context, rcParams
    from matplotlib.figure import Figure

    svg = io.StringIO()
    with rc_context():
        rcParams.update({"svg.fonttype": "none", "svg.hashsalt": f"{width} x {height}"})
        rcParams.update({"text.parse_math": False, "font.size": 10.5})
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        yield axes, svg
        axes.tick_params(color=_GRID, labelcolor=_FAINT, length=0)
        axes.grid(axis="y", color=_GRID, lw=0.8)
        axes.spines[:].set_visible(False)
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def _name_axes(axes: Any, x: str, y: str) -> None:
    """Names the axes, y on top, where a long name has room, and the lines below, where they hide nothing."""
    axes.set_xlabel(x, color=_FAINT)
    axes.set_title(y, loc="left", x=0, size="medium", color=_FAINT)
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.figure
    columns = max(1, int(12 * figure.get_figwidth() / (6 + max(map(len, labels), default=0))))
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=min(columns, len(labels)),
        frameon=False,
        labelcolor=_INK,
        handletextpad=0.4,
        columnspacing=1.2,
    )


def smooth(values: ArrayLike) -> NDArray[np.float64]:
    """Mean over a window of about a thirtieth of the run, centred so that the curve does not lag.

    >>> smooth([3.0, 2.0, 1.0]).tolist()
    [3.0, 2.0, 1.0]
    """
    total: NDArray[np.float64] = np.cumsum([0.0, *np.asarray(values, float)])
    at, reach = np.arange(len(total) - 1), (len(total) - 1) // 60
    first, end = (at - reach).clip(min=0), (at + reach + 1).clip(max=len(at))
    mean: NDArray[np.float64] = (total[end] - total[first]) / (end - first)
    return mean


def _thin(steps: NDArray[Any], values: NDArray[np.float64]) -> tuple[ArrayLike, ArrayLike]:
    """At most 400 points, each the mean of its bin: a longer path only makes the page heavier."""
    bins = min(len(steps), 400)
    edges = np.linspace(0, len(steps), bins + 1).astype(int)[:-1]
    if bins == len(steps):
        return steps, values
    counts = np.diff([*edges, len(steps)])
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def _limits(arms: Sequence[Arm]) -> tuple[float, float]:
    """The frame leaves out the plunge of the first steps, beside which every difference vanishes."""
    tops, lows = [], []
    for arm in arms:
        for values in (smooth(arm.train), np.asarray(arm.eval, float)):
            if len(values):
                tops.append(values[min(len(values) // 10, len(values) - 1)])
                lows.append(values.min())
    low, top = min(lows), max(*tops, min(lows) * 1.02 + 1e-3)
    return low - 0.06 * (top - low), top + 0.08 * (top - low)


def _describe(drawn: Sequence[tuple[int, Arm]]) -> str:
    ends = [f"{arm.label} ends at {(arm.eval or arm.train)[-1]:.3f}" for _, arm in drawn]
    return f"Bits per byte over training steps: {'; '.join(ends)}."


def _inline(svg: str, description: str) -> str:
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    # Ids of two drawings on one page would clash; those that are referred to hold a hash of the size.
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    for colour, role in _ROLES.items():
        svg = svg.replace(colour, f"var({role})")
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    body = svg[svg.index(">") + 1 :].replace("xlink:href", "href")
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(description)}">{body}'
