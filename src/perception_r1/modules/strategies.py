"""Strategies of the trainer besides Lightning's own: what of a training the devices divide among them.

`--trainer.strategy zero1` divides the states of the optimiser.
"""

from collections.abc import Callable
from typing import TypeAlias

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

OptimizerFactory: TypeAlias = Callable[[list[nn.Parameter]], Optimizer]


class ZeRO1Strategy(DDPStrategy):
    """Every device has the whole model and the states of the optimiser for its share of the weights (ZeRO, stage 1).

    A device updates its share and sends it to the others (arXiv 1910.02054, torch's `ZeroRedundancyOptimizer`).
    Checkpoints are those of any other strategy.
    """

    @staticmethod
    def divided(make: OptimizerFactory) -> OptimizerFactory:
        """What makes the same optimiser, divided among the devices."""
        return lambda parameters: ZeroRedundancyOptimizer(parameters, optimizer_class=make)  # type: ignore[arg-type]


SUPPORTED: tuple[type[Strategy], ...] = (SingleDeviceStrategy, DDPStrategy, ZeRO1Strategy)
"""What a run can be divided by; not their subclasses, which shard or translate."""

StrategyRegistry.register("zero1", ZeRO1Strategy, description="DDP with the optimiser's states divided")
