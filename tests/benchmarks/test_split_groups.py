"""What a split group costs: the program on a small case, and that its page says what its results say."""

import json
import sys

from tests.benchmarks.programs import RESULTS, program
from tests.readme import ROOT

pages, split_groups = program("pages"), program("split_groups")


def test_the_page_shows_the_committed_results():
    rows = json.loads((RESULTS / "split_groups.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    assert pages.fill(page, "split_groups", {"ratios": split_groups.ratios(rows)}) == page
    assert "<!-- split_groups: ratios -->" in page


def test_every_number_of_parts_is_measured_both_ways(tmp_path, monkeypatch, capsys):
    shape = split_groups.Shape(prompt_tokens=60, picture=(2, 2), hidden=64, layers=1, heads=1, kv_heads=1)
    monkeypatch.setattr(split_groups, "SHAPES", {60: shape})
    monkeypatch.setattr(split_groups, "COMPLETION", 4)
    path = tmp_path / "result.json"
    command = ["split_groups.py", "--prompts", "60", "--rounds", "1", "--results", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    assert split_groups.main() == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["parts"] for row in rows] == [2, 3, 6, 12]
    assert all(row["once"] > 0 and row["for_each_part"] > 0 for row in rows)
    assert "| 60 | 12 |" in capsys.readouterr().out
