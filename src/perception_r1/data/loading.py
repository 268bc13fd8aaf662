"""From samples to batches: which samples make a batch on which device, and a training loader that can be resumed.

Both samplers yield whole batches of indices. They are `DistributedSampler`s, so Lightning leaves them alone, and every
device gets the same number of batches.
"""

import heapq
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from perception_r1.data.images import load_image
from perception_r1.errors import UserError
from perception_r1.policy.batch import PromptBatch
from perception_r1.processes import end_with_parent
from perception_r1.records import ImageBytes, LoadedSample, Sample, TargetT

Encoder: TypeAlias = Callable[[Sequence[Sample[Any]]], PromptBatch]
"""Makes prompts of samples; see `PromptEncoder`."""


class Batch:
    """A few samples on their way to the module, with their prompts where a worker has encoded them.

    It is no sequence: Lightning's precision plugins take sequences and dataclasses apart in search of tensors and then
    fail to put frozen ones together again.

    Args:
        samples: Their images are loaded, unless there are prompts.
        prompts: The same samples as `PromptEncoder` encodes them; None: that is left to the module.
        problem: Why a worker could not make the batch: the main process raises it as it is.

    Attributes:
        seconds: How long the training step waited for it.
    """

    def __init__(
        self,
        samples: Sequence[Sample[Any]],
        prompts: PromptBatch | None = None,
        problem: UserError | None = None,
    ) -> None:
        self.samples = samples
        self.prompts = prompts
        self.problem = problem
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Sample[Any]]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, indices: Sequence[int]) -> "Batch":
        """The samples with these numbers, in this order, with their prompts."""
        prompts = None if self.prompts is None else self.prompts.select(indices)
        return Batch([self.samples[index] for index in indices], prompts)

    def pin_memory(self) -> "Batch":
        """The same batch with its pixels in memory from which a device copies without anybody waiting."""
        if self.prompts is not None:
            self.prompts = self.prompts.pin_memory()
        return self


class BatchDataset(Dataset[Batch]):
    """Samples by lists of indices.

    Args:
        samples: Of a split.
        encode: Encodes a batch where it is made, and its images stay there; None: images are loaded into the samples.
    """

    def __init__(self, samples: Sequence[Sample[Any]], encode: Encoder | None = None) -> None:
        self.samples = samples
        self.encode = encode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        try:
            samples = [self.samples[index] for index in indices]
            if self.encode is None or not samples:
                return Batch([load_sample_image(sample) for sample in samples])
            samples = [_without_table(sample) for sample in samples]
            return Batch(samples, self.encode(samples))
        except UserError as error:
            if get_worker_info() is None:
                raise
            return Batch([], problem=error)  # a loader would put its own traceback into the sentence


def shuffled(size: int, seed: int, epoch: int) -> list[int]:
    """The numbers below `size` in an order that depends on nothing but seed and epoch."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randperm(size, generator=generator).tolist()


def longest_first(order: Sequence[int], num_pixels: Sequence[int], count: int) -> list[int]:
    """An order that begins with the `count` largest images, and then is as it was.

    >>> longest_first([0, 1, 2, 3], [5, 9, 7, 9], 2)
    [1, 3, 0, 2]
    """
    front = heapq.nlargest(count, range(len(order)), key=lambda position: num_pixels[order[position]])
    moved = set(front)
    rest = [index for position, index in enumerate(order) if position not in moved]
    return [order[position] for position in front] + rest


class TrainBatchSampler(DistributedSampler[Any]):
    """Full batches in the order of an epoch; the rest of the epoch is left out.

    Step `k` of all devices together shows the same samples whatever their number, as long as `batch_size` times that
    number stays the same.

    Args:
        num_samples: Samples of an epoch.
        batch_size: Of a device.
        order: The indices of an epoch, given its number.
        rank: Of this device.
        world_size: Number of devices.

    Attributes:
        start: The batch at which the next iteration starts.

    Raises:
        UserError: There are fewer samples than one step of all devices takes.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        order: Callable[[int], Sequence[int]],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        samples: Any = range(num_samples)  # the base class wants no more of them than their number
        super().__init__(samples, num_replicas=world_size, rank=rank, shuffle=False)
        self.size = num_samples
        self.order = order
        self.batch_size = batch_size
        self.start = 0
        self.samples_per_step = batch_size * world_size
        if num_samples < self.samples_per_step:
            raise UserError(
                f"{num_samples} training samples do not fill one step of {self.samples_per_step} (batch_size"
                f" {batch_size} on {world_size} devices): lower batch_size or give more samples"
            )

    def __len__(self) -> int:
        return self.size // self.samples_per_step

    def __iter__(self) -> Iterator[Any]:
        order = self.order(self.epoch)
        for batch in range(self.start, len(self)):
            first = batch * self.samples_per_step + self.rank * self.batch_size
            yield list(order[first : first + self.batch_size])


class EvalBatchSampler(DistributedSampler[Any]):
    """Every sample once, in order, in batches whose sizes differ by at most one.

    Every device gets the same number of batches, at least one; where there are fewer samples than that, some are empty.
    """

    def __init__(self, num_samples: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        samples: Any = range(num_samples)
        super().__init__(samples, num_replicas=world_size, rank=rank, shuffle=False)
        self.size = num_samples
        self.num_batches = max(1, math.ceil(math.ceil(num_samples / world_size) / batch_size))

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        num_shares = self.num_batches * self.num_replicas
        for share in range(self.rank, num_shares, self.num_replicas):
            yield list(range(share * self.size // num_shares, (share + 1) * self.size // num_shares))


def eval_loader(
    dataset: BatchDataset, sampler: EvalBatchSampler, num_workers: int = 0, *, pin_memory: bool = False
) -> DataLoader[Batch]:
    """A loader that never touches torch's global random state; a plain one, as Lightning rebuilds it for prediction."""
    return DataLoader(dataset, sampler=sampler, **_options(num_workers, pin_memory))


class ResumableLoader(DataLoader[Batch]):
    """Batches of a `TrainBatchSampler` sampler, without those that the trainer has done before it was stopped.

    The loader itself counts nothing: it may have handed out a batch that no step has used. Lightning makes the iterator
    before it calls `set_epoch`, so an iteration asks for `num_done`, the batches of this epoch that are done, when its
    first batch is asked for. It never touches torch's global random state.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        sampler: TrainBatchSampler,
        num_workers: int = 0,
        num_done: Callable[[], int] = int,
        *,
        fingerprint: str = "",
        pin_memory: bool = False,
    ) -> None:
        super().__init__(dataset, sampler=sampler, **_options(num_workers, pin_memory))
        self._batches = sampler
        self._num_done = num_done
        self._fingerprint = fingerprint

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._batches.start = self._num_done()
        batches, started = super().__iter__(), time.perf_counter()
        for batch in batches:
            batch.seconds = time.perf_counter() - started
            yield batch
            started = time.perf_counter()

    def state_dict(self) -> dict[str, int | str]:
        """What the samples and their order depend on, but for the seed; `load_state_dict` compares it."""
        numbers = {"num_samples": self._batches.size, "samples_per_step": self._batches.samples_per_step}
        return numbers | {"fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Make sure that the batches are those of the run that is resumed.

        Raises:
            UserError: The state belongs to other data or another number of samples per step.
        """
        for key, value in self.state_dict().items():
            given = state.get(key, value)  # early checkpoints have no fingerprint
            if given != value:
                told = f"{key}={value}, it was written with {given}"
                told = "these training samples, it was written with others" if key == "fingerprint" else told
                raise UserError(
                    f"the checkpoint cannot be resumed with {told}: restore the data and batch settings "
                    "(batch_size x devices), or start from its weights only"
                )


def _without_table(sample: Sample[TargetT]) -> Sample[TargetT]:
    """The sample with the bytes of its image in place of the table in which they lie, which is not to be sent along."""
    if not isinstance(sample.image, ImageBytes):
        return sample
    return replace(sample, image=ImageBytes(sample.image.name, partial(bytes, sample.image.read())))


def _options(num_workers: int, pin_memory: bool) -> dict[str, Any]:
    options = {"batch_size": None, "num_workers": num_workers, "pin_memory": pin_memory}
    return options | {"generator": torch.Generator(), "worker_init_fn": _bind_to_parent}


def _bind_to_parent(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the training process: it ends its workers itself.

    Where it is killed they end with it: else one whose batch is larger than a pipe would wait for ever for a reader.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def load_sample_image(sample: Sample[TargetT]) -> LoadedSample[TargetT]:
    """The sample with its image loaded, if it is not.

    Raises:
        ImageError: The image cannot be read.
    """
    image = sample.image if isinstance(sample.image, Image.Image) else load_image(sample.image)
    return cast(LoadedSample[TargetT], replace(sample, image=image))
