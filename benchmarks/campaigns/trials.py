"""Numbered trials, each derived from a seed and its number alone, with their outcomes in a file as they come.

A campaign that was stopped goes on with the first number that has no outcome. What a trial leaves behind is kept where
something was wrong, and removed where nothing was.
"""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from filelock import FileLock, Timeout

from perception_r1.callbacks.environment import git_state, versions

Outcome: TypeAlias = dict[str, Any]
"""What came of a trial, for JSON; `faults` holds a sentence for everything that was wrong."""
TRIALS = "trials.jsonl"
"""The file of the outcomes, one a line, in the folder of a campaign."""
_NUM_TOLD = 20
"""Faults that a summary quotes; the file of the outcomes has them all."""


class Campaign(ABC):
    """Trials of one kind.

    Args:
        place: Folder of the campaign: outcomes, what trials share, and a folder for each trial.
        seed: Of all trials.
    """

    name: ClassVar[str]
    duty: ClassVar[str]
    """What is tried, in a few words."""
    size: ClassVar[int]
    """Trials of a whole campaign."""

    def __init__(self, place: Path, seed: int = 0) -> None:
        self.place, self.seed = place.resolve(), seed

    @abstractmethod
    def trial(self, number: int, folder: Path) -> Outcome:
        """One trial, in an empty folder of its own."""

    @abstractmethod
    def measures(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """What all outcomes together say, for JSON."""

    @abstractmethod
    def rows(self, summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """The heads and the rows of the table of a summary."""

    @cached_property
    def commit(self) -> str:
        """What the trials of this process try."""
        state = git_state(Path(__file__).parent)
        return "unknown" if state is None else f"{state['commit']}{' and changes' * bool(state['is_dirty'])}"

    def clear(self, folder: Path) -> None:
        """Remove what a trial has left, also one that was stopped."""
        shutil.rmtree(folder, ignore_errors=True)

    def outcomes(self) -> list[Outcome]:
        """Those that are there."""
        path = self.place / TRIALS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a line that was cut is none

    def run(self, numbers: Iterable[int]) -> None:
        """Do those trials that have no outcome yet, and say what came of each.

        Raises:
            SystemExit: Another process does so in the same folder.
        """
        self.place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.place / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise SystemExit(f"{self.place}: this campaign is at work already; wait until it is done") from None
        with lock:
            known = self.outcomes()
            _write(self.place / TRIALS, known)
            done = {outcome["trial"] for outcome in known}
            for number in numbers:
                if number not in done:
                    self._do(number)

    def _do(self, number: int) -> None:
        folder = self.place / str(number)
        self.clear(folder)
        folder.mkdir()
        outcome = {"trial": number, "seed": self.seed, "commit": self.commit, **self.trial(number, folder)}
        with (self.place / TRIALS).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(outcome) + "\n")
        faults = outcome["faults"]
        if not faults:
            self.clear(folder)
        told = f"{len(faults)} wrong, see {folder}: {faults[0]}" if faults else "nothing wrong"
        print(f"{self.name} {number}: {outcome['what']}: {told}", flush=True)

    def summary(self) -> dict[str, Any]:
        """What came of all trials so far, with what they were done with."""
        outcomes = self.outcomes()
        faulty = [outcome for outcome in outcomes if outcome["faults"]]
        told = [{key: outcome[key] for key in ("trial", "what", "faults")} for outcome in faulty[:_NUM_TOLD]]
        return {
            "campaign": self.name,
            "seed": self.seed,
            "num_trials": len(outcomes),
            "num_faulty_trials": len(faulty),
            **self.measures(outcomes),
            "faulty_trials": told,
            "commits": sorted({outcome["commit"] for outcome in outcomes}),
            "versions": versions(),
        }


def _write(path: Path, outcomes: Sequence[Outcome]) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(outcome) + "\n" for outcome in outcomes), encoding="utf-8")
    draft.replace(path)
