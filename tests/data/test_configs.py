"""Every file of configs/data reads data of the form that it names, from a folder that one variable moves."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from jsonargparse import ArgumentParser

from perception_r1.cli import main
from perception_r1.data.base import BaseDataModule
from perception_r1.data.mixed import parts_of
from tests.public_data import (
    from_the_hub,
    make_coco,
    make_fox,
    make_pageocr,
    make_perception_r1,
    make_refcoco,
    make_rex_omni,
    make_v_triune,
    make_vlm_r1,
)
from tests.readme import ROOT

NAMES = sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml"))


REFCOCO = [f"{name}_{split}" for name in ("refcoco", "refcocoplus") for split in ("val", "testA", "testB")]
REFCOCO += ["refcocog_val", "refcocog_test"]


ALL_SOURCES = ["grounding/perception_r1", "counting/perception_r1", "detection/perception_r1", "ocr/pageocr"]


def held_out(source: str) -> dict[str, dict[str, int]]:
    """Six samples of a source, of which one is validated and one tested."""
    return {"train": {source: 4}, "val": {source: 1}, "test": {source: 1}}


KNOWN: dict[str, tuple[str, Callable[[Path], None], dict[str, dict[str, int]]]] = {
    "coco": ("detection", make_coco, {"train": {"coco": 6}, "val": {"coco": 1}, "test": {"coco_val2017": 3}}),
    "refcoco": (
        "grounding",
        make_refcoco,
        {
            "train": {"refcoco": 12, "refcocoplus": 12, "refcocog": 12},
            "val": {"refcoco_val": 1, "refcocoplus_val": 1, "refcocog_val": 1},
            "test": dict.fromkeys(REFCOCO, 12),
        },
    ),
    "refcoco_hub": ("grounding", lambda root: None, {"test": dict.fromkeys(REFCOCO, 4)}),
    "pixmo_count": (
        "counting",
        lambda root: None,
        {"train": {"pixmo_count": 5}, "val": {"pixmo_count": 5}, "test": {"pixmo_count_val": 5, "pixmo_count_test": 5}},
    ),
    "pageocr": ("ocr", make_pageocr, {"train": {"pageocr": 4}, "val": {"pageocr": 1}, "test": {"pageocr": 1}}),
    "fox": ("ocr", make_fox, {"test": {"fox_en": 2, "fox_cn": 2}}),
    "perception_r1_grounding": ("grounding", lambda root: None, held_out("perception_r1")),
    "perception_r1_counting": ("counting", make_perception_r1, held_out("perception_r1")),
    "perception_r1_detection": ("detection", make_perception_r1, held_out("perception_r1")),
    "perception_r1_all": (
        "all",
        lambda root: [make(root) for make in (make_perception_r1, make_pageocr)],
        {split: dict.fromkeys(ALL_SOURCES, count) for split, count in {"train": 4, "val": 1, "test": 1}.items()},
    ),
    "vlm_r1": ("grounding", make_vlm_r1, {"train": dict.fromkeys(("refcoco", "refcocoplus", "refcocog"), 2)}),
    "vision_reasoner": ("counting", lambda root: None, held_out("vision_reasoner")),
    "v_triune": ("detection", make_v_triune, held_out("v3det")),
    "rex_omni": ("detection", make_rex_omni, held_out("detection")),
}
"""Task, what makes the data, and how many samples of each source are in each split."""


def composed(name: str, task: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The data module's part of the configuration that the command line makes of the files."""
    files = ["default.yaml", f"task/{task}.yaml", f"data/{name}.yaml"]
    arguments = [word for file in files for word in ("-c", str(ROOT / "configs" / file))]
    assert main(["fit", *arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)["data"]


def test_every_file_is_known_to_these_tests():
    assert sorted(KNOWN) == NAMES


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_split_of_a_configuration_is_loaded(name, tmp_path, monkeypatch, capsys):
    root = tmp_path / "some where"
    monkeypatch.setenv("PERCEPTION_R1_DATA", str(root))
    monkeypatch.setattr(datasets, "load_dataset", from_the_hub(root))
    monkeypatch.chdir(tmp_path)
    task, make, expected = KNOWN[name]
    make(root)
    config = composed(name, task, capsys)
    parser = ArgumentParser()
    parser.add_subclass_arguments(BaseDataModule, "data")
    module = parser.instantiate_classes(parser.parse_object({"data": config})).data
    for stage in ("fit", "test") if "train" in expected else ("test",):
        module.setup(stage)
    for split, sizes in expected.items():
        samples = list(module.samples(split))
        assert {key: sum(sample.source == key for sample in samples) for key in sizes} == sizes
        assert len(samples) == sum(sizes.values())
        read = {name: part.sources.get(split, part.sources.get("train")) for name, part in parts_of(module).items()}
        assert ["/".join(filter(None, (name, key))) for name in read for key in read[name]] == list(sizes)
    assert module.fingerprint()


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_names_of_sources_make_plain_tags_and_folders_are_those_of_the_repository_by_default(name, monkeypatch, capsys):
    monkeypatch.delenv("PERCEPTION_R1_DATA", raising=False)
    settings = composed(name, KNOWN[name][0], capsys)["init_args"]
    parts = [part["init_args"] for part in settings["tasks"].values()] if "tasks" in settings else [settings]
    for part, split in itertools.product(parts, ("train", "val", "test")):
        for key, source in (part[split] or {}).items():
            assert key.replace("_", "").isalnum()
            paths = [value for value in source["init_args"].values() if isinstance(value, str) and "/" in value]
            assert all(
                path.startswith(("data/", "lmms-lab/", "allenai/", "linkangheng/", "Ricky06662/")) for path in paths
            )
