"""The order of a curriculum."""

import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception_r1.data.curriculum import PromptMemory, easy_to_hard
from perception_r1.data.sources import DataError, JsonLines
from perception_r1.records import Sample
from tests.data.test_module import Recorder, data, every_step, fit, rows, trainer


def samples_of(*names: tuple[str, str]) -> list[Sample]:
    return [Sample(id=id, image=Path("a.png"), width=1, height=1, query="", target="", source=s) for s, id in names]


def write(path: Path, rewards: dict) -> Path:
    lines = [json.dumps({"source": s, "id": id, "reward": reward}) + "\n" for (s, id), reward in rewards.items()]
    path.write_text("".join(lines))
    return path


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, -1.0, 3]), min_size=1, max_size=8), st.randoms())
def test_samples_go_from_high_reward_to_low_and_equal_ones_keep_their_order(tmp_path_factory, rewards, random):
    names = [("s", str(index)) for index in range(len(rewards))]
    table = list(zip(names, rewards, strict=True))
    random.shuffle(table)  # the order of the file does not matter
    path = write(tmp_path_factory.getbasetemp() / "predictions.jsonl", dict(table))
    indices = easy_to_hard(samples_of(*names), path)
    assert sorted(indices) == list(range(len(rewards)))
    pairs = [(-rewards[index], index) for index in indices]
    assert pairs == sorted(pairs)


def test_sources_with_the_same_ids_are_told_apart_and_other_rows_do_not_matter(tmp_path):
    path = write(tmp_path / "p.jsonl", {("a", "1"): 0.1, ("b", "1"): 0.9, ("c", "1"): 5.0, ("a", "2"): 0.5})
    assert easy_to_hard(samples_of(("a", "1"), ("b", "1"), ("a", "2")), path) == [1, 2, 0]
    path.write_text('{"id": 1, "reward": 0.1}\n{"id": "2", "reward": 1}\n')  # rows without a source have none
    assert easy_to_hard(samples_of(("", "1"), ("", "2")), path) == [1, 0]


def test_samples_without_a_reward_are_counted_and_named(tmp_path):
    path = write(tmp_path / "p.jsonl", {("a", "1"): 0.1})
    with pytest.raises(DataError, match=r"p\.jsonl: has no reward for 2 of 3 training samples, first 2; evaluate"):
        easy_to_hard(samples_of(("a", "1"), ("a", "2"), ("b", "1")), path)


@pytest.mark.parametrize(
    "text", ["no json", "[]", "3", '{"id": "1"}', '{"id": "1", "reward": null}', '{"reward": 1}', '{"id": "1", "re']
)
def test_another_file_is_an_error_of_one_sentence(tmp_path, text):
    (tmp_path / "p.jsonl").write_text(text + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl:1: must be a row of the predictions\.jsonl of an evaluation \("):
        easy_to_hard(samples_of(("", "1")), tmp_path / "p.jsonl")


def test_an_empty_file_has_no_rewards(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"p\.jsonl: has no reward for 1 of 1 training samples, first 1; evaluate"):
        easy_to_hard(samples_of(("", "1")), tmp_path / "p.jsonl")


def test_a_file_that_cannot_be_read_is_an_error_of_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"p\.jsonl: cannot be read \(No such file or directory\)"):
        easy_to_hard([], tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"p\.jsonl:1: must be a row of the predictions.*UTF-8"):
        easy_to_hard([], tmp_path / "p.jsonl")


def synthetic(task, folder: Path) -> tuple[Path, list[str]]:
    """A file of rewards for synthetic scenes, and the ids of these from easy to hard."""
    rewards = {("", f"train-{index}"): (index * 7) % 17 for index in range(17)}
    path = write(folder / "predictions.jsonl", rewards)
    return path, [name for _, name in sorted(rewards, key=lambda name: -rewards[name])]


def run(task, folder: Path, curriculum: Path, **options) -> Recorder:
    model, ckpt_path = Recorder(), options.pop("ckpt_path", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(folder, **options).fit(model, datamodule=data(task, curriculum=curriculum), ckpt_path=ckpt_path)
    return model


def test_training_follows_the_curriculum_in_every_epoch_and_is_resumed_exactly(task, tmp_path):
    path, order = synthetic(task, tmp_path)
    whole = run(task, tmp_path, path, max_epochs=2, callbacks=[every_step(tmp_path)])
    assert [name for batch in whole.seen[:5] for name in batch] == order[:15]
    assert whole.seen[5:] == whole.seen[:5]
    for step in (1, 3, 5, 6):
        resumed = run(task, tmp_path, path, max_epochs=2, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:]
    shuffled = fit(task, tmp_path, max_epochs=1)
    assert [name for batch in shuffled.seen for name in batch] != order[:15]


def test_several_devices_share_the_steps_of_a_curriculum(task, tmp_path, monkeypatch):
    path, order = synthetic(task, tmp_path)
    shown = []
    for rank in (0, 1):
        module = data(task, curriculum=path, batch_size=2)
        module.setup("fit")
        monkeypatch.setattr(module, "_ranks", lambda rank=rank: (rank, 2))
        shown.append([[sample.id for sample in batch] for batch in module.train_dataloader()])
    steps = [one + other for one, other in zip(*shown, strict=True)]
    assert [name for step in steps for name in step] == order[:16]


def test_a_curriculum_covers_what_is_not_held_out_of_the_training_rows(task, write_rows, tmp_path):
    path = write_rows(rows(10), num_images=10)
    module = data(task, train={"mine": JsonLines(path)})
    module.setup("fit")
    names = [(sample.source, sample.id) for sample in module.samples("train")]
    assert {source for source, _ in names} == {"mine"}
    rewards = {name: index % 3 for index, name in enumerate(names)}
    ordered = data(task, train={"mine": JsonLines(path)}, curriculum=write(tmp_path / "p.jsonl", rewards))
    ordered.setup("fit")
    shown = [("mine", sample.id) for batch in ordered.train_dataloader() for sample in batch]
    assert shown == sorted(names, key=lambda name: -rewards[name])[: len(shown)]


known = st.sampled_from([True, False, None])


@given(data=st.data(), size=st.integers(1, 12))
def test_a_prompt_that_taught_nothing_sits_out_one_epoch_and_no_other_does(data, size):
    memory, resting = PromptMemory(), set()
    for epoch in range(4):
        plain = data.draw(st.permutations(range(size)))
        order = memory.order(epoch, plain)
        kept = [index for index in plain if index not in resting] or plain
        assert memory.resting == resting
        assert len(order) == size
        assert [*order[: len(kept)]] == kept
        assert set(order) == set(kept)
        last = {}
        for start, index in enumerate(order):
            value = data.draw(known)
            memory.update(start, [value])
            last |= {} if value is None else {index: value}
        resting = {index for index, value in last.items() if not value}


@given(st.permutations(range(6)), st.lists(known, min_size=6, max_size=6), st.integers(0, 5))
def test_a_memory_that_is_taken_up_again_gives_the_same_orders(plain, values, stop):
    whole, first, second = PromptMemory(), PromptMemory(), PromptMemory()
    for memory in (whole, first):
        memory.order(0, plain)
        memory.update(0, [False, None, True, False, False, True])
        memory.order(1, plain)
    whole.update(0, values)
    first.update(0, values[:stop])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.order(1, plain) == whole.order(1, plain)
    second.update(stop, values[stop:])
    assert second.state_dict() == whole.state_dict()
    assert second.order(2, plain) == whole.order(2, plain)
