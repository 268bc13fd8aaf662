"""Pictures to answers: the greedy evaluation up to the parse, for pictures that nobody has annotated.

Picture -> sample without target -> `EvaluationModule.predict_step`, called by a trainer -> ParsedCompletion
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from perception_r1.data.images import load_image
from perception_r1.data.loading import Batch
from perception_r1.errors import UserError
from perception_r1.modules.evaluation import EvaluationModule
from perception_r1.records import LoadedSample, Sample

BATCH_SIZE = 8
"""Pictures answered at once: enough to keep a device busy, few enough for its memory."""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are given; of a folder all pictures directly in it, sorted by name.

    Raises:
        UserError: A folder holds no picture.
    """
    found: list[Path] = []
    for path in paths:
        pictures = sorted(file for file in path.iterdir() if _is_image(file)) if path.is_dir() else [path]
        if not pictures:
            raise UserError(f"there is no picture in the folder {path}")
        found += pictures
    return found


def _is_image(path: Path) -> bool:
    """Whether the name is that of a picture which could be read."""
    form = Image.registered_extensions().get(path.suffix.lower())
    return form in Image.OPEN and path.is_file() and not path.name.startswith(".")


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
    batches = DataLoader(_PictureBatches(module, paths, query), batch_size=None)
    trainer.predict(module, batches, return_predictions=False)


class PictureBatch(Batch):
    """The pictures of a batch that can be answered, and what is wrong with the others."""

    def __init__(self, samples: list[LoadedSample[Any]], problems: list[str]) -> None:
        super().__init__(samples)
        self.problems = problems


class _PictureBatches(Dataset[PictureBatch]):
    """Batches of pictures, loaded when they are asked for."""

    def __init__(self, module: EvaluationModule, paths: Sequence[Path], query: str) -> None:
        self.task, self.policy, self.query = module.task, module.policy, query
        self.groups = [paths[start : start + BATCH_SIZE] for start in range(0, len(paths), BATCH_SIZE)]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> PictureBatch:
        batch = PictureBatch([], [])
        for path in self.groups[index]:
            try:
                batch.samples.append(self._load(path))
            except UserError as error:
                batch.problems.append(str(error))
        return batch

    def _load(self, path: Path) -> LoadedSample[None]:
        """A picture as a sample without target.

        Raises:
            UserError: It cannot be read, or is not for this model.
        """
        image = load_image(path)
        width, height = image.size
        sample = Sample(id=str(path), image=image, width=width, height=height, query=self.query, target=None)
        try:
            self.policy.processor.check_prompt(
                self.task.messages(sample), width=width, height=height, max_tokens=self.policy.max_prompt_length
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return sample
