"""The command line: a LightningCLI for `fit`, `validate` and `test`; `predict`, `export` and `score` have own files.

It knows every other part and joins them: it registers the tasks, hands the data module's task to the module, warms the
embedded policy up, and finds the checkpoint that `last` and `best` mean.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from perception_r1.callbacks.before_after import BeforeAfter
from perception_r1.callbacks.checkpoints import FOLDER, Checkpoints
from perception_r1.callbacks.evaluation import Evaluation
from perception_r1.callbacks.pictures import Pictures
from perception_r1.callbacks.progress import Progress
from perception_r1.callbacks.run_card import RunCard
from perception_r1.data.module import TaskDataModule
from perception_r1.embedded.warmup import EmbeddedConfig, warm_policy
from perception_r1.errors import UserError
from perception_r1.evaluation_key import EVALUATION, evaluation_key
from perception_r1.modules import GRPO, SFT  # noqa: F401 - their import makes the short names known
from perception_r1.modules.base import PolicyModule
from perception_r1.tasks import TASKS  # noqa: F401 - their import makes the short names known

EMBEDDED = "tiny"
"""Name of the embedded policy."""

_DESCRIPTION = "Post-train and evaluate vision-language models on visual perception."
_EPILOG = (
    "Besides these: `perception-r1 predict --help`, answers to pictures; `perception-r1 export --help`, a checkpoint "
    "as a model folder; `perception-r1 score --help`, reward and terms of completions that came from anywhere."
)
_SIGTERM_STATUS = 143


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
            (Pictures, "pictures"),
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
                    settings.purge_step = torch.load(checkpoint, mmap=True, weights_only=True)["global_step"]
        if has_folder and self.subcommand == "test" and settings.get("version") is None:
            settings.version = EVALUATION + evaluation_key(config.as_dict())

    def after_instantiate_classes(self) -> None:
        """Put the warmed-up folder where the configuration says `tiny`."""
        config = self.config[self.subcommand]
        if self.model.policy_config.name != EMBEDDED:
            return
        self.datamodule.setup(self.subcommand)  # a bad data file is found before minutes of warm start
        folder = warm_policy(
            self.config_init[self.subcommand].embedded,
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
        raise UserError(f"No run under {runs} has a {FOLDER}/{name}.ckpt yet; train first, or give a file.")
    return found[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["score"]:
        from perception_r1.commands import score  # needs no trainer: starts in a fraction of the time

        return score.main(args[1:])
    _quieten()
    if args[:1] == ["data"]:
        from perception_r1.commands import data

        return data.main(args[1:])
    if args[:1] == ["export"]:
        from perception_r1.commands import export

        return export.main(args[1:])
    if args[:1] == ["predict"]:
        from perception_r1.commands import predict

        return predict.main(args[1:])
    return guarded(lambda: PerceptionCLI.of(None if argv is None else args))


def guarded(run: Callable[[], object]) -> int:
    """Run something; an error that speaks to the user ends in its sentence, any other in a traceback.

    Returns:
        The exit status: that of `run` if it returns one, 0 if not, 2 after a user's error.
    """
    try:
        status = run()
    except SIGTERMException:
        sys.stderr.write("Stopped by SIGTERM; --ckpt_path last goes on from the last checkpoint.\n")
        return _SIGTERM_STATUS
    except Exception as error:
        known = _known_error(error)
        if known is None or os.environ.get("PERCEPTION_R1_TRACEBACK"):
            raise
        sys.stderr.write(f"perception-r1: error: {known}\n")
        return 2
    return status if isinstance(status, int) else 0


def _known_error(error: BaseException | None) -> BaseException | None:
    """The error that speaks to the user, which the parser may have wrapped in others of its own."""
    while error is not None and not isinstance(error, UserError | MisconfigurationException):
        error = error.__cause__ or error.__context__
    return error


def _quieten() -> None:
    """Leave the screen to the progress display: no advertisements, no notes about workers or missing torchvision."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # the reference, rightly
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # of verbs that are ours
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


if __name__ == "__main__":
    sys.exit(main())
