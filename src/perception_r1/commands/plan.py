"""`perception-r1 plan`: how much memory a run needs, phase by phase, and which card has it; nothing is downloaded.

Options of a run -> module and data, without files -> `planning/run.py` -> table, cards, what would help.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from rich import get_console

from perception_r1.commands.compose import compose
from perception_r1.commands.configuration import PARSER, ConfiguredCLI
from perception_r1.commands.options import run_command
from perception_r1.errors import UserError
from perception_r1.planning.advice import next_change
from perception_r1.planning.devices import Devices, Strategy
from perception_r1.planning.report import GB, peak_table, summary
from perception_r1.planning.run import Plan, plan_run

CARDS = (24, 48, 80, 141)
"""GB of the cards that are asked about unless others are named."""
_DESCRIPTION = "Say how much memory a run needs on a GPU, phase by phase, which card has it, and what would help."
STRATEGIES: dict[str, Strategy] = {
    "auto": "ddp",
    "ddp": "ddp",
    "DDPStrategy": "ddp",
    "SingleDeviceStrategy": "ddp",
    "zero1": "zero1",
    "ZeRO1Strategy": "zero1",
    "fsdp2": "fsdp2",
    "FSDP2Strategy": "fsdp2",
}
"""By the names under which `--trainer.strategy` has them."""
_SOURCES = ("train_file", "val_file", "test_file", "train", "val", "test")


class PlanCLI(ConfiguredCLI):
    """The configuration of a run, of whose data no file is read: pictures are as large as the policy takes them."""

    is_synthetic = True

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options besides those of a run."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--cards", type=float, nargs="+", default=list(CARDS), help="Memory of each card in GB.")
        parser.add_argument("--advice", type=bool, default=True, help="Look for settings with which a run fits.")

    def before_instantiate_classes(self) -> None:
        """Leave out what needs files: the sources of data, and metrics that read a dictionary."""
        for settings in _data_settings(self.config.data):
            task: Any = settings.get("task")
            if task is not None and "word_metrics" in task.get("init_args", {}):
                task.init_args["word_metrics"] = None
            for name in _SOURCES:
                if settings.get(name) is not None:
                    self.is_synthetic, settings[name] = False, None

    def plan(self) -> Plan:
        """Run the phases; once, for they change the module.

        Raises:
            UserError: The model or the strategy is unknown, or the devices do not go with the batch.
        """
        trainer = self.config.trainer
        strategy: Any = trainer.strategy
        name = str(getattr(strategy, "class_path", strategy)).rpartition(".")[2]
        if name not in STRATEGIES:
            raise UserError(f"plan does not know the strategy {name}; use ddp, zero1 or fsdp2")
        devices = Devices(
            count=_num_devices(trainer.devices) * int(trainer.num_nodes),
            strategy=STRATEGIES[name],
            is_bucket_view=bool(getattr(strategy, "init_args", {}).get("gradient_as_bucket_view", False)),
        )
        return plan_run(
            self.model,
            self.datamodule,
            precision=str(trainer.precision or "32-true"),
            devices=devices,
            is_synthetic=self.is_synthetic,
        )


def main(argv: Sequence[str]) -> int:
    """Plan a run; the result is the exit status: 1 where none of the cards has the memory."""
    return run_command("plan", _run, argv)


def read(argv: Sequence[str]) -> PlanCLI:
    """The configuration that the options of a run make.

    Raises:
        UserError: An option is wrong.
    """
    parser_kwargs = PARSER | {"prog": "perception-r1 plan", "description": _DESCRIPTION}
    return PlanCLI(compose(argv), run=False, save_config_callback=None, parser_kwargs=parser_kwargs)


def _run(argv: Sequence[str]) -> int:
    cli, console = read(argv), get_console()
    cards: list[float] = sorted(cli.config.cards, reverse=True)
    if cards[-1] <= 0:
        raise UserError(f"--cards are sizes in GB, such as 24 80; there is none of {cards[-1]:g}")
    with console.status("Running the phases without values"):
        found = cli.plan()
    left = 1 - cli.model.engine.memory_share
    console.print(summary(found), highlight=False, soft_wrap=True)
    console.print(peak_table(found.peaks))
    for card in reversed(cards):
        console.print(f"{card:g} GB: {_fits(found, card * left)}", highlight=False)
    missed = [card for card in cards if found.highest.bytes > card * left * GB]
    if missed and cli.config.advice:
        for line in advise(argv, cli, found, missed):
            console.print(line, highlight=False, soft_wrap=True)
    return int(len(missed) == len(cards))


def _fits(plan: Plan, card: float) -> str:
    spare = card - plan.highest.bytes / GB
    if spare < 0:
        return f"does not fit; {plan.highest.phase} needs {-spare:.1f} GB more"
    return f"fits, with {spare:.1f} GB to spare"


def advise(argv: Sequence[str], cli: PlanCLI, plan: Plan, cards: Sequence[float]) -> Iterator[str]:
    """Settings with which a run fits cards that are too small for it, planned until it does; the largest card first."""
    options: list[str] = []
    for card in cards:
        while plan.highest.bytes > card * (1 - cli.model.engine.memory_share) * GB:
            change = next_change(cli.model, plan)
            if change is None:
                yield f"{card:g} GB: no setting is enough; lower max_pixels or max_new_tokens, or use more devices."
                return
            options += change
            cli = read([*argv, *options])
            plan = cli.plan()
        need = plan.highest.bytes / GB
        yield f"It fits {card:g} GB with {' '.join(_last_values(options))}: {need:.1f} GB."


def _last_values(options: Sequence[str]) -> list[str]:
    """Options and their values, of those that are there several times the last."""
    return [word for pair in dict(zip(options[::2], options[1::2], strict=True)).items() for word in pair]


def _data_settings(data: Any) -> Iterator[Any]:
    """The settings of the data module, and those of its parts in a mixture."""
    yield data.init_args
    for part in (data.init_args.get("tasks") or {}).values():
        yield part.init_args


def _num_devices(devices: Any) -> int:
    """How many devices the trainer is told to use; where it is to find out itself, one."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    return len(text.split(",")) if "," in text else int(text) if text.isdecimal() else 1
