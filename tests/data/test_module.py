import logging
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from perception_r1.data.curriculum import PromptMemory
from perception_r1.data.loading import Batch
from perception_r1.data.module import TaskDataModule
from perception_r1.data.sources import DataError, JsonLines
from perception_r1.data.synthetic.objects import DetectionWorld
from perception_r1.data.synthetic.pages import TextWorld
from perception_r1.errors import UserError
from perception_r1.records import Sample
from tests.data.conftest import NameTask

WORLD = TextWorld()
STEPS_PER_EPOCH = 5


class Recorder(LightningModule):
    """Notes the ids of every batch; the optimiser steps in the loop or in the module."""

    def __init__(self, automatic: bool = True) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.automatic_optimization = automatic
        self.seen: list[list[str]] = []
        self.evaluated: list[str] = []

    def training_step(self, batch, batch_idx):
        assert isinstance(batch, Batch)
        assert all(isinstance(sample, Sample) and sample.image.mode == "RGB" for sample in batch)
        self.seen.append([sample.id for sample in batch])
        loss = self.layer(torch.ones(1, dtype=self.layer.weight.dtype)).sum()
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return None

    def validation_step(self, batch, batch_idx):
        self.evaluated += [sample.id for sample in batch]

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(task, **kwargs) -> TaskDataModule:
    settings = {"num_train": 5 * 3 + 2, "num_val": 4, "num_test": 5, "batch_size": 3, "eval_batch_size": 2, **kwargs}
    return TaskDataModule(task, WORLD, **settings)


def trainer(folder: Path, *, callbacks=(), **kwargs) -> Trainer:
    settings = {"max_epochs": 3, "accelerator": "cpu", "devices": 1, **kwargs}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        logger=False,
        **settings,
    )


def fit(task, folder: Path, *, automatic=True, num_workers=0, ckpt_path=None, callbacks=(), **kwargs) -> Recorder:
    model = Recorder(automatic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(folder, callbacks=callbacks, **kwargs).fit(
            model, datamodule=data(task, num_workers=num_workers), ckpt_path=ckpt_path
        )
    return model


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("automatic", [True, False])
def test_a_run_resumed_at_any_step_sees_the_samples_of_an_uninterrupted_one(task, tmp_path, automatic):
    whole = fit(task, tmp_path, automatic=automatic, callbacks=[every_step(tmp_path)])
    assert len(whole.seen) == 3 * STEPS_PER_EPOCH
    epochs = [whole.seen[start : start + STEPS_PER_EPOCH] for start in range(0, 15, STEPS_PER_EPOCH)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    for step in range(1, 3 * STEPS_PER_EPOCH):
        resumed = fit(task, tmp_path, automatic=automatic, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:], f"resumed after step {step}"


@pytest.mark.parametrize("step", [3, 5, 6])
def test_a_run_with_workers_is_resumed_exactly(task, tmp_path, step):
    whole = fit(task, tmp_path)
    fit(task, tmp_path, num_workers=2, max_steps=step, max_epochs=None, callbacks=[every_step(tmp_path)])
    resumed = fit(task, tmp_path, num_workers=2, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert resumed.seen == whole.seen[step:]


@pytest.mark.parametrize("limit", [1.0, 3])
def test_a_run_resumed_from_the_end_of_an_epoch_goes_on_with_the_next(task, tmp_path, limit):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    settings = {"limit_train_batches": limit}
    whole = fit(task, tmp_path, callbacks=[checkpoint], **settings)
    steps = len(whole.seen) // 3
    for epoch in (0, 1):
        resumed = fit(task, tmp_path, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **settings)
        assert resumed.seen == whole.seen[(epoch + 1) * steps :]


def test_a_run_resumed_after_a_validation_within_an_epoch_goes_on_exactly(task, tmp_path):
    settings = {"val_check_interval": 2, "limit_train_batches": 5}
    checkpoint = ModelCheckpoint(
        tmp_path, filename="{step}", save_on_train_epoch_end=False, every_n_epochs=1, save_top_k=-1
    )
    whole = fit(task, tmp_path, callbacks=[checkpoint], **settings)
    names = sorted(int(path.stem.split("=")[1]) for path in tmp_path.glob("step=*.ckpt"))
    assert len(names) == 6
    for step in names:
        resumed = fit(task, tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt", **settings)
        assert resumed.seen == whole.seen[step:], f"resumed after step {step}"


def test_resuming_twice_within_one_epoch_goes_on_exactly(task, tmp_path):
    whole = fit(task, tmp_path)
    fit(task, tmp_path, max_steps=1, max_epochs=None, callbacks=[every_step(tmp_path)])
    for step in (2, 4, 7):
        previous = max(int(path.stem.split("=")[1]) for path in tmp_path.glob("step=*.ckpt"))
        model = fit(
            task,
            tmp_path,
            max_steps=step,
            max_epochs=None,
            callbacks=[every_step(tmp_path)],
            ckpt_path=tmp_path / f"step={previous}.ckpt",
        )
        assert model.seen == whole.seen[previous:step]


def test_resuming_with_another_batch_size_is_refused(task, tmp_path):
    fit(task, tmp_path, max_steps=2, max_epochs=None, callbacks=[every_step(tmp_path)])
    with pytest.raises(ValueError, match="samples_per_step=2, it was written with 3"):
        trainer(tmp_path).fit(Recorder(), datamodule=data(task, batch_size=2), ckpt_path=tmp_path / "step=2.ckpt")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_every_precision_hands_the_samples_over_whole(task, tmp_path, precision):
    assert len(fit(task, tmp_path, max_epochs=1, precision=precision).seen) == STEPS_PER_EPOCH


def test_validation_and_test_show_every_sample_once_in_order(task, tmp_path):
    model, module = Recorder(), data(task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path).validate(model, datamodule=module, verbose=False)
        trainer(tmp_path).test(model, datamodule=module, verbose=False)
    assert model.evaluated == [f"val-{i}" for i in range(4)] + [f"test-{i}" for i in range(5)]


def test_overfit_batches_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match="overfit_batches is not supported"):
        trainer(tmp_path, overfit_batches=2).fit(Recorder(), datamodule=data(task))


def test_made_scenes_become_samples_with_the_rows_target(task):
    module = data(task)
    module.setup("fit")
    (sample, *_), *_ = module.val_dataloader()
    assert sample.id == "val-0"
    source = module.samples("val").source[0]
    assert sample.target == source.values["text"]
    assert (sample.width, sample.height) == sample.image.size == source.image.size
    with pytest.raises(RuntimeError, match="the test samples are not loaded"):
        module.test_dataloader()


def test_batches_before_a_trainer_is_attached_are_those_of_one_device(task):
    module = data(task)
    module.setup()
    assert [len(batch) for batch in module.train_dataloader()] == [3] * 5
    assert [len(batch) for batch in module.test_dataloader()] == [1, 2, 2]


def rows(num_images: int, per_image: int = 2) -> list[dict]:
    return [
        {"image": f"{image}.png", "text": "t", "id": f"{image}/{k}"}
        for image in range(num_images)
        for k in range(per_image)
    ]


def ids(module: TaskDataModule, split: str) -> set[str]:
    return {sample.id for sample in module.samples(split)}


def test_rows_of_one_image_are_in_one_split_and_every_row_is_in_one(task, write_rows):
    module = data(task, train_file=write_rows(rows(30), num_images=30))
    module.setup()
    images = {split: {name.split("/")[0] for name in ids(module, split)} for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in images.items()} == {"train": 24, "val": 3, "test": 3}
    assert len(images["train"] | images["val"] | images["test"]) == 30
    assert sum(len(module.samples(split)) for split in images) == 60


def test_the_division_depends_on_neither_the_folder_nor_the_stage(task, write_rows, tmp_path):
    path = write_rows(rows(20), num_images=20)
    (tmp_path / "elsewhere").mkdir()
    for file in [path, *tmp_path.glob("*.png")]:
        (tmp_path / "elsewhere" / file.name).write_bytes(file.read_bytes())
    here, there = data(task, train_file=path), data(task, train_file=tmp_path / "elsewhere" / path.name)
    here.setup()
    there.setup("test")
    assert ids(here, "test") == ids(there, "test")
    assert here.fingerprint() == there.fingerprint()


def test_split_files_are_taken_whole_and_nothing_else_is_held_out(task, write_rows):
    val = write_rows(rows(2), "val.jsonl")
    test = write_rows(rows(1), "test.jsonl")
    module = data(task, train_file=write_rows(rows(10), num_images=10), val_file=val, test_file=test)
    module.setup()
    assert [len(module.samples(split)) for split in ("train", "val", "test")] == [20, 4, 2]
    module = data(task, train_file=write_rows(rows(10), num_images=10), test_file=test)
    module.setup()
    assert [len(module.samples(split)) for split in ("train", "val", "test")] == [18, 2, 2]


def test_too_few_images_to_hold_some_out_are_an_error(task, write_rows):
    module = data(task, train_file=write_rows(rows(2)))
    with pytest.raises(DataError, match=r"2 different images, but holding out val and test needs at least 3"):
        module.setup("fit")
    three = data(task, train_file=write_rows(rows(3)))
    three.setup()
    assert [len(three.samples(split)) for split in ("train", "val", "test")] == [2, 2, 2]


def test_an_evaluation_file_alone_serves_evaluation_and_not_training(task, write_rows, tmp_path):
    module = data(task, test_file=write_rows(rows(3)))
    model = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path).test(model, datamodule=module, verbose=False)
    assert len(model.evaluated) == 6
    with pytest.raises(DataError, match="the train samples have no source: give train_file"):
        module.setup("fit")
    with pytest.raises(DataError, match="the val samples have no source: give val_file or train_file"):
        module.setup("validate")


def test_a_bad_row_stops_the_run_before_training_or_is_left_out(task, write_rows):
    path = write_rows([*rows(3), {"image": "0.png"}])
    with pytest.raises(DataError, match=r"data\.jsonl:7: text: is missing"):
        data(task, train_file=path).setup("fit")
    module = data(task, train_file=path, on_bad_row="skip")
    module.setup()
    assert sum(len(module.samples(split)) for split in ("train", "val", "test")) == 6


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_every_split_is_checked_for_what_the_model_cannot_take(task, write_rows, stage):
    path = write_rows(rows(3))
    splits = {"fit": "train", "validate": "val", "test": "test"}
    module = data(task, **{f"{splits[stage]}_file": path}, on_bad_row="skip")
    refused = iter([UserError("no")])

    def refuse_the_first(sample):
        assert isinstance(sample.image, Path)  # the check is about sizes and texts; no image is loaded for it
        for error in refused:
            raise error

    module.check_sample = refuse_the_first
    module.setup(stage)
    loaded = [sample for name in ("train", "val", "test") for sample in module._samples.get(name, ())]
    assert len(loaded) == 5


class LabelTask(NameTask):
    def __init__(self, names=None):
        object.__setattr__(self, "names", names)

    def with_labels(self, labels):
        return self if self.names is not None else LabelTask(tuple(labels))


class Unread(JsonLines):
    def read(self):
        raise AssertionError("the labels do not matter to this task")


def test_a_task_gets_the_labels_of_its_data_if_it_wants_them(task, write_rows):
    objects = [{"image": "0.png", "objects": [{"label": name}, {"label": "a"}]} for name in "cab"]
    path = write_rows(objects)
    assert TaskDataModule(LabelTask(), DetectionWorld(), val_file=path).task.names == ("a", "b", "c")
    assert TaskDataModule(LabelTask(("x",)), DetectionWorld(), val_file=path).task.names == ("x",)
    assert TaskDataModule(LabelTask(), DetectionWorld()).task.names == DetectionWorld().labels
    unread = TaskDataModule(task, DetectionWorld(), val={"u": Unread(path)})
    assert unread.task is task


def test_more_training_rows_than_there_are_is_one_sentence(task, write_rows):
    module = data(task, train_file=write_rows(rows(3)), train_take="first:50")
    with pytest.raises(UserError, match="'first:50' asks for 50 rows, but there are only 2"):
        module.setup("fit")


def test_fingerprint_changes_with_scenes_and_with_file_contents(task, write_rows):
    path = write_rows(rows(3))
    prints = [
        data(task).fingerprint(),
        data(task, seed=1).fingerprint(),
        data(task, num_train=20).fingerprint(),
        TaskDataModule(task, DetectionWorld()).fingerprint(),
        data(task, train_file=path).fingerprint(),
        data(task, train_file=path, held_out_share=0.2).fingerprint(),
        data(task, test_file=path).fingerprint(),
    ]
    path.write_text(path.read_text() + "\n")
    prints.append(data(task, train_file=path).fingerprint())
    assert len(set(prints)) == len(prints)
    assert data(task).fingerprint() == data(task, num_workers=2, batch_size=5).fingerprint()
    assert data(task).fingerprint("train") == data(task, num_val=3).fingerprint("train")
    assert data(task).fingerprint("train") != data(task, num_train=20).fingerprint("train")
    ours, other = (data(task, train_file=path, test_file=file) for file in (path, write_rows(rows(4), "other.jsonl")))
    assert ours.fingerprint("train") == other.fingerprint("train")
    assert ours.fingerprint("test") != other.fingerprint("test")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("batch_size", 0),
        ("eval_batch_size", 0),
        ("num_val", 0),
        ("num_workers", -1),
        ("seed", -1),
        ("held_out_share", 0.5),
        ("held_out_share", 0.0),
    ],
)
def test_settings_out_of_range_are_refused(task, setting, value):
    with pytest.raises(ValueError, match=f"^{setting} must "):
        data(task, **{setting: value})


def test_each_source_has_a_test_loader_of_its_own_also_for_what_is_left_to_answer(task, write_rows, tmp_path):
    names = {"one": 3, "two": 2, "three": 1}
    sources = {
        name: JsonLines(write_rows(rows(size), f"{name}.jsonl", num_images=size)) for name, size in names.items()
    }
    module = data(task, test=sources)
    module.setup("test")

    def found():
        return [[(sample.source, sample.id) for batch in loader for sample in batch] for loader in loaders()]

    def loaders():
        return module.test_dataloader()

    whole = found()
    assert module.tested_sources == tuple(names)
    assert whole == [[(name, f"{i}/{k}") for i in range(size) for k in range(2)] for name, size in names.items()]
    assert [len(loader) for loader in loaders()] == [3, 2, 1]
    module.leave_out({*whole[0][1:4], *whole[2]})
    assert found() == [[whole[0][0], *whole[0][4:]], whole[1], []]
    module.leave_out(frozenset())
    model = Recorder()
    model.test_step = lambda batch, batch_idx, dataloader_idx=0: Recorder.validation_step(model, batch, batch_idx)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, limit_test_batches=1).test(model, datamodule=module, verbose=False)
    assert model.evaluated == ["0/0", "0/1", "0/0", "0/1", "0/0", "0/1"]  # the limit is one of each source
    single = data(task, test={"one": sources["one"]})
    single.setup("test")
    assert not isinstance(single.test_dataloader(), list)


def first_global_batch(world_size, **sizes):
    """Ids in the first step of all devices, and how many each of them has."""
    ids, counts = [], []
    module = TaskDataModule(NameTask(), WORLD, num_train=30, num_val=1, **sizes)
    module.setup("fit")
    for rank in range(world_size):
        module._ranks = lambda rank=rank: (rank, world_size)
        batch = next(iter(module.train_dataloader()))
        ids += [sample.id for sample in batch.samples]
        counts.append(len(batch.samples))
    return ids, counts


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_a_global_batch_is_shared_by_the_devices(world_size):
    ids, counts = first_global_batch(world_size, global_batch_size=14, batch_size=3)
    assert counts == [14 // world_size] * world_size
    assert ids == first_global_batch(1, batch_size=14)[0]


def test_a_global_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(UserError, match="global_batch_size 14 cannot be shared evenly by 4 devices; 12 can"):
        first_global_batch(4, global_batch_size=14)
    with pytest.raises(UserError, match="global_batch_size must be at least 1"):
        first_global_batch(1, global_batch_size=0)


def test_of_many_rows_a_validation_answers_some_and_a_test_all(task, write_rows):
    module = data(task, train_file=write_rows(rows(60), num_images=60), held_out_share=0.2, num_val=7)
    module.setup()
    assert len(module.samples("val")) == 24
    seen = [sample.id for batch in module.val_dataloader() for sample in batch]
    assert seen == [sample.id for sample in module.validated_samples()] == [s.id for s in module.validated_samples()]
    assert len(set(seen)) == 7
    positions = [[sample.id for sample in module.samples("val")].index(name) for name in seen]
    assert positions == sorted(positions) != list(range(7))
    other = data(task, train_file=module.sources["train"][""].file, held_out_share=0.2, num_val=7, seed=1)
    other.setup("fit")
    assert [sample.id for sample in other.validated_samples()] != seen
    assert sum(map(len, module.test_dataloader())) == len(module.samples("test")) == 24


def test_a_test_of_the_validation_split_answers_all_of_it(task, write_rows):
    module = data(task, val_file=write_rows(rows(10), num_images=10), eval_split="val", num_val=3)
    module.setup("test")
    assert sum(map(len, module.test_dataloader())) == 20
    assert sum(map(len, module.val_dataloader())) == 3


def test_few_rows_are_all_validated_in_order(task, write_rows):
    module = data(task, val_file=write_rows(rows(10), num_images=10), num_val=20)
    module.setup("validate")
    assert list(module.validated_samples()) == list(module.samples("val"))


@pytest.fixture
def uneven(task, write_rows, tmp_path):
    """A data module of 18 rows whose images differ in size, with the pixels of each by id."""
    sizes = {f"{index}": (10 + 7 * index % 50, 20 + 13 * index % 31) for index in range(18)}
    path = write_rows([{"image": f"s{name}.png", "text": "x", "id": name} for name in sizes])
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / f"s{name}.png")
    files = {"train_file": path, "val_file": path, "test_file": path}
    pixels = {name: width * height for name, (width, height) in sizes.items()}
    return lambda **options: data(task, **files, **options), pixels


def orders(module, epochs=2):
    module.setup("fit")
    return [[sample.id for batch in epoch_of(module, epoch) for sample in batch] for epoch in range(epochs)]


def epoch_of(module, epoch):
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return loader


def test_the_largest_images_come_first_and_the_others_stay_in_order(uneven):
    make, pixels = uneven
    (plain, plain_second), (found, second) = orders(make()), orders(make(longest_first=True))
    largest = sorted(plain, key=lambda name: -pixels[name])[:3]
    assert found == largest + [name for name in plain if name not in largest]
    assert second == plain_second, "only the first step of a run is to fail"
    assert orders(make(longest_first=False)) == [plain, plain_second]


def test_all_devices_together_begin_with_the_largest_images(uneven, monkeypatch):
    make, pixels = uneven
    steps = []
    for rank in range(2):
        module = make(longest_first=True, global_batch_size=4)
        monkeypatch.setattr(module, "_ranks", lambda rank=rank: (rank, 2))
        module.setup("fit")
        steps.append([sample.id for sample in next(iter(epoch_of(module, 0)))])
    assert [len(step) for step in steps] == [2, 2]
    assert steps[0] + steps[1] == sorted(pixels, key=lambda name: -pixels[name])[:4]


def test_by_default_only_a_gpu_changes_the_order(uneven, monkeypatch):
    make, _ = uneven
    module = make()
    monkeypatch.setattr(module, "_is_on_cuda", lambda: True)
    first = [orders(made)[0] for made in (make(), module, make(longest_first=True))]
    assert first[0] != first[1] == first[2]


@pytest.mark.parametrize("step", [1, 2, 5, 7])
def test_a_run_that_began_with_the_largest_images_is_resumed_exactly(uneven, tmp_path, step):
    make, _ = uneven
    whole, half, rest = Recorder(), Recorder(), Recorder()
    options = {"limit_val_batches": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path / "whole", **options).fit(whole, datamodule=make(longest_first=True))
        checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", every_n_train_steps=1, save_last=True)
        stopped = trainer(tmp_path / "half", callbacks=[checkpoint], max_steps=step, **options)
        stopped.fit(half, datamodule=make(longest_first=True))
        again = trainer(tmp_path / "rest", **options)
        again.fit(rest, datamodule=make(longest_first=True), ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert half.seen + rest.seen == whole.seen


def test_scenes_are_not_drawn_to_find_the_largest(task, monkeypatch):
    module = data(task, longest_first=True)
    module.setup("fit")
    monkeypatch.setattr(type(module.samples("train")), "__getitem__", None)
    assert list(module._order(0)) == list(module.train_order(0))


def test_what_prompts_taught_is_recorded_for_those_that_were_shown(uneven):
    make, _ = uneven
    module, memory = make(longest_first=True), PromptMemory()
    module.follow(memory)
    module.setup("fit")
    shown = [module.samples("train")[index].id for index in module._order(0)]
    memory.update(0, [False, True, False])
    resting = memory.state_dict()["taught_nothing"]
    assert {module.samples("train")[index].id for index in resting} == {shown[0], shown[2]}


def test_a_split_is_described_once_it_is_set_up(task, write_rows):
    module = data(task, num_train=20, num_val=3, num_test=2)
    assert module.describe() == {}
    module.setup("fit")
    scenes = {"is_held_out": False, "sources": {}, "world": "TextWorld"}
    assert module.describe() == {"train": {"num_samples": 20, **scenes}, "val": {"num_samples": 3, **scenes}}
    path = write_rows(rows(3))
    module = data(task, train_file=path, val={"mine": JsonLines(path, take="first:2")}, train_take="first:1")
    module.setup("fit")
    file = {"name": str(path), "hub_id": None}
    assert module.describe() == {
        "train": {"num_samples": 1, "is_held_out": False, "sources": {"": file}, "world": None},
        "val": {"num_samples": 2, "is_held_out": False, "sources": {"mine": file}, "world": None},
        "test": {"num_samples": 2, "is_held_out": True, "sources": {"": file}, "world": None},
    }
