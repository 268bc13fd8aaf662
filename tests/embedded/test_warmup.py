import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForImageTextToText, AutoTokenizer

import perception_r1
from perception_r1.data.synthetic.worlds import GroundingWorld
from perception_r1.embedded.warmup import EmbeddedConfig, StopAtLoss, warm_policy
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.tasks.counting import CountingData
from perception_r1.tasks.grounding import Grounding, GroundingData
from perception_r1.tasks.ocr import Ocr, OcrData


class Count(Callback):
    """Counts the warm starts that were really trained."""

    def __init__(self):
        self.num_fits = self.num_steps = 0

    def on_train_start(self, trainer, pl_module):
        self.num_fits += 1

    def on_train_batch_end(self, trainer, *args):
        self.num_steps += 1


class Interrupt(Callback):
    def on_train_batch_end(self, trainer, *args):
        raise KeyboardInterrupt


def config_of(tmp_path, **options):
    return EmbeddedConfig(**({"max_steps": 2, "batch_size": 2, "cache_dir": tmp_path / "cache"} | options))


def warm(config, data=None, *, seed=0, callbacks=()):
    return warm_policy(config, data or GroundingData(), seed=seed, max_new_tokens=8, callbacks=lambda: list(callbacks))


def test_the_second_call_trains_nothing(tmp_path):
    count = Count()
    first = warm(config_of(tmp_path), callbacks=[count])
    assert (count.num_fits, count.num_steps) == (1, 2)
    assert warm(config_of(tmp_path), callbacks=[count]) == first
    assert count.num_fits == 1
    assert first.name.startswith("grounding-")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]


@pytest.fixture
def untrained(monkeypatch):
    """Folders are made, but nothing is trained."""
    monkeypatch.setattr("perception_r1.embedded.warmup._build", lambda folder, *args, **kwargs: None)


def test_what_is_only_evaluated_gives_the_same_folder(tmp_path, untrained):
    config = config_of(tmp_path)
    assert warm(config, OcrData(Ocr(word_metrics="stems"))) == warm(config, OcrData())


def test_everything_that_shapes_it_gives_another_folder(tmp_path, untrained):
    config = config_of(tmp_path)
    folders = [
        warm(config),
        warm(config, seed=1),
        warm(replace(config, lr=1e-3)),
        warm(replace(config, family="qwen2_5_vl")),
        warm(replace(config, whole_tokens=["250"])),
        warm(config, GroundingData(world=GroundingWorld(tint=3))),
        warm(config, GroundingData(task=Grounding(think=True))),
        warm(config, CountingData()),
    ]
    assert len(set(folders)) == len(folders)


IMPORTS = """
import sys, perception_r1
from perception_r1.tasks.{task} import {data}
{data}()
from perception_r1.embedded import warmup
print(*(module.__file__ for name, module in sys.modules.items() if name.startswith("perception_r1")), sep="\\n")
"""
"""A program that makes what a warm start needs, and names the files that it imports for that."""


def imported(task: str) -> list[str]:
    words = [sys.executable, "-c", IMPORTS.format(task=task, data=f"{task.capitalize()}Data")]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    package = Path(perception_r1.__file__).parent
    return [str(Path(line).relative_to(package)) for line in output.split()]


def test_a_change_of_any_file_that_it_imports_makes_another_warm_start(tmp_path, untrained, monkeypatch):
    package = shutil.copytree(Path(perception_r1.__file__).parent, tmp_path / "package")
    files = imported("grounding")
    assert {"data/loading.py", "data/module.py", "data/synthetic/worlds.py", "rows.py", "policy/policy.py"} <= {*files}
    monkeypatch.setattr(perception_r1, "__file__", str(package / "__init__.py"))
    first = warm(config_of(tmp_path))
    for file in files:
        text = (package / file).read_text()
        (package / file).write_text(f"{text}\n# changed\n")
        assert warm(config_of(tmp_path)) != first, file
        (package / file).write_text(text)
    assert warm(config_of(tmp_path)) == first


def test_code_that_shows_or_starts_a_run_does_not_shape_it(tmp_path, untrained, monkeypatch):
    package = shutil.copytree(Path(perception_r1.__file__).parent, tmp_path / "package")
    monkeypatch.setattr(perception_r1, "__file__", str(package / "__init__.py"))
    first = warm(config_of(tmp_path))
    for file in ("cli.py", "commands/training.py", "callbacks/progress.py"):
        (package / file).write_text("")
    assert warm(config_of(tmp_path)) == first


def test_files_of_the_run_and_the_place_of_the_cache_do_not_shape_it(tmp_path, untrained):
    config = config_of(tmp_path)
    first = warm(config)
    (tmp_path / "rows.jsonl").write_text("{}")
    assert warm(config, GroundingData(train_file=tmp_path / "rows.jsonl", batch_size=7)) == first
    assert warm(replace(config, cache_dir=tmp_path / "other")).name == first.name


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_warm_start_leaves_nothing_behind(tmp_path):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        warm(config_of(tmp_path), callbacks=[Interrupt()])
    assert list((tmp_path / "cache").iterdir()) == []
    assert warm(config_of(tmp_path)).is_dir()


def test_a_race_is_won_by_whoever_is_first(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    expected = warm(config)
    moved = expected.rename(tmp_path / "first")

    class Rival(Callback):
        def on_train_end(self, trainer, pl_module):
            moved.rename(expected)
            (expected / "first").touch()

    assert warm(config, callbacks=[Rival()]) == expected
    assert (expected / "first").exists()
    assert list((tmp_path / "cache").iterdir()) == [expected]


def test_it_learns_and_the_same_seed_learns_the_same(tmp_path):
    config = config_of(tmp_path, max_steps=3, warmup_steps=1)
    one, other = warm(config), warm(replace(config, cache_dir=tmp_path / "other"))
    first, second = (Policy.load(PolicyConfig(name=str(folder))) for folder in (one, other))
    assert all(torch.equal(left, right) for left, right in zip(first.parameters(), second.parameters(), strict=True))


def test_transformers_loads_a_warm_start_by_itself(tmp_path):
    folder = warm(config_of(tmp_path))
    _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert len(AutoTokenizer.from_pretrained(folder)("<|box_start|>")["input_ids"]) == 1


def test_a_warm_start_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    warm(config_of(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)


def test_it_ends_once_the_average_loss_is_low_enough_after_a_cool_down(tmp_path):
    count = Count()
    stop = StopAtLoss(loss=99.0, cooldown_steps=2, patience=1)
    assert stop.passed_at is None
    warm(config_of(tmp_path, max_steps=9), callbacks=[stop, count])
    assert stop.passed_at == 1
    assert count.num_steps == 3


def test_an_endless_warm_start_ends_at_max_steps(tmp_path):
    count = Count()
    warm(config_of(tmp_path, stop_loss=0.0, max_steps=4), callbacks=[count])
    assert count.num_steps == 4
