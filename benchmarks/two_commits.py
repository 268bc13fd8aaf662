"""Did training get faster? The same run from two commits of this repository, taking turns.

    python benchmarks/two_commits.py OLD NEW --task counting

Each commit is checked out into a folder of its own. After one run whose seconds do not count,
runs of a few steps alternate on one thread each; compared are the medians of the seconds of a step, its phases, and the
tokens written per second. Both start from the same seed, but a change of the engine changes the rounding and with it
the policies, hence also the lengths of completions: tokens per second take that out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
NUM_DROPPED = 2
"""First steps of a run that are not counted."""


def check_out(commit: str, parent: Path) -> Path:
    """The files of a commit in a folder of their own."""
    folder = parent / commit
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
    return folder


def train(folder: Path, task: str, steps: int) -> dict[str, list[float]]:
    """Run some steps; returns what TensorBoard has of each of them."""
    configs = ["default", f"task/{task}", "model/tiny", f"tiny/{task}"]  # as older commits take them too
    command = [sys.executable, "-m", "perception_r1", "fit", "--seed_everything", "0"]
    command += [word for name in configs for word in ("-c", f"configs/{name}.yaml")]
    command += [
        "--trainer.max_steps",
        str(steps),
        "--trainer.limit_val_batches",
        "0",
        "--before_after.enabled",
        "false",
        "--trainer.logger.init_args.name",
        task,
    ]
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The run in {folder} failed:\n{done.stderr[-2000:]}")
    runs = (folder / "logs" / task).glob("version_*")
    events = EventAccumulator(str(max(runs, key=lambda run: int(run.name.split("_")[1]))))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "seconds" in tag or "per_second" in tag]
    return {tag: [event.value for event in events.Scalars(tag)[NUM_DROPPED:]] for tag in tags}


def main() -> int:
    """Take turns, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--task", default="counting")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--results", type=Path, help="Default: benchmarks/results/train_TASK.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        folders = [check_out(commit, Path(parent)) for commit in args.commits]
        for folder in folders:
            train(folder, args.task, NUM_DROPPED + 1)  # older commits prepare their model in it
        seen: list[dict[str, list[float]]] = [{}, {}]
        for _ in range(args.rounds):
            for folder, metrics in zip(folders, seen, strict=True):
                for tag, values in train(folder, args.task, args.steps).items():
                    metrics.setdefault(tag, []).extend(values)
    medians = [{tag: round(median(values), 4) for tag, values in metrics.items()} for metrics in seen]
    old, new = medians
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "lightning")},
        "task": args.task,
        "steps": {
            commit: len(metrics["train/seconds/step"]) for commit, metrics in zip(args.commits, seen, strict=True)
        },
        "commits": args.commits,
        "medians": medians,
        "step_faster_by": round(old["train/seconds/step"] / new["train/seconds/step"], 3),
        "tokens_per_second_ratio": round(new["train/tokens_per_second"] / old["train/tokens_per_second"], 3),
    }
    path = args.results or ROOT / "benchmarks" / "results" / f"train_{args.task}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
