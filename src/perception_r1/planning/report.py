"""What a plan shows: memory by phase and by kind, and whether a card has it."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from perception_r1.errors import UserError
from perception_r1.modules.base import PolicyModule
from perception_r1.planning.measure import KINDS, resting_memory
from perception_r1.planning.meter import Peak
from perception_r1.planning.run import Plan

GB = 10**9
"""A card of 80 GB counts as 80 * 10^9 bytes: it has about 5 % more, which driver and allocator take."""
_SHOWN = 0.05
"""GB below which a number is left out."""


def summary(plan: Plan) -> str:
    """What was planned, in a line."""
    trained = f"{plan.num_trainable / 1e6:,.0f} of {plan.num_parameters / 1e6:,.0f} million weights trained"
    return f"{trained}; prompts of {plan.prompt.num_tokens} tokens, {plan.prompt.num_image_tokens} of them a picture's."


def peak_table(peaks: Sequence[Peak]) -> Table:
    """A column per phase, the highest one bold, and a row per kind that any phase has, in GB."""
    kinds = [kind for kind in KINDS if any(peak.kinds.get(kind, 0) >= _SHOWN * GB for peak in peaks)]
    top = max(peaks, key=lambda peak: peak.bytes)
    table = Table(title="Most memory of each phase, in GB", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0))
    table.add_column("")
    for peak in peaks:
        table.add_column(peak.phase, justify="right", overflow="fold", style="bold" if peak is top else "")
    for kind in kinds:
        table.add_row(kind, *(_size(peak.kinds.get(kind, 0)) for peak in peaks), end_section=kind == kinds[-1])
    table.add_row("total", *(_size(peak.bytes) for peak in peaks))
    return table


def check_memory(module: PolicyModule, total: int) -> None:
    """Refuse a fit that cannot have the memory for its weights alone, before any of them is read.

    Args:
        module: A module that has no policy yet.
        total: Bytes of the device.

    Raises:
        UserError: The device is too small.
    """
    sizes = {kind: size for kind, size in resting_memory(module).items() if size}
    if sum(sizes.values()) > total:
        named = ", ".join(f"{kind} {size / GB:.1f}" for kind, size in sizes.items())
        need = f"{sum(sizes.values()) / GB:.1f} GB before the first batch ({named})"
        raise UserError(
            f"{module.policy_config.name} needs {need}, and the device has {total / GB:.1f} GB: train an adapter "
            "(--variant lora) or a smaller model; `perception-r1 plan` with the same options says what fits"
        )


def _size(number: int) -> str:
    return f"{number / GB:.1f}" if number >= _SHOWN * GB else "-"
