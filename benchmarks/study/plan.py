"""The plan of the study: which runs there are, with which settings and for how many steps, and doing what is missing.

Learning rate and whether the vision tower is trained are searched on a seed of their own, in as many trials for
supervised fine-tuning as for GRPO; there it is also measured what a step costs, from which follows how many a run has.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from study.trainings import KINDS, TASKS, TRAININGS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "learning"

BUDGET = 180.0
"""CPU-seconds of training steps of a run."""
FEW_BUDGET = 90.0
"""The same on few labelled images."""
LABELS = (64, 256, 1024)
SEEDS = (0, 1, 2, 3, 4)
RATES = {"grpo": (3e-5, 6e-5, 1.2e-4), "sft": (5e-5, 1.5e-4, 4e-4)}
"""Learning rates that are tried for each kind with the vision tower frozen, and the middle one with all trained."""
SEARCH_SEED = 1000
CALIBRATION_STEPS = 12
NUM_TESTED = {"grounding": 1200, "counting": 400, "detection": 400, "ocr": 1200, "all": 400}
"""Held-out images of a run, of each task: more where an answer is short."""


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
    """A run that is wanted; see `run.Run`. One of the search has a choice, all others a seed."""

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

    @property
    def part(self) -> str:
        """Its part of the study; empty for the search."""
        if self.choice is not None:
            return ""
        return TRAININGS[self.training].part if self.training in TRAININGS else "main"


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
        """The settings whose best validation was the highest; for all tasks in one those of configs/model/tiny.yaml."""
        if task == "all":
            return Choice(6e-5, False)
        found = {job.choice: self.read(job)["best_validation"] for job in trial_jobs(task, kind) if job.choice}
        return max(found, key=found.__getitem__)

    def phases(self, job: Job) -> list[tuple[list[str], int]]:
        """Options and steps of a job's trainings."""
        if job.training == "base":
            return []
        if job.choice is not None:
            purpose, _, name = job.training.partition("-")
            training = TRAININGS[name]
            options = KINDS[training.kinds[0]] + job.choice.options + training.on(job.task)
            cost = cost_job(job.task, name, job.choice.is_vision_frozen)
            return [(options, CALIBRATION_STEPS if purpose == "cost" else self._steps(cost, BUDGET))]
        training = TRAININGS[job.training]
        budget = (FEW_BUDGET if job.labels else BUDGET) * training.share / len(training.kinds)
        return [
            (
                KINDS[kind] + choice.options + training.on(job.task),
                self._steps(cost_job(job.task, cost_name(job.training, kind), choice.is_vision_frozen), budget),
            )
            for kind, choice in ((kind, self.best_choice(job.task, kind)) for kind in training.kinds)
        ]

    def _steps(self, cost: Job, seconds: float) -> int:
        return max(4, round(seconds / self.read(cost)["cpu_seconds_per_step"]))

    def costs(self, jobs: Sequence[Job]) -> list[Job]:
        """The runs that tell what the steps of others cost, those of the search among them."""
        steps = [
            (job.task, cost_name(job.training, kind), kind)
            for job in jobs
            if job.training in TRAININGS
            for kind in TRAININGS[job.training].kinds
        ]
        return [
            cost_job(task, name, self.best_choice(task, kind).is_vision_frozen)
            for task, name, kind in dict.fromkeys(steps)
        ]

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
        values |= {"part": job.part, "phases": self.phases(job), "folder": str(folder), "num_tested": num_tested}
        command = [sys.executable, str(ROOT / "benchmarks" / "study" / "run.py"), json.dumps(values)]
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
    for training in (name for name in trainings if TRAININGS[name].labels != "few"):
        own = [task for task in TRAININGS[training].tasks if task in tasks or task == "all"]
        jobs += [Job(task=task, training=training, seed=seed) for seed in seeds for task in own]
    for count in labels:
        for training in (name for name in trainings if TRAININGS[name].labels != "new"):
            jobs += [Job(task=task, training=training, seed=seed, labels=count) for seed in seeds for task in tasks]
    return jobs


def search_jobs(tasks: Sequence[str] = TASKS) -> tuple[list[Job], list[Job]]:
    """The runs of the search: those that tell costs, and the trials."""
    pairs = [(task, kind) for task in tasks for kind in KINDS]
    costs = [cost_job(*pair, is_vision_frozen) for pair in pairs for is_vision_frozen in (True, False)]
    return costs, [job for pair in pairs for job in trial_jobs(*pair)]


def cost_name(training: str, kind: str) -> str:
    """Whose steps tell what those of a training cost."""
    return training if TRAININGS[training].has_own_cost else kind


def cost_job(task: str, name: str, is_vision_frozen: bool) -> Job:
    """The run that tells what a step costs."""
    return Job(task=task, training=f"cost-{name}", seed=SEARCH_SEED, choice=Choice(None, is_vision_frozen))


def trial_jobs(task: str, kind: str) -> list[Job]:
    """The runs that tell which settings are best."""
    choices = [*(Choice(lr, True) for lr in RATES[kind]), Choice(RATES[kind][1], False)]
    return [Job(task=task, training=f"trial-{kind}", seed=SEARCH_SEED, choice=choice) for choice in choices]
