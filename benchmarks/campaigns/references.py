"""What comes of every command when nothing disturbs it, computed once in the folder of a campaign."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from campaigns.processes import start
from campaigns.results import Result
from campaigns.scenarios import Scenario, Training, make_inputs, scenarios
from campaigns.web import serving

SECONDS = 1200.0
"""No command takes longer, on a busy machine too."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A command that nothing disturbed.

    Attributes:
        result: What came of it.
        points: The points that it came to, with seconds.
        folder: Where it worked.
    """

    result: Result
    points: Sequence[tuple[float, str]]
    folder: Path

    @property
    def seconds(self) -> float:
        """How long it took after its start."""
        return self.points[-1][0] + 1.0


@dataclass(frozen=True, kw_only=True)
class References:
    """The commands of a campaign.

    Attributes:
        place: Folder of the campaign.
        scenarios: All of them; the first one makes the run that others read.
    """

    place: Path
    scenarios: Sequence[Scenario]

    @property
    def variables(self) -> dict[str, str]:
        """Of the environment: nothing is read from a hub, nothing is written to the user's own folders."""
        folders = {"PERCEPTION_R1_CACHE": self.place / "cache", "HF_HOME": self.place / "huggingface"}
        return {name: str(path) for name, path in folders.items()} | {"HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}

    def reference(self, scenario: Scenario) -> Reference:
        """What comes of a command.

        Raises:
            SystemExit: It fails.
        """
        run = self.place / "inputs" / "run"
        if not isinstance(scenario, Training) and not run.exists():
            source = self.reference(self.scenarios[0]).folder / "logs" / "run" / "version_0"
            shutil.copytree(source, run.with_name("draft"), dirs_exist_ok=True)
            run.with_name("draft").rename(run)
        place = self.place / "references" / scenario.name
        if not (place / "reference.json").exists():
            self._make(scenario, place)
        kept = json.loads((place / "reference.json").read_text(encoding="utf-8"))
        points = [(when, where) for when, where in kept["points"]]
        return Reference(result=kept["result"], points=points, folder=place / "folder")

    def _make(self, scenario: Scenario, place: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        (place / "folder").mkdir(parents=True)
        running = start(scenario.argv(place / "folder"), place / "folder", variables=self.variables)
        if running.wait(SECONDS) != 0:
            raise SystemExit(f"{scenario.name} fails undisturbed; see {running.output}: {running.last_line()}")
        kept = {"result": scenario.result(place / "folder"), "points": running.points()}
        (place / "reference.tmp").write_text(json.dumps(kept), encoding="utf-8")
        (place / "reference.tmp").rename(place / "reference.json")


@contextmanager
def references(place: Path) -> Iterator[References]:
    """All commands, while the server is at work from which one of them fetches."""
    make_inputs(place / "inputs")
    with serving(place / "inputs" / "pictures") as server:
        yield References(place=place, scenarios=scenarios(place / "inputs", server))
