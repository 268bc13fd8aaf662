"""The pretraining loop: seeing first, then seeing and answering.

    python -m perception_r1.embedded.pretraining --folder FOLDER --processes 2

In the first steps only dense supervision runs (`dense.py`); then the answers of all tasks are learnt besides, each task
with the same weight, and with them what to attend to (`supervised_attention.py`). The learning rate is constant after a
warm-up and falls to zero over the last steps of a run, so a run can be made longer from any checkpoint before that.
A run that is stopped goes on from its last checkpoint to the same weights; several processes share the images of a step
and average their gradients.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import get_console
from torch import Tensor, nn

from perception_r1.displays import open_display
from perception_r1.embedded.pretraining.batch import PretrainingBatch, make_batch
from perception_r1.embedded.pretraining.dense import DenseHead
from perception_r1.embedded.pretraining.questions import page, shape_scene
from perception_r1.embedded.pretraining.supervised_attention import attention_loss, keep_scores
from perception_r1.policy.forward import lay_out_row, packed_forward
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.logits import process_logits
from perception_r1.policy.packing import pack
from perception_r1.policy.policy import Policy

SEEN_LAYERS = 2
"""Behind this many layers of the language model an image token knows what is seen in it."""
LOOKING_LAYERS = 2
"""In the attention of so many layers behind those, an answer is taught what to attend to."""
_WORK, _LINE_SECONDS = "pretraining", 60.0
NUM_PARTS = 3
"""The scenes of a step are computed in this many parts: answers of about the same length need little padding."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the weights, besides the code; by default, those of the model in the package.

    Attributes:
        num_steps: Steps of the whole run.
        dense_steps: The first of them, with dense supervision alone.
        mixed_steps: The first of them, in which a third of the images is harder than the rest: many and small things.
        cooldown_steps: The last of them, over which the learning rates fall to zero.
        warmup_steps: Steps of linear growth to the learning rates.
        num_scenes: Scenes of objects per step.
        num_pages: Pages per step.
        dense_scale: In the first steps a step has this many times more images, for each costs less.
        matrix_lr: Learning rate of Muon, for the matrices of the layers.
        lr: Learning rate of AdamW, for everything else.
        dense_weight: Weight of dense supervision and of supervised attention beside the answers.
        seed: Of the initial weights.
    """

    num_steps: int = 8_000
    dense_steps: int = 1800
    mixed_steps: int = 4200
    cooldown_steps: int = 2500
    warmup_steps: int = 100
    num_scenes: int = 24
    num_pages: int = 24
    dense_scale: int = 2
    matrix_lr: float = 0.004
    lr: float = 1e-3
    dense_weight: float = 1.0
    seed: int = 0

    def lr_factor(self, step: int) -> float:
        """Learning rate of a step as a share of the highest."""
        left = (self.num_steps - step) / max(1, self.cooldown_steps)
        return min(1.0, (step + 1) / self.warmup_steps, left)


def run_process(rank: int, world_size: int, folder: Path, settings: Settings, save_every: int) -> None:
    """One of the processes, on one thread."""
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29517")}
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    train(folder, folder / "start", settings, rank=rank, world_size=world_size, save_every=save_every)


def make_optimizers(policy: nn.Module, head: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms, biases and the dense head."""
    matrices: list[nn.Parameter] = []
    others = list(head.parameters())
    for name, parameter in policy.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if is_matrix else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=settings.matrix_lr, weight_decay=0.01, adjust_lr_fn="original")
    return [muon, torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)]


def step_batches(policy: Policy, settings: Settings, step: int, rank: int, world_size: int) -> list[PretrainingBatch]:
    """The images of a step that belong to a process, in parts with continuations of about the same length."""
    scale = settings.dense_scale
    done = min(step, settings.dense_steps) * scale + max(0, step - settings.dense_steps)  # steps' worth of images
    now = scale if step < settings.dense_steps else 1
    is_mixed = step < settings.mixed_steps
    scenes, pages = (
        [
            make(index, policy.codec, is_mixed=is_mixed)
            for index in range(done * size + rank, (done + now) * size, world_size)
        ]
        for make, size in ((shape_scene, settings.num_scenes), (page, settings.num_pages))
    )
    scenes.sort(key=lambda scene: max(len(question.answer) for question in scene[1]))
    size = -(-len(scenes) // NUM_PARTS)
    parts = [scenes[start : start + size] for start in range(0, len(scenes), size)]
    return [make_batch(policy, part) for part in (*parts, pages) if part]


class SumsOfLosses(nn.Module):
    """Losses of a batch by name, each a sum over `count_terms` of the batch."""

    def __init__(self, policy: Policy, head: DenseHead) -> None:
        super().__init__()
        self.policy, self.head = policy, head
        self._states: list[Tensor] = []
        keep_scores(policy.model)
        policy.model.model.language_model.layers[SEEN_LAYERS - 1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._states.append(output[0] if isinstance(output, tuple) else output)

    def forward(self, batch: PretrainingBatch, *, has_answers: bool) -> dict[str, Tensor]:
        """Dense losses (see `DenseHead`), cross-entropy of the answers of each task, and that of their attention."""
        model, prompts = self.policy.model, batch.prompts
        rows = batch.continuations if has_answers else []
        self._states.clear()
        packing = pack(prompts.lengths, [len(row) for row in rows], self.policy.device)
        hidden = packed_forward(model, prompts, rows, packing)
        _, _, image_tokens = lay_out_row(prompts, rows, image_token_id=model.config.image_token_id)
        seen = self._states.pop().flatten(0, -2)[image_tokens]
        losses: dict[str, Tensor] = {
            f"{batch.kind}/{name}": loss for name, loss in self.head(seen, batch.targets).items()
        }
        if not has_answers:
            return losses
        ends = accumulate(map(len, rows))
        chosen = [torch.arange(end - length, end) for end, length in zip(ends, batch.answer_lengths, strict=True)]
        picked = torch.cat(chosen)
        logits = model.lm_head(hidden[packing.predictor_indices[picked]])
        logits = process_logits(logits, suppress_tokens=self.policy.suppress_tokens, temperature=1.0)
        token_losses = nn.functional.cross_entropy(logits, torch.cat(rows)[picked], reduction="none")
        by_answer = token_losses.split(batch.answer_lengths)
        losses[f"{batch.kind}/attention"] = self._attention_loss(batch, packing.predictor_indices[picked], image_tokens)
        for task in sorted(set(batch.tasks)):
            own = torch.cat([loss for loss, name in zip(by_answer, batch.tasks, strict=True) if name == task])
            losses[task] = own.sum()
        return losses

    def _attention_loss(self, batch: PretrainingBatch, looking: Tensor, image_tokens: Tensor) -> Tensor:
        """Mean over the layers, sum over the answer tokens that are told what to attend to."""
        layers = self.policy.model.model.language_model.layers[SEEN_LAYERS : SEEN_LAYERS + LOOKING_LAYERS]
        num_asked = len(batch.continuations) // len(batch.prompts)
        lengths = [targets.shape[1] for targets in batch.attention_targets[::num_asked]]  # of the images
        images = [tokens for tokens in image_tokens.split(lengths) for _ in range(num_asked)]
        answers = zip(looking.split(batch.answer_lengths), images, batch.attention_targets, strict=True)
        parts = [attention_loss(layer.self_attn, *answer) for answer in answers for layer in layers]
        return torch.stack(parts).sum() / len(layers)


def train(folder: Path, start: Path, settings: Settings, *, rank: int, world_size: int, save_every: int = 100) -> None:
    """Train from a model folder, or from the last checkpoint in `folder`; the result is `folder/model`."""
    policy = Policy.load(PolicyConfig(name=str(start)))
    torch.manual_seed(settings.seed)
    head = DenseHead(policy.model.config.get_text_config().hidden_size)
    losses_of = SumsOfLosses(policy, head)
    optimizers = make_optimizers(policy, head, settings)
    trained = [parameter for parameter in (*policy.parameters(), *head.parameters()) if parameter.requires_grad]
    checkpoint = folder / "checkpoint.pt"
    step = _resume(checkpoint, policy, head, optimizers) if checkpoint.exists() else 0
    if rank == 0:
        _cut(folder / "curve.jsonl", step)
    with ExitStack() as stack:
        display = open_display(get_console(), _LINE_SECONDS) if rank == 0 else None
        if display is not None:
            stack.callback(display.close)
            display.start(_WORK, step, settings.num_steps)
        while step < settings.num_steps:
            started, cpu = time.perf_counter(), time.process_time()
            has_answers = step >= settings.dense_steps
            batches = step_batches(policy, settings, step, rank, world_size)
            losses = _backward(losses_of, batches, has_answers=has_answers, dense_weight=settings.dense_weight)
            _average_gradients(trained, world_size)
            norm = torch.nn.utils.clip_grad_norm_(trained, 2.0)
            for optimizer, lr in zip(optimizers, (settings.matrix_lr, settings.lr), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = lr * settings.lr_factor(step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            if display is None:
                continue
            costs = {"grad_norm": float(norm), "seconds": time.perf_counter() - started}
            costs |= {"cpu_seconds": (time.process_time() - cpu) * world_size}
            _log(folder / "curve.jsonl", step, losses | costs)
            if step % save_every == 0 or step == settings.num_steps:
                _save(checkpoint, policy, head, optimizers, step, settings)
            display.advance(_WORK, step, _shown(losses))
    if rank == 0:
        policy.half().save(folder / "model")


def count_terms(batch: PretrainingBatch) -> Counter[str]:
    """Points, points on things, tokens with a target of attention, answer tokens: what the losses are summed over."""
    is_thing = batch.targets[..., 0] > 0
    counts = Counter({f"{batch.kind}/name": is_thing.numel()})
    counts.update({f"{batch.kind}/{name}": int(is_thing.sum()) for name in ("colour", "box")})
    counts[f"{batch.kind}/attention"] = max(1, sum(int(each.any(1).sum()) for each in batch.attention_targets))
    for task, length in zip(batch.tasks, batch.answer_lengths, strict=True):
        counts[task] += length
    return counts


def _backward(
    losses_of: SumsOfLosses, batches: Sequence[PretrainingBatch], *, has_answers: bool, dense_weight: float
) -> dict[str, float]:
    """Gradients of the sum of all losses, each a mean over the step; the result is their values."""
    counts = sum(map(count_terms, batches), Counter[str]())
    values = dict.fromkeys(counts, 0.0)
    for batch in batches:
        means = {name: loss / counts[name] for name, loss in losses_of(batch, has_answers=has_answers).items()}
        weights = {name: dense_weight if "/" in name and has_answers else 1.0 for name in means}
        torch.stack([weights[name] * mean for name, mean in means.items()]).sum().backward()
        for name, mean in means.items():
            values[name] += float(mean.detach())
    return values


def _average_gradients(parameters: Sequence[nn.Parameter], world_size: int) -> None:
    """Means over the processes; a weight without gradient (the later layers, at first) has none anywhere."""
    if world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient) / world_size)


def _shown(losses: Mapping[str, float]) -> dict[str, float]:
    """The losses of the answers, or while there are none those of seeing."""
    answers = {name: loss for name, loss in losses.items() if "/" not in name}
    return answers if any(answers.values()) else {name: loss for name, loss in losses.items() if "/" in name}


def _log(path: Path, step: int, metrics: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"step": step} | {name: round(value, 5) for name, value in metrics.items()}) + "\n")


def _cut(path: Path, num_steps: int) -> None:
    """Forget the steps after a checkpoint, which are to be done again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(lines[:num_steps]))


def _save(path: Path, policy: nn.Module, head: nn.Module, optimizers: list[Any], step: int, settings: Settings) -> None:
    state = {
        "policy": policy.state_dict(),
        "head": head.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "settings": asdict(settings),
    }
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def _resume(path: Path, policy: nn.Module, head: nn.Module, optimizers: list[Any]) -> int:
    """Take a checkpoint up; the result is the number of steps done."""
    state = torch.load(path, weights_only=True)
    policy.load_state_dict(state["policy"])
    head.load_state_dict(state["head"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])
