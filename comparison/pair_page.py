"""The page of two runs that are compared, and the same content for a run's report."""

from pathlib import Path
from typing import Any

import numpy as np

from comparison.forest_plot import axis_limit, svg_axis, svg_row
from comparison.pair import PairComparison, format_change, verdict_with_reason
from comparison.statistics import MetricDifference
from experiment.files import write_atomically
from experiment.formatting import display_name, format_metric
from experiment.pages import folder_name, render


def write_pair_page(comparison: PairComparison) -> Path:
    """Write the page of a comparison into the later run's folder, and return its path."""
    folder = comparison.after.path
    path = folder / f"compared-with-{comparison.before.path.name}.html"
    page = render(
        "pair.html.jinja",
        after=folder_name(folder),
        has_report=(folder / "report.html").is_file(),
        pair=pair_content(comparison),
    )
    write_atomically(path, page)
    return path


def pair_content(comparison: PairComparison) -> dict[str, Any]:
    """Return what a page shows of a comparison: the changes, and a table of metrics and one of F1 scores."""
    metric_tables = []
    for difference in comparison.metrics.values():
        caption = f"{difference.metric.capitalize()}, mean over the folds that both have"
        metric_tables.append(_table(caption, "metric", [difference]))
    class_tables = []
    if comparison.f1:
        largest_first = sorted(comparison.f1.values(), key=lambda difference: -abs(difference.mean))
        class_tables.append(_table("F1 of each class, the largest change first", "class", largest_first))
    explanation = comparison.explanation_with_classes
    if comparison.is_identical:
        explanation = "The two runs are identical in every fold."
    return {
        "before": folder_name(comparison.before.path),
        "changes": list(dict.fromkeys(change.text for change in comparison.changes)) or ["repetition"],
        "metric_tables": metric_tables,
        "class_tables": class_tables,
        "explanation": explanation,
    }


def _table(caption: str, heading: str, differences: list[MetricDifference]) -> dict[str, Any]:
    limit = axis_limit(differences)
    rows = []
    for difference in differences:
        row = {
            "name": display_name(difference.metric) if heading == "class" else difference.metric,
            "before": format_metric(float(np.mean(difference.before))),
            "after": format_metric(float(np.mean(difference.after))),
            "change": format_change(difference).removesuffix(" (95 %)"),
            "plot": svg_row(difference, limit),
            "verdict": difference.verdict,
            "text": verdict_with_reason(difference),
        }
        rows.append(row)
    axis = svg_axis(limit, differences[0].lower_is_better)
    return {"caption": caption, "heading": heading, "rows": rows, "axis": axis}
