"""The phases of a run one after another, on tensors without values: what each holds at most, and of what kind.

The methods that run are the module's own. Only what comes from outside stands in for the real: weights have no values,
every prompt is the longest, every completion too, and every group teaches something.

Legend: B prompts, G completions per prompt, N = B*G completions.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from perception_r1.modules.base import PolicyModule
from perception_r1.modules.evaluation import evaluation_mode
from perception_r1.modules.experience import Experience
from perception_r1.modules.grpo import GRPO
from perception_r1.modules.sft import SFT
from perception_r1.planning.cuda_semantics import cuda_semantics
from perception_r1.planning.devices import Devices, gather_for_pass, gather_wholes, num_bytes
from perception_r1.planning.meter import MemoryMeter, Peak
from perception_r1.planning.policy import ShapePolicy, WrittenElsewhere
from perception_r1.planning.prompts import LongestPrompt
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.packing import MicroBatch, plan_eval_batches

KINDS = (
    "weights",
    "gradients",
    "moments",
    "reference",
    "gathered",
    "generation copy",
    "caches",
    "activations",
    "vision tower",
    "logits",
    "temporaries",
    "DDP buckets",
)
"""What memory is for, in the order in which it is shown."""

_PHASES = {"policy_forward": "forward", "optimizer": "update"}
"""Phases that have a longer name in the log."""
_NUM_COMPLETE = 2
"""Micro-batches, or groups that are split into several, that are computed: all are equal, but the second one meets the
gradients of the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSize:
    """What decides about memory besides the module.

    Attributes:
        batch_size: Prompts of a step on a device.
        eval_batch_size: Samples of an evaluation batch; 0: there is no evaluation.
        precision: That of the trainer.
        devices: Those that train together.
    """

    batch_size: int
    eval_batch_size: int
    precision: str = "32-true"
    devices: Devices = field(default_factory=Devices)


def load_shapes(module: PolicyModule, trainer: Trainer, precision: str) -> ShapePolicy:
    """Give a module its policy, and its reference if a fit needs one, without values."""
    module.policy_class = ShapePolicy
    if module.engine.has_own_weights:
        module.engine = WrittenElsewhere()
    module.trainer = trainer
    trainer.strategy.connect(module)
    trainer.state.fn = TrainerFn.FITTING
    module.configure_model()
    if precision == "bf16-true":
        module.to(torch.bfloat16)
    module.to("meta")
    return cast(ShapePolicy, module.policy)


def measure(
    module: PolicyModule, prompt: LongestPrompt, size: RunSize, semantics: AbstractContextManager[None] | None = None
) -> list[Peak]:
    """Run the phases of a fit; the module's policy is one of `load_shapes`.

    Args:
        module: The module.
        prompt: Every prompt.
        size: How many at once, and how they are computed.
        semantics: What stands for the kernels of the device; None: those of CUDA.

    Returns:
        The peak of each phase, in the order of the run.
    """
    policy = cast(ShapePolicy, module.policy)
    devices, vocabulary = size.devices, policy.model.config.get_text_config().vocab_size
    meter = policy.meter = MemoryMeter("meta", vocabulary, devices.shares)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    _watch(module, meter, trained, is_bucket_view=devices.is_bucket_view)
    _stand_for(module, meter, devices)
    optimizer = module.optimizer_factory(trained)
    buckets = [_make_buckets(trained)] if devices.has_buckets else []
    meter.claim(buckets, "DDP buckets")
    if semantics is None:
        semantics = cuda_semantics({"bf16-mixed": torch.bfloat16}.get(size.precision))
    with semantics, gather_wholes(meter) if devices.is_sharded else nullcontext(), meter:
        meter.claim(_begin(optimizer, trained), "moments")
        if size.eval_batch_size:
            _evaluate(module, prompt, size.eval_batch_size)
        if isinstance(module, GRPO):
            batch: object = _step_of_grpo(module, prompt, size.batch_size)
        else:
            batch = _step_of_sft(cast(SFT, module), prompt, size.batch_size)
        with meter.phase("update"), meter.kind("temporaries"):
            _update(optimizer, trained, module.max_grad_norm)
        del batch  # a step holds it to its end
        with meter.phase("save"):
            module.state_dict()
    return list(meter.peaks.values())


def _stand_for(module: PolicyModule, meter: MemoryMeter, devices: Devices) -> None:
    """Let a module do what it does on one of the devices; its clock measures memory."""

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        is_backward = name == "backward"
        with ExitStack() as stack:
            stack.enter_context(meter.phase(_PHASES.get(name, name)))
            if devices.is_sharded and (is_backward or name == "policy_forward"):
                stack.enter_context(gather_for_pass(meter, module.policy, is_backward=is_backward))
            yield

    module.phase = phase  # type: ignore[method-assign]
    module.exchanges_gradients = lambda: devices.count > 1  # type: ignore[method-assign]
    module.num_empty_passes = lambda num_micro_batches: 0  # type: ignore[method-assign]  # all devices have as many
    if devices.is_sharded:
        module._device_mesh = cast(DeviceMesh, devices)  # all that is asked is whether there is one


def _watch(module: PolicyModule, meter: MemoryMeter, trained: Sequence[nn.Parameter], *, is_bucket_view: bool) -> None:
    """Tell the meter what belongs to whom."""
    named = {"weights": module.policy, "reference": getattr(module, "reference", None)}
    for kind, policy in named.items():
        if policy is not None:
            meter.claim([*policy.parameters(), *policy.buffers()], kind)
            blocks = policy.family.vision_blocks(policy.model)
            inside = (child for block in blocks for child in block.children())
            for part in (*policy.family.vision_modules(policy.model), *inside):
                meter.watch(part, "vision tower")  # where it is checkpointed, these are computed again alone
            for layer in policy.model.model.language_model.layers:
                layer.register_forward_hook(lambda *args: _claim_cache(meter, args[2]), with_kwargs=True)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(
            lambda weight: meter.forget([weight.grad]) if is_bucket_view else meter.claim([weight.grad], "gradients")
        )


def _claim_cache(meter: MemoryMeter, kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    for layer in [] if cache is None else cache.layers:
        if layer.is_initialized:
            meter.claim([layer.keys, layer.values], "caches")


def resting_memory(module: PolicyModule) -> dict[str, int]:
    """Bytes by kind that a fit holds whatever its batches are; the module stays as it is, without a policy."""
    policy = ShapePolicy.load(module.policy_config)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    config = module.reference_config if isinstance(module, GRPO) else None
    reference = None if config is None else ShapePolicy.load(config, is_trained=False)
    with cuda_semantics(None):
        moments = _begin(module.optimizer_factory(trained), trained)
    return {
        "weights": num_bytes(policy.parameters()),
        "gradients": num_bytes(trained),
        "moments": num_bytes(moments),
        "reference": 0 if reference is None else num_bytes(reference.parameters()),
    }


def _begin(optimizer: Optimizer, trained: Sequence[nn.Parameter]) -> list[Tensor]:
    """A first update, so that all that follows has the moments beside it; returns them."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor) and value.is_meta]


def _evaluate(module: PolicyModule, prompt: LongestPrompt, batch_size: int) -> None:
    policy = cast(ShapePolicy, module.policy)
    lengths = [prompt.num_tokens] * batch_size
    first = plan_eval_batches(lengths, module.max_new_tokens, module.eval_batch_tokens)[0]
    with evaluation_mode(policy), module.phase("evaluate"):
        module.answer(prompt.batch(policy, len(first)))


def _step_of_grpo(module: GRPO, prompt: LongestPrompt, batch_size: int) -> Experience:
    policy = cast(ShapePolicy, module.policy)
    num_prompts = min(module.num_prompts or batch_size, batch_size)
    group_size = max(module.group_size, module.final_group_size)
    prompts = prompt.batch(policy, num_prompts)
    with evaluation_mode(policy):
        if policy.is_vision_frozen:
            with module.phase("vision"):
                prompts = policy.encode_images(prompts)
        states = module.prompt_states(prompts) if num_prompts == batch_size else None
        rollout = module.generate(prompts, group_size, [0] * num_prompts, states)
        if policy.keeps_copies and module.device_mesh is None:  # the next step begins with what this one has left
            rollout = module.generate(prompts, group_size, [0] * num_prompts, states)
    experience = module.make_experience(prompts, rollout, torch.ones(num_prompts * group_size), states)
    experience = replace(experience, micro_batches=_first(experience.micro_batches))
    module.accumulate_gradients(experience, module.reference_logprobs(experience), None)
    return experience


def _first(micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    ends = [index + 1 for index, micro_batch in enumerate(micro_batches) if micro_batch.is_last_part]
    return list(micro_batches[: ends[:_NUM_COMPLETE][-1]])


def _step_of_sft(module: SFT, prompt: LongestPrompt, batch_size: int) -> PromptBatch:
    prompts = prompt.batch(cast(ShapePolicy, module.policy), batch_size)
    module.accumulate_gradients(prompts, [torch.zeros(module.max_new_tokens, dtype=torch.long)] * batch_size)
    return prompts


def _update(optimizer: Optimizer, trained: Sequence[nn.Parameter], max_grad_norm: float) -> None:
    torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _make_buckets(trained: Sequence[nn.Parameter]) -> Tensor:
    """Gradients once more, in which devices exchange them."""
    return torch.empty(num_bytes(trained), dtype=torch.uint8, device="meta")
