"""Long trainings: memory, descriptors, threads and the time of a step stay as they are.

A trial is one training of many steps in one process, with validations, checkpoints and logs: GRPO on scenes, GRPO on
rows with workers, supervised. A slope is Theil and Sen's, the median of those of all pairs of points, with its 95 %
confidence interval; the first half, in which caches and the allocator's heap fill, does not count.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import theilslopes

from campaigns.processes import start
from campaigns.scenarios import make_inputs
from campaigns.trials import Campaign, Outcome
from perception_r1.embedded.model import build_model_folder

NUM_STEPS = 10_000
_FIRST_SHARE = 0.5
_SECONDS = 24 * 3600.0
LIMIT = 1024
"""Bytes a step by which memory may seem to grow."""
_TRAININGS = ("GRPO", "GRPO on rows, with workers", "supervised")


class Soak(Campaign):
    """See the file."""

    name = "soak"
    duty = "trainings of 10,000 steps"
    size = len(_TRAININGS)
    num_steps = NUM_STEPS

    def trial(self, number: int, folder: Path) -> Outcome:
        """A training."""
        inputs, what = self.place / "inputs", _TRAININGS[number % len(_TRAININGS)]
        make_inputs(inputs)
        if not (inputs / "model" / "config.json").exists():
            build_model_folder(inputs / "model", family="qwen2_vl", seed=0)
        lines, every = folder / "footprint.jsonl", max(1, self.num_steps // 500)
        argv = [
            *("fit", "--task=ocr", f"--model={inputs / 'model'}", f"--trainer.max_steps={self.num_steps}"),
            *(f"--trainer.val_check_interval={max(2, self.num_steps // 20)}", "--trainer.accelerator=cpu"),
            *("--data.batch_size=2", "--data.eval_batch_size=4", "--data.num_val=4", "--data.num_test=4"),
            *("--data.num_workers=0", "--log_samples.num_samples=2", "--model.max_new_tokens=6"),
            *("--model.optimizer.lr=0.0001", f"--seed_everything={self.seed}"),
            *("--trainer.callbacks+=campaigns.footprint.Footprint", f"--trainer.callbacks.file={lines}"),
            f"--trainer.callbacks.every={every}",
        ]
        argv += ["--variant=sft"] if what == "supervised" else ["--model.group_size=4", "--model.kl_coef=0.04"]
        if "rows" in what:
            argv += ["--task=detection", f"--data.train_file={inputs / 'rows.jsonl'}", "--data.num_workers=2"]
        work = folder / "work"
        work.mkdir()
        running = start(argv, work, variables={"PERCEPTION_R1_CACHE": str(self.place / "cache")})
        status = running.wait(_SECONDS)
        if status != 0:
            return {"what": what, "measured": {}, "faults": [f"ends with status {status}; see {running.output}"]}
        points = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
        measured = slopes(points)
        (self.place / f"footprint-{number}.jsonl").write_text(lines.read_text(encoding="utf-8"), encoding="utf-8")
        return {"what": what, "measured": measured, "faults": faults(measured)}

    def measures(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """What each training took."""
        return {"trainings": {outcome["what"]: outcome["measured"] for outcome in outcomes}}

    def rows(self, summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """A row for each training."""
        heads = [
            "training",
            "steps",
            "memory, bytes a step",
            "its 95 % interval",
            "descriptors",
            "threads",
            "step time",
        ]
        rows = []
        for what, found in summary["trainings"].items():
            if found:
                memory, drift = found["private"], found["cpu_seconds"]
                change = drift["slope"] * found["num_steps"] / drift["median"]
                counts = [f"{found[name]['first']} to {found[name]['last']}" for name in ("descriptors", "threads")]
                interval = f"{memory['low']:+.0f} to {memory['high']:+.0f}"
                row = [what, f"{found['num_steps']:,}", f"{memory['slope']:+.0f}", interval, *counts]
                rows.append([*row, f"{change:+.1%} over the run"])
        return heads, rows


def slopes(points: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """How each number changes with the steps, after the first ones."""
    kept = points[int(len(points) * _FIRST_SHARE) :]
    steps = [point["step"] for point in kept]
    found: dict[str, Any] = {"num_steps": points[-1]["step"], "num_points": len(kept)}
    for name in ("resident", "private", "cpu_seconds", "descriptors", "threads"):
        values = [point[name] for point in kept]
        slope, _, low, high = theilslopes(values, steps)
        ends = {"first": values[0], "last": values[-1], "most": max(values), "median": sorted(values)[len(values) // 2]}
        found[name] = {"slope": float(slope), "low": float(low), "high": float(high), **ends}
    return found


def faults(measured: Mapping[str, Any]) -> list[str]:
    """What grows."""
    found = []
    for name in ("resident", "private"):
        if measured[name]["slope"] >= LIMIT:
            found.append(f"{name} memory grows by {measured[name]['slope']:.0f} bytes a step")
    for name in ("descriptors", "threads"):
        if measured[name]["last"] > measured[name]["first"] and measured[name]["slope"] > 0:
            found.append(f"{name} grow from {measured[name]['first']} to {measured[name]['last']}")
    return found
