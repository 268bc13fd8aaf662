"""Evaluations from the command line: small data in files, and answers that are known beforehand."""

import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from perception_r1.callbacks.predictions import rescore, row_key
from perception_r1.cli import main
from perception_r1.data.loading import Batch
from perception_r1.data.synthetic.scenes import SyntheticScenes
from perception_r1.modules.base import PolicyModule
from perception_r1.records import Sample
from perception_r1.scoring import parse_completions, score_completions
from perception_r1.tasks.counting import CountingData
from perception_r1.tasks.detection import DetectionData
from perception_r1.tasks.grounding import GroundingData
from perception_r1.tasks.ocr import OcrData

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = {"grounding": GroundingData, "counting": CountingData, "detection": DetectionData, "ocr": OcrData}
LEFT_BEHIND = ("predictions.jsonl", "metrics.json", "margins_of_error.json", "report.md", "worst.png", "best.png")
"""What an evaluation leaves behind, but for the configuration and the events of TensorBoard."""


def write_sources(folder: Path, task: str, sizes: Mapping[str, int]) -> dict[str, Path]:
    """A file of rows for each name, with pictures; ids are their indices, so sources share them."""
    scenes = iter(SyntheticScenes(DATA[task]().world, "test", 0, sum(sizes.values())))
    files = {}
    for name, size in sizes.items():
        rows = []
        for index in range(size):
            scene = next(scenes)
            picture = folder / name / f"{index}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            scene.image.save(picture)
            rows.append({**scene.values, "image": picture.name, "id": index, "note": name})
        files[name] = folder / name / "rows.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def arguments(task: str, folder: Path, files: Mapping[str, Path], *more: str, split: str = "test") -> list[str]:
    """The command line of an evaluation of named sources; its configuration goes into the folder."""
    sources = {name: {"class_path": "JsonLines", "init_args": {"file": str(file)}} for name, file in files.items()}
    config = folder / f"{task}-{split}.yaml"
    config.write_text(yaml.safe_dump({"data": {"init_args": {split: sources}}}, sort_keys=False))
    layers = [CONFIGS / "default.yaml", CONFIGS / "task" / f"{task}.yaml", CONFIGS / "model" / "tiny.yaml"]
    layers += [CONFIGS / "tiny" / f"{task}.yaml", config]
    return ["test", *(word for layer in layers for word in ("-c", str(layer))), *more]


def evaluate(place: Path, words: list[str], monkeypatch: Any) -> list[tuple[str, str]]:
    """Run an evaluation in a folder; returns source and id of each sample that was answered."""
    answered: list[tuple[str, str]] = []
    real = PolicyModule.score_greedy

    def answer(module: PolicyModule, batch: Batch) -> Any:
        answered.extend((sample.source, sample.id) for sample in batch)
        return real(module, batch)

    place.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(PolicyModule, "score_greedy", answer)
        patch.chdir(place)
        patch.setenv("PL_GLOBAL_SEED", "0")  # seeding everything sets it; so it is restored
        assert main(words) == 0
    return answered


def results(place: Path) -> Path:
    """The only evaluation under a folder."""
    (found,) = place.glob("logs/*/eval-*")
    return found


def left_behind(folder: Path) -> dict[str, bytes]:
    """Files of an evaluation that must not differ; no others may be there."""
    names = {path.name for path in folder.iterdir()} - {"config.yaml", "hparams.yaml", "images"}
    assert {name for name in names if not name.startswith("events.")} == {*LEFT_BEHIND, "evaluation.json"}
    return {name: (folder / name).read_bytes() for name in LEFT_BEHIND}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_of(rows: Iterable[Mapping[str, Any]]) -> Callable[[PolicyModule, Batch], Any]:
    """In place of `PolicyModule.score_greedy`: the answers that are known already."""
    known = {row_key(row): row for row in rows}

    def answer(module: PolicyModule, batch: Batch) -> Any:
        return [rescore(module.task, module.codec, sample, known[sample.source, sample.id]) for sample in batch]

    return answer


def answer_by_lot(module: PolicyModule, samples: Batch | list[Sample]) -> Any:
    """In place of `PolicyModule.score_greedy`: right, nearly right, hostile and truncated answers, always the same."""
    completions, image_sizes = [], []
    for sample in samples:
        lot = random.Random(f"{sample.source} {sample.id}")
        image_size = module.policy.processor.image_size(sample.width, sample.height)
        right = module.task.target_text(sample, module.codec, image_size)
        cut = lot.randrange(len(right) + 1)
        kinds = [
            right,
            right + "<|im_end|>",
            right[:cut],
            right + right,
            right.replace("5", "6", 1),
            "\ud800\n|\x1b[31m",
        ]
        completions.append(kinds[lot.randrange(len(kinds))])
        image_sizes.append(image_size)
    parsed = parse_completions(
        module.task,
        module.codec,
        samples=list(samples),
        image_sizes=image_sizes,
        completions=completions,
        lengths=[len(completion) for completion in completions],
        truncated=[len(completion) % 2 == 1 for completion in completions],
    )
    return score_completions(module.task, parsed, is_evaluation=True)
