"""`perception-r1 fit`, `validate` and `test`: a LightningCLI.

It knows every other part and joins them: it registers the tasks, hands the data module's task to the module, warms the
embedded policy up, and finds the checkpoint that `last` and `best` mean.
"""

from pathlib import Path
from typing import Any, Self

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from perception_r1.callbacks.before_after import BeforeAfter
from perception_r1.callbacks.checkpoints import FOLDER, Checkpoints, next_log_step
from perception_r1.callbacks.log_samples import LogSamples
from perception_r1.callbacks.progress import Progress
from perception_r1.callbacks.run_card import RunCard
from perception_r1.commands.reader import load_reader, sample_check
from perception_r1.data.module import TaskDataModule
from perception_r1.embedded.warmup import EmbeddedConfig, warm_policy
from perception_r1.errors import UserError
from perception_r1.evaluation.callback import Evaluation
from perception_r1.evaluation.key import EVALUATION, evaluation_key
from perception_r1.modules import GRPO, SFT  # noqa: F401 - their import makes the short names known
from perception_r1.modules.base import PolicyModule
from perception_r1.tasks import TASKS  # noqa: F401 - their import makes the short names known

EMBEDDED = "tiny"
"""Name of the embedded policy."""

_DESCRIPTION = "Post-train and evaluate vision-language models on visual perception."
_EPILOG = (
    "Besides these: `perception-r1 data --help`, data before a run; `perception-r1 predict --help`, answers to "
    "pictures; `perception-r1 export --help`, a checkpoint as a model folder; `perception-r1 score --help`, reward and "
    "components of completions that came from anywhere."
)


class PerceptionCLI(LightningCLI):
    """LightningCLI with this project's callbacks, links and names."""

    @classmethod
    def of(cls, args: list[str] | None, *, run: bool = True) -> Self:
        """Parse a command line (None: that of the process), instantiate, and run the verb unless told otherwise."""
        mode: dict[str, Any] = {"parser_mode": "omegaconf+"}
        verbs = cls.subcommands() if run else ()
        return cls(
            PolicyModule,
            TaskDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs=mode | {"description": _DESCRIPTION, "epilog": _EPILOG} | dict.fromkeys(verbs, mode),
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's own, but for `predict`: that is a command which needs no data set."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options besides trainer, model and data."""
        parser.add_argument("--task", type=str, default="run", help="Name of the folder under logs/ for the runs.")
        parser.add_class_arguments(EmbeddedConfig, "embedded")
        for callback, group in (
            (Progress, "progress"),
            (Checkpoints, "checkpoints"),
            (LogSamples, "log_samples"),
            (RunCard, "run_card"),
            (BeforeAfter, "before_after"),
            (Evaluation, "evaluation"),
        ):
            parser.add_lightning_class_args(callback, group)
        parser.link_arguments("data.task", "model.init_args.task", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Turn the checkpoint names `last` and `best` into files; what goes on does so in its own folder."""
        config = self.config[self.subcommand]
        name = config.get("ckpt_path")
        settings: Any = getattr(config.trainer.logger, "init_args", None)
        has_folder = settings is not None and "save_dir" in settings and "name" in settings
        if name in ("last", "best"):
            if not has_folder:
                raise UserError(f"--ckpt_path {name} needs one logger that writes to a folder; give the file instead.")
            checkpoint = find_checkpoint(Path(settings.save_dir) / settings.name, name)
            config.ckpt_path = str(checkpoint)
            if self.subcommand == "fit":
                settings.version = checkpoint.parents[1].name
                if "purge_step" in settings:  # TensorBoard forgets what came after the checkpoint
                    settings.purge_step = next_log_step(checkpoint)
        if has_folder and self.subcommand == "test" and settings.get("version") is None:
            settings.version = EVALUATION + evaluation_key(config.as_dict())

    def after_instantiate_classes(self) -> None:
        """Put the warmed-up folder where the configuration says `tiny`."""
        config = self.config[self.subcommand]
        is_embedded = self.model.policy_config.name == EMBEDDED
        embedded = self.config_init[self.subcommand].embedded if is_embedded else None
        if self.datamodule.sources:  # synthetic scenes suit every model
            _, processor = load_reader(self.model.policy_config, embedded, self.datamodule)
            max_prompt_length = self.model.policy_config.max_prompt_length
            self.datamodule.check_sample = sample_check(processor, self.datamodule.task, max_prompt_length)
        if embedded is None:
            return
        self.datamodule.setup(self.subcommand)  # a bad data file is found before minutes of warm start
        folder = warm_policy(
            embedded,
            self.datamodule,
            seed=config.seed_everything,
            max_new_tokens=self.model.max_new_tokens,
            callbacks=lambda: [Progress(metrics=["train/loss"])],
        )
        self.model.policy_config.name = str(folder)


def find_checkpoint(runs: Path, name: str) -> Path:
    """The newest checkpoint of this name among the runs in a folder.

    Raises:
        UserError: There is none.
    """
    found = sorted(runs.glob(f"*/{FOLDER}/{name}.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"No run under {runs} has a {FOLDER}/{name}.ckpt yet; train first, or give a file, or null for the model "
            "as it is."
        )
    return found[-1]
