"""`perception-r1 predict`: what a run or a model answers to pictures, as JSON lines and, if wanted, drawn on them."""

import json
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, Literal

import jsonargparse
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from rich.console import Console

from perception_r1.callbacks.log_samples import answer_fields
from perception_r1.commands.answers import PictureBatch, answer_images, find_images
from perception_r1.commands.engine import HELP, read_engine
from perception_r1.commands.options import (
    check_unused,
    first_positional,
    known,
    make_task,
    new_parser,
    option_value,
    parse,
    run_command,
    task_values,
)
from perception_r1.commands.runs import Run, is_run, open_policy, open_run
from perception_r1.data.loading import load_sample_image
from perception_r1.displays import Display, Lines, open_display
from perception_r1.drawing import annotate, draw_card
from perception_r1.engines import GenerationEngine
from perception_r1.errors import UserError
from perception_r1.locks import locked
from perception_r1.modules.evaluation import EvaluationModule
from perception_r1.policy.load import PolicyConfig
from perception_r1.scoring import ParsedCompletion
from perception_r1.task import Task, tasks_of
from perception_r1.tasks import TASKS

Precision = Literal["32-true", "bf16-mixed", "bf16-true", "64-true"]
"""Precisions of the trainer in which a policy can answer."""
_MAX_NEW_TOKENS = 2048
"""Longest completion of a model that comes without a run, that of `configs/task` where answers are longest."""
_MAX_STEM = 200
"""Bytes of the name of a picture that is written: file systems take 255, and a number and the kind come behind it."""
_LINE_SECONDS = 20.0
"""Longest time between two plain lines of progress."""


def main(argv: Sequence[str]) -> int:
    """Answer pictures; the result is the exit status: 1 when some, named on stderr, could not be answered."""
    return run_command("predict", _predict, argv)


def _predict(argv: Sequence[str]) -> int:
    engine, argv = read_engine(argv)
    source = first_positional(argv)
    run = open_run(Path(source)) if source is not None and is_run(Path(source)) else None
    name = option_value(argv, "--task")
    task_class: type[Task[Any, Any]] | None = None
    defaults: dict[str, Any] = {}
    trained = {} if run is None else {task.name: task for task in tasks_of(run.task).values()}
    if name in trained or (name is None and len(trained) == 1):
        own = trained[name or next(iter(trained))]
        task_class, defaults = type(own), asdict(own)
    elif name is not None:
        task_class = known("--task", name, TASKS)
    options = parse(_parser(task_class, defaults), argv)
    if task_class is None:
        raise UserError(f"--task is needed where no run tells it: one of {', '.join(trained or TASKS)}")
    task = make_task(task_class, task_values(task_class, options))
    query = _query(task, options.query)
    paths = find_images(options.pictures)
    with ExitStack() as stack:
        if options.out is not None:
            stack.enter_context(locked(options.out, "a prediction"))
            check_unused("--out", options.out)
        module, precision = _load(run, task, options, engine)
        files, console = [sys.stdout], Console(stderr=True)  # a bar on the terminal redirects sys.stdout
        # bars and JSON lines on one terminal would overwrite each other
        display = Lines(console, _LINE_SECONDS) if sys.stdout.isatty() else open_display(console, _LINE_SECONDS)
        stack.callback(display.close)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            files.append(stack.enter_context((options.out / "predictions.jsonl").open("w", encoding="utf-8")))
        display.start("pictures", 0, len(paths))
        writer = _Writer(task, files, console, display, options.out)
        answer_images(module, paths, query=query, precision=precision, callback=writer)
    if writer.num_failed:
        sys.stderr.write(f"{writer.num_failed} of {len(paths)} pictures could not be answered.\n")
    return int(writer.num_failed > 0)


def _parser(task_class: type[Task[Any, Any]] | None, defaults: dict[str, Any]) -> jsonargparse.ArgumentParser:
    """The options, those of the task with the values that the run had."""
    parser = new_parser(
        "predict",
        "Answer pictures: one JSON line each on stdout, boxes in pixels of the upright picture.",
        "With a run or --task, this help also shows the options of the task.",
    )
    parser.add_argument("model", help="Folder of a run, or a model: hub id or folder in the hub's layout.")
    parser.add_argument("pictures", type=Path, nargs="+", help="Pictures, or folders of pictures.")
    parser.add_argument("--task", type=str | None, help=f"One of {', '.join(TASKS)}; a run knows its own.")
    parser.add_argument("--query", type=str | None, help='What the prompt asks for, where it asks: "red cup".')
    parser.add_argument("--ckpt", type=str | None, help="Checkpoint of a run: best (the default), last, or a file.")
    parser.add_argument("--out", type=Path | None, help="Folder for annotated pictures and predictions.jsonl.")
    parser.add_argument("--precision", type=Precision | None, help="Of the trainer; else that of the run, or 32-true.")
    parser.add_argument("--max_new_tokens", type=int | None, help="Longest completion; else that of the run.")
    parser.add_argument("--min_pixels", type=int | None, help="Smaller pictures are enlarged to this many pixels.")
    parser.add_argument("--max_pixels", type=int | None, help="Larger pictures are shrunk to this many pixels.")
    parser.add_argument("--engine", type=str | None, help=HELP)  # see commands/engine.py
    if task_class is not None:
        parser.add_class_arguments(task_class, as_group=True)
        parser.set_defaults(defaults)
    return parser


def _query(task: Task[Any, Any], query: str | None) -> str:
    """What fills the slot of the task's prompt; nothing when it has none.

    Raises:
        UserError: The query is missing, or has no place in the prompt.
    """
    has_slot = task.prompt("a") != task.prompt("b")
    if has_slot and not query:
        raise UserError(f"--query is needed: {task.name} asks {task.prompt('{query}')!r}")
    if query and not has_slot:
        raise UserError(f"--query has no place in the prompt of {task.name}, {task.prompt('')!r}: leave it out")
    return query or ""


def _load(
    run: Run | None, task: Task[Any, Any], options: jsonargparse.Namespace, engine: GenerationEngine | None
) -> tuple[EvaluationModule, str]:
    """The module with its policy, and the precision in which it answers.

    Raises:
        UserError: The model or the checkpoint cannot be used, or a number is out of range.
    """
    max_new_tokens = options.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = _MAX_NEW_TOKENS if run is None else run.max_new_tokens
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {max_new_tokens}; it must be 1 or more")
    config = PolicyConfig(name=options.model) if run is None else run.policy
    given = {name: options[name] for name in ("min_pixels", "max_pixels") if options[name] is not None}
    module = EvaluationModule(task, policy=replace(config, **given), engine=engine, max_new_tokens=max_new_tokens)
    module.policy = open_policy(run, module.policy_config, ckpt=options.ckpt, engine=module.engine)
    return module, options.precision or ("32-true" if run is None else run.precision)


class _Writer(Callback):
    """Writes answers as they come, problems to stderr and progress beside them."""

    def __init__(
        self, task: Task[Any, Any], files: Sequence[IO[str]], console: Console, display: Display, out: Path | None
    ) -> None:
        self.task, self.files, self.console, self.display, self.out = task, files, console, display, out
        self.num_done = self.num_failed = 0

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PictureBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Write what is known about the pictures of a batch."""
        for problem in batch.problems:
            self.console.print(problem, soft_wrap=True, highlight=False, markup=False)
        for parsed in outputs:
            self._write(parsed)
        self.num_failed += len(batch.problems)
        self.num_done += len(outputs) + len(batch.problems)
        self.display.advance("pictures", self.num_done, {})
        if trainer.received_sigterm:  # the trainer itself heeds it in training and test alone
            raise SystemExit(128 + signal.SIGTERM)

    def _write(self, parsed: ParsedCompletion) -> None:
        """One answer as a line of JSON, in ASCII, so that no character of a completion can break the line."""
        record = {
            "image": parsed.sample.id,
            "query": parsed.sample.query,
            "completion": parsed.completion,
            "prediction": self.task.serialize_prediction(parsed.prediction, parsed.image_size),
        }
        line = json.dumps(record, allow_nan=False) + "\n"
        for file in self.files:
            file.write(line)
            file.flush()
        if self.out is not None:
            draw(parsed, self.task).save(_free_name(self.out, Path(parsed.sample.id).stem))


def draw(parsed: ParsedCompletion, task: Task[Any, Any]) -> Image.Image:
    """The picture with what was predicted on it; of a task without overlays a card with the words."""
    image = load_sample_image(parsed.sample).image
    if type(task).overlays is Task.overlays:
        fields = {"prompt": task.prompt(parsed.sample.query), **answer_fields(task, parsed)}
        return draw_card(image, title=Path(parsed.sample.id).name, fields=fields)
    return annotate(image, [], [] if parsed.prediction is None else task.overlays(parsed.prediction))


def _free_name(folder: Path, stem: str) -> Path:
    """A file for a picture; pictures of one name from different folders are numbered."""
    stem = stem.encode()[:_MAX_STEM].decode(errors="ignore")
    path, number = folder / f"{stem}.png", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.png", number + 1
    return path
