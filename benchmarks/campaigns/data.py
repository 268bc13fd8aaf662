"""Odd sources and pictures: refused in one sentence before the first step, or trained on; never anything else.

Each is read by `data check` and by `fit`, which have to agree, in processes that are forked from this one. The training
shows every row once.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from campaigns.malformed_pictures import EITHER, REFUSED, USED
from campaigns.malformed_sources import CASES, Case, good_rows, json_lines
from campaigns.trials import Campaign, Outcome
from perception_r1.embedded.model import build_model_folder

_SECONDS = 120
"""Longer than this is a hang."""


class Data(Campaign):
    """See the file."""

    name = "data"
    duty = "malformed sources and pictures"
    size = max(200, len(CASES))

    def trial(self, number: int, folder: Path) -> Outcome:
        """Something odd; numbers beyond the last case are the first ones again, with other draws."""
        model = self.place / "model"
        if not (model / "config.json").exists():
            build_model_folder(model, family="qwen2_vl", seed=0)
        name, case = list(CASES.items())[number % len(CASES)]
        odd, good = folder / "odd", folder / "good"
        odd.mkdir()
        good.mkdir()
        source = case.write(odd, random.Random(f"{self.seed} {number}"))
        _write_good(good, case.task)
        data = {"train": {"odd": source}} | {
            split: {"good": json_lines(good / "rows.jsonl")} for split in ("val", "test")
        }
        config = folder / "data.yaml"
        config.write_text(yaml.safe_dump({"data": {"init_args": data}}), encoding="utf-8")
        argv = ["--task", case.task, "-c", str(config), "--model.policy.name", str(model)]
        checked = run(["data", "check", *argv], folder, "check", self.place / "cache")
        trained = run(["fit", *argv, *_SHORT], folder, "fit", self.place / "cache")
        become, faults = _judged(case, checked, trained)
        return {"what": name, "expected": case.expected, "became": become, "told": trained.told, "faults": faults}

    def measures(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """What became of each kind."""
        kinds: dict[str, Counter[str]] = {}
        for outcome in outcomes:
            kinds.setdefault(outcome["what"].partition(":")[0], Counter())[outcome["became"]] += 1
        return {
            "became": {kind: dict(counts) for kind, counts in kinds.items()},
            "sentences": {outcome["what"]: outcome["told"] for outcome in outcomes if outcome["became"] == REFUSED},
        }

    def rows(self, summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """A row for each kind of thing that is odd."""
        faulty = Counter(trial["what"].partition(":")[0] for trial in summary["faulty_trials"])
        rows = [
            [
                kind,
                str(sum(counts.values())),
                *(str(counts.get(name, 0)) for name in (REFUSED, USED)),
                str(faulty[kind]),
            ]
            for kind, counts in summary["became"].items()
        ]
        return ["what is odd", "cases", "refused", "trained on", "faulty trials"], rows


_SHORT = [
    *("--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.accelerator=cpu", "--data.batch_size=2"),
    *("--data.num_val=2", "--data.shuffle=false", "--data.num_workers=0", "--before_after.enabled=false"),
    *("--log_samples.num_samples=1", "--model.max_new_tokens=4", "--model.group_size=2", "--model.kl_coef=0"),
    *("--model.policy.max_pixels=50176",),
]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A command that has ended.

    Attributes:
        status: Its exit status; None where it hung.
        text: What it wrote.
    """

    status: int | None
    text: str

    @property
    def told(self) -> str:
        """The last line."""
        lines = self.text.strip().splitlines()
        return lines[-1][:300] if lines else ""


def run(argv: Sequence[str], folder: Path, name: str, cache: Path) -> Ended:
    """Run `perception-r1` in a process that is forked from this one, so that nothing has to be imported again."""
    import perception_r1.commands.data
    import perception_r1.commands.training  # noqa: F401
    from perception_r1.cli import main

    output = folder / f"{name}.txt"
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            os.environ |= {"PERCEPTION_R1_CACHE": str(cache), "HF_HOME": str(cache / "hub"), "COLUMNS": "200"}
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))  # whatever they were before
            sys.argv = ["perception-r1", *argv]
            status = main(list(argv))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 99
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            return Ended(status=os.waitstatus_to_exitcode(code), text=_text(output))
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return Ended(status=None, text=_text(output))


def _judged(case: Case, checked: Ended, trained: Ended) -> tuple[str, list[str]]:
    """What became of a case, and what is wrong with that."""
    faults = []
    for name, ended in (("check", checked), ("fit", trained)):
        if ended.status is None:
            faults.append(f"{name} hangs")
        elif "Traceback" in ended.text:
            faults.append(f"{name} ends with a traceback: {ended.told}")
    if faults:
        return "neither", faults
    became = {0: USED, 2: REFUSED}.get(trained.status or 0, "neither")
    if became == "neither":
        faults.append(f"fit ends with status {trained.status}: {trained.told}")
    if became == REFUSED:
        if "Training on" in trained.text:
            faults.append(f"is refused after the training has begun: {trained.told}")
        if not trained.told.startswith("perception-r1 fit: error: ") or case.place not in trained.told:
            faults.append(f"the sentence does not name {case.place}: {trained.told}")
    is_good = checked.status == 0
    if is_good != (became == USED) and case.place != " ":
        faults.append(f"check ends with status {checked.status}, and fit with {trained.status}: {checked.told}")
    if case.expected not in (EITHER, became):
        faults.append(f"is {became} and ought to be {case.expected}: {trained.told}")
    return became, faults


def _write_good(folder: Path, task: str) -> None:
    lines = [json.dumps(row) + "\n" for row in good_rows(folder, task)]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
