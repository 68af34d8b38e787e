"""Learning curves as SVG for the pages: drawn in milliseconds, in the colours of the page."""

import math
import statistics
from collections.abc import Mapping, Sequence

Histories = Mapping[str, Sequence[Mapping[str, float | None]]]
Point = tuple[float, float]

WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 12, 40  # margins
MAX_POINTS = 200  # of a curve
LOG_SCALE_RATIO = 20  # ratio of the largest to the smallest loss above which the axis is logarithmic
PARTS = ("train", "validation")


def draw_learning_curves(histories: Histories, metric: str) -> str:
    """Return loss or accuracy after each epoch as SVG: thin curves for the folds, thick ones for their mean.

    Parameters
    ----------
    histories : mapping
        The history of each fold and of "final", by name. They may be of different length, also empty.
    metric : str
        "loss" or "accuracy".

    Returns
    -------
    str
        "" if no fold has completed an epoch.
    """
    curves = _curves(histories, metric)
    values = [value for _, points in curves for _, value in points]
    if not values:
        return ""
    epochs = max(epoch for _, points in curves for epoch, _ in points)
    is_log = metric == "loss" and 0 < LOG_SCALE_RATIO * min(values) < max(values)
    ticks = _log_ticks(min(values), max(values)) if is_log else _ticks(min(values), max(values))
    low, high = min(*ticks, *values), max(*ticks, *values)

    def x(epoch: float) -> float:
        return LEFT + (epoch - 1) / max(1, epochs - 1) * (WIDTH - LEFT - RIGHT) if epochs > 1 else WIDTH / 2

    def y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if is_log else (value - low) / ((high - low) or 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_alt(histories, metric)}">']
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y(tick) + 4:.1f}">{tick:.6g}</text>')
    for epoch in _epoch_ticks(epochs):
        parts.append(f'<text class="middle" x="{x(epoch):.1f}" y="{HEIGHT - BOTTOM + 18}">{epoch}</text>')
    parts.append(f'<text class="middle" x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 4}">epoch</text>')
    for name, points in curves:
        parts.append(_path(name, [(x(epoch), y(value)) for epoch, value in points]))
    return "".join([*parts, "</svg>"])


def draw_thumbnail(histories: Histories) -> str:
    """Return the mean training and validation loss after each epoch as a small SVG; "" if there are none."""
    curves = [(name, points) for name, points in _curves(histories, "loss") if "mean" in name]
    values = [value for _, points in curves for _, value in points]
    epochs = max((epoch for _, points in curves for epoch, _ in points), default=0)
    if not values or epochs < 2:
        return ""
    low, height = min(values), (max(values) - min(values)) or 1
    parts = [f'<svg class="thumb" viewBox="0 0 80 30" role="img" aria-label="{_alt(histories, "loss")}">']
    for name, points in curves:
        scaled = [(2 + 76 * (epoch - 1) / (epochs - 1), 28 - 26 * (value - low) / height) for epoch, value in points]
        parts.append(_path(name, scaled))
    return "".join([*parts, "</svg>"])


def _curves(histories: Histories, metric: str) -> list[tuple[str, list[Point]]]:
    """Return the finite points (epoch, value) of each curve, with its CSS classes; the means come last."""
    folds = [history for name, history in histories.items() if name != "final"]
    curves, means = [], []
    for part in PARTS:
        name = f"{part}/{metric}"
        for history in folds:
            curves.append((f"{part} fold", _points([epoch.get(name) for epoch in history])))
        common = min((len(history) for history in folds if history), default=0)
        per_epoch = [[history[epoch].get(name) for history in folds if history] for epoch in range(common)]
        means.append((f"{part} mean", _points([_mean(values) for values in per_epoch])))
    final = [epoch.get(f"train/{metric}") for epoch in histories.get("final", [])]
    return [*curves, ("final", _points(final)), *means]


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


def _points(values: Sequence[float | None]) -> list[Point]:
    step = max(1, math.ceil(len(values) / MAX_POINTS))
    chosen = [index for index in range(len(values)) if index % step == 0 or index == len(values) - 1]
    points = []
    for index in chosen:
        value = values[index]
        if value is not None and math.isfinite(value):
            points.append((index + 1.0, float(value)))
    return points


def _path(name: str, points: Sequence[Point]) -> str:
    if not points:
        return ""
    if len(points) == 1:
        points = [points[0], points[0]]  # a line of length 0 with round ends is a dot
        name += " dot"
    return f'<path class="{name}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (factor * step) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return at most about eight powers of ten between `low` and `high`, or also 2 and 5 times these."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside[:: max(1, len(inside) // 8)]


def _epoch_ticks(epochs: float) -> list[int]:
    step = max(1, math.ceil(epochs / 10))
    return [1, *range(2 if step == 1 else step, int(epochs) + 1, step)]


def _alt(histories: Histories, metric: str) -> str:
    """Return what a chart shows, for people who cannot see it."""
    curves = dict(_curves(histories, metric))
    sentences = []
    for part in PARTS:
        points = curves[f"{part} mean"]
        if points:
            (first, start), (last, end) = points[0], points[-1]
            sentences.append(
                f"mean {part.replace('train', 'training')} {metric} {start:.4g} after epoch {first:.0f}, "
                f"{end:.4g} after epoch {last:.0f}"
            )
    return f"{metric.capitalize()} after each epoch: {'; '.join(sentences)}."
