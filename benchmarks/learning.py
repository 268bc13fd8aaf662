"""What GRPO makes of the embedded model, beside supervised fine-tuning, from the same base and at equal cost.

Trainings, each of BUDGET CPU-seconds of training steps on one thread (FEW_BUDGET on few labels):

    grpo         the project's default
    sft          supervised fine-tuning on the same scenes
    sft-grpo     half of it supervised, then GRPO from there
    sequential   GRPO whose reward pairs the k-th prediction with the k-th target (counting and detection)
    box          GRPO with an advantage for each box (counting and detection)
    think        GRPO that asks for thoughts before the answer

grpo and sft are also trained on few labelled images, seen as often as the budget takes. Learning rate and whether the
vision tower is trained are searched on a seed of their own, in as many trials for sft as for grpo; there it is also
measured what a step costs. Every training ends with the best of four validations. Nothing that is tested was seen in
training or chosen on.

    python benchmarks/learning.py search            # settings and costs, once
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
BUDGET = 180.0
"""CPU-seconds of training steps of a run."""
FEW_BUDGET = 90.0
"""The same on few labelled images."""
KINDS = {"grpo": [], "sft": ["--variant", "sft"]}
"""The two kinds of training steps, with their options; all trainings are made of them."""
RATES = {"grpo": (3e-5, 6e-5, 1.2e-4), "sft": (5e-5, 1.5e-4, 4e-4)}
"""Learning rates that are tried for each kind with the vision tower frozen, and the middle one with all trained."""
SEARCH_SEED = 1000
EXTRA = {
    "sequential": ["--data.task.init_args.matching", "sequential"],
    "box": ["--model.credit_assignment", "box"],
    "think": ["--variant", "think"],
}
TRAININGS = ("grpo", "sft", "sft-grpo", "sequential", "box", "think")
LABELS = (64, 256, 1024)
CALIBRATION_STEPS = 12
NUM_TESTED = {"grounding": 1200, "counting": 400, "detection": 400, "ocr": 1200}
"""Held-out images of a run: more where an answer is short."""


@dataclass(frozen=True, order=True)
class Choice:
    """Settings that the search tries; `lr` None where only the cost of a step is asked for."""

    lr: float | None
    is_vision_frozen: bool

    @property
    def name(self) -> str:
        """In a file's name."""
        words = [f"{self.lr:g}"] if self.lr is not None else []
        return "-".join([*words, "frozen" if self.is_vision_frozen else "whole"])

    @property
    def options(self) -> list[str]:
        """For the command line."""
        rate = [] if self.lr is None else ["--model.optimizer.lr", f"{self.lr:g}"]
        return [*rate, "--model.policy.freeze_vision", str(self.is_vision_frozen).lower()]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is wanted; see `learning_run.Run`."""

    task: str
    training: str
    seed: int
    labels: int = 0
    choice: Choice | None = None

    @property
    def name(self) -> str:
        """What its result is called."""
        words = [self.training, *([f"{self.labels}-labels"] if self.labels else [])]
        return "-".join([*words, f"seed-{self.seed}" if self.choice is None else self.choice.name])


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

    def best_choice(self, task: str, kind: str) -> Choice:
        """The settings whose best validation was the highest."""
        found = {job.choice: self.read(job)["best_validation"] for job in trial_jobs(task, kind) if job.choice}
        return max(found, key=found.__getitem__)

    def phases(self, job: Job) -> list[tuple[list[str], int]]:
        """Options and steps of a job's trainings."""
        if job.training == "base":
            return []
        purpose, _, kind = job.training.partition("-")
        if purpose in ("cost", "trial") and job.choice is not None:
            is_cost = purpose == "cost"
            steps = CALIBRATION_STEPS if is_cost else self._steps(job.task, kind, job.choice, BUDGET)
            return [(KINDS[kind] + job.choice.options, steps)]
        kinds = ["sft", "grpo"] if job.training == "sft-grpo" else ["sft" if job.training == "sft" else "grpo"]
        chosen = [(kind, self.best_choice(job.task, kind)) for kind in kinds]
        extra, budget = EXTRA.get(job.training, []), FEW_BUDGET if job.labels else BUDGET
        return [
            (KINDS[kind] + choice.options + extra, self._steps(job.task, kind, choice, budget / len(kinds)))
            for kind, choice in chosen
        ]

    def _steps(self, task: str, kind: str, choice: Choice, seconds: float) -> int:
        cost = self.read(cost_job(task, kind, choice.is_vision_frozen))["cpu_seconds_per_step"]
        return max(4, round(seconds / cost))

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
        values = {name: value for name, value in asdict(job).items() if name != "choice"}
        num_tested = self.num_tested or NUM_TESTED[job.task]
        values |= {"phases": self.phases(job), "folder": str(folder), "num_tested": num_tested}
        values["is_measured"] = not job.training.startswith(("cost", "trial"))
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
        matched = ("counting", "detection") if training in ("sequential", "box") else TASKS
        jobs += [Job(task=task, training=training, seed=seed) for seed in seeds for task in tasks if task in matched]
    for count in labels:
        for kind in (kind for kind in KINDS if kind in trainings):
            jobs += [Job(task=task, training=kind, seed=seed, labels=count) for seed in seeds for task in tasks]
    return jobs


def cost_job(task: str, kind: str, is_vision_frozen: bool) -> Job:
    """The run that tells what a step costs."""
    return Job(task=task, training=f"cost-{kind}", seed=SEARCH_SEED, choice=Choice(None, is_vision_frozen))


def trial_jobs(task: str, kind: str) -> list[Job]:
    """The runs that tell which settings are best."""
    choices = [*(Choice(lr, True) for lr in RATES[kind]), Choice(RATES[kind][1], False)]
    return [Job(task=task, training=f"trial-{kind}", seed=SEARCH_SEED, choice=choice) for choice in choices]


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
        study.do([cost_job(*pair, is_vision_frozen) for pair in pairs for is_vision_frozen in (True, False)], 1)
        study.do([job for pair in pairs for job in trial_jobs(*pair)], args.jobs)
    elif args.what == "run":
        study.do(plan(args.tasks, args.trainings, args.labels, args.seeds), args.jobs)
    else:
        from learning_report import report

        report(study.results, ROOT / "docs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
