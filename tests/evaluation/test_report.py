"""The report of an evaluation."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageChops
from rich.console import Console

from perception_r1.callbacks.log_samples import sample_card
from perception_r1.drawing import contact_sheet
from perception_r1.evaluation.paper import PAPER_METRICS, Comparison
from perception_r1.evaluation.report import TaskResults, write_report
from perception_r1.records import Score
from perception_r1.tasks.grounding import Grounding
from tests.callbacks.toy import ToyTask, toy_samples, toy_scored
from tests.hostile import WORST

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def scored_with(rewards):
    return [
        replace(toy_scored(sample), score=Score(reward=reward, components={"format": reward}))
        for sample, reward in zip(toy_samples(len(rewards)), rewards, strict=True)
    ]


ALIKE = Comparison(deviations=(), incomplete={})
TOY = ToyTask()


def report(
    folder: Path,
    metrics,
    *,
    margins=None,
    rewards=(1.0,),
    scored_completions=None,
    num_samples=2,
    comparison=ALIKE,
    task=TOY,
) -> str:
    write_report(
        folder,
        [TaskResults(task=task, metrics=metrics, margins=margins or {}, comparison=comparison)],
        split="val",
        scored_completion=lambda index: (task, (scored_completions or scored_with(rewards))[index]),
        rewards=list(rewards),
        num_samples=num_samples,
        checkpoint=None,
    )
    return (folder / "report.md").read_text()


def row_of(text: str, source: str, metric: str) -> list[str]:
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {source} | {metric} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][2:]


def test_what_is_known_of_margins_stands_beside_the_metrics(tmp_path: Path, console: Console):
    text = report(
        tmp_path,
        {"mine": {"reward": 1.5, "accuracy": 0.5, "ap": 0.25}},
        margins={"mine": {"reward": 0.0625, "accuracy": math.nan}},
    )
    assert row_of(text, "mine", "reward")[0] == "1.5000 ± 0.0625"
    assert row_of(text, "mine", "accuracy")[0] == "0.5000"
    assert row_of(text, "mine", "ap")[0] == "0.2500"
    assert "95 % confidence interval" in text
    assert "1.5000 ± 0.0625" in console.file.getvalue()


def test_the_papers_metrics_stand_beside_the_sources_of_their_names(tmp_path: Path, console: Console):
    values = {"reward": 1.5, "accuracy_50": 0.25, "accuracy": 0.5, "published/accuracy_50": 0.375}
    text = report(tmp_path, {"refcocoplus_testA": values, "mine": values})
    assert row_of(text, "refcocoplus_testA", "accuracy_50") == ["0.2500", "0.3750", "0.8250", "0.8680"]
    assert row_of(text, "refcocoplus_testA", "accuracy") == ["0.5000", "", "", ""]
    assert row_of(text, "mine", "accuracy_50") == ["0.2500", "0.3750", "", ""]
    names = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| refcoco")]
    assert names == ["accuracy", "accuracy_50", "reward"]  # the primary metric first, then what the paper has
    assert "1 samples of the val split" in text
    shown = console.file.getvalue()
    assert all(word in shown for word in ("refcocoplus_testA", "0.8250", "0.8680", "mine", str(tmp_path / "report.md")))


def test_no_metric_stands_beside_one_that_was_computed_in_another_way(tmp_path: Path, console: Console):
    metrics = {name: {"accuracy_50": 0.25, "published/accuracy_50": 0.25} for name in ("refcoco_val", "refcoco_testA")}
    for comparison, shown in (
        (Comparison(deviations=("the penalty was 1.05",), incomplete={}), {}),
        (Comparison(deviations=(), incomplete={"refcoco_val": (7, 10_834)}), {"refcoco_testA"}),
    ):
        text = report(tmp_path, metrics, comparison=comparison, task=Grounding(), num_samples=0)
        rows = {name: row_of(text, name, "accuracy_50")[2:] for name in metrics}
        assert {name for name, cells in rows.items() if cells != ["", ""]} == set(shown)
        assert ("in another way: the penalty was 1.05. `--protocol published`" in text) == bool(comparison.deviations)
        assert ("of refcoco_val are of 10834 samples, and these of 7." in text) == bool(comparison.incomplete)


def test_a_sentence_says_what_reading_as_published_costs(tmp_path: Path, console: Console):
    metrics = {"a": {"accuracy_50": 0.25, "published/accuracy_50": 0.375}, "b": {"accuracy_50": 1, "reward": 2}}
    text = report(tmp_path, metrics, task=Grounding(), num_samples=0)
    assert "Read as published, accuracy_50 of a is 0.3750 instead of 0.2500 (+0.1250)." in text
    assert "accuracy_50 of b" not in text
    assert "Read as published" not in report(tmp_path, metrics)  # nothing is published of this task


def test_the_paper_has_metrics_of_sources_of_the_configurations():
    settings = [yaml.safe_load(file.read_text())["data"]["init_args"] for file in CONFIGS.glob("*.yaml")]
    assert PAPER_METRICS.keys() <= {name for found in settings for name in found.get("test", ())}


def test_a_metric_that_is_not_a_number_is_a_dash(tmp_path: Path, console: Console):
    text = report(tmp_path, {"test": {"accuracy": math.nan, "ap": 0.5}})
    assert row_of(text, "test", "accuracy") == ["-", "", "", ""]
    assert row_of(text, "test", "ap") == ["0.5000", "", "", ""]


def test_the_lowest_and_the_highest_rewards_are_drawn_in_their_order(tmp_path: Path, console: Console):
    rewards = [0.5, 2.0, -1.0, 0.0, 3.0]
    text = report(tmp_path, {"test": {"accuracy": 1.0}}, rewards=rewards)
    scored_completions = scored_with(rewards)
    for name, indices in (("worst", (2, 3)), ("best", (4, 1))):
        cards = [sample_card(ToyTask(), scored_completions[index], step=None) for index in indices]
        with Image.open(tmp_path / f"{name}.png") as drawn:
            assert ImageChops.difference(drawn, contact_sheet(cards)).getbbox() is None
        assert f"![{name} answers]({name}.png)" in text


def test_without_pictures_none_are_drawn(tmp_path: Path, console: Console):
    assert "png" not in report(tmp_path, {"test": {"accuracy": 1.0}}, num_samples=0)
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_fewer_samples_than_pictures_are_drawn_all(tmp_path: Path, console: Console):
    report(tmp_path, {"test": {"accuracy": 1.0}}, rewards=[1.0], num_samples=8)
    assert (tmp_path / "worst.png").read_bytes() == (tmp_path / "best.png").read_bytes()


HOSTILE = WORST | {"terminal": "\ud800 | \x1b[31m [bold]", "markdown": "# heading\n| a | b |"}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_completions_do_no_harm(tmp_path: Path, console: Console, kind: str):
    scored_completions = [toy_scored(toy_samples(1)[0], HOSTILE[kind])]
    text = report(tmp_path, {"test": {"accuracy": 1.0}}, scored_completions=scored_completions, num_samples=1)
    assert HOSTILE[kind] not in text
    assert (tmp_path / "worst.png").stat().st_size > 1000
