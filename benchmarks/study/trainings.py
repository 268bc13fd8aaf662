"""What the study compares: trainings from the same base, each with its options and its share of the budget."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

TASKS = ("grounding", "counting", "detection", "ocr")
BOXED = ("counting", "detection")
"""Tasks whose answers are lists of boxes."""
KINDS = {"grpo": [], "sft": ["--variant", "sft"]}
"""The two kinds of training steps, with their options; all trainings are made of them."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training, from the base on.

    Attributes:
        title: In tables and plots.
        part: The part of the study to which it belongs, a key of `PARTS`.
        kinds: The kinds of its phases, which share the budget evenly.
        options: Of every phase, for the command line.
        task_options: Options of a task besides.
        tasks: On which it is done.
        share: Of the budget.
        has_own_cost: Its steps cost something else than those of its kind.
        labels: Whether its images are ever new ones, few ones, or, in runs of their own, both.
    """

    title: str
    part: str
    kinds: tuple[str, ...] = ("grpo",)
    options: tuple[str, ...] = ()
    task_options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tasks: tuple[str, ...] = TASKS
    share: float = 1.0
    has_own_cost: bool = False
    labels: Literal["new", "few", "both"] = "new"

    def on(self, task: str) -> list[str]:
        """All its options on a task."""
        return [*self.options, *self.task_options.get(task, ())]


PARTS = {
    "main": "GRPO beside supervised fine-tuning, at equal cost and on few labels",
    "estimators": "advantages, losses and objectives",
    "rewards": "rewards beside the paper's",
    "generalist": "one policy for all tasks beside four, with four times the budget",
}
"""Parts of the study; the first is measured on every level and by sampling, the others on the level of training."""

_TWICE = ("--model.num_iterations", "2")


def _reward(name: str, *options: str) -> tuple[str, ...]:
    return ("--data.task.reward", name, *options)


TRAININGS = {
    "grpo": Training(title="GRPO", part="main", labels="both"),
    "sft": Training(title="SFT", part="main", kinds=("sft",), labels="both"),
    "sft-short": Training(title="SFT, an eighth of the budget", part="main", kinds=("sft",), share=0.125, labels="few"),
    "sft-grpo": Training(title="SFT, then GRPO", part="main", kinds=("sft", "grpo")),
    "sequential": Training(
        title="GRPO, sequential matching",
        part="main",
        options=("--data.task.matching", "sequential"),
        tasks=BOXED,
    ),
    "box": Training(
        title="GRPO, advantage for each box",
        part="main",
        options=("--model.credit_assignment", "box"),
        tasks=BOXED,
    ),
    "think": Training(title="GRPO, think", part="main", options=("--variant", "think"), has_own_cost=True),
    "reserve": Training(
        title="GRPO, a reserve of prompts",
        part="main",
        task_options={
            "grounding": ("--data.batch_size", "64", "--model.num_prompts", "32", "--model.min_reward_std", "0.05"),
            "counting": ("--data.batch_size", "32", "--model.num_prompts", "16", "--model.min_reward_std", "0.02"),
            "detection": ("--data.batch_size", "32", "--model.num_prompts", "16", "--model.min_reward_std", "0.05"),
            "ocr": ("--data.batch_size", "64", "--model.num_prompts", "32", "--model.min_reward_std", "0.02"),
        },
        has_own_cost=True,
    ),
    "dr-grpo": Training(
        title="Dr. GRPO",
        part="estimators",
        options=("--model.loss_type", "dr_grpo", "--model.scale_rewards", "none"),
    ),
    "rloo": Training(
        title="RLOO",
        part="estimators",
        options=("--model.advantage_estimator", "rloo", "--model.scale_rewards", "none"),
    ),
    "batch": Training(title="scale of the batch", part="estimators", options=("--model.scale_rewards", "batch")),
    "gdpo": Training(
        title="GDPO",
        part="estimators",
        options=("--model.advantage_estimator", "gdpo"),
        tasks=("grounding", "detection"),
    ),
    "dapo": Training(
        title="DAPO's loss", part="estimators", options=("--model.loss_type", "dapo", "--model.clip_eps_high", "0.28")
    ),
    "twice": Training(title="two updates: clip", part="estimators", options=_TWICE, has_own_cost=True),
    "gspo": Training(
        title="two updates: GSPO",
        part="estimators",
        options=(
            *_TWICE,
            *("--model.importance_sampling_level", "sequence"),
            *("--model.clip_eps_low", "3e-4", "--model.clip_eps_high", "4e-4"),
        ),
        has_own_cost=True,
    ),
    "cispo": Training(
        title="two updates: CISPO",
        part="estimators",
        options=(*_TWICE, "--model.objective", "cispo"),
        has_own_cost=True,
    ),
    "sapo": Training(
        title="two updates: SAPO",
        part="estimators",
        options=(*_TWICE, "--model.objective", "sapo"),
        has_own_cost=True,
    ),
    "mean-f1": Training(title="mean F1", part="rewards", options=_reward("mean_f1"), tasks=BOXED),
    "mean-f1-box": Training(
        title="mean F1, advantage for each box",
        part="rewards",
        options=(*_reward("mean_f1"), "--model.credit_assignment", "box"),
        tasks=BOXED,
    ),
    "thresholds": Training(title="thresholds", part="rewards", options=_reward("thresholds"), tasks=("grounding",)),
    "giou": Training(title="GIoU", part="rewards", options=_reward("giou"), tasks=("grounding",)),
    "rising": Training(
        title="rising threshold",
        part="rewards",
        options=("--data.task.final_iou_threshold", "0.8"),
        tasks=("grounding", "detection"),
    ),
    "lines": Training(title="lines", part="rewards", options=_reward("lines"), tasks=("ocr",)),
    "unit-tests": Training(title="unit tests", part="rewards", options=_reward("unit_tests"), tasks=("ocr",)),
    "generalist": Training(title="generalist", part="generalist", tasks=("all",), share=4.0),
    "specialist": Training(title="specialists, four times the budget each", part="generalist", share=4.0),
}
"""By name; the most telling ones of a part come first."""
