"""What makes another evaluation, and what does not."""

import os
import re
import shutil
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from perception_r1.cli import main
from perception_r1.evaluation.key import evaluation_key
from perception_r1.policy.checkpoint_file import save_file
from tests.evaluation.evaluating import arguments, write_sources


@pytest.fixture
def name_of(folder, tmp_path, monkeypatch):
    """The name that the command line gives to an evaluation, without the evaluation."""
    files = write_sources(tmp_path, "grounding", {"only": 2})
    model = shutil.copytree(folder, tmp_path / "model")
    for checkpoint in ("a.ckpt", "b.ckpt"):
        save_file({"run": {}, "state_dict": {}, "global_step": 2}, tmp_path / checkpoint)
    monkeypatch.chdir(tmp_path)
    found = []

    def test(trainer, model=None, datamodule=None, ckpt_path=None):
        found.append(Path(trainer.log_dir).name)

    monkeypatch.setattr(Trainer, "test", test)

    def name(*more: str) -> str:
        assert main(arguments("grounding", tmp_path, files, f"--model.policy.name={model}", *more)) == 0
        return found[-1]

    return name


@pytest.mark.slow
def test_what_changes_the_answers_changes_the_name(name_of, tmp_path):
    names = [
        name_of(),
        name_of("--model.max_new_tokens=5"),
        name_of("--data.task.think=true"),
        name_of("--data.eval_split=val"),
        name_of("--data.num_test=7"),
        name_of("--model.policy.max_pixels=100000"),
        name_of("--model.policy.name=tiny"),
        name_of("--seed_everything=3"),
        name_of("--trainer.precision=bf16-true"),
        name_of("--trainer.limit_test_batches=1"),
        name_of("--ckpt_path=a.ckpt"),
        name_of("--ckpt_path=b.ckpt"),
    ]
    os.utime(tmp_path / "a.ckpt", ns=(1, 1))
    names.append(name_of("--ckpt_path=a.ckpt"))
    os.utime(tmp_path / "model" / "model.safetensors", ns=(1, 1))
    names.append(name_of())
    rows = tmp_path / "only" / "rows.jsonl"
    rows.write_text(rows.read_text() + "\n")
    names.append(name_of())
    assert all(re.fullmatch("eval-[0-9a-f]{12}", name) for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_what_changes_no_answer_changes_no_name(name_of):
    settings = [
        (),
        ("--data.num_workers=1",),
        ("--data.batch_size=3",),
        ("--data.global_batch_size=3",),
        ("--data.eval_batch_size=3",),
        ("--model.eval_batch_tokens=300",),
        ("--model.optimizer.lr=0.5", "--model.lr_scheduler.warmup_steps=3"),
        ("--trainer.devices=2", "--trainer.strategy=ddp"),
        ("--progress.plain_seconds=3", "--evaluation.num_samples=1"),
    ]
    assert len({name_of(*more) for more in settings}) == 1


def test_a_name_that_is_given_is_kept(name_of):
    assert name_of("--trainer.logger.version=mine") == "mine"


@pytest.mark.parametrize("text", ["x" * 5000, "a\0b", "", ".", "/", "\ud800"])
def test_a_setting_may_be_any_text(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = evaluation_key({"data": {"take": text}, "model": {"name": [text]}})
    (tmp_path / "config.json").write_text("{}")
    assert len(before) == 12
    assert text in (".",) or evaluation_key({"data": {"take": text}, "model": {"name": [text]}}) == before


def test_another_version_of_the_code_is_another_evaluation(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr("perception_r1.__file__", str(package / "__init__.py"))
    before = evaluation_key({})
    (package / "new.py").write_text("x = 1\n")
    assert evaluation_key({}) != before
