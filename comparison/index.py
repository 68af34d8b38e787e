"""The page of all runs, runs/index.html: what changed, did it help."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from comparison.changes import (
    changes_between,
    comparable,
    describe_changes,
    run_with_fewest_changes,
    same_images,
)
from comparison.forest_plot import axis_limit, svg_axis, svg_row
from comparison.overview import overview_of
from comparison.pair import LOSS, METRICS, PairComparison, describe_noise, metric_of, metrics_of
from comparison.run_reader import (
    FinishedRun,
    read_identity,
    read_resume,
    read_run,
    run_folders,
    time_in_name,
)
from experiment.charts import draw_thumbnail
from experiment.errors import ConfigurationError
from experiment.files import write_atomically
from experiment.formatting import format_duration, format_metric
from experiment.pages import folder_name, mark_as_stopped, read_progress, relative_url, render

MAX_CHANGES_WIDTH = 105  # characters of the changes in a row
LOCK_SECONDS = 10  # to wait for another process that writes the page; then it is written without the lock
VERDICTS = ("worse", "not significant", "identical", "better")  # the order of sorted rows


def write_index(runs_dir: Path, baseline: FinishedRun | None = None) -> Path:
    """Write the page of all runs in a folder and return its path.

    Without `baseline`, each group is compared with its oldest run. Processes that write the page at the same time do so
    one after another, so that the last one sees the runs of all.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    path = runs_dir / "index.html"
    with _lock(runs_dir):
        write_atomically(path, render("index.html.jinja", **_content(runs_dir, baseline)))
    return path


@contextmanager
def _lock(runs_dir: Path) -> Iterator[None]:
    lock = FileLock(runs_dir / ".index.lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except (Timeout, OSError, NotImplementedError):  # some network file systems have no locks
        pass
    try:
        yield
    finally:
        lock.release()


def _content(runs_dir: Path, baseline: FinishedRun | None) -> dict[str, Any]:
    runs, states, problems = _read_all(runs_dir)
    groups: list[list[FinishedRun]] = []
    for run in runs:
        group = next((each for each in groups if any(same_images(other, run) for other in each)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    shown = [_group(group, states, runs_dir, baseline) for group in groups]
    if problems:
        shown.append(_group_of_unreadable(problems))
    count, now = len(runs) + len(problems), datetime.now().astimezone()
    return {
        "folder": folder_name(runs_dir.absolute()),
        "count": "1 run" if count == 1 else f"{count} runs",
        "state": "running" if any(state.startswith("running") for state in states.values()) else "",
        "written": f"{now:%Y-%m-%d %H:%M}",
        "updated_seconds": f"{now.timestamp():.0f}",
        "groups": shown,
    }


def _read_all(runs_dir: Path) -> tuple[list[FinishedRun], dict[Path, str], dict[Path, str]]:
    """Return all runs, the newest first, the state of those that are unfinished, and why others cannot be read.

    An unfinished run has no folds.
    """
    runs, states, problems = [], {}, {}
    for path in run_folders(runs_dir):
        try:
            if (path / "results.json").exists():
                runs.append(read_run(path))
                continue
            states[path] = _state_of_unfinished(path)
            runs.append(_as_unfinished(path))
        except (ConfigurationError, OSError) as error:  # OSError: deleted meanwhile
            problems[path] = str(error)
    runs.sort(key=lambda run: (run.created, run.path.name), reverse=True)
    return runs, states, problems


def _as_unfinished(path: Path) -> FinishedRun:
    changed = datetime.fromtimestamp((path / "config.json").stat().st_mtime).astimezone()
    return FinishedRun(path, changed, 0.0, False, read_identity(path), {}, [])


def _state_of_unfinished(path: Path) -> str:
    """Return the state of a run, from its lock and its report; the report of a killed run is marked as stopped."""
    report = path / "report.html"
    state, progress = read_progress(report)
    if (path / ".lock").exists():
        lock = FileLock(path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return f"running, {progress}" if progress else "running"
        except (OSError, NotImplementedError):  # a file system without locks: it may be running
            return "unfinished"
        try:
            mark_as_stopped(report)
        finally:
            lock.release()
    ended = "failed" if state == "failed" else "stopped"
    command = "the same command" if read_resume(path) else "the same command, with RESUME = True,"
    return f"{ended}{f' after {progress}' if progress else ''}; {command} resumes it"


def _group(
    runs: list[FinishedRun], states: dict[Path, str], runs_dir: Path, chosen: FinishedRun | None
) -> dict[str, Any]:
    """Return what the page shows of the runs whose folds consist of the same images, the newest first."""
    usable = [run for run in runs if len(run.folds) >= 2]
    baseline = usable[-1] if usable else None
    if chosen is not None:
        baseline = next((run for run in usable if run.path == chosen.path), baseline)
    compared: dict[Path, PairComparison] = {}
    explanation = "No run here has a result in two folds yet."
    if baseline is not None:
        others = [run for run in usable if run.path != baseline.path and comparable(baseline, run)]
        overview = overview_of(baseline, others, runs_dir, usable)
        compared = {row.run.path: row.comparison for row in overview.rows if row.comparison is not None}
        explanation = f"Baseline: {folder_name(baseline.path)}."
        differences = [each for pair in compared.values() for each in pair.metrics.values()]
        tests = sum(difference.has_interval for difference in differences)
        if tests > 1:
            explanation += f" Verdicts and intervals are corrected for {tests} comparisons (Holm)."
        if differences:
            explanation += f" {describe_noise(overview.noise, differences)}"
    metrics = metrics_of(baseline or runs[0])
    limits = {metric: axis_limit([pair.metrics[metric] for pair in compared.values()]) for metric in metrics}
    frequency: Counter[str] = Counter()
    changes = []
    for index, run in enumerate(runs):
        nearest = run_with_fewest_changes(run, [other for other in runs[index + 1 :] if other.folds])
        found = changes_between(nearest, run) if nearest is not None else None
        changes.append(found)
        frequency.update({change.text for change in found or []})
    rows = []
    minutes = Counter(f"{run.created:%Y%m%d%H%M}" for run in runs)
    for run, found in zip(runs, changes, strict=True):
        row = _row_of(run, compared.get(run.path), limits)
        if row["has_time"]:
            row["when"] = _when(run.created, minutes[f"{run.created:%Y%m%d%H%M}"] > 1)
        row["change"] = (
            describe_changes(found, MAX_CHANGES_WIDTH, frequency) if found is not None else "no earlier result"
        )
        row["state"] = states.get(run.path, "")
        if baseline is not None and run.path == baseline.path:
            row["note"] = "baseline" + row["note"]
        rows.append(row)
    identity = runs[0].identity
    return {
        "title": f"{identity.dataset}, {identity.folds} folds, RNG_SEED {identity.rng_seed}",
        "explanation": explanation,
        "metrics": [(name, svg_axis(limits[name], name == LOSS) if compared else "") for name in metrics],
        "rows": rows,
    }


def _when(created: datetime, with_seconds: bool) -> str:
    """Return a time with what is needed to tell it from others: the seconds, and the year if it is another one."""
    year = "" if created.year == datetime.now().year else " %Y"
    return created.strftime(f"%d %b{year} %H:%M{':%S' if with_seconds else ''}")


def _row_of(run: FinishedRun, pair: PairComparison | None, limits: dict[str, float]) -> dict[str, Any]:
    row = _empty_row(run.path)
    row["when"] = row["name"]
    row["has_time"] = time_in_name(run.path.name) is not None
    row["order"] = f"{run.created.timestamp():.0f}"
    if run.diverged:
        row["note"] = f" ({', '.join(run.diverged)} diverged)"
    if run.seconds:
        row |= {"took": f"{'>' if run.resumed else ''}{format_duration(run.seconds)}", "seconds": f"{run.seconds:.0f}"}
    row["metrics"] = [_metric_cells(run, metric, pair, limit) for metric, limit in limits.items()]
    if pair is not None:
        words = [pair.metrics[metric].verdict for metric in limits]
        row["verdicts"] = [("", words[0])] if len(set(words)) == 1 else list(zip(limits, words, strict=True))
        row["verdict_order"] = sum(map(VERDICTS.index, words))
    row["thumbnail"] = draw_thumbnail({fold.name: fold.history for fold in run.folds.values()})
    return row


def _metric_cells(run: FinishedRun, metric: str, pair: PairComparison | None, limit: float) -> dict[str, str]:
    """Return the mean of a metric over a run's folds and its difference to the baseline, as far as there are any."""
    cells = {"name": metric, "mean": "", "order": "", "plot": ""}
    if run.folds:
        mean = float(np.mean([metric_of(fold, metric) for fold in run.folds.values()]))
        cells |= {"mean": format_metric(mean), "order": f"{mean:.9g}"}
    if pair is not None:
        cells["plot"] = svg_row(pair.metrics[metric], limit)
    return cells


def _empty_row(path: Path) -> dict[str, Any]:
    cells = "when order change state note verdict_order took seconds thumbnail".split()
    row: dict[str, Any] = dict.fromkeys(cells, "")
    has_report = (path / "report.html").exists()
    return row | {
        "name": folder_name(path),
        "has_time": False,
        "url": relative_url(path.name, "report.html") if has_report else "",
        "metrics": [{"name": metric, "mean": "", "order": "", "plot": ""} for metric in METRICS],
        "verdicts": [],
    }


def _group_of_unreadable(problems: dict[Path, str]) -> dict[str, Any]:
    rows = []
    for path, problem in problems.items():
        created = time_in_name(path.name)
        row = _empty_row(path)
        row |= {"when": row["name"], "state": problem, "order": f"{created.timestamp():.0f}" if created else ""}
        rows.append(row)
    explanation = "These folders cannot be read by this version of the program."
    return {
        "title": "Not readable",
        "explanation": explanation,
        "metrics": [(name, "") for name in METRICS],
        "rows": rows,
    }
