"""Hostile answers, malformed rows and odd settings: no exception, and nothing slow.

A trial is 10,000 answers, 1,000 rows or 20 settings; of 23 trials 20 are answers, two rows and one settings.
"""

import gc
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from campaigns import answers, malformed_rows, odd_settings
from campaigns.trials import Campaign, Outcome

NUM_ANSWERS, NUM_ROWS, NUM_SETTINGS = 10_000, 1_000, 20
"""Of a trial."""
_ROUND = (*(("answers",) * 10), "rows", *(("answers",) * 10), "rows", "settings")
_MOST_TOLD = 10
"""Faults of a trial that are written down."""


class Fuzz(Campaign):
    """See the file."""

    name = "fuzz"
    duty = "hostile answers, malformed rows and odd settings"
    size = 50 * len(_ROUND)

    def trial(self, number: int, folder: Path) -> Outcome:
        """Many of a kind."""
        draw = random.Random(f"{self.seed} {number}")
        whole_round, place = divmod(number, len(_ROUND))
        index = whole_round * _ROUND.count(_ROUND[place]) + _ROUND[:place].count(_ROUND[place])
        if _ROUND[place] == "answers":
            return _answers(draw, index)
        if _ROUND[place] == "rows":
            name, read = malformed_rows.read_many(draw, index, NUM_ROWS, folder)
            counts = {"num_tried": read.num_rows, "num_refused": read.num_refused}
            return {"what": "rows", "kind": name, **counts, "faults": read.faults[:_MOST_TOLD]}
        return _settings(draw)

    def measures(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Numbers of what was tried, and the slowest."""
        found: dict[str, Any] = {}
        for what in ("answers", "rows", "settings"):
            own = [outcome for outcome in outcomes if outcome["what"] == what]
            counts = {name: sum(outcome[name] for outcome in own) for name in ("num_tried", "num_refused")}
            kinds = Counter(outcome["kind"] for outcome in own)
            found[what] = counts | {"num_faults": sum(len(outcome["faults"]) for outcome in own), "trials": dict(kinds)}
        for name in ("slowest", "slowest_parts"):
            slow = [outcome[name] for outcome in outcomes if name in outcome]
            found[name] = max(slow, key=lambda each: each["milliseconds"], default=None)
        return found

    def rows(self, summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """A row for each kind of thing."""
        milliseconds = {what: "-" for what in ("answers", "rows", "settings")}
        if summary["slowest"]:
            milliseconds["answers"] = f"{summary['slowest']['milliseconds']:.1f} ms"
        rows = []
        for what, slowest in milliseconds.items():
            found = summary[what]
            counts = [f"{found[name]:,}" for name in ("num_tried", "num_refused", "num_faults")]
            rows.append([what, *counts, slowest])
        return ["what", "tried", "of them refused", "exceptions and other faults", "slowest, CPU time"], rows


def _answers(draw: random.Random, index: int) -> Outcome:
    task, codec = answers.KINDS[index % len(answers.KINDS)]
    gc.collect()
    gc.freeze()  # what is there already would be looked through again and again
    found = answers.score_many(draw, index, NUM_ANSWERS)
    return {
        "what": "answers",
        "kind": answers.name_of(task, codec),
        "num_tried": NUM_ANSWERS,
        "num_refused": NUM_ANSWERS - found.num_valid,
        "slowest": asdict(found.slowest),
        "slowest_parts": asdict(found.slowest_parts),
        "faults": found.faults[:_MOST_TOLD],
    }


def _settings(draw: random.Random) -> Outcome:
    num_refused, faults = 0, []
    for _ in range(NUM_SETTINGS):
        argv, status, fault = odd_settings.try_setting(draw)
        num_refused += status == 2
        if fault is not None:
            faults.append(f"{' '.join(argv)}: {fault}")
    counts = {"num_tried": NUM_SETTINGS, "num_refused": num_refused}
    return {"what": "settings", "kind": "fit", **counts, "faults": faults[:_MOST_TOLD]}
