"""What the hub reads of a model card: base model, license, data sets, tags, and metrics as its model-index."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils.hub import cached_file

from perception_r1.codecs import Codec
from perception_r1.commands.evaluations import CheckpointEvaluation
from perception_r1.commands.runs import Run
from perception_r1.metrics import PUBLISHED
from perception_r1.policy.load import model_path
from perception_r1.policy.processor import Processor
from perception_r1.task import tasks_of

_PIPELINE = "image-text-to-text"


@dataclass(frozen=True, kw_only=True)
class Export:
    """What a folder is made of.

    Attributes:
        run: The run.
        checkpoint: The file that was exported.
        step: Optimiser step at which it was written.
        family: Name of the model's family.
        codec: How the model writes boxes.
        processor: What makes prompts of chats and pictures, with the bounds of the run.
        is_adapter: The folder holds an adapter, not a whole model.
        evaluations: Those of the checkpoint.
    """

    run: Run
    checkpoint: Path
    step: int
    family: str
    codec: Codec
    processor: Processor
    is_adapter: bool
    evaluations: Sequence[CheckpointEvaluation]

    @property
    def is_local(self) -> bool:
        """The base model is a folder of this machine, not one of the hub."""
        return Path(model_path(self.run.policy.name)).is_dir()

    @property
    def base_name(self) -> str:
        """The base model; of a folder its name only, for a path means nothing on another machine."""
        name = self.run.policy.name
        return Path(name).name if self.is_local else name

    @cached_property
    def base_card(self) -> Mapping[str, Any]:
        """Metadata of the base model's own card, as far as it can be had."""
        name = model_path(self.run.policy.name)
        try:
            file = Path(name) / "README.md" if self.is_local else cached_file(name, "README.md")
            return dict(ModelCard.load(str(file), ignore_metadata_errors=True).data.to_dict())
        except (OSError, ValueError, yaml.YAMLError):  # there is none, it cannot be reached, or nobody can read it
            return {}


def card_metadata(export: Export) -> ModelCardData:
    """The metadata of a model card."""
    base, run = export.base_card, export.run
    trained = [source for name, split in splits_of(run).items() if name.endswith("train") for source in origins(split)]
    tasks = [task.name for task in tasks_of(run.task).values()]
    results = list(_results(export))
    return ModelCardData(
        library_name="peft" if export.is_adapter else "transformers",
        pipeline_tag=_PIPELINE,
        base_model=base.get("base_model") if export.is_local else export.base_name,
        datasets=list(dict.fromkeys(origin.name for origin in trained if origin.is_on_hub)) or None,
        license=base.get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        tags=["perception-r1", "visual-perception", run.training.lower(), *tasks],
        model_name=f"{export.base_name} on {', '.join(tasks)}" if results else None,
        eval_results=results or None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where samples come from.

    Attributes:
        source: Name of the source in the run.
        name: Of the data set: its id on the hub, the name of its file, or its world.
        is_on_hub: It is an id on the hub.
    """

    source: str
    name: str
    is_on_hub: bool


def splits_of(run: Run) -> Mapping[str, Any]:
    """What `run.json` says of each split, see `TaskDataModule.describe`."""
    splits: Mapping[str, Any] = (run.card["data"] or {"splits": {}})["splits"]
    return splits


def origins(split: Mapping[str, Any]) -> list[Origin]:
    """Where the samples of a split come from; of a file no more than its name, since a path tells of the machine."""
    if not split["sources"]:
        return [Origin(source="", name=f"synthetic scenes ({split['world']})", is_on_hub=False)]
    return [
        Origin(source=name, name=found["hub_id"] or Path(found["name"]).name, is_on_hub=found["hub_id"] is not None)
        for name, found in split["sources"].items()
    ]


def _results(export: Export) -> Iterator[EvalResult]:
    """Metrics of exactly these weights: of their evaluations, else of the end of the run if that is where they are."""
    card = export.run.card
    for found in export.evaluations:
        for source, values in found.metrics.items():
            yield from _of_source(export.run, found.split, source, values)
    if not export.evaluations and card.get("after") and card["steps"] == export.step:
        yield from _of_source(export.run, "test", "test", card["after"])


def _of_source(run: Run, split: str, source: str, values: Mapping[str, float | None]) -> Iterator[EvalResult]:
    """Metrics as the hub lists them, components of the reward left out."""
    known = [origin for name, found in splits_of(run).items() if name.endswith(split) for origin in origins(found)]
    named = [origin.name for origin in known if origin.source == source or len(known) == 1]
    dataset = named[0] if named else source
    for name, value in values.items():
        if value is not None and not name.startswith((PUBLISHED, "reward/")):
            yield EvalResult(
                task_type=_PIPELINE,
                task_name=", ".join(task.name for task in tasks_of(run.task).values()),
                dataset_type=dataset,
                dataset_name=dataset if source == "test" else source,
                dataset_split=split,
                metric_type=name,
                metric_name=name,
                metric_value=value,
            )
