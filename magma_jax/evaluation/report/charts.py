"""Line charts as inline SVG, coloured by the style sheet of the enclosing page."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 12, 44


def line_chart(x: Sequence[float | int], y: Sequence[float | int], x_label: str, y_label: str) -> str:
    """One curve over labelled axes that start at zero; units belong in the labels.

    Raises:
        ValueError: no points, or different numbers of x and y values.
    """
    if not x or len(x) != len(y):
        raise ValueError(f"a chart needs points: got {len(x)} x and {len(y)} y values")
    x_ticks, y_ticks = ticks(max(x)), ticks(max(y))
    # The x axis ends at the last step, the y axis at the next round number.
    x_end, y_end = max(x) or 1.0, y_ticks[-1]

    def across(value: float | int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / x_end

    def up(value: float | int) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / y_end

    parts = []
    for tick in y_ticks:
        height = up(tick)
        name = "grid" if tick else "axis"
        parts.append(f'<line class="{name}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in (tick for tick in x_ticks if tick <= x_end):
        place = across(tick)
        base = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text x="{place:.1f}" y="{base + 18}" text-anchor="middle">{tick:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    centre = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{centre}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )
    points = [(across(a), up(b)) for a, b in zip(x, y, strict=True)]
    if len(points) == 1:
        parts.append(f'<circle class="curve" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2"/>')
    else:
        parts.append(f'<polyline class="curve" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')
    title = escape(f"{y_label} over {x_label}")
    inner = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{inner}</svg>'


def ticks(largest: float | int, wanted: int = 5) -> list[float]:
    """Round numbers from 0 to ``largest`` or just above, about ``wanted`` steps."""
    if largest <= 0:
        return [0.0, 1.0]
    rough = largest / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 2.5, 5, 10) if multiple * power >= rough * 0.999)
    return [round(i * step, 10) for i in range(math.ceil(largest / step - 1e-9) + 1)]
