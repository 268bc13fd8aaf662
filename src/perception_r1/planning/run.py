"""One configuration of a run -> the peaks of its phases."""

from dataclasses import dataclass

from lightning.pytorch import Trainer

from perception_r1.data.base import BaseDataModule
from perception_r1.errors import UserError
from perception_r1.modules.base import PolicyModule
from perception_r1.planning.devices import Devices
from perception_r1.planning.measure import RunSize, load_shapes, measure
from perception_r1.planning.meter import Peak
from perception_r1.planning.prompts import LongestPrompt, longest_prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run needs.

    Attributes:
        peaks: The peak of each phase, in their order.
        prompt: Its longest prompt.
        num_parameters: Weights of the policy.
        num_trainable: Those that are trained.
        devices: Those that train together.
    """

    peaks: tuple[Peak, ...]
    prompt: LongestPrompt
    num_parameters: int
    num_trainable: int
    devices: Devices

    @property
    def highest(self) -> Peak:
        """The peak of the whole run."""
        return max(self.peaks, key=lambda peak: peak.bytes)


def plan_run(
    module: PolicyModule,
    data: BaseDataModule,
    *,
    precision: str,
    devices: Devices,
    is_synthetic: bool,
) -> Plan:
    """Run the phases of a fit without values.

    Args:
        module: A module that has no policy yet.
        data: Its data, of which only sizes of batches, tasks and scenes matter.
        precision: That of the trainer.
        devices: Those that train together.
        is_synthetic: The data are scenes, else pictures as large as the policy takes them.

    Raises:
        UserError: The model is unknown, or the number of devices does not divide the batch.
    """
    if data.global_batch_size is not None and data.global_batch_size % devices.count:
        numbers = f"global_batch_size {data.global_batch_size} cannot be shared evenly by {devices.count} devices"
        raise UserError(numbers)
    share = data.batch_size if data.global_batch_size is None else data.global_batch_size // devices.count
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    policy = load_shapes(module, trainer, precision)
    prompt = longest_prompt(policy.processor, data, is_synthetic=is_synthetic)
    size = RunSize(batch_size=share, eval_batch_size=data.eval_batch_size, precision=precision, devices=devices)
    weights = list(policy.parameters())
    return Plan(
        peaks=tuple(measure(module, prompt, size)),
        prompt=prompt,
        num_parameters=sum(weight.numel() for weight in weights),
        num_trainable=sum(weight.numel() for weight in weights if weight.requires_grad),
        devices=devices,
    )
