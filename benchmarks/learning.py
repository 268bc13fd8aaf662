"""What GRPO makes of the embedded model, beside supervised fine-tuning, from the same base and at equal cost.

Trainings, each of BUDGET CPU-seconds of training steps on one thread:

    grpo         the project's default
    sft          supervised fine-tuning on the same scenes
    sft-grpo     half of it supervised, then GRPO from there
    sequential   GRPO whose reward pairs the k-th prediction with the k-th target (counting and detection)
    think        GRPO that asks for thoughts before the answer

grpo and sft are also trained on few labelled images, seen as often as the budget takes. Learning rates are searched on
a seed of their own, as many for sft as for grpo, and so is what a step costs. Every training ends with the best of four
validations. Nothing that is tested was seen in training or chosen on.

    python benchmarks/learning.py search            # learning rates and costs, once
    python benchmarks/learning.py run --jobs 2      # what is not there yet; it can be stopped and goes on
    python benchmarks/learning.py report            # tables and plots of what is there

Every run is a file in benchmarks/results/learning; see `learning_run.py` for what is measured, `learning_worlds.py` for
where, and docs/results.md for what was found.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "learning"

TASKS = ("grounding", "counting", "detection", "ocr")
BUDGET = 240.0
"""CPU-seconds of training steps of a run."""
KINDS = {"grpo": [], "sft": ["--variant", "sft"]}
"""The two kinds of training steps, with their options; all trainings are made of them."""
RATES = {"grpo": (1e-5, 2e-5, 4e-5, 8e-5), "sft": (3e-5, 1e-4, 2e-4, 4e-4)}
"""Learning rates that are tried for each kind; the best by validation is taken."""
SEARCH_SEED = 1000
EXTRA = {
    "sequential": ["--data.task.init_args.matching", "sequential"],
    "think": ["--variant", "think"],
}
TRAININGS = ("grpo", "sft", "sft-grpo", "sequential", "think")
LABELS = (64, 256, 1024)
CALIBRATION_STEPS = 12
NUM_TESTED = {"grounding": 1200, "counting": 400, "detection": 400, "ocr": 1200}
"""Held-out images of a run: more where an answer is short."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is wanted; see `learning_run.Run`."""

    task: str
    training: str
    seed: int
    labels: int = 0
    lr: float | None = None

    @property
    def name(self) -> str:
        """What its result is called."""
        words = [self.training, *([f"{self.labels}-labels"] if self.labels else [])]
        return "-".join([*words, f"{self.lr:g}" if self.lr is not None else f"seed-{self.seed}"])


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where runs and results are, and how much is tested.

    Attributes:
        results: Folder of the results, one file for each run.
        runs: Folder of the trainings.
        num_tested: Held-out images of pretraining and of training, of the levels beyond half as many; NUM_TESTED unless
            given.
    """

    results: Path = RESULTS
    runs: Path = ROOT / "logs" / "learning"
    num_tested: int | None = None

    def path(self, job: Job) -> Path:
        """Where the result of a job is."""
        return self.results / job.task / f"{job.name}.json"

    def read(self, job: Job) -> dict[str, float]:
        """The result of a job of the search."""
        if not self.path(job).is_file():
            raise SystemExit(f"{self.path(job)} is not there: run `python benchmarks/learning.py search` first")
        return json.loads(self.path(job).read_text(encoding="utf-8"))

    def best_rate(self, task: str, kind: str) -> float:
        """The learning rate whose best validation was the highest."""
        found = {job.lr: self.read(job)["best_validation"] for job in rate_jobs(task, kind)}
        return max(found, key=found.__getitem__)

    def phases(self, job: Job) -> list[tuple[list[str], int]]:
        """Options and steps of a job's trainings."""
        if job.training == "base":
            return []
        purpose, _, kind = job.training.partition("-")
        if purpose == "cost":
            return [(KINDS[kind], CALIBRATION_STEPS)]
        if purpose == "rate":
            return [self._phase(job.task, kind, 1.0, job.lr)]
        kinds = ["sft", "grpo"] if job.training == "sft-grpo" else ["sft" if job.training == "sft" else "grpo"]
        found = [self._phase(job.task, kind, 1 / len(kinds), self.best_rate(job.task, kind)) for kind in kinds]
        return [(options + EXTRA.get(job.training, []), steps) for options, steps in found]

    def _phase(self, task: str, kind: str, share: float, lr: float | None) -> tuple[list[str], int]:
        cost = self.read(cost_job(task, kind))["cpu_seconds_per_step"]
        return [*KINDS[kind], "--model.optimizer.lr", f"{lr:g}"], max(4, round(BUDGET * share / cost))

    def do(self, jobs: Sequence[Job], num_jobs: int) -> None:
        """Do what is not done yet, side by side, and say how far it is."""
        missing = [job for job in jobs if not self.path(job).is_file()]
        print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are there", flush=True)
        with ThreadPoolExecutor(num_jobs) as pool:
            for number, path in enumerate(pool.map(self._do, missing), 1):
                print(f"{number}/{len(missing)} {path.relative_to(self.results)}", flush=True)

    def _do(self, job: Job) -> Path:
        folder = self.runs / job.task / job.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        values = {name: value for name, value in asdict(job).items() if name != "lr"}
        num_tested = self.num_tested or NUM_TESTED[job.task]
        values |= {"phases": self.phases(job), "folder": str(folder), "num_tested": num_tested}
        values["is_measured"] = not job.training.startswith(("cost", "rate"))
        command = [sys.executable, str(ROOT / "benchmarks" / "learning_run.py"), json.dumps(values)]
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        with (folder / "output.txt").open("w") as output:
            done = subprocess.run(
                [*command, str(self.path(job))], cwd=ROOT, env=environment, stdout=output, stderr=output, check=False
            )
        if done.returncode:
            raise SystemExit(f"a run failed; see {folder / 'output.txt'}")
        for checkpoint in folder.rglob("*.ckpt"):
            checkpoint.unlink()
        return self.path(job)


def plan(tasks: Sequence[str], trainings: Sequence[str], labels: Sequence[int], seeds: Sequence[int]) -> list[Job]:
    """The runs of the study, the most telling ones first."""
    jobs = [Job(task=task, training="base", seed=seed) for seed in seeds for task in tasks]
    for training in trainings:
        matched = ("counting", "detection") if training == "sequential" else TASKS
        jobs += [Job(task=task, training=training, seed=seed) for seed in seeds for task in tasks if task in matched]
    for count in labels:
        for kind in (kind for kind in KINDS if kind in trainings):
            jobs += [Job(task=task, training=kind, seed=seed, labels=count) for seed in seeds for task in tasks]
    return jobs


def cost_job(task: str, kind: str) -> Job:
    """The run that tells what a step costs."""
    return Job(task=task, training=f"cost-{kind}", seed=SEARCH_SEED)


def rate_jobs(task: str, kind: str) -> list[Job]:
    """The runs that tell which learning rate is best."""
    return [Job(task=task, training=f"rate-{kind}", seed=SEARCH_SEED, lr=lr) for lr in RATES[kind]]


def main() -> int:
    """Search, run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "run", "report"))
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--trainings", nargs="*", default=TRAININGS, choices=TRAININGS)
    parser.add_argument("--labels", nargs="*", type=int, default=LABELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2, 3, 4))
    parser.add_argument("--jobs", type=int, default=2, help="Runs side by side, one thread each.")
    parser.add_argument("--results", type=Path, default=Study.results, help="Folder of the results.")
    parser.add_argument("--runs", type=Path, default=Study.runs, help="Folder of the trainings.")
    parser.add_argument("--num_tested", type=int, help="Held-out images of a run.")
    args = parser.parse_args()
    study = Study(results=args.results.resolve(), runs=args.runs.resolve(), num_tested=args.num_tested)
    pairs = [(task, kind) for task in args.tasks for kind in KINDS]
    if args.what == "search":
        study.do([cost_job(*pair) for pair in pairs], 1)
        study.do([job for pair in pairs for job in rate_jobs(*pair)], args.jobs)
    elif args.what == "run":
        study.do(plan(args.tasks, args.trainings, args.labels, args.seeds), args.jobs)
    else:
        from learning_report import report

        report(study.results, ROOT / "docs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
