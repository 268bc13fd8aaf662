import importlib.util
import json
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("learning", ROOT / "benchmarks" / "learning.py")
learning = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(learning)


def entry(seed, before, after, *, task="grounding", variant="grpo", form=1.0):
    metrics = {"before": before, "after": after, "format_after": form, "steps": 5, "seconds": 2.0}
    return {"task": task, "variant": variant, "seed": seed} | metrics


def test_table_has_a_line_per_task_and_training_with_the_mean_gain():
    rows = [entry(0, 0.1, 0.3), entry(1, 0.2, 0.6), entry(0, 0.1, 0.2, variant="sft")]
    assert learning.table(rows).splitlines()[2:] == [
        "| grounding | accuracy at IoU 0.5 | grpo | 0.100 → 0.300 | 0.200 → 0.600 | +0.300 | 5 | 2 |",
        "| grounding | accuracy at IoU 0.5 | sft | 0.100 → 0.200 | - | +0.100 | 5 | 2 |",
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([entry(0, 0.1, 0.5), entry(1, 0.3, 0.2)], "seed 1: not better after"),
        ([entry(0, 0.1, 0.15)], "below 0.08"),
        ([entry(0, 0.1, 0.5, form=0.9)], "format 0.900 is below 0.98"),
    ],
)
def test_what_falls_short_is_named(rows, words):
    (found,) = learning.shortfalls(rows)
    assert words in found


def test_committed_results_are_those_of_the_table_and_hold_every_claim():
    rows = json.loads((ROOT / "benchmarks" / "results" / "learning.json").read_text(encoding="utf-8"))["rows"]
    text = (ROOT / "benchmarks" / "results" / "learning.md").read_text(encoding="utf-8")
    assert text.startswith(learning.table(rows))
    assert learning.shortfalls(rows) == []
    assert {(row["task"], row["seed"]) for row in rows if row["variant"] == "grpo"} == {
        (task, seed) for task in learning.PRIMARY_METRICS for seed in (0, 1, 2)
    }
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert all(f"{row['before']:.3f} → {row['after']:.3f}" in page for row in rows)


def test_the_readme_has_the_means_of_grpo_over_the_seeds():
    rows = json.loads((ROOT / "benchmarks" / "results" / "learning.json").read_text(encoding="utf-8"))["rows"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for task, (_, metric) in learning.PRIMARY_METRICS.items():
        runs = [row for row in rows if (row["task"], row["variant"]) == (task, "grpo")]
        before, after = (mean(row[when] for row in runs) for when in ("before", "after"))
        (line,) = (line for line in readme.splitlines() if line.startswith(f"| {task} |"))
        assert line.endswith(f"| {metric} | {before:.3f} | {after:.3f} |")
