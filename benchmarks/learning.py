"""What GRPO adds to the embedded policy on each task, beside SFT and beside GRPO without matching.

Every run starts from the warm start of its seed and trains for the same number of optimiser steps:

    grpo         the project's default
    sft          supervised fine-tuning on the same prompts, same learning rate and batch
    sequential   GRPO whose reward pairs the k-th prediction with the k-th target (counting and detection)

Metrics are greedy, on 400 held-out scenes (the test split) that no setting was chosen on: settings were tuned on other
seeds, whose scenes differ. Each run has one thread; `--jobs` of them go side by side, so its seconds are upper bounds.

    python benchmarks/learning.py                         # everything, about an hour on two cores
    python benchmarks/learning.py --tasks ocr --seeds 0   # a part; finished runs are kept and not repeated

Writes benchmarks/results/learning.json and learning.md.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "logs" / "learning"

PRIMARY_METRICS = {
    "grounding": ("accuracy_50", "accuracy at IoU 0.5"),
    "counting": ("count_accuracy", "count accuracy"),
    "detection": ("ap50", "AP50"),
    "ocr": ("reward/similarity", "1 - edit distance"),
}
"""Task -> name of its metric in run.json, and in words."""
VARIANTS = {
    "grpo": [],
    "sft": ["--variant", "sft"],
    "sequential": ["--data.task.init_args.matching", "sequential"],
}
MATCHED_TASKS = ("counting", "detection")
REQUIRED_GAIN = {"grounding": 0.08, "ocr": 0.08, "counting": 0.05, "detection": 0.05}
"""Mean gain of GRPO that the project claims; `main` says where a result falls short."""
REQUIRED_FORMAT = 0.98


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training and what came of it."""

    task: str
    variant: str
    seed: int

    def folder(self, runs: Path) -> Path:
        """Where its run.json lies."""
        return runs / self.task / f"{self.variant}-{self.seed}"


def train(run: Run, runs: Path, options: list[str]) -> dict[str, Any]:
    """Train unless a finished run is there; its run.json, which names the commit."""
    folder = run.folder(runs)
    done = finished(folder)
    if done is not None:
        return done
    command = [
        *(sys.executable, "-m", "perception_r1", "fit", "--task", run.task, *VARIANTS[run.variant]),
        *("--seed_everything", str(run.seed), "--trainer.logger.init_args.save_dir", str(runs)),
        *("--trainer.logger.init_args.name", run.task),
        *("--trainer.logger.init_args.version", f"{run.variant}-{run.seed}"),
        *options,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("w") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=True)
    result = finished(folder)
    if result is None:
        raise RuntimeError(f"{folder} holds no finished run.json; see output.txt beside it.")
    return result


def finished(folder: Path) -> dict[str, Any] | None:
    """The run.json of a run that has ended."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    card = json.loads(path.read_text())
    return card if card["status"] == "finished" else None


def row(run: Run, card: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a run that the table shows."""
    metric = PRIMARY_METRICS[run.task][0]
    return asdict(run) | {
        "metric": metric,
        "before": card["before"][metric],
        "after": card["after"][metric],
        "format_after": card["after"].get("reward/format"),
        "steps": card["steps"],
        "seconds": card["seconds"],
        "commit": (card["git"] or {}).get("commit"),
        "before_all": card["before"],
        "after_all": card["after"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per task and variant, one column per seed."""
    seeds = sorted({entry["seed"] for entry in rows})
    heads = ["task", "metric", "training", *(f"seed {seed}" for seed in seeds), "mean gain", "steps", "seconds"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for task, (_, words) in PRIMARY_METRICS.items():
        for variant in VARIANTS:
            chosen = {entry["seed"]: entry for entry in rows if (entry["task"], entry["variant"]) == (task, variant)}
            if not chosen:
                continue
            cells = [f"{chosen[s]['before']:.3f} → {chosen[s]['after']:.3f}" if s in chosen else "-" for s in seeds]
            gain = mean(entry["after"] - entry["before"] for entry in chosen.values())
            seconds = mean(entry["seconds"] for entry in chosen.values())
            steps = next(iter(chosen.values()))["steps"]
            lines.append(
                f"| {task} | {words} | {variant} | {' | '.join(cells)} | {gain:+.3f} | {steps} | {seconds:.0f} |"
            )
    return "\n".join(lines)


def shortfalls(rows: list[dict[str, Any]]) -> list[str]:
    """Where GRPO does not reach what the project claims."""
    found = []
    for task, required in REQUIRED_GAIN.items():
        chosen = [entry for entry in rows if (entry["task"], entry["variant"]) == (task, "grpo")]
        if not chosen:
            continue
        found += [f"{task}, seed {e['seed']}: not better after" for e in chosen if e["after"] <= e["before"]]
        gain = mean(entry["after"] - entry["before"] for entry in chosen)
        if gain < required:
            found.append(f"{task}: mean gain {gain:.3f} is below {required}")
        formats = [entry["format_after"] for entry in chosen if entry["format_after"] is not None]
        low = [value for value in formats if value < REQUIRED_FORMAT]
        found += [f"{task}: format {value:.3f} is below {REQUIRED_FORMAT}" for value in low]
    return found


def main() -> int:
    """Train, tabulate, compare with the claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(PRIMARY_METRICS), choices=list(PRIMARY_METRICS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=RUNS, help="Folder of the runs.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the table.")
    parser.add_argument("--options", type=shlex.split, default=[], help="Further options of each run, in one string.")
    args = parser.parse_args()
    runs = [
        Run(task=task, variant=variant, seed=seed)
        for variant in args.variants
        for seed in args.seeds
        for task in args.tasks
        if variant != "sequential" or task in MATCHED_TASKS
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        cards = list(pool.map(lambda run: train(run, args.runs.resolve(), args.options), runs))
    rows = [row(run, card) for run, card in zip(runs, cards, strict=True)]
    args.results.mkdir(exist_ok=True)
    environment = {name: cards[0][name] for name in ("versions", "hardware", "start")}
    (args.results / "learning.json").write_text(json.dumps(environment | {"rows": rows}, indent=2) + "\n")
    text = table(rows)
    claims = shortfalls(rows) or ["Every claim holds: GRPO is better after on each seed, by the required mean gain."]
    text += "\n\n" + "\n".join(f"- {claim}" for claim in claims) + "\n"
    (args.results / "learning.md").write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
