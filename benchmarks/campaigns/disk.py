"""Disks that are full, that cannot be written to, or that are slow: a sentence, and the last good checkpoint.

A full disk is a small file system in memory, and a read-only one is mounted so; this takes the rights of root. On a
slow one a command waits whenever it opens a file to write, makes a folder, renames or synchronises, see `marked.py`.
Where a command has failed there is room afterwards, and what goes on ends in the same bits as ever.
"""

import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from campaigns.processes import SLOW, start
from campaigns.references import SECONDS, Reference, references
from campaigns.results import differences
from campaigns.scenarios import Scenario
from campaigns.trials import Campaign, Outcome

KINDS = ("full", "read-only", "slow")
_COMMANDS = ("GRPO", "two updates", "own data with workers", "evaluation", "predict", "export", "convert", "fetch")
_LEAST_ROOM = 2**17
_PAUSE = "0.02"
"""Seconds of a slow disk."""


class Disk(Campaign):
    """See the file."""

    name = "disk"
    duty = "disks that are full, read-only or slow"
    size = len(KINDS) * len(_COMMANDS)

    def trial(self, number: int, folder: Path) -> Outcome:
        """One command on one disk."""
        draw = random.Random(f"{self.seed} {number}")
        kind, name = KINDS[number % len(KINDS)], _COMMANDS[number // len(KINDS) % len(_COMMANDS)]
        with references(self.place) as known:
            scenario = next(each for each in known.scenarios if each.name == name)
            reference = known.reference(scenario)
            room = _room(reference, draw)
            with _disk(kind, folder / "disk", room, scenario):
                found = _on_a_disk(kind, scenario, reference, folder / "disk", known.variables)
        return {"what": f"{kind}, {name}", "disk": kind, "room": room, **found}

    def clear(self, folder: Path) -> None:
        """See `Campaign`; a trial that was stopped has left a file system."""
        if (folder / "disk").is_mount():
            _unmount(folder / "disk")
        super().clear(folder)

    def measures(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """How often each kind of disk was tried, and what the commands said that failed on it."""
        return {
            "trials_by_disk": dict(Counter(outcome["disk"] for outcome in outcomes)),
            "failures_by_disk": dict(Counter(outcome["disk"] for outcome in outcomes if outcome["told"])),
            "sentences": {outcome["what"]: outcome["told"] for outcome in outcomes if outcome["told"]},
        }

    def rows(self, summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """A row for each kind of disk."""
        faulty = Counter(trial["what"].partition(",")[0] for trial in summary["faulty_trials"])
        rows = [
            [kind, str(number), str(summary["failures_by_disk"].get(kind, 0)), str(faulty[kind])]
            for kind, number in summary["trials_by_disk"].items()
        ]
        return ["disk", "commands", "failed", "faulty trials"], rows


def _room(reference: Reference, draw: random.Random) -> int:
    """Bytes that are used up at some moment of the command, or nearly."""
    used = sum(path.stat().st_size for path in reference.folder.rglob("*") if path.is_file())
    return max(_LEAST_ROOM, int(used * draw.uniform(0.1, 1.2)))


def _on_a_disk(
    kind: str, scenario: Scenario, reference: Reference, work: Path, variables: Mapping[str, str]
) -> Outcome:
    """A command that may fail, and the same with room."""
    slow = {SLOW: _PAUSE} if kind == "slow" else {}
    running = start(scenario.argv(work), work, name="first", variables={**variables, **slow})
    status = running.wait(SECONDS)
    told, faults = running.last_line() if status != 0 else "", []
    if status is None:
        faults.append("hangs")
    elif "Traceback" in running.text():
        faults.append(f"a traceback: {told}")
    elif status != 0 and ": error: " not in told:
        faults.append(f"ends with status {status} without a sentence: {told}")
    if kind != "full" and (status == 0) == (kind == "read-only"):
        faults.append(f"ends with status {status}")
    faults += scenario.faults(work, reference.result)
    if status != 0:
        if kind != "slow":
            _mount("remount,rw,size=2g", work)
        running = start(scenario.argv(work), work, name="with-room", variables=variables)
        status = running.wait(SECONDS)
        if status != 0:
            faults.append(f"fails with room too, with status {status}: {running.last_line()}")
    if status == 0:
        faults += [f"{name} is another" for name in differences(scenario.result(work), reference.result)]
    return {"told": told, "faults": faults}


@contextmanager
def _disk(kind: str, folder: Path, room: int, scenario: Scenario) -> Iterator[None]:
    """A folder that is such a disk."""
    folder.mkdir()
    if kind == "slow":
        yield
        return
    _mount(f"size={room if kind == 'full' else '2g'}", folder, "-t", "tmpfs", "campaign")
    try:
        if kind == "read-only":
            scenario.argv(folder)  # what a command reads from its folder is there
            _mount("remount,ro", folder)
        yield
    finally:
        _unmount(folder)


def _mount(options: str, folder: Path, *words: str) -> None:
    done = subprocess.run(["mount", "-o", options, *words, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"this campaign has to mount file systems, as root: {done.stderr.strip()}")


def _unmount(folder: Path) -> None:
    for _ in range(50):  # a process that was just killed may still hold it
        if subprocess.run(["umount", str(folder)], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "-l", str(folder)], check=True)
