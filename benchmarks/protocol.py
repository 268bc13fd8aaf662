"""What each difference between the strict and the published evaluation amounts to, on answers of the embedded model.

    python benchmarks/protocol.py

Every setting alone is made that of `PROTOCOL=published`, the others stay strict, and the metric of the published tables
is compared with that of the strict evaluation of the same images. How answers are read and what their boxes are taken
for needs no generation. Detection was published of Qwen2.5-VL, whose form of boxes the embedded model does not write:
its answers are rewritten in it, with the numbers that a picture of 640 x 480 pixels would have, COCO's usual size.

Writes benchmarks/results/protocol.json and the table of docs/evaluation.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from pages import fill, table
from study.worlds import DATA, levels

from perception_r1.data.loading import Batch
from perception_r1.evaluation.paper import GENERATION
from perception_r1.metrics import make_metrics, update_metrics
from perception_r1.modules.evaluation import EvaluationModule
from perception_r1.policy.families import CODECS
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.records import ImageSize, LabelledBox, LoadedSample
from perception_r1.scoring import ScoredCompletion, parse_completions, score_as_published, score_completions
from perception_r1.task import Task

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "protocol.json"
PAGE = ROOT / "docs" / "evaluation.md"
METRICS = {
    "grounding": ("accuracy_50", "accuracy at IoU 0.5"),
    "counting": ("count_accuracy", "count accuracy"),
    "detection": ("ap", "AP"),
    "ocr": ("edit_distance", "edit distance"),
}
COCO_SIZE = ImageSize(width=640, height=480, resized_width=644, resized_height=476)
ENDS = ("strict", "published")
_EMPTY = (0.0, 0.0, 0.0, 0.0)
_BATCH = 50


class Evaluated:
    """The embedded model on the images of a task.

    Args:
        name: Of the task.
        num_images: How many.
    """

    def __init__(self, name: str, num_images: int) -> None:
        self.task: Task[Any, Any] = DATA[name]().task
        data = DATA[name](task=self.task, world=levels(name)["training"], num_test=num_images)
        data.setup("test")
        self.samples: list[LoadedSample[Any]] = list(data.samples("test"))
        self.name, self.metric = name, METRICS[name][0]

    def answers(self, **settings: Any) -> list[ScoredCompletion]:
        """Greedy answers with other settings than the strict ones."""
        template = settings.pop("prompt_template", None)
        task = self.task if template is None else replace(self.task, prompt_template=template)
        defaults = {"max_new_tokens": strict(f"task/{self.name}")["max_new_tokens"]}
        defaults |= {"max_pixels": strict("model/qwen2_vl_2b")["policy"]["max_pixels"]}
        options = defaults | settings
        config = PolicyConfig(name="tiny", max_pixels=options.pop("max_pixels"))
        module = EvaluationModule(task, policy=config, **options)
        module.policy = Policy.load(config)
        parts = [self.samples[start : start + _BATCH] for start in range(0, len(self.samples), _BATCH)]
        answers = [answer for part in parts for answer in module.score_greedy(Batch(part))]
        return rewritten(self.task, answers) if self.name == "detection" else answers

    def value(self, answers: Sequence[ScoredCompletion]) -> float:
        """The primary metric of answers."""
        metrics = make_metrics(self.task)
        update_metrics(metrics, answers)
        return float(metrics.compute()[self.metric])

    def as_published(self, answers: Sequence[ScoredCompletion], **options: Any) -> list[ScoredCompletion]:
        """Answers as the public code reads them."""
        codec = CODECS["qwen2_5_vl" if self.name == "detection" else "qwen2_vl"]
        return score_as_published(replace(self.task, **options), codec, answers)


def strict(name: str) -> dict[str, Any]:
    """What a file of configs/ sets of the module."""
    settings = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    return dict(settings["model"]["init_args"])


def rewritten(task: Task[Any, Any], answers: Sequence[ScoredCompletion]) -> list[ScoredCompletion]:
    """Answers in Qwen2.5-VL's form, scored as such; what was no list has a word before it."""
    texts = []
    for answer in answers:
        text = answer.completion.replace("<|im_end|>", "")
        found = CODECS["qwen2_vl"].parse_boxes(text, answer.image_size)
        items = [LabelledBox(label=item.label or "", box=item.box or _EMPTY) for item in found.items]
        texts.append(("" if found.is_exact else "Here: ") + CODECS["qwen2_5_vl"].format_boxes(items, COCO_SIZE))
    samples = [replace(answer.sample, width=COCO_SIZE.width, height=COCO_SIZE.height) for answer in answers]
    parsed = parse_completions(
        task,
        CODECS["qwen2_5_vl"],
        samples=samples,
        image_sizes=[COCO_SIZE] * len(texts),
        completions=texts,
        lengths=[answer.num_tokens for answer in answers],
        truncated=[answer.is_truncated for answer in answers],
    )
    return score_completions(task, parsed, is_evaluation=True)


def measure(name: str, num_images: int) -> dict[str, float]:
    """The primary metric of a task: strict, with each setting alone as published, and with all of them."""
    evaluated, published = Evaluated(name, num_images), GENERATION[name]
    answers = evaluated.answers()
    settings: dict[str, dict[str, Any]] = {
        "prompt": {"prompt_template": published.prompt_template},
        "pictures": {"max_pixels": None},
        "longest answer": {"max_new_tokens": published.max_new_tokens},
        "repetition penalty": {"repetition_penalty": published.repetition_penalty},
    }
    found = {"strict": evaluated.value(answers)}
    found |= {difference: evaluated.value(evaluated.answers(**changed)) for difference, changed in settings.items()}
    mapped = {"published_boxes": "resized"} if name == "detection" else {}
    found["reading"] = evaluated.value(evaluated.as_published(answers, **mapped))
    if name == "detection":
        found["boxes"] = evaluated.value(evaluated.as_published(answers)) - found["reading"] + found["strict"]
    everything = evaluated.answers(**{key: value for changed in settings.values() for key, value in changed.items()})
    return found | {"published": evaluated.value(evaluated.as_published(everything))}


def effects(results: dict[str, dict[str, float]]) -> str:
    """The effects in Markdown; a setting that is the same in both evaluations has none."""
    names = list(dict.fromkeys(name for found in results.values() for name in found if name not in ENDS))
    rows = []
    for task, found in results.items():
        changes = [f"{found[name] - found['strict']:+.3f}" if name in found else "" for name in names]
        rows.append([task, METRICS[task][1], f"{found['strict']:.3f}", *changes, f"{found['published']:.3f}"])
    return table(["task", "metric", "strict", *names, "all, published"], rows)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=tuple(METRICS), choices=METRICS)
    parser.add_argument("--num_images", type=int, default=400)
    parser.add_argument("--results", type=Path, default=RESULT, help="File of the results.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(name, args.num_images) for name in args.tasks}
    told = {"torch": torch.__version__, "num_images": args.num_images, "tasks": results}
    args.results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(effects(results))
    if args.results == RESULT:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(fill(page, "protocol", {"effects": effects(results)}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
