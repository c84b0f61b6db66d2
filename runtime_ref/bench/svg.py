"""Small charts as SVG text: pure functions from numbers to a string. No library, no script, nothing fetched.

Every chart is a complete, well-formed <svg> element with a viewBox, so that it fills whatever width it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 26, 44  # room for the axes' labels
COLORS = ("#2f6db0", "#d1742c", "#3f8f5b", "#8a5fa8", "#b0443c", "#5a6670")

Scale = Callable[[float], float]


def histogram(
    values: Sequence[float], marks: Mapping[str, float], x_label: str, y_label: str, color: str = COLORS[0]
) -> str:
    """How often values occur (at least one value), with named vertical lines; a long tail becomes a note."""
    longest = max(marks.values(), default=max(values))
    high = max(values) if max(values) <= 1.5 * longest else 1.15 * longest
    low = min(values)
    if high - low < 0.02 * high:  # nearly all the same
        low, high = low - 0.05 * high, high + 0.05 * high
    beyond = sum(v > high for v in values)
    bins = max(8, min(40, round(2 * math.sqrt(len(values)))))
    counts = [0] * bins
    for value in values:
        if value <= high:
            counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    x, y = _linear(low, high, LEFT, WIDTH - RIGHT), _linear(0, max(counts) * 1.3, HEIGHT - BOTTOM, TOP)
    whole = [tick for tick in ticks(0, max(counts)) if tick == int(tick)]
    parts = _axes(ticks(low, high), whole, x, y, x_label, y_label)
    step = (high - low) / bins
    for i, count in enumerate(counts):
        if count:
            left = x(low + i * step)
            parts.append(_rect(left, y(count), x(low + (i + 1) * step) - left - 0.6, y(0) - y(count), color))
    labels = []
    for i, (name, value) in enumerate(sorted(marks.items(), key=lambda item: item[1])):
        at, height = x(min(value, high)), TOP + 14 * i
        side, shift = ("end", -4) if at > WIDTH * 0.62 else ("start", 4)
        parts.append(_line(at, height - 8, at, y(0), "#333", "4 3"))
        labels.append(_text(at + shift, height, f"{name} {number(value)}", side, "mark"))
    parts += labels  # on top of every line
    if beyond:
        parts.append(
            _text(WIDTH - RIGHT, y(0) - 6, f"{beyond} more beyond, up to {number(max(values))}", "end", "mark")
        )
    return _svg(f"histogram of {x_label}", parts)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, log_x: bool = False) -> str:
    """Points joined by lines, y from 0; at least one series with a point. log_x: equal steps for equal ratios (x >= 1)."""
    points = [point for part in series.values() for point in part]
    xs = sorted({p[0] for p in points})
    top = 1.15 * max(p[1] for p in points) or 1.0
    y = _linear(0, top, HEIGHT - BOTTOM, TOP + 8)
    if log_x:
        inner = _linear(math.log(xs[0]), math.log(xs[-1]), LEFT + 12, WIDTH - RIGHT - 12)
        x: Scale = lambda value: inner(math.log(value))  # noqa: E731
        x_ticks = xs
    else:
        x, x_ticks = _linear(0, xs[-1], LEFT + 12, WIDTH - RIGHT - 18), ticks(0, xs[-1])
    parts = _axes(x_ticks, ticks(0, top), x, y, x_label, y_label)
    for i, (name, part) in enumerate(series.items()):
        color = COLORS[i % len(COLORS)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in part)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5" fill="{color}"/>' for a, b in part]
        place = WIDTH - RIGHT - 84 * (len(series) - i)
        parts.append(_rect(place, 3, 10, 10, color))
        parts.append(_text(place + 15, 12, name, "start", "mark"))
    return _svg(f"{y_label} against {x_label}", parts)


def bars(items: Sequence[tuple[str, float]], unit: str, title: str, strong: Sequence[str] = ()) -> str:
    """Horizontal bars from 0 with their values; labels in `strong` stand out. At least one item."""
    height = 24 * len(items) + 8
    room = 8 + 7.2 * max(len(label) for label, _ in items)
    top = max(value for _, value in items) or 1.0
    x = _linear(0, top, room, WIDTH - 84)
    parts = []
    for i, (label, value) in enumerate(items):
        at = 24 * i + 8
        kind = "strong" if label in strong else "label"
        parts.append(_text(room - 6, at + 12, label, "end", kind))
        parts.append(
            _rect(room, at, max(1.0, x(value) - room), 16, COLORS[0] if label in strong or not strong else "#9db6cf")
        )
        parts.append(_text(x(value) + 5, at + 12, f"{number(value)} {unit}", "start", kind))
    return _svg(title, parts, height)


def number(value: float) -> str:
    """Three digits that matter: 0.0123, 1.23, 12.3, 123, 1,234."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    digits = 2 - math.floor(math.log10(abs(value)))
    text = f"{value:,.{max(0, min(digits, 6))}f}"
    return text


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    if high <= low:
        return [low]
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _axes(xs: Sequence[float], ys: Sequence[float], x: Scale, y: Scale, x_label: str, y_label: str) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for value in ys:
        parts.append(_line(LEFT, y(value), WIDTH - RIGHT, y(value), "#dfe3e8"))
        parts.append(_text(LEFT - 6, y(value) + 4, f"{value:,.10g}", "end", "tick"))
    for value in xs:
        parts.append(_line(x(value), bottom, x(value), bottom + 4, "#667"))
        parts.append(_text(x(value), bottom + 17, f"{value:,.10g}", "middle", "tick"))
    parts.append(_line(LEFT, bottom, WIDTH - RIGHT, bottom, "#667"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle", "label"))
    parts.append(_text(4, 12, y_label, "start", "label"))
    return parts


def _svg(title: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    name = escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}" '
        f'font-family="sans-serif"><title>{name}</title>{"".join(parts)}</svg>'
    )


_FONTS = {"tick": 'font-size="11" fill="#556"', "label": 'font-size="12" fill="#223"', "mark": 'font-size="11.5" fill="#223" stroke="#fff" stroke-width="3" paint-order="stroke"',
          "strong": 'font-size="12" fill="#111" font-weight="bold"'}  # fmt: skip


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {_FONTS[kind]}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{dashed}/>'


def _rect(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" fill="{color}"/>'
