import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from perception_r1.data.loading import (
    Batch,
    BatchDataset,
    EvalBatchSampler,
    ResumableLoader,
    TrainBatchSampler,
    eval_loader,
    shuffled,
)
from perception_r1.records import Sample

sizes = st.integers(1, 60)
batch_sizes = st.integers(1, 9)
world_sizes = st.integers(1, 4)


def samples(count: int) -> list[Sample[str]]:
    image = Image.new("RGB", (4, 4))
    return [Sample(id=str(i), image=image, width=4, height=4, query="", target="") for i in range(count)]


def train_loader(num_samples: int = 23, num_workers: int = 0, num_done: Any = int, **kwargs: int) -> ResumableLoader:
    batches = TrainBatchSampler(num_samples, **{"batch_size": 4, "order": partial(shuffled, num_samples, 0), **kwargs})
    return ResumableLoader(BatchDataset(samples(num_samples)), batches, num_workers, num_done)


def ids(loader: Iterable[Batch]) -> list[list[str]]:
    return [[sample.id for sample in batch] for batch in loader]


@given(size=sizes, batch_size=batch_sizes, world_size=world_sizes, epoch=st.integers(0, 3), shuffle=st.booleans())
def test_a_training_epoch_shows_every_sample_at_most_once_in_full_batches(size, batch_size, world_size, epoch, shuffle):
    assume(size >= batch_size * world_size)
    order = partial(shuffled, size, 1) if shuffle else lambda epoch: range(size)
    ranks = [
        TrainBatchSampler(size, batch_size=batch_size, order=order, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.set_epoch(epoch)
    batches = [list(rank) for rank in ranks]
    assert {len(rank) for rank in batches} == {len(ranks[0])} == {size // (batch_size * world_size)}
    assert {len(batch) for rank in batches for batch in rank} == {batch_size}
    seen = [index for rank in batches for batch in rank for index in batch]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(size))
    one = TrainBatchSampler(size, batch_size=batch_size * world_size, order=order)
    one.set_epoch(epoch)
    steps = [list(itertools.chain(*step)) for step in zip(*batches, strict=True)]
    assert steps == list(one), "the steps of all devices together do not depend on their number"


@given(size=sizes, batch_size=batch_sizes, world_size=world_sizes)
def test_evaluation_shows_every_sample_once_in_equally_many_even_batches(size, batch_size, world_size):
    ranks = [
        list(EvalBatchSampler(size, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    lengths = [len(batch) for rank in ranks for batch in rank]
    assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(size))
    assert len({len(rank) for rank in ranks}) == 1
    assert max(lengths) <= min(batch_size, min(lengths) + 1)
    assert min(lengths) >= 1 or size < len(lengths)


def test_the_order_changes_with_epoch_and_seed_and_only_with_them():
    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = TrainBatchSampler(40, batch_size=4, order=partial(shuffled, 40, seed))
        batches.set_epoch(epoch)
        return list(batches)

    assert order(0, 0) == order(0, 0)
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    assert list(TrainBatchSampler(5, batch_size=2, order=lambda epoch: range(5))) == [[0, 1], [2, 3]]


def test_too_few_samples_for_one_step_are_an_error():
    with pytest.raises(ValueError, match=r"7 training samples do not fill one step of 8 \(batch_size 4 on 2 devices\)"):
        TrainBatchSampler(7, batch_size=4, order=partial(shuffled, 7, 0), world_size=2)


def test_with_nothing_left_every_device_gets_one_empty_batch():
    assert [list(EvalBatchSampler(0, batch_size=2, rank=rank, world_size=2)) for rank in range(2)] == [[[]], [[]]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_done", [0, 1, 3, 5])
def test_a_loader_goes_on_after_the_batches_that_are_done(num_workers, num_done):
    done = [num_done, 0]
    whole, rest = train_loader(), train_loader(num_workers=num_workers, num_done=lambda: done.pop(0))
    for loader in (whole, rest):
        loader.sampler.set_epoch(1)
    assert ids(rest) == ids(whole)[num_done:]
    assert ids(rest) == ids(whole), "the next pass starts at the beginning"


def test_a_loader_takes_no_batch_for_done_that_it_has_handed_out():
    loader = train_loader()
    state = loader.state_dict()
    next(iter(loader))
    assert loader.state_dict() == state


def test_the_epoch_is_read_when_the_first_batch_is_asked_for():
    loader, whole = train_loader(), train_loader()
    batches = iter(loader)
    loader.sampler.set_epoch(2)
    whole.sampler.set_epoch(2)
    assert [[sample.id for sample in batch] for batch in batches] == ids(whole)


def test_a_state_of_other_data_or_another_batch_size_is_refused():
    state = train_loader().state_dict()
    with pytest.raises(ValueError, match="with num_samples=24, it was written with 23"):
        train_loader(24).load_state_dict(state)
    with pytest.raises(ValueError, match="with samples_per_step=2, it was written with 4"):
        train_loader(batch_size=2).load_state_dict(state)
    train_loader(batch_size=2, world_size=2).load_state_dict(state)
    with pytest.raises(ValueError, match="with these training samples, it was written with others: restore the data"):
        train_loader().load_state_dict(state | {"fingerprint": "another"})
    train_loader().load_state_dict({key: value for key, value in state.items() if key != "fingerprint"})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_state_alone(num_workers):
    before = torch.get_rng_state()
    ids(train_loader(num_workers=num_workers))
    ids(eval_loader(BatchDataset(samples(5)), EvalBatchSampler(5, batch_size=2), num_workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_pictures_are_loaded_into_the_batch_but_not_into_the_samples(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (5, 3), 7).save(path)
    dataset = BatchDataset([Sample(id="a", image=path, width=5, height=3, query="q", target="t")])
    (sample,) = dataset[[0]]
    assert (sample.image.mode, sample.image.size, sample.image.getpixel((0, 0))) == ("RGB", (5, 3), (7, 7, 7))
    assert (sample.id, sample.query, sample.target) == ("a", "q", "t")
    assert dataset.samples[0].image == path


_KILLED = """
import os, signal, time
from PIL import Image
from perception_r1.data.loading import BatchDataset, EvalBatchSampler, eval_loader
from perception_r1.records import Sample
image = Image.effect_noise((500, 500), 50).convert("RGB")
samples = [Sample(id=str(i), image=image, width=500, height=500, query="", target="") for i in range(40)]
loader = iter(eval_loader(BatchDataset(samples), EvalBatchSampler(40, batch_size=4), 1))
next(loader)
print(loader._workers[0].pid, flush=True)
time.sleep(1)  # the next batches are more than a pipe holds
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    with (tmp_path / "output").open("w") as output:  # a pipe would be held open by the worker
        done = subprocess.run([sys.executable, "-c", _KILLED], stdout=output, stderr=output, check=False)
    assert done.returncode == -signal.SIGKILL, (tmp_path / "output").read_text()
    worker = Path(f"/proc/{int((tmp_path / 'output').read_text())}")
    end = time.monotonic() + 20
    while worker.exists() and "Z" not in (worker / "stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < end
        time.sleep(0.1)
