"""Forest plots: one row per comparison, with the difference in each fold, their mean and its confidence interval.

For figures they are drawn by matplotlib, for pages as SVG, one drawing per row of a table.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from comparison.statistics import MetricDifference

SVG_WIDTH = 200

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_panel(panel: "Axes", title: str, differences: Sequence[MetricDifference], labels: Sequence[str]) -> None:
    """Draw one row per difference, the first at the top.

    The marker of the mean is filled where the difference is significant: where the interval does not contain 0.
    """
    from experiment.plots import BLUE, ORANGE

    rows = np.arange(len(differences))
    for row in rows[1::2]:
        panel.axhspan(row - 0.5, row + 0.5, color="black", alpha=0.04, linewidth=0)
    panel.axvline(0, color="black", linewidth=1)
    for row, difference in zip(rows, differences, strict=True):
        in_folds = difference.per_fold
        panel.plot(in_folds, [row + 0.2] * len(in_folds), "o", color=BLUE, alpha=0.6, markersize=4)
    means = [difference.mean for difference in differences]
    half_widths = [difference.ci_half_width if difference.has_interval else math.nan for difference in differences]
    panel.errorbar(means, rows - 0.15, xerr=half_widths, fmt="none", color=ORANGE, capsize=3)
    fills = [ORANGE if difference.verdict in ("better", "worse") else "white" for difference in differences]
    panel.scatter(means, rows - 0.15, s=30, marker="D", facecolors=fills, edgecolors=ORANGE, zorder=3)
    _limit_axis(panel, differences)
    panel.set_title(title, fontsize=10)
    panel.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.set_xlabel("difference", fontsize=9)
    panel.locator_params(axis="x", nbins=6)
    panel.tick_params(axis="x", labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", alpha=0.3)
    left, right = ("better", "worse") if differences[0].lower_is_better else ("worse", "better")
    panel.text(0.01, 1.01, f"← {left}", transform=panel.transAxes, ha="left", va="bottom", fontsize=9)
    panel.text(0.99, 1.01, f"{right} →", transform=panel.transAxes, ha="right", va="bottom", fontsize=9)


def axis_limit(differences: Sequence[MetricDifference]) -> float:
    """Return where an axis ends that shows all differences except those ten times as large as the median."""
    extents = sorted(difference.max_extent for difference in differences if difference.max_extent > 0) or [0.001]
    median = extents[(len(extents) - 1) // 2]
    return 1.08 * max(extent for extent in extents if extent <= 10 * median)


def _limit_axis(panel: "Axes", differences: Sequence[MetricDifference]) -> None:
    """Set the limits of the axis, with 0 in the middle.

    Rows that extend ten times as far as the median row are cut off at the edge, with an arrow and their mean: one run
    with a very bad result must not compress all others around 0.
    """
    from experiment.plots import ORANGE

    limit = axis_limit(differences)
    panel.set_xlim(-limit, limit)
    for row, difference in enumerate(differences):
        if difference.max_extent <= limit:
            continue
        at_left = difference.mean < 0
        number = _size(difference)
        panel.text(
            -0.98 * limit if at_left else 0.98 * limit,
            row - 0.15,
            f"← −{number}" if at_left else f"+{number} →",
            ha="left" if at_left else "right",
            va="center",
            fontsize=8,
            color=ORANGE,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )


def add_title(figure: "Figure", title: str) -> None:
    """Add the title of a figure and the legend of its panels."""
    from matplotlib.lines import Line2D

    from experiment.plots import BLUE, ORANGE

    fold = Line2D([], [], marker="o", linestyle="none", color=BLUE, alpha=0.6, label="difference in a fold")
    mean = Line2D([], [], marker="D", color=ORANGE, label="mean and 95 % interval, corrected (Holm)")
    not_significant = "not significant: the interval contains 0"
    empty = Line2D([], [], marker="D", color=ORANGE, markerfacecolor="white", label=not_significant)
    figure.legend(handles=[fold, mean, empty], ncols=3, fontsize=8, frameon=False, loc="outside lower center")
    figure.suptitle(title, fontsize=11, parse_math=False)


def _size(difference: MetricDifference) -> str:
    number = f"{abs(difference.mean):.2g}"
    return f"{number} ± {difference.ci_half_width:.1g}" if difference.has_interval else number


def svg_row(difference: MetricDifference, limit: float) -> str:
    """Return a difference as SVG, on an axis from -limit to limit; beyond it, as an arrow with the number."""
    mean = _svg_x(difference.mean, limit)
    sign = "−" if difference.mean < 0 else "+"
    label = f"{difference.metric if difference.metric in ('accuracy', 'loss') else 'F1'} {sign}{_size(difference)}"
    parts = [f'<svg class="plot" viewBox="0 0 {SVG_WIDTH} 24" role="img" aria-label="{label}"><path class="zero" d="M']
    parts.append(f'{SVG_WIDTH // 2} 0V24"/>')
    if difference.max_extent > limit:
        anchor, x = ("", 4) if difference.mean < 0 else (' class="end"', SVG_WIDTH - 4)
        text = f"← −{_size(difference)}" if difference.mean < 0 else f"+{_size(difference)} →"
        return "".join([*parts, f'<text x="{x}" y="15"{anchor}>{text}</text></svg>'])
    dots = "".join(f"M{_svg_x(value, limit):.1f} 17h0" for value in difference.per_fold)
    parts.append(f'<path class="points" d="{dots}"/>')
    if difference.has_interval:
        low, high = (_svg_x(difference.mean + side * difference.ci_half_width, limit) for side in (-1, 1))
        parts.append(f'<path class="interval" d="M{low:.1f} 4v6m0-3H{high:.1f}m0-3v6"/>')
    fill = " filled" if difference.verdict in ("better", "worse") else ""
    parts.append(f'<path class="diamond{fill}" d="M{mean - 4:.1f} 7l4-4 4 4-4 4z"/></svg>')
    return "".join(parts)


def svg_axis(limit: float, lower_is_better: bool) -> str:
    """Return the axis of `svg_row` as SVG, with the direction in which a metric improves."""
    left, right = ("better", "worse") if lower_is_better else ("worse", "better")
    step = 10.0 ** math.floor(math.log10(limit))
    step *= next(factor for factor in (5, 2, 1, 0.5) if factor * step <= 0.8 * limit)
    texts = [f'<text x="2" y="10">← {left}</text><text class="end" x="{SVG_WIDTH - 2}" y="10">{right} →</text>']
    for value in (-step, 0, step):
        number = f"{value:+.1g}".replace("-", "−") if value else "0"
        texts.append(f'<text class="middle" x="{_svg_x(value, limit):.0f}" y="26">{number}</text>')
    return f'<svg class="axis" viewBox="0 0 {SVG_WIDTH} 30" aria-hidden="true">{"".join(texts)}</svg>'


def _svg_x(value: float, limit: float) -> float:
    return SVG_WIDTH / 2 * (1 + value / limit)
