"""What data modules share: from the samples of each split to batches on each device, in a resumable order."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from perception_r1.data.curriculum import PromptMemory
from perception_r1.data.loading import (
    Batch,
    BatchDataset,
    Encoder,
    EvalBatchSampler,
    ResumableLoader,
    TrainBatchSampler,
    eval_loader,
    longest_first,
)
from perception_r1.data.samples import subset
from perception_r1.data.splits import Samples
from perception_r1.errors import UserError
from perception_r1.records import Split
from perception_r1.task import AnyTask


class BaseDataModule(LightningDataModule, ABC):
    """Batches of samples, with their prompts where worker processes encode them.

    Training batches come in an order that depends on seed and epoch alone and is resumed exactly. Evaluation shows
    every sample once, on all devices together.

    Args:
        batch_size: Prompts per training step and device.
        global_batch_size: Prompts per training step on all devices together, in place of `batch_size`; the number of
            devices must divide it.
        eval_batch_size: Most samples in an evaluation batch.
        num_workers: Processes that read, resize and encode the images of the next batches while this one is trained on;
            0 does so in the training process, when its turn comes.
        longest_first: Begin the first epoch with the largest images, so that prompts that do not fit into memory fail
            in the first step; null does so on CUDA devices.
        seed: Seed of the synthetic scenes and of the training order.
        eval_split: The split that `test` evaluates; with "train" it makes the file for `curriculum`.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(
        self,
        *,
        batch_size: int = 8,
        global_batch_size: int | None = None,
        eval_batch_size: int = 100,
        num_workers: int = 0,
        longest_first: bool | None = None,
        seed: int = 0,
        eval_split: Split = "test",
    ) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.global_batch_size = global_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.longest_first = longest_first
        self.eval_split = eval_split
        self._encode: Encoder | None = None
        self._answered: Set[tuple[str, str]] = frozenset()
        self._memory: PromptMemory | None = None
        positive = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        positive |= {} if global_batch_size is None else {"global_batch_size": global_batch_size}
        check_numbers(positive, 1)
        check_numbers({"num_workers": num_workers, "seed": seed}, 0)

    @property
    @abstractmethod
    def task(self) -> AnyTask:
        """The task or tasks of the samples, which the command line hands to the module."""

    @abstractmethod
    def samples(self, split: Split) -> Samples:
        """The samples of a split that is set up, source by source; images of files are not loaded."""

    @abstractmethod
    def validated_samples(self) -> Samples:
        """What a validation answers: the "val" samples, or some of them where there are many; they are set up."""

    @property
    @abstractmethod
    def tested_sources(self) -> tuple[str, ...]:
        """Names of the sources that `test` evaluates, as in `Sample.source`, at least one: each has a loader."""

    @abstractmethod
    def tested_samples(self) -> Mapping[str, Samples]:
        """What `test` evaluates, by the names of `tested_sources` and in their order; no scene is drawn for it."""

    @abstractmethod
    def train_order(self, epoch: int) -> Sequence[int]:
        """Indices of the training samples of an epoch, in the order in which they are shown."""

    @abstractmethod
    def num_train_pixels(self) -> Sequence[int]:
        """Pixels of the image of each training sample; 0 for scenes, which are all small and are not drawn for this."""

    @abstractmethod
    def fingerprint(self, split: Split | None = None) -> str:
        """A hex digest of everything that determines the samples of a split, or of all; it needs no setup."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Number and sources of the samples of each split that is set up, for JSON."""

    def encode_with(self, encode: Encoder) -> None:
        """Let the workers encode prompts so; without workers the module does it itself."""
        self._encode = encode

    def leave_out(self, answered: Set[tuple[str, str]]) -> None:
        """Do not test these samples, given by source and id: an evaluation that goes on has their answers already."""
        self._answered = answered

    def follow(self, memory: PromptMemory) -> None:
        """Let it change the order of the training samples."""
        self._memory = memory

    def train_dataloader(self) -> ResumableLoader:
        """Full training batches for this device, resumable.

        Raises:
            UserError: `global_batch_size` does not go with the number of devices, or there are too few samples.
        """
        samples = self.samples("train")
        rank, world_size = self._ranks()
        settings = {"batch_size": self._device_batch_size(world_size), "rank": rank, "world_size": world_size}
        batches = TrainBatchSampler(len(samples), order=self._order, **settings)
        return ResumableLoader(
            self._dataset(samples),
            batches,
            self.num_workers,
            self._num_done,
            fingerprint=self.fingerprint("train"),
            pin_memory=self._is_on_cuda(),
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches for this device."""
        return self._eval_loader(self.validated_samples())

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Test batches for this device: one loader for each of `tested_sources`, in a list if there are several."""
        loaders = []
        for samples in self.tested_samples().values():
            if self._answered:
                keys = enumerate((sample.source, sample.id) for sample in samples)
                samples = subset(samples, [index for index, key in keys if key not in self._answered])
            loaders.append(self._eval_loader(samples))
        return loaders if len(loaders) > 1 else loaders[0]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The batch as it is: the policy moves what it needs.

        Raises:
            UserError: A worker could not make it.
        """
        if batch.problem is not None:
            raise batch.problem
        return batch

    def _order(self, epoch: int) -> Sequence[int]:
        order = self.train_order(epoch)
        if epoch == 0 and (self._is_on_cuda() if self.longest_first is None else self.longest_first):
            _, world_size = self._ranks()
            order = longest_first(order, self.num_train_pixels(), self._device_batch_size(world_size) * world_size)
        return order if self._memory is None else self._memory.order(epoch, order)

    def _device_batch_size(self, world_size: int) -> int:
        """Prompts of a training step on each device.

        Raises:
            UserError: They cannot be shared evenly.
        """
        if self.global_batch_size is None:
            return self.batch_size
        batch_size = self.global_batch_size // world_size
        if self.global_batch_size % world_size:
            raise UserError(
                f"global_batch_size {self.global_batch_size} cannot be shared evenly by {world_size} devices; "
                f"{batch_size * world_size or world_size} can"
            )
        return batch_size

    def _eval_loader(self, samples: Samples) -> DataLoader[Batch]:
        rank, world_size = self._ranks()
        batches = EvalBatchSampler(len(samples), batch_size=self.eval_batch_size, rank=rank, world_size=world_size)
        return eval_loader(self._dataset(samples), batches, self.num_workers, pin_memory=self._is_on_cuda())

    def _dataset(self, samples: Samples) -> BatchDataset:
        return BatchDataset(samples, self._encode if self.num_workers else None)

    def _is_on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _num_done(self) -> int:
        """Batches of this epoch that the trainer has done."""
        return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.current.completed

    def _ranks(self) -> tuple[int, int]:
        """Rank of this process and number of processes.

        Raises:
            UserError: The trainer is set to swap the samplers for its own.
        """
        if getattr(self.trainer, "overfit_batches", 0):
            raise UserError("overfit_batches is not supported: use few samples and shuffle=false instead")
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def check_numbers(numbers: Mapping[str, int], least: int) -> None:
    """Refuse numbers that are too small.

    Raises:
        UserError: Names the setting.
    """
    for name, value in numbers.items():
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
