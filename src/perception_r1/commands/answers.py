"""Pictures to answers: the greedy evaluation up to the parse, for pictures that nobody has annotated.

Picture -> sample without target -> `EvaluationModule.predict_step`, called by a trainer -> ParsedCompletion
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image

from perception_r1.data.images import load_image
from perception_r1.data.loading import Batch
from perception_r1.errors import UserError
from perception_r1.modules.evaluation import EvaluationModule
from perception_r1.records import LoadedSample, Sample
from perception_r1.task import task_of

BATCH_SIZE = 8
"""Pictures answered at once: enough to keep a device busy, few enough for its memory."""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are given; of a folder all pictures directly in it, sorted by name.

    Raises:
        UserError: A folder holds no picture.
    """
    endings = {ending for ending, form in Image.registered_extensions().items() if form in Image.OPEN}
    found: list[Path] = []
    for path in paths:
        pictures = [path]
        if path.is_dir():
            pictures = sorted(file for file in path.glob("[!.]*") if file.suffix.lower() in endings and file.is_file())
        if not pictures:
            raise UserError(f"there is no picture in the folder {path}")
        found += pictures
    return found


def answer_images(
    module: EvaluationModule, paths: Sequence[Path], *, query: str, precision: str, callback: Callback
) -> None:
    """Answer pictures greedily on one device, in their order.

    Args:
        module: A module with its policy.
        paths: The pictures.
        query: What fills the slot of the task's prompt.
        precision: That of the trainer.
        callback: Gets the answers by `on_predict_batch_end`: `outputs` are the `ParsedCompletion`s, and
            `batch.problems` says what is wrong with the pictures that have none.
    """
    trainer = Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]  # it is a string in a file
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.predict(module, _batches(module, paths, query), return_predictions=False)


class PictureBatch(Batch):
    """The pictures of a batch that can be answered, and what is wrong with the others."""

    def __init__(self, samples: Sequence[LoadedSample[Any]], problems: Sequence[str]) -> None:
        super().__init__(samples)
        self.problems = problems


def _batches(module: EvaluationModule, paths: Sequence[Path], query: str) -> Iterator[PictureBatch]:
    """Batches of pictures, loaded when they are asked for."""
    for start in range(0, len(paths), BATCH_SIZE):
        samples, problems = list[LoadedSample[Any]](), list[str]()
        for path in paths[start : start + BATCH_SIZE]:
            try:
                samples.append(_load(path, query, module))
            except UserError as error:
                problems.append(str(error))
        yield PictureBatch(samples, problems)


def _load(path: Path, query: str, module: EvaluationModule) -> LoadedSample[None]:
    """A picture as a sample without target.

    Raises:
        UserError: It cannot be read, or is not for this model.
    """
    image, policy = load_image(path), module.policy
    width, height = image.size
    sample = Sample(id=str(path), image=image, width=width, height=height, query=query, target=None)
    messages, max_tokens = task_of(module.task, sample).messages(sample), policy.max_prompt_length
    try:
        policy.processor.check_prompt(messages, width=width, height=height, max_tokens=max_tokens)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return sample
