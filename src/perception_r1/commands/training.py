"""`perception-r1 fit`, `validate` and `test`: a LightningCLI.

Before anything that takes long it checks what can be checked, and finds the checkpoint that `last` and `best` mean.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich import get_console

from perception_r1.callbacks.checkpoints import FOLDER, LAST, PREVIOUS, find_last, next_log_step, repair_last
from perception_r1.callbacks.files import CONFIG
from perception_r1.commands.compose import compose
from perception_r1.commands.configuration import PARSER, ConfiguredCLI
from perception_r1.commands.options import run_command
from perception_r1.commands.reader import load_reader, sample_check
from perception_r1.data.base import BaseDataModule
from perception_r1.data.mixed import parts_of
from perception_r1.errors import UserError
from perception_r1.evaluation.key import EVALUATION, evaluation_key
from perception_r1.locks import claim_version, locked
from perception_r1.modules.signals import is_told_to_stop
from perception_r1.planning.report import check_memory
from perception_r1.policy.checkpoint import check_origin, read_meta

_VERBS = {"fit": "Training", "validate": "Validating", "test": "Evaluating"}
_DESCRIPTION = "Post-train and evaluate vision-language models on visual perception."
_EPILOG = (
    "Besides these: `perception-r1 data --help`, data before a run; `perception-r1 plan --help`, the memory that a run "
    "needs; `perception-r1 predict --help`, answers to pictures; `perception-r1 export --help`, a checkpoint as a "
    "model folder; `perception-r1 push --help`, such a folder to the hub; `perception-r1 serve --help`, a model at an "
    "address of this machine; `perception-r1 report --help`, a page about runs; `perception-r1 score --help`, reward "
    "and components of completions that came from anywhere."
)
_NUM_PROCESSES = 2
"""Processes on the CPU that any machine may start: training on several devices can be tried out everywhere."""


def main(argv: Sequence[str]) -> int:
    """Run a verb of the trainer; the result is the exit status."""
    return run_command(argv[0] if argv and argv[0] in _VERBS else "", _run, argv)


def _run(argv: Sequence[str]) -> int:
    args = [argv[0], *compose(argv[1:])] if argv and argv[0] in _VERBS else argv
    parsers = {verb: dict(PARSER) for verb in _VERBS}
    PerceptionCLI(
        args,
        save_config_callback=SaveSettings,
        save_config_kwargs={"overwrite": True, "config_filename": _DRAFT},
        parser_kwargs=PARSER | {"usage": None, "description": _DESCRIPTION, "epilog": _EPILOG} | parsers,
    )
    return 0


_DRAFT = f"{CONFIG}.tmp"
_IS_FIRST = getattr(rank_zero_only, "rank", 0) == 0
"""Whether this is the first process of a run, or its only one."""


class SaveSettings(SaveConfigCallback):
    """Write the configuration of a run to config.yaml, to go on from, and to the logger, which shows it.

    A run that goes on keeps what it has until its checkpoint and its data are found to fit the new one.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write that of a run that begins."""
        if stage != "fit" or self.config.get("ckpt_path") is None:
            self._write(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that of a run that goes on."""
        self._write(trainer, pl_module, "fit")

    def _write(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it whole or not at all."""
        super().setup(trainer, pl_module, stage)
        folder = Path(trainer.log_dir or "")  # all processes ask together
        if trainer.is_global_zero and (folder / _DRAFT).exists():
            os.replace(folder / _DRAFT, folder / CONFIG)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the configuration to the loggers; checkpoints hold none of it, they must not change later options."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


class PerceptionCLI(ConfiguredCLI):
    """The trainer's verbs."""

    def __init__(self, args: Sequence[str], **options: Any) -> None:
        self._occupied: set[Path] = set()
        with ExitStack() as self._resources:  # the verb is run in here
            super().__init__(args, **options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's own, but for `predict`: that is a command which needs no data set."""
        return {verb: skipped for verb, skipped in LightningCLI.subcommands().items() if verb in _VERBS}

    def before_instantiate_classes(self) -> None:
        """Turn the checkpoint names `last` and `best` into files; what goes on does so in its own folder.

        Raises:
            UserError: There is no such checkpoint, or it is damaged or that of another program.
        """
        config = self.config[self.subcommand]
        name = config.get("ckpt_path")
        settings = _with_folder(config.trainer.logger)
        has_folder = settings is not None
        if name == "best" and self.subcommand == "fit":
            raise UserError("--ckpt_path best has no state of the optimiser; training goes on from last")
        if name in ("last", "best"):
            if not has_folder:
                raise UserError(f"--ckpt_path {name} needs one logger that writes to a folder; give the file instead.")
            checkpoint = find_checkpoint(Path(settings.save_dir) / (settings.name or config.run_name), name)
            if self.subcommand == "fit":
                self._occupy(checkpoint.parents[1])
                if _IS_FIRST:  # the others read it when all have met
                    repair_last(checkpoint)
            elif name == "last":
                checkpoint = find_last(checkpoint)
            config.ckpt_path = str(checkpoint)
            if self.subcommand == "fit":
                settings.version = checkpoint.parents[1].name
                if "purge_step" in settings:  # TensorBoard forgets what came after the checkpoint
                    settings.purge_step = next_log_step(checkpoint)
        if config.get("ckpt_path") is not None:
            check_origin(read_meta(Path(config.ckpt_path)))
        if has_folder and self.subcommand == "test" and settings.get("version") is None:
            settings.version = EVALUATION + evaluation_key(config.as_dict())

    def instantiate_classes(self) -> None:
        """Make the trainer besides; a logger without a name of its own writes to the folder of the run's name.

        Its folder is this process's alone until the verb has run.

        Raises:
            UserError: Another process is at work in the folder, or the trainer refuses its settings.
        """
        config = self.config[self.subcommand]
        settings: Any = _with_folder(config.trainer.logger) or {}
        given = {name: settings.get(name) for name in ("name", "version") if name in settings}
        if given.get("name", "") is None:
            settings.name = config.run_name
        if "save_dir" in settings and "version" in given:
            settings.version = self._own_version(Path(settings.save_dir) / (settings.name or ""), given["version"])
        super().instantiate_classes()
        for name, value in given.items():  # as it was: config.yaml may be run again under another name
            settings[name] = value
        try:
            self.trainer = self.instantiate_trainer()
        except (ImportError, MisconfigurationException, TypeError, ValueError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a verb; a signal to all processes also ends workers, which may be noticed first."""
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            if is_told_to_stop(self.trainer) and "DataLoader worker" in str(error):
                raise SIGTERMException from error
            raise

    def _own_version(self, runs: Path, version: str | int | None) -> str | int | None:
        """The version of the logger: the one that is given or the next, whose folder no other process gets."""
        if not _IS_FIRST:
            return version
        self._remove_if_unused(runs)
        if version is None:
            folder = claim_version(runs)
            self._resources.callback(_remove_if_empty, folder)
            version = folder.name
        self._occupy(runs / (version if isinstance(version, str) else f"version_{version}"))
        return version

    def _occupy(self, folder: Path) -> None:
        """Keep other processes out of a run's folder until the verb has run."""
        if _IS_FIRST and folder not in self._occupied:
            work = {"fit": "a training", "validate": "a validation", "test": "an evaluation"}[str(self.subcommand)]
            self._resources.enter_context(locked(folder, work))
            self._occupied.add(folder)

    def _remove_if_unused(self, folder: Path) -> None:
        """Leave no folder of a run that does not begin, of this one and those above it that are not there yet."""
        for each in (*reversed(folder.parents), folder):
            if not each.exists():
                self._resources.callback(_remove_if_empty, each)

    def after_instantiate_classes(self) -> None:
        """Check all that needs no weights."""
        verb = str(self.subcommand)
        check_devices(self.trainer)
        self.datamodule.trainer = self.trainer  # it tells among how many processes the samples are divided
        self.model.check_trainer(self.trainer, is_training=verb == "fit")
        config, read = self.model.policy_config, [part for part in parts_of(self.datamodule).values() if part.sources]
        if read:  # synthetic scenes suit every model
            _, processor = load_reader(config)
            for part in read:
                part.check_sample = sample_check(processor, part.task, config.max_prompt_length)
        told = f"{_VERBS[verb]} on {describe_devices(self.trainer)}."
        if verb in ("fit", "validate"):
            self.datamodule.setup(verb)
            told += describe_validation(self.datamodule)
        if verb == "fit":
            self.datamodule.train_dataloader()  # refuses what does not fill a step
            is_whole = type(self.trainer.strategy) in (SingleDeviceStrategy, DDPStrategy)
            if is_whole and isinstance(self.trainer.accelerator, CUDAAccelerator):
                device = torch.cuda.get_device_properties(self.trainer.strategy.root_device)
                check_memory(self.model, round(device.total_memory * (1 - self.model.engine.memory_share)))
        if self.trainer.is_global_zero:
            get_console().print(told, highlight=False)


def _with_folder(loggers: Any) -> Any:
    """Options of the logger whose folder is that of the run, the first one of several; None if it has none."""
    first = loggers[0] if isinstance(loggers, list) and loggers else loggers
    settings = getattr(first, "init_args", None)
    return settings if settings is not None and "save_dir" in settings and "name" in settings else None


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder in which nothing has been written."""
    with suppress(OSError):
        folder.rmdir()


def check_devices(trainer: Trainer) -> None:
    """Refuse more processes on the CPU than it has cores; of other devices the trainer itself knows the number.

    Raises:
        UserError: There are too many.
    """
    cores = os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > max(cores, _NUM_PROCESSES):
        raise UserError(f"trainer.devices is {trainer.num_devices}, and this machine has {cores} cores: give fewer")


def describe_devices(trainer: Trainer) -> str:
    """What a run computes with: "cpu, 1 device, 32-true"."""
    number = trainer.world_size
    return f"{trainer.accelerator.name()}, {number} device{'s' * (number > 1)}, {trainer.precision}"


def describe_validation(data: BaseDataModule) -> str:
    """How many samples a validation answers, where these are not all; else nothing."""
    number, total = len(data.validated_samples()), len(data.samples("val"))
    return f" A validation answers {number} of {total} samples (num_val)." if number < total else ""


def find_checkpoint(runs: Path, name: str) -> Path:
    """The newest checkpoint of this name among the runs in a folder.

    Raises:
        UserError: There is none.
    """
    names = (LAST, PREVIOUS) if name == "last" else (f"{name}.ckpt",)
    found = [path for known in names for path in runs.glob(f"*/{FOLDER}/{known}")]
    if not found:
        what = f"No run under {runs} has a {FOLDER}/{name}.ckpt yet"
        raise UserError(f"{what}; train first, or give a file, or null for the model as it is.")
    return max(found, key=lambda path: path.stat().st_mtime).with_name(names[0])
