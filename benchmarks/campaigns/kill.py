"""Signals at random moments of every command; what goes on from there ends in the same bits.

A trial begins a command, interrupts it once to three times, each time in what goes on from the last time, and lets it
end. A signal is aimed at a moment, at a place that the command comes to (`marked.py`), or at a file that is being
written; what comes of the command is compared with what came of it uninterrupted.
"""

import random
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from campaigns.processes import Running, start
from campaigns.references import SECONDS, Reference, references
from campaigns.results import differences
from campaigns.scenarios import Scenario, Training
from campaigns.trials import Campaign, Outcome

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WEIGHTS = (4, 3, 3, 1)
_TRAINING_WEIGHT = 3
"""How often a training is drawn for each time that another command is."""
_UNFINISHED = ("*.part", "*.tmp")
"""Names of files that are being written."""
_PATIENCE = 120.0
"""Until a command has to have ended after a signal."""


class Kill(Campaign):
    """See the file."""

    name = "kill"
    duty = "signals to trainings and all other commands, at any moment"
    size = 300

    def trial(self, number: int, folder: Path) -> Outcome:
        """A command that is interrupted."""
        draw = random.Random(f"{self.seed} {number}")
        with references(self.place) as known:
            weights = [_TRAINING_WEIGHT if isinstance(each, Training) else 1 for each in known.scenarios]
            (scenario,) = draw.choices(known.scenarios, weights)
            return _interrupted(scenario, known.reference(scenario), folder, known.variables, draw)

    def measures(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Signals by scenario, by number and by where they came."""
        sent = [(outcome["what"], each) for outcome in outcomes for each in outcome["signals"]]
        altered = [outcome for outcome in outcomes if outcome["is_altered"]]
        return {
            "num_signals": len(sent),
            "num_altered_results": len(altered),
            "signals_by_command": dict(Counter(what for what, _ in sent).most_common()),
            "trials_by_command": dict(Counter(outcome["what"] for outcome in outcomes).most_common()),
            "signals_by_name": dict(Counter(each["signal"] for _, each in sent).most_common()),
            "signals_by_place": dict(Counter(each["place"] for _, each in sent).most_common()),
        }

    def rows(self, summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """A row for each command."""
        faults = Counter(trial["what"] for trial in summary["faulty_trials"])
        rows = [
            [what, str(number), str(summary["signals_by_command"].get(what, 0)), str(faults[what])]
            for what, number in summary["trials_by_command"].items()
        ]
        total = [summary["num_trials"], summary["num_signals"], summary["num_faulty_trials"]]
        return ["command", "trials", "signals", "faulty trials"], [*rows, ["all", *map(str, total)]]


def _interrupted(
    scenario: Scenario, reference: Reference, folder: Path, variables: Mapping[str, str], draw: random.Random
) -> Outcome:
    """Interrupt, go on, and compare."""
    work = folder / "work"
    work.mkdir()
    faults: list[str] = []
    sent: list[dict[str, Any]] = []
    planned = draw.choice([1, 1, 1, 2, 2, 3])
    for part in range(planned):
        running = start(scenario.argv(work), work, name=f"part-{part}", variables=variables)
        found = _signalled(running, scenario, reference, work, draw)
        status = running.wait(_PATIENCE if found else SECONDS)
        sent += found
        faults += _faults_of_the_end(running, status, found)
        faults += [f"part {part}: process {pid} is left behind" for pid in running.left_behind()]
        faults += [f"part {part}: {fault}" for fault in scenario.faults(work, reference.result)]
        if status == 0 or faults or scenario.is_done(work):
            break
    else:
        running = start(scenario.argv(work), work, name="rest", variables=variables)
        status = running.wait(SECONDS)
        if status != 0:
            faults.append(f"what goes on from there ends with status {status}: {running.last_line()}")
    altered = []
    if not faults:
        altered = differences(scenario.result(work), reference.result)
        faults += [f"{name} is another" for name in altered]
    return {"what": scenario.name, "signals": sent, "is_altered": bool(altered), "faults": faults}


def _signalled(
    running: Running, scenario: Scenario, reference: Reference, work: Path, draw: random.Random
) -> list[dict[str, Any]]:
    """Wait for a moment, then send a signal, or two; those that were sent."""
    aim = draw.choice(["moment", "place", "place", "file"])
    where = sorted({place for _, place in reference.points})
    place, pause = draw.choice(where), draw.random()
    visits = [when for when, name in reference.points if name == place]
    visit = draw.randrange(len(visits))
    number = draw.choices(SIGNALS, _WEIGHTS)[0]
    others = ["other"] * (scenario.num_processes - 1)
    receiver = draw.choice(["first", "group", *others])
    is_twice, second_pause = draw.random() < 0.25, draw.random()
    if aim == "moment":
        running.wait_until(lambda: bool(running.points()), SECONDS)
        end = time.monotonic() + pause * reference.seconds
        running.wait_until(lambda: time.monotonic() > end, SECONDS)
    elif aim == "file":
        known = _unfinished(work)
        running.wait_until(lambda: bool(_unfinished(work) - known), SECONDS)
        time.sleep(pause * 0.03)
    else:
        running.wait_until(lambda: sum(name == place for _, name in running.points()) > visit, SECONDS)
        later = [when for when, _ in reference.points if when > visits[visit]]
        time.sleep(pause * (later[0] - visits[visit] if later else 0.5))
    place = running.points()[-1][1] if running.points() else "before the start"
    told = {"signal": number.name, "to": receiver, "aim": aim, "place": place}
    sent = [told] if running.send(number, receiver) else []
    if sent and is_twice:
        time.sleep(second_pause)
        sent += [told] if running.send(number, receiver) else []
    return sent


def _faults_of_the_end(running: Running, status: int | None, sent: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with how a command ended."""
    if status is None:
        return [f"has not ended {_PATIENCE if sent else SECONDS:g} seconds later"]
    text = running.output.read_text(encoding="utf-8", errors="replace")
    names = {each["signal"] for each in sent}
    faults = []
    if not sent and status != 0:
        faults.append(f"ends with status {status} without any signal: {running.last_line()}")
    if "Traceback" in text:
        faults.append(f"a traceback after {' and '.join(names)}: {running.last_line()}")
    return faults


def _unfinished(folder: Path) -> set[Path]:
    return {path for pattern in _UNFINISHED for path in folder.rglob(pattern)}
