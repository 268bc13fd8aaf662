"""Orders of the training samples that depend on what the policy does with them.

`easy_to_hard` goes from what it does well before training to what it does badly: the paper scores the training set once
with the base model and lets a run go from higher rewards to lower ones. `PromptMemory` records over the epochs
which prompts teach something.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from perception_r1.data.sources import DataError, open_source
from perception_r1.records import Sample


def easy_to_hard(samples: Sequence[Sample[Any]], path: Path) -> list[int]:
    """Indices of samples by falling reward; equal rewards keep their order.

    `path` is the `predictions.jsonl` of an evaluation of the policy before training on the same rows.

    Raises:
        DataError: The file cannot be read, or a sample has no reward in it.
    """
    rewards = _rewards(path)
    missing = [sample for sample in samples if (sample.source, sample.id) not in rewards]
    if missing:
        raise DataError(
            f"{path}: has no reward for {len(missing)} of {len(samples)} training samples, first {missing[0].id}; "
            "evaluate the policy on the rows that it is to be trained on"
        )
    return sorted(range(len(samples)), key=lambda index: -rewards[samples[index].source, samples[index].id])


class PromptMemory:
    """Prompts that taught nothing when they were last shown sit out one epoch; others are shown again in their place.

    Every epoch stays as long as it is. After the one that it sat out a prompt is shown again, for the policy may have
    changed; where no prompt teaches anything, all are shown.

    Attributes:
        resting: Indices of the samples that sit out the epoch that goes on.
    """

    def __init__(self) -> None:
        self.resting: set[int] = set()
        self._epoch = 0
        self._taught_nothing: set[int] = set()  # so far in the epoch that goes on
        self._order: Sequence[int] = ()

    def order(self, epoch: int, order: Sequence[int]) -> Sequence[int]:
        """The order of an epoch, given that of all samples; the same one whenever this epoch is asked for again."""
        if epoch > self._epoch:
            self._epoch, self.resting, self._taught_nothing = epoch, self._taught_nothing, set()
        kept = [index for index in order if index not in self.resting]
        self._order = list(islice(cycle(kept), len(order))) if kept else order
        return self._order

    def update(self, start: int, has_taught: Sequence[bool | None]) -> None:
        """What the samples from position `start` of the epoch on did: None where a sample was not answered."""
        for index, value in zip(self._order[start : start + len(has_taught)], has_taught, strict=True):
            if value:
                self._taught_nothing.discard(index)
            elif value is not None:
                self._taught_nothing.add(index)

    def state_dict(self) -> dict[str, Any]:
        """What the orders of this epoch and of the next one depend on."""
        sets = {"resting": self.resting, "taught_nothing": self._taught_nothing}
        return {"epoch": self._epoch} | {name: sorted(indices) for name, indices in sets.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up again."""
        self._epoch = state["epoch"]
        self.resting, self._taught_nothing = set(state["resting"]), set(state["taught_nothing"])


def _rewards(path: Path) -> dict[tuple[str, str], float]:
    """Reward by source and id."""
    found: dict[tuple[str, str], float] = {}
    for row in open_source(path):
        name, reward = row.values.get("id"), row.values.get("reward")
        if name is None or not isinstance(reward, int | float):
            problem = row.problem or "it has no id or no reward"
            raise DataError(f"{row.location}: must be a row of the predictions.jsonl of an evaluation ({problem})")
        found[str(row.values.get("source", "")), str(name)] = float(reward)
    return found
