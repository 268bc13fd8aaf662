"""What the trainer's verbs and those of `data` share: the options of a run, its data module and its module.

It joins the other parts: it makes the tasks known and hands the data module's task to the module.
"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from omegaconf.errors import OmegaConfBaseException

from perception_r1.callbacks.before_after import BeforeAfter
from perception_r1.callbacks.checkpoints import Checkpoints
from perception_r1.callbacks.log_samples import LogSamples
from perception_r1.callbacks.online_curriculum import OnlineCurriculum
from perception_r1.callbacks.progress import Progress
from perception_r1.callbacks.run_card import RunCard
from perception_r1.callbacks.watchdog import Watchdog
from perception_r1.commands.compose import PARTS
from perception_r1.commands.nulls import check_nulls
from perception_r1.commands.options import parse
from perception_r1.data.base import BaseDataModule
from perception_r1.data.mixed import MixedData  # noqa: F401 - its import makes the short name known
from perception_r1.errors import UserError
from perception_r1.evaluation.callback import Evaluation
from perception_r1.modules import GRPO, SFT  # noqa: F401 - their import makes the short names known
from perception_r1.modules.base import PolicyModule
from perception_r1.tasks import TASKS  # noqa: F401 - their import makes the short names known

PARSER: dict[str, Any] = {
    "parser_mode": "omegaconf+",
    "exit_on_error": False,
    "usage": "%(prog)s --task NAME [--model NAME] [--data NAME] [--recipe NAME] [--variant NAME] [--ANY.OPTION VALUE]",
    "epilog": "Parts of the configuration: " + "; ".join(f"--{part}, {text}" for part, text in PARTS.items()) + ".",
}
"""Settings of a parser of these options."""


class ConfiguredCLI(LightningCLI):
    """The options of a run with this project's callbacks, links and names; data module and module, but no trainer.

    It takes the options as `compose` returns them, and those of LightningCLI itself.
    """

    datamodule: BaseDataModule
    model: PolicyModule

    def __init__(self, args: Sequence[str], **options: Any) -> None:
        options |= {"subclass_mode_model": True, "subclass_mode_data": True, "auto_configure_optimizers": False}
        super().__init__(PolicyModule, BaseDataModule, args=list(args), **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options besides trainer, model and data."""
        parser.add_argument("--task", type=str | None, default=None, help="Name of the task.")
        parser.add_argument("--run_name", type=str, default="run", help="Name of the folder under logs/ for the runs.")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(Progress, "progress")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(LogSamples, "log_samples")
        parser.add_lightning_class_args(OnlineCurriculum, "online_curriculum")
        parser.add_lightning_class_args(RunCard, "run_card")
        parser.add_lightning_class_args(BeforeAfter, "before_after")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.link_arguments("data.task", "model.init_args.task", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the options.

        Raises:
            UserError: One is wrong, or refers to a setting that is not there.
        """
        try:
            self.config = parse(parser, args)
        except OmegaConfBaseException as error:
            raise UserError(" ".join(str(error).split())) from error

    def _parse_ckpt_path(self) -> None:
        """Take no settings from a checkpoint, which Lightning's own would read before it is known whose it is."""

    def instantiate_classes(self) -> None:
        """Make the data module and the module.

        Raises:
            UserError: A setting is null that must not be, one of them refuses its own, or needs another package.
        """
        for name in ("trainer", "model", "data"):
            check_nulls(name, self._get(self.config, name))
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ImportError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise UserError(" ".join(str(cause).split())) from error
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
