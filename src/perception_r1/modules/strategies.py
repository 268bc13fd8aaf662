"""Strategies of the trainer besides Lightning's own: what of a training is sharded over the devices.

`--trainer.strategy zero1` shards the states of the optimiser, `--trainer.strategy fsdp2` also weights and gradients.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from perception_r1.policy.checkpoint import read
from perception_r1.policy.checkpoint_file import save_file
from perception_r1.policy.sharded_checkpoint import is_sharded, load_shards, save_shards

OptimizerFactory: TypeAlias = Callable[[list[nn.Parameter]], Optimizer]


class ZeRO1Strategy(DDPStrategy):
    """Every device has the whole model and the states of the optimiser for its share of the weights (ZeRO, stage 1).

    A device updates its share and sends it to the others (arXiv 1910.02054, torch's `ZeroRedundancyOptimizer`).
    Checkpoints are those of any other strategy.
    """

    @staticmethod
    def sharded(make: OptimizerFactory) -> OptimizerFactory:
        """What makes the same optimiser, sharded over the devices."""
        return lambda parameters: ZeroRedundancyOptimizer(parameters, optimizer_class=make)  # type: ignore[arg-type]


class FSDP2Strategy(ModelParallelStrategy):
    """Every device has a share of the weights, of their gradients and of the states of the optimiser (FSDP2).

    `EvaluationModule.load_policy` shards the weights, by torch's `fully_shard`. A checkpoint is one file, as with any
    other strategy, or a folder to which every device writes its share; a run with any strategy and any number of
    devices goes on from both.

    Args:
        save_distributed_checkpoint: Write folders of shards: no device then has to hold a whole checkpoint.
        process_group_backend: Of torch.distributed; null: that of the device.
        timeout: Of its operations; null: that of torch.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """All devices are one group: `auto` would mean those of a machine only."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The trainer restores the optimiser, as it does with other strategies."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What training changes: in shards, or whole on the first device."""
        assert self.lightning_module is not None
        return self._collected(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state: in shards, or whole on the first device."""
        return self._collected(super(ModelParallelStrategy, self).optimizer_state(optimizer))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a file, or with all devices a folder."""
        if self._save_distributed_checkpoint:
            path = Path(self.broadcast(filepath))
            save_shards(checkpoint, path, is_global_zero=self.is_global_zero)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, or of a folder the shards of this device."""
        path = Path(checkpoint_path)
        if not is_sharded(path):
            return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        assert self.lightning_module is not None
        layouts = {f"state_dict/{name}": value for name, value in self.lightning_module.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, parameter in enumerate(_parameters(optimizer)):
                layouts[f"optimizer_states/{number}/state/{index}"] = parameter
        return load_shards(path, layouts)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take the weights up, each device its share."""
        assert self.lightning_module is not None
        layouts = self.lightning_module.state_dict()
        state = {name: _sharded_like(layouts.get(name), value) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the states of the optimiser up, each device its share."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = _parameters(optimizer)
            sharded = {
                index: {name: _sharded_like(parameters[index], value) for name, value in values.items()}
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": sharded})

    def _collected(self, state: dict[str, Any]) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return state
        return apply_to_collection(state, DTensor, self._whole)  # type: ignore[no-any-return]

    def _whole(self, value: DTensor) -> Tensor | None:
        """The whole of a tensor on the CPU of the first device; the others help to gather it."""
        whole: Tensor = value.full_tensor()
        return whole.cpu() if self.is_global_zero else None


class CheckpointIO(TorchCheckpointIO):
    """Checkpoints that prove themselves: files, and folders of shards for reading, which become whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a file or a folder; code in it is never run, whatever the trainer was told."""
        return read(Path(path))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """Parameters in the order of their numbers in the optimiser's state."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _sharded_like(layout: Tensor | None, value: Any) -> Any:
    """A whole tensor sharded like another one of its shape, each device by itself; all else as it is."""
    is_whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not isinstance(layout, DTensor) or not is_whole or value.shape != layout.shape:
        return value
    return distribute_tensor(value.to(layout.device), layout.device_mesh, layout.placements, src_data_rank=None)


SUPPORTED: tuple[type[Strategy], ...] = (SingleDeviceStrategy, DDPStrategy, ZeRO1Strategy, FSDP2Strategy)
"""With which a run is right; of Lightning's own not their subclasses, which shard or translate."""

StrategyRegistry.register("zero1", ZeRO1Strategy, description="DDP with the optimiser's states sharded")
StrategyRegistry.register("fsdp2", FSDP2Strategy, description="weights, gradients and optimiser's states sharded")
