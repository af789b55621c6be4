"""Charts as small SVG, drawn by the style sheet of the page that they stand in.

A chart holds geometry and classes, no colours and no fonts: `report.html.jinja` gives them, for light, dark
and paper. Everything of agent number k has the class `a{k % COLOURS}`, and its points have the shape
`k % len(SHAPES)`, so that colour isn't all that tells agents apart. A point shows its figures where the
pointer rests on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape as escape_html

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from cpql.errors import printable

__all__ = ["COLOURS", "Line", "Strip", "interval", "key", "lines", "sparkline", "strips"]

COLOURS = 10
"""How many the style sheet has."""

SHAPES = (
    "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z",  # circle
    "M-3-3h6v6h-6z",  # square
    "M0-4L3.9 2.8h-7.8z",  # triangle
    "M0-4.3L4.3 0 0 4.3-4.3 0z",  # diamond
    "M0 4L3.9-2.8h-7.8z",  # triangle on its tip
    "M-1.2-3.8h2.4v2.6h2.6v2.4h-2.6v2.6h-2.4v-2.6h-2.6v-2.4h2.6z",  # plus
    "M0-4L3.8-1.2 2.4 3.2h-4.8L-3.8-1.2z",  # pentagon
)

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 46, 26, 40  # margins of the plot
MANY = 40  # points more than these are a line alone
DOTS = 300  # in a strip, at most

Array = NDArray[np.float64]
Span = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line with a band.

    Attributes:
        name: of what it shows.
        agent: its number, which gives colour and shape.
        x: of its points, [n].
        y: their values, [n].
        low: lower end of the band, [n]; without NaN. None for no band.
        high: its upper end, [n].
        faint: dashed, as what isn't finished.
        steps: go on with each value up to the next point.
    """

    name: str
    agent: int
    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    faint: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Strip:
    """Values as dots, in a lane for each seed, over a box of their quartiles.

    Attributes:
        name: of what they are.
        agent: its number.
        lanes: the values, an array a seed.
    """

    name: str
    agent: int
    lanes: Sequence[ArrayLike]


def key(agent: int) -> str:
    """What stands beside an agent's name in a legend."""
    return (
        f'<svg class="key {_colour(agent)}" viewBox="0 0 26 12" aria-hidden="true">'
        f'<path class="line" d="M1 6h24"/>{_mark(agent, 13, 6)}</svg>'
    )


def lines(
    given: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    references: Sequence[tuple[str, float]] = (),
    y_span: Span | None = None,
) -> str:
    """Lines over a common axis, with horizontal references, whose values stand beside them.

    Args:
        given: at least one.
        title: what the chart is, for those who can't see it.
        x_label: of the horizontal axis, with its unit.
        y_label: of the vertical one.
        references: name and value of each.
        y_span: of the vertical axis; None takes what the values need.
    """
    xs = np.concatenate([_array(line.x) for line in given])
    values = [_array(part) for line in given for part in (line.y, line.low, line.high) if part is not None]
    values.append(np.array([value for _, value in references]))
    x_span, y_span = _span(xs, pad=0.0), y_span or _span(np.concatenate(values))
    x_axis, y_axis = _Axis(x_span, (LEFT, WIDTH - RIGHT)), _Axis(y_span, (HEIGHT - BOTTOM, TOP))
    parts = [*_y_grid(y_axis, y_label), *_x_grid(x_axis, x_label, HEIGHT, TOP)]
    for name, value in references:
        y = y_axis(value)
        across = f'<path class="reference" d="M{LEFT} {_n(y)}H{WIDTH - RIGHT}"/>'
        parts.append(f"<g><title>{escape(f'{name} {value:,.1f}')}</title>{across}</g>")
        parts.append(_tick(WIDTH - RIGHT + 5, y + 4, _digits(y_axis, "{:,.1f}")(value), "start"))
    for line in given:  # all bands lie under all lines
        if line.low is not None and line.high is not None:
            low, high = (_points(line, part, x_axis, y_axis) for part in (line.low, line.high))
            outline = f"M{_path(high)}L{_path(low[::-1])}z"
            parts.append(f'<path class="band {_colour(line.agent)}" d="{outline}"/>')
    for line in given:
        where = _points(line, line.y, x_axis, y_axis)
        drawn = [f'<path class="line{_faint(line.faint)}" d="M{_path(where)}"/>']
        if len(_array(line.x)) <= MANY and not line.steps:
            for (x, y), step, value in zip(where, _array(line.x), _array(line.y), strict=True):
                tip = f"{line.name}: {value:,.1f} at {step:,.0f}"
                drawn.append(_mark(line.agent, x, y, tip))
        parts.append(f'<g class="{_colour(line.agent)}">{"".join(drawn)}</g>')
    ends = "; ".join(f"{line.name} ends at {_array(line.y)[-1]:,.4g}" for line in given)
    named = "".join(f"; {name} {value:,.4g}" for name, value in references)
    return _svg(HEIGHT, f"{title}: {ends}{named}", parts)


def strips(
    given: Sequence[Strip], *, title: str, x_label: str, references: Sequence[tuple[str, float]] = ()
) -> str:
    """Distributions below one another over a common axis.

    Args:
        given: at least one.
        title: what the chart is, for those who can't see it.
        x_label: of the axis, with its unit.
        references: name and value of vertical lines.
    """
    above, step = TOP + (12 if references else 0), 50
    height = above + step * len(given) + BOTTOM
    values = [np.concatenate([_array(lane) for lane in strip.lanes]) for strip in given]
    x_axis = _Axis(_span(np.concatenate([*values, [value for _, value in references]])), (10, WIDTH - RIGHT))
    parts = _x_grid(x_axis, x_label, height, above)
    for name, value in references:
        x = x_axis(value)
        anchor = "end" if x > WIDTH * 0.75 else "start" if x < WIDTH * 0.25 else "middle"
        parts.append(f'<path class="reference" d="M{_n(x)} {above - 4}V{height - BOTTOM}"/>')
        parts.append(_tick(x, above - 10, escape(name), anchor))
    told = []
    for index, (strip, every) in enumerate(zip(given, values, strict=True)):
        top = above + step * index + 18
        low, middle, high = np.quantile(every, [0.25, 0.5, 0.75])
        lane = 24 / len(strip.lanes)
        dots = "".join(
            f"M{_n(x_axis(value))} {_n(top + 2 + lane * (number + 0.15 + 0.7 * (k * 0.618034 % 1)))}h0"
            for number, own in enumerate(strip.lanes)
            for k, value in enumerate(_thinned(_array(own), DOTS // len(strip.lanes)))
        )
        text = f"median {middle:,.0f}, quartiles {low:,.0f} and {high:,.0f}"
        told.append(f"{strip.name}: {text}")
        x, width = x_axis(low), max(x_axis(high) - x_axis(low), 0.5)
        parts.append(
            f'<g class="{_colour(strip.agent)}"><text class="name" x="10" y="{top - 5}">{escape(strip.name)}'
            f'</text><rect class="box" x="{_n(x)}" y="{top}" width="{_n(width)}" height="28" rx="2">'
            f'<title>{escape(told[-1])}</title></rect><path class="dots" d="{dots}"/>'
            f'<path class="median" d="M{_n(x_axis(middle))} {top}v28"/></g>'
        )
    return _svg(height, f"{title}: {'; '.join(told)}", parts)


def interval(value: float, ends: Span | None, span: Span, agent: int) -> str:
    """A figure with its interval, for a table's cell: drawn, since another cell has it in digits.

    Args:
        value: the figure.
        ends: of its interval, where it has one.
        span: that all cells of the column share.
        agent: its number.
    """
    axis = _Axis(span, (8, 172))
    bar = "" if ends is None else f'<path class="line" d="M{_n(axis(ends[0]))} 9H{_n(axis(ends[1]))}"/>'
    return (
        f'<svg class="interval {_colour(agent)}" viewBox="0 0 180 18" aria-hidden="true">'
        f'<path class="grid" d="M8 9H172"/>{bar}{_mark(agent, axis(value), 9)}</svg>'
    )


def sparkline(x: ArrayLike, y: ArrayLike, agent: int) -> str:
    """A curve for a table's cell."""
    xs, ys = _array(x), _array(y)
    x_axis, y_axis = _Axis(_span(xs, pad=0.0), (3, 87)), _Axis(_span(ys), (21, 3))
    where = [(x_axis(a), y_axis(b)) for a, b in zip(xs, ys, strict=True)]
    return (
        f'<svg class="spark {_colour(agent)}" viewBox="0 0 90 24" aria-hidden="true">'
        f'<path class="line" d="M{_path(where)}"/>'
        f'<path class="dots" d="M{_n(where[-1][0])} {_n(where[-1][1])}h0"/></svg>'
    )


class _Axis:
    """From values to pixels."""

    def __init__(self, span: Span, pixels: Span) -> None:
        self.span, self.pixels = span, pixels
        locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])
        self.ticks = [tick for tick in locator.tick_values(*span) if span[0] <= tick <= span[1]]

    def __call__(self, value: float) -> float:
        (low, high), (start, end) = self.span, self.pixels
        return start + (value - low) / (high - low) * (end - start)


def escape(text: str) -> str:
    """Text as it may stand in SVG, between tags or in an attribute."""
    return escape_html(printable(text))


def _array(values: ArrayLike) -> Array:
    return np.asarray(values, np.float64)


def _span(values: Array, pad: float = 0.06) -> Span:
    """What an axis covers: all values and a little more; something where they are all alike."""
    low, high = float(values.min()), float(values.max())
    around = (high - low) * pad or (0.0 if high > low else max(abs(high), 1.0) * 0.5)
    return low - around, high + around


def _thinned(values: Array, most: int) -> Array:
    """At most so many values with the same distribution, in the order of a fixed shuffle."""
    if len(values) > most:
        values = np.quantile(values, (np.arange(most) + 0.5) / most)
    return np.random.default_rng(0).permutation(values)


def _points(line: Line, y: ArrayLike, x_axis: _Axis, y_axis: _Axis) -> list[tuple[float, float]]:
    xs, ys = [x_axis(x) for x in _array(line.x)], [y_axis(y) for y in _array(y)]
    if line.steps:
        xs, ys = [x for x in xs for _ in range(2)][1:], [y for y in ys for _ in range(2)][:-1]
    return list(zip(xs, ys, strict=True))


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "L".join(f"{_n(x)} {_n(y)}" for x, y in points)


def _n(value: float) -> str:
    """A length in tenths of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def _colour(agent: int) -> str:
    return f"a{agent % COLOURS}"


def _faint(faint: bool) -> str:
    return " faint" if faint else ""


def _mark(agent: int, x: float, y: float, tip: str = "") -> str:
    inside = f"<title>{escape(tip)}</title>" if tip else ""
    shape = SHAPES[agent % len(SHAPES)]
    return f'<path class="mark" transform="translate({_n(x)} {_n(y)})" d="{shape}">{inside}</path>'


def _y_grid(axis: _Axis, label: str) -> list[str]:
    text = _digits(axis, "{:,g}")
    return [
        *(f'<path class="grid" d="M{LEFT} {_n(axis(tick))}H{WIDTH - RIGHT}"/>' for tick in axis.ticks),
        *(_tick(LEFT - 7, axis(tick) + 4, text(tick), "end") for tick in axis.ticks),
        f'<text class="label" x="4" y="12">{escape(label)}</text>',
    ]


def _digits(axis: _Axis, form: str) -> Callable[[float], str]:
    """How numbers of an axis are written: with a prefix, such as k, where they are large."""
    return EngFormatter(sep="") if max(map(abs, axis.span)) >= 10_000 else form.format


def _x_grid(axis: _Axis, label: str, height: float, top: float) -> list[str]:
    bottom, text = height - BOTTOM, EngFormatter(sep="")
    return [
        *(f'<path class="grid" d="M{_n(axis(tick))} {top}V{bottom}"/>' for tick in axis.ticks),
        f'<path class="axis" d="M{axis.pixels[0]} {bottom}H{axis.pixels[1]}"/>',
        *(_tick(axis(tick), bottom + 15, text(tick), "middle") for tick in axis.ticks),
        f'<text class="label" text-anchor="end" x="{axis.pixels[1]}" y="{height - 6}">{escape(label)}</text>',
    ]


def _tick(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" text-anchor="{anchor}" x="{_n(x)}" y="{_n(y)}">{text}</text>'


def _svg(height: float, what: str, parts: Iterable[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(what)}">'
        f"{''.join(parts)}</svg>"
    )
