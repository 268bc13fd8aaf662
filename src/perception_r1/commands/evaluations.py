"""Evaluations of a checkpoint that lie beside its run: what `perception-r1 test` has found of exactly these weights."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perception_r1.callbacks.predictions import read_rows
from perception_r1.errors import UserError
from perception_r1.evaluation.key import EVALUATION

Metrics = Mapping[str, Mapping[str, float | None]]
"""Source -> metric -> value; None is not a number."""
_NUM_PARTS = 3
"""Of a checkpoint's path, by which it is known wherever the logs are: version_N/checkpoints/best.ckpt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointEvaluation:
    """What an evaluation has found.

    Attributes:
        name: Of its folder.
        split: Which samples were answered.
        num_samples: How many of each source.
        metrics: Of each source.
        margins: Half the width of the 95 % confidence interval of each metric.
    """

    name: str
    split: str
    num_samples: Mapping[str, int]
    metrics: Metrics
    margins: Metrics


def evaluations_of(checkpoint: Path) -> list[CheckpointEvaluation]:
    """All evaluations of a run's checkpoint that are complete and not older than it, by name.

    Raises:
        UserError: The files of one are damaged.
    """
    checkpoint = checkpoint.resolve()
    found = []
    for file in sorted(checkpoint.parents[2].glob(f"{EVALUATION}*/margins_of_error.json")):
        folder = file.parent
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            evaluated = Path(config["ckpt_path"] or "")
            is_same = evaluated.parts[-_NUM_PARTS:] == checkpoint.parts[-_NUM_PARTS:]
            if is_same and file.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns:
                found.append(_read(folder, config))
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"the evaluation {folder} cannot be read ({reason}): remove or repeat it") from error
    return found


def _read(folder: Path, config: Mapping[str, Any]) -> CheckpointEvaluation:
    metrics, margins = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("metrics.json", "margins_of_error.json")
    )
    counts = Counter(row["source"] or "test" for row in read_rows(folder / "predictions.jsonl"))
    split = config["data"]["init_args"]["eval_split"]
    return CheckpointEvaluation(name=folder.name, split=split, num_samples=counts, metrics=metrics, margins=margins)
