"""The page of two runs: tables, drawings and text."""

import re
from pathlib import Path

from synthetic_runs import BASE, BETTER, make_run

from comparison.pair import compare_runs
from comparison.pair_page import pair_content, write_pair_page
from comparison.run_reader import read_run


def test_page_has_the_changes_the_metrics_and_each_class(tmp_path: Path) -> None:
    before = read_run(make_run(tmp_path / "before", classes=["3", "<b>"]))
    after = read_run(make_run(tmp_path / "after", BETTER, classes=["3", "<b>"], mirror=True, epochs=3))
    path = write_pair_page(compare_runs(before, after))
    assert path == tmp_path / "after" / "compared-with-before.html"
    page = path.read_text(encoding="utf-8")
    assert re.findall(r"<li>(.*?)</li>", page) == ["EPOCHS 10 → 3", "MIRROR False → True"]
    assert re.findall(r'<th scope="row">(.*?)</th>', page) == ["accuracy", "loss", "&lt;b&gt;", "class 3"]
    assert page.count('class="diamond filled"') == 4 and "+0.0090 ± 0.0037" in page
    assert "report.html" not in page
    (tmp_path / "after" / "report.html").touch()
    assert 'href="report.html"' in write_pair_page(compare_runs(before, after)).read_text(encoding="utf-8")


def test_repetition_is_identical(tmp_path: Path) -> None:
    pair = compare_runs(read_run(make_run(tmp_path / "before")), read_run(make_run(tmp_path / "after", BASE)))
    content = pair_content(pair)
    assert content["changes"] == ["repetition"]
    assert content["explanation"] == "The two runs are identical in every fold."
