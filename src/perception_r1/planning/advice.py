"""What to change where a run does not fit: first what changes no number of it, then what trains less."""

from collections.abc import Iterator

from perception_r1.modules.base import PolicyModule
from perception_r1.planning.run import Plan

_PASSES = ("reference", "forward", "backward")


def next_change(module: PolicyModule, plan: Plan) -> list[str] | None:
    """Options that lower the highest phase of a plan; None where nothing is left to change.

    Args:
        module: The planned module, with the settings so far.
        plan: Its plan.
    """
    return next(_changes(module, plan), None)


def _changes(module: PolicyModule, plan: Plan) -> Iterator[list[str]]:
    """In the order in which they are tried."""
    config, phase = module.policy_config, plan.highest.phase
    least = plan.prompt.num_tokens + module.max_new_tokens  # of one prompt with one completion
    if phase in _PASSES:
        if not config.gradient_checkpointing:
            yield ["--model.policy.gradient_checkpointing", "true"]
        yield from _halve("micro_batch_tokens", module.micro_batch_tokens, least)
    if phase == "evaluate":
        yield from _halve("eval_batch_tokens", module.eval_batch_tokens, least)
    if plan.devices.count > 1 and not plan.devices.is_sharded:
        yield ["--trainer.strategy", "zero1" if plan.devices.strategy == "ddp" else "fsdp2"]
    if config.lora is None:
        yield ["--variant", "lora"]
    if not config.gradient_checkpointing:
        yield ["--model.policy.gradient_checkpointing", "true"]


def _halve(name: str, tokens: int | None, least: int) -> Iterator[list[str]]:
    """A smaller budget of tokens, unless it is as small as it can be."""
    smaller = 8 * least if tokens is None else max(least, tokens // 2)
    if tokens is None or smaller < tokens:
        yield [f"--model.{name}", str(smaller)]
