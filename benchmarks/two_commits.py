"""Did training get faster? The same run from two commits of this repository, taking turns.

    python benchmarks/two_commits.py OLD NEW --task counting
    python benchmarks/two_commits.py OLD NEW --engine

Each commit is checked out into a folder of its own. With --engine it is single steps in the sizes of `engine.py` that
take turns, and CPU-seconds that are compared. Otherwise, after one run whose seconds do not count,
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
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from engine import GROUP_SIZES, SHAPES, SIZES, Worker
from random_model import make_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
NUM_DROPPED = 2
"""First steps of a run that are not counted."""


def short(commit: str) -> str:
    """The short hash of a commit, under whatever name it is given."""
    command = ["git", "rev-parse", "--short", commit]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


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


def compare_steps(folders: Sequence[Path], rounds: int) -> list[dict[str, float]]:
    """Of each size: CPU-seconds of a step from both commits, and how many times the old one's the new one's are."""
    rows = []
    with tempfile.TemporaryDirectory() as made:
        for prompt, completion in SIZES:
            model = Path(made) / str(prompt)
            make_folder(model, SHAPES[prompt])
            for group_size in GROUP_SIZES:
                sizes = [str(group_size), str(completion)]
                commands = [
                    ["env", f"PYTHONPATH={folder / 'src'}", sys.executable, str(folder / "benchmarks/step_worker.py")]
                    for folder in folders
                ]
                workers = [Worker([*command, str(model), "shared", *sizes]) for command in commands]
                taken: list[list[float]] = [[], []]
                for _ in range(rounds + 1):
                    for worker, seconds in zip(workers, taken, strict=True):
                        seconds.append(worker.step()["cpu_s"])
                for worker in workers:
                    worker.close()
                old, new = (median(seconds[1:]) for seconds in taken)
                row = {"prompt": prompt, "completion": completion, "group_size": group_size}
                rows.append(row | {"old": round(old, 3), "new": round(new, 3), "ratio": round(new / old, 3)})
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """Take turns, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--engine", action="store_true", help="Compare single steps in several sizes.")
    parser.add_argument("--task", default="counting")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--results", type=Path, help="Default: results/train_TASK.json, or engine_commits.json.")
    args = parser.parse_args()
    args.commits = [short(name) for name in args.commits]
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "lightning")},
        "commits": args.commits,
    }
    with tempfile.TemporaryDirectory() as parent:
        folders = [check_out(commit, Path(parent)) for commit in args.commits]
        if args.engine:
            results["steps"] = compare_steps(folders, args.rounds)
            path = args.results or ROOT / "benchmarks" / "results" / "engine_commits.json"
            path.write_text(json.dumps(results, indent=1) + "\n")
            return 0
        for folder in folders:
            train(folder, args.task, NUM_DROPPED + 1)  # older commits prepare their model in it
        seen: list[dict[str, list[float]]] = [{}, {}]
        for _ in range(args.rounds):
            for folder, metrics in zip(folders, seen, strict=True):
                for tag, values in train(folder, args.task, args.steps).items():
                    metrics.setdefault(tag, []).extend(values)
    medians = [{tag: round(median(values), 4) for tag, values in metrics.items()} for metrics in seen]
    old, new = medians
    counts = [len(metrics["train/seconds/step"]) for metrics in seen]
    results |= {
        "task": args.task,
        "steps": dict(zip(args.commits, counts, strict=True)),
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
