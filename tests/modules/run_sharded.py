"""Trains in one process or in one of two and writes what it ends with; started by `test_strategies.py`."""

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import StrategyRegistry
from torch.distributed.tensor import DTensor
from transformers.models.qwen2_vl import modeling_qwen2_vl as modeling

from perception_r1.callbacks.log_samples import LogSamples
from perception_r1.engines import NativeEngine
from perception_r1.engines.base import EngineContext, EngineError
from perception_r1.engines.weights import save_adapter
from perception_r1.modules import GRPO, SFT
from perception_r1.modules.strategies import FSDP2Strategy
from perception_r1.policy.load import LoraConfig
from perception_r1.policy.policy import Policy
from perception_r1.records import Score
from perception_r1.tasks.grounding import Grounding
from tests.modules.toy import Checkpoints, Log, Lottery, make_data, make_module, make_trainer


@dataclass(frozen=True, kw_only=True)
class Sometimes(Lottery):
    """Pays for answers to some samples only: the groups of the others teach nothing."""

    def score(self, prediction: Any, target: Any) -> Score:
        paid = super().score(prediction, target)
        return paid if target.box[1] > 0.4 else Score(reward=0.0, components=paid.components, metrics=paid.metrics)


class Counting(GRPO):
    """Counts its passes."""

    def make_experience(self, *args: Any) -> Any:
        experience = super().make_experience(*args)
        self.counts = [*getattr(self, "counts", []), (len(experience.micro_batches), experience.num_empty_passes)]
        return experience


class Failing(Counting):
    """The third update of the first process is not finite."""

    def manual_backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        is_failing = self.global_step == 2 and self.global_rank == 0
        super().manual_backward(loss * float("nan") if is_failing else loss, *args, **kwargs)


class Elsewhere(NativeEngine):
    """Computes here as if it were elsewhere: the adapter is written for it, and one process loses it once.

    Args:
        folder: Where the first process writes the adapter before each rollout.
        num_rollouts: So many succeed on the second process.
    """

    has_own_weights = True

    def __init__(self, folder: Path, num_rollouts: int) -> None:
        self.folder, self.num_rollouts, self.count = folder, num_rollouts, 0

    def connect(self, policy: Policy, context: EngineContext) -> None:
        self.rank = context.rank

    def generate(self, policy: Policy, *args: Any, **kwargs: Any) -> Any:
        if self.rank == 0:
            folder = self.folder / f"adapter-{self.count}"
            folder.mkdir(parents=True)
            save_adapter(policy, folder)
        elif self.count == self.num_rollouts:
            raise EngineError("It is lost.")
        self.count += 1
        return super().generate(policy, *args, **kwargs)


StrategyRegistry.register("shards", FSDP2Strategy, save_distributed_checkpoint=True)
ADAPTER = {"policy": {"lora": LoraConfig(r=2, lora_alpha=6)}}
SAMPLED = {"kind": Counting, "task": Sometimes(), "group_size": 2, "max_new_tokens": 4, "kl_coef": 0.0}
SAMPLED |= {"loss_type": "dapo"}
KINDS: dict[str, dict[str, Any]] = {
    "full": SAMPLED,
    "penalty": SAMPLED | {"kl_coef": 0.1, "policy": {"gradient_checkpointing": True}},
    "lora": SAMPLED | ADAPTER | {"kl_coef": 0.1},
    "frozen": SAMPLED | {"kind": Failing, "policy": {"freeze_vision": True}},
    "sft": {"kind": SFT, "task": Grounding(), "max_grad_norm": 0.5},
}


@contextmanager
def exact():
    """All in float64: weights already when a checkpoint is read, norms and rotations, which transformers rounds."""
    load = Policy.load

    def norm(self, rows):
        return F.rms_norm(rows, rows.shape[-1:], self.weight, self.variance_epsilon)

    def rotate(query, key, cos, sin):
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return [each * cos + modeling.rotate_half(each) * sin for each in (query, key)]

    with (
        mock.patch.object(Policy, "load", lambda *args, **options: load(*args, **options).double()),
        mock.patch.object(modeling.Qwen2VLRMSNorm, "forward", norm),
        mock.patch.object(modeling, "apply_rotary_pos_emb_vision", rotate),
    ):
        yield


NUM_STEPS = 6
"""Of a whole training, which validates in the middle and at the end."""


def train(
    model: str,
    folder: str,
    kind: str,
    *,
    strategy: str = "auto",
    max_steps: int = NUM_STEPS,
    ckpt_path: str | None = None,
    num_rollouts: int | None = None,
) -> tuple[Any, Any, Log]:
    """Steps of four prompts; with two devices the first computes each completion by itself."""
    log, num_devices = Log(), 1 if strategy == "auto" else 2
    settings: dict[str, Any] = {"max_steps": max_steps, "precision": "64-true", "limit_val_batches": 1.0}
    settings |= {"val_check_interval": NUM_STEPS // 2, "check_val_every_n_epoch": None, "devices": num_devices}
    trainer = make_trainer(Path(folder), [log, Checkpoints(), LogSamples(1, 64)], strategy=strategy, **settings)
    torch.manual_seed(0)  # of an adapter's first weights
    micro_batch_tokens = 1 if num_devices > 1 and trainer.global_rank == 0 else None
    engine = {} if num_rollouts is None else {"engine": Elsewhere(Path(folder), num_rollouts)}
    module = make_module(Path(model), micro_batch_tokens=micro_batch_tokens, decay="constant", **KINDS[kind], **engine)
    with exact():
        trainer.fit(module, datamodule=make_data(module.task, global_batch_size=4), ckpt_path=ckpt_path)
    return module, trainer, log


def main(model: str, plan: str) -> None:
    """Train as the lines of a file say, each a JSON object with the arguments of `train`."""
    torch.set_num_threads(1)
    for line in Path(plan).read_text().splitlines():
        options = json.loads(line)
        if "num_rollouts" in options:
            rank = os.environ["LOCAL_RANK"]
            try:
                train(model, **options)
            except EngineError as error:
                (Path(options["folder"]) / f"error{rank}.txt").write_text(str(error))
            continue
        module, trainer, log = train(model, **options)
        shares = [_share(value) for value in module.policy.parameters()]
        found = {"log": log.steps, "shares": shares, "counts": getattr(module, "counts", [])}
        (Path(options["folder"]) / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


def _share(parameter: torch.Tensor) -> tuple[int, int]:
    """How many of a parameter's numbers this process has, and how many there are."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.numel(), parameter.numel()


if __name__ == "__main__":
    main(*sys.argv[1:])
