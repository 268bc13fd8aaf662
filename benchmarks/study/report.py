"""Tables and plots of the study, from the runs that are there."""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeAlias

from pages import fill, table
from scipy.stats import t as student
from study.trainings import PARTS, TRAININGS

Result: TypeAlias = Mapping[str, Any]
"""The file of a run."""

PRIMARY = {
    "grounding": ("accuracy_50", "accuracy at IoU 0.5"),
    "counting": ("count_accuracy", "count accuracy"),
    "detection": ("ap50", "AP50"),
    "ocr": ("reward/similarity", "1 - edit distance"),
}
"""Task -> name of its metric, and in words."""
OTHERS = {
    "grounding": {"reward/iou": "mean IoU", "accuracy_75": "accuracy at .75", "accuracy_95": "accuracy at .95"},
    "counting": {"mean_iou": "mean IoU", "box_recall": "objects boxed", "-absolute_error": "less count error"},
    "detection": {"mean_iou": "mean IoU", "box_recall": "objects boxed", "ap75": "AP75", "ap": "AP"},
}
"""Metrics besides, which the reward of the task does not name, or not alone; with a minus, less is better."""
MAIN = {
    name: training.title for name, training in TRAININGS.items() if training.part == "main" and training.labels != "few"
}
"""Trainings of the main part on ever new labels, and their titles."""
FEW = {name: training.title for name, training in TRAININGS.items() if training.labels != "new"}
"""Those on few labels."""
COLUMNS = (
    ("grounding", "accuracy_50", "accuracy at .5"),
    ("grounding", "reward/iou", "mean IoU"),
    ("counting", "count_accuracy", "count accuracy"),
    ("counting", "box_recall", "objects boxed"),
    ("detection", "ap50", "AP50"),
    ("detection", "ap75", "AP75"),
    ("ocr", "reward/similarity", "1 - edit distance"),
)
"""Task, metric and its name in the tables of the other parts."""
SAMPLED = {
    "mean": "mean of 8 samples",
    "best": "best of 8",
    "kl_per_token": "KL from the base per token",
    "tokens": "tokens",
    "count_calibration_error": "calibration error of the count",
}
LEVELS = ("pretraining", "training", "crowded", "photographs")
COLOURS = {"grpo": "#c2185b", "sft": "#1976d2"}


def read(folder: Path) -> list[Result]:
    """All measured runs below a folder; one on all tasks as one of each."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/*.json"))]
    of_one = [result for result in found if "levels" in result]
    of_all = [result for result in found if "by_task" in result]
    return of_one + [result | {"task": task} | own for result in of_all for task, own in result["by_task"].items()]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval by Student's t; one value has no width.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(half, 3)
    (2.0, 2.484)
    """
    if len(values) < 2:
        return mean(values), float("nan")
    return mean(values), float(student.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))


def gains(
    results: Iterable[Result], task: str, training: str, labels: int, value: Callable[[Result], float]
) -> list[float]:
    """What a training added on each seed, paired with the base on the same scenes."""
    by_seed = {(r["training"], r["labels"], r["seed"]): r for r in results if r["task"] == task}
    return [
        value(result) - value(by_seed["base", 0, seed])
        for (name, count, seed), result in sorted(by_seed.items())
        if (name, count) == (training, labels) and ("base", 0, seed) in by_seed
    ]


def differences(results: Iterable[Result], task: str, other: str, labels: int, metric: str) -> list[float]:
    """What GRPO has added more than another training on each seed, on the level of training."""
    by_seed = {(r["training"], r["seed"]): r["levels"]["training"][metric] for r in results if is_of(r, task, labels)}
    seeds = sorted(seed for name, seed in by_seed if name == "grpo" and (other, seed) in by_seed)
    return [by_seed["grpo", seed] - by_seed[other, seed] for seed in seeds]


def is_of(result: Result, task: str, labels: int) -> bool:
    """Whether a run is of a task and has this many labelled images."""
    return (result["task"], result["labels"]) == (task, labels)


def at_level(level: str, metric: str) -> Callable[[Result], float]:
    """What reads a metric of a level, its sign changed where there is a minus before its name."""
    name, sign = metric.removeprefix("-"), -1 if metric.startswith("-") else 1
    return lambda result: sign * float(result["levels"][level][name])


def words(values: Sequence[float], *, is_gain: bool = True) -> str:
    """Mean and interval, and on how many seeds it is a gain.

    >>> words([0.1, 0.1, 0.1])
    '+0.100 ± 0.000 (3 of 3)'
    >>> words([]), words([0.25], is_gain=False)
    ('-', '0.250')
    """
    if not values:
        return "-"
    center, half = interval(values)
    text = f"{center:+.3f}" if is_gain else f"{center:.3f}"
    text += f" ± {half:.3f}" if len(values) > 1 else ""
    return f"{text} ({sum(value > 0 for value in values)} of {len(values)})" if is_gain else text


def part_table(results: Sequence[Result], part: str) -> str:
    """Training by metric: the gains on the training level of a part's trainings that were done, and of GRPO."""
    rows = []
    for name in ["grpo", *(name for name, training in TRAININGS.items() if training.part == part)]:
        cells = [words(gains(results, task, name, 0, at_level("training", metric))) for task, metric, _ in COLUMNS]
        if set(cells) != {"-"}:
            rows.append([TRAININGS[name].title, *cells])
    return table(["training", *(f"{task}: {title}" for task, _, title in COLUMNS)], rows)


def base_table(results: Sequence[Result]) -> str:
    """The primary metric of the base on every level."""
    rows = []
    for task, (metric, name) in PRIMARY.items():
        bases = [r for r in results if (r["task"], r["training"]) == (task, "base")]
        if bases:
            rows.append(
                [task, name, *(words([at_level(level, metric)(r) for r in bases], is_gain=False) for level in LEVELS)]
            )
    return table(["task", "metric", *LEVELS], rows)


def main_table(results: Sequence[Result]) -> str:
    """Task by training: the gain in the primary metric on the training level."""
    rows = []
    for task, (metric, name) in PRIMARY.items():
        base = [at_level("training", metric)(r) for r in results if (r["task"], r["training"]) == (task, "base")]
        if base:
            cells = [words(gains(results, task, kind, 0, at_level("training", metric))) for kind in shown(results)]
            rows.append([task, name, words(base, is_gain=False), *cells])
    return table(["task", "metric", "base", *shown(results).values()], rows)


def shown(results: Sequence[Result]) -> dict[str, str]:
    """Trainings on ever new labels that have been done, and their titles."""
    done = {result["training"] for result in results if not result["labels"]}
    return {name: title for name, title in MAIN.items() if name in done}


def difference_table(results: Sequence[Result]) -> str:
    """Task by training and number of labelled images: how much more GRPO has gained in the primary metric."""
    counts = sorted({r["labels"] for r in results})
    rows = []
    for task, (metric, name) in PRIMARY.items():
        for other, title in ((kind, title) for kind, title in (FEW | MAIN).items() if kind != "grpo"):
            cells = [words(differences(results, task, other, count, metric)) for count in counts]
            if set(cells) - {"-"}:
                rows.append([task, name, f"GRPO - {title}", *cells])
    heads = [f"{count} images" if count else "ever new images" for count in counts]
    return table(["task", "metric", "difference", *heads], rows)


def other_table(results: Sequence[Result]) -> str:
    """The gains in other metrics on the training level."""
    rows = []
    for task, metrics in OTHERS.items():
        for metric, name in metrics.items():
            cells = [words(gains(results, task, kind, 0, at_level("training", metric))) for kind in shown(results)]
            if set(cells) != {"-"}:
                rows.append([task, name, *cells])
    return table(["task", "metric", *shown(results).values()], rows)


def level_table(results: Sequence[Result]) -> str:
    """The primary metric on every level: the base, and what GRPO and SFT add."""
    rows = []
    for task, (metric, _) in PRIMARY.items():
        for level in LEVELS:
            read_it = at_level(level, metric)
            base = [read_it(r) for r in results if (r["task"], r["training"]) == (task, "base")]
            if base:
                added = [words(gains(results, task, kind, 0, read_it)) for kind in ("grpo", "sft")]
                rows.append([task, level, words(base, is_gain=False), *added])
    return table(["task", "level", "base", "GRPO", "SFT"], rows)


def label_table(results: Sequence[Result]) -> str:
    """The gain in the primary metric by the number of labelled images, on the level of training and beyond."""
    counts = sorted({r["labels"] for r in results if r["labels"]})
    rows = []
    for task, (metric, _) in PRIMARY.items():
        for level, kind in itertools.product(LEVELS[1:], FEW):
            cells = [words(gains(results, task, kind, count, at_level(level, metric))) for count in counts]
            if set(cells) - {"-"}:
                rows.append([task, level, FEW[kind], *cells])
    return table(["task", "level", "training", *(f"{count} images" for count in counts)], rows)


def sampling_table(results: Sequence[Result]) -> str:
    """What one of G samples holds before, and what training makes of it, by temperature."""
    rows = []
    for task in PRIMARY:
        for training in ("base", "grpo", "sft"):
            found = [r["sampled"] for r in results if (r["task"], r["training"], r["labels"]) == (task, training, 0)]
            for temperature in found[0] if found else ():
                columns = [[r[temperature][name] for r in found if name in r[temperature]] for name in SAMPLED]
                rows.append([task, training, temperature, *(words(each, is_gain=False) for each in columns)])
    return table(["task", "policy", "temperature", *SAMPLED.values()], rows)


TABLES: dict[str, Callable[[Sequence[Result]], str]] = {
    "base": base_table,
    "gains": main_table,
    "differences": difference_table,
    "others": other_table,
    "levels": level_table,
    "labels": label_table,
    "sampling": sampling_table,
} | {part: partial(part_table, part=part) for part in PARTS if part != "main"}
"""The tables that a page can have, by the name in the comment before it: `<!-- learning: gains -->`."""


def filled(page: str, results: Sequence[Result]) -> str:
    """A page with its tables of the study written anew."""
    return fill(page, "learning", {name: make(results) for name, make in TABLES.items()})


def report(folder: Path, docs: Path) -> None:
    """Write the tables into results.md and the plots into learning.png of the documentation."""
    results, page = read(folder), docs / "results.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    plot(results, docs / "learning.png")
    print(f"wrote {page} and {docs / 'learning.png'} from {len(results)} runs")


def _rows_of_plot(results: Sequence[Result], task: str, metric: str) -> list[dict[str, list[float]]]:
    """Gains of a task by what they are of: trainings, trainings at levels, and trainings on few labels."""
    counts = sorted({result["labels"] for result in results if result["labels"]})
    return [
        {label: gains(results, task, kind, 0, at_level("training", metric)) for kind, label in MAIN.items()},
        {
            f"{level}, {MAIN[kind]}": gains(results, task, kind, 0, at_level(level, metric))
            for level in LEVELS
            for kind in COLOURS
        },
        {
            f"{count} images, {title}": gains(results, task, kind, count, at_level("training", metric))
            for count in counts
            for kind, title in FEW.items()
        },
    ]


def plot(results: Sequence[Result], path: Path) -> None:
    """Gains with intervals: a row for trainings, one for levels, one for few labels; a column for each task."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    columns = [_rows_of_plot(results, task, metric) for task, (metric, _) in PRIMARY.items()]
    shown = [[label for label in rows[0] if any(row[label] for row in rows)] for rows in zip(*columns, strict=True)]
    figure, axes = plt.subplots(
        *(len(shown), len(columns)),
        **{"figsize": (12, 9), "sharey": "row", "squeeze": False, "layout": "constrained"},
        height_ratios=[max(1, len(labels)) for labels in shown],
    )
    for column, (rows, (task, (_, name))) in enumerate(zip(columns, PRIMARY.items(), strict=True)):
        for axis, row, labels in zip(axes[:, column], rows, shown, strict=True):
            for height, label in enumerate(reversed(labels)):
                if not row[label]:
                    continue
                center, half = interval(row[label])
                colour = COLOURS["sft" if "SFT" in label and "GRPO" not in label else "grpo"]
                axis.errorbar(center, height, xerr=0 if half != half else half, fmt="o", color=colour, capsize=3)
                axis.plot(row[label], [height] * len(row[label]), ".", color=colour, alpha=0.35)
            axis.axvline(0, color="grey", linewidth=0.8)
            axis.set_yticks(range(len(labels)), list(reversed(labels)), fontsize=8)
            axis.set_ylim(-0.6, max(1, len(labels)) - 0.4)
            axis.tick_params(axis="x", labelsize=8)
        axes[0, column].set_title(f"{task}: gain in {name}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
