"""The commands that are interrupted: how each begins, how it goes on, what comes of it, and what it may never leave."""

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import datasets
import yaml
from PIL import Image, ImageDraw

from campaigns.results import Result, files, is_draft, training
from perception_r1.policy.checkpoint_file import load_file

_SMALL = [
    *("--trainer.max_steps=6", "--trainer.val_check_interval=2", "--data.batch_size=2", "--data.eval_batch_size=3"),
    *("--data.num_val=4", "--data.num_test=4", "--log_samples.num_samples=1", "--model.max_new_tokens=32"),
    "--model.optimizer.lr=0.001",
]
"""What makes a training a matter of seconds, in which every step changes all weights."""
_GRPO = ["--model.group_size=4", "--model.temperature=1.0", "--model.kl_coef=0.04"]
_NUM_PICTURES = 24
SIZE = (112, 84)
"""Width and height of the pictures."""


@dataclass(frozen=True, kw_only=True)
class Scenario(ABC):
    """A command, which works in a folder of its own.

    Attributes:
        name: Of the scenario.
        inputs: Folder of what the commands read, see `make_inputs`.
        options: Of the command line, besides those of the kind.
    """

    name: str
    inputs: Path
    options: tuple[str, ...] = ()
    num_processes = 1

    @abstractmethod
    def argv(self, folder: Path) -> list[str]:
        """The command line with which a user begins, or goes on from what is in the folder."""

    @abstractmethod
    def result(self, folder: Path) -> Result:
        """What has come of it in the end."""

    @abstractmethod
    def faults(self, folder: Path, reference: Result) -> list[str]:
        """What an interruption has left there under the name of something whole."""

    def is_done(self, folder: Path) -> bool:
        """Whether all is there, though the signal came before the end, so that the command would not begin again."""
        return False


@dataclass(frozen=True, kw_only=True)
class Training(Scenario):
    """`fit`, which goes on with `--ckpt_path last`."""

    @property
    def num_processes(self) -> int:  # type: ignore[override]
        """How many train together."""
        return 2 if "--trainer.devices=2" in self.options else 1

    def argv(self, folder: Path) -> list[str]:
        """See `Scenario`."""
        going_on = ["--ckpt_path", "last"] if list(folder.glob("logs/run/*/checkpoints/last.ckpt")) else []
        return ["fit", "--run_name=run", *_SMALL, *self.options, *going_on]

    def result(self, folder: Path) -> Result:
        """See `Scenario`."""
        return training(folder / "logs" / "run")

    def faults(self, folder: Path, reference: Result) -> list[str]:
        """See `Scenario`."""
        found = []
        readers = {
            "checkpoints/*.ckpt": load_file,
            "*.json": lambda path: json.loads(path.read_text(encoding="utf-8")),
            "*.yaml": lambda path: yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["class_path"],
            "samples/**/*.png": lambda path: Image.open(path).load(),
        }
        for pattern, read in readers.items():
            paths = folder.glob(f"logs/run/*/{pattern}")
            for path in (path for path in paths if not is_draft(path)):
                try:
                    read(path)
                except Exception as error:
                    found.append(f"{path.relative_to(folder)} is half a file ({type(error).__name__}: {error})")
        return found


@dataclass(frozen=True, kw_only=True)
class Evaluation(Scenario):
    """`test`, which goes on where it was."""

    def argv(self, folder: Path) -> list[str]:
        """See `Scenario`."""
        checkpoint = self.inputs / "run" / "checkpoints" / "best.ckpt"
        small = ["--data.num_test=30", "--data.eval_batch_size=3", "--model.max_new_tokens=32"]
        return ["test", "--run_name=run", "--task=grounding", f"--ckpt_path={checkpoint}", *small, *self.options]

    def result(self, folder: Path) -> Result:
        """See `Scenario`."""
        (run,) = folder.glob("logs/run/*")
        return {name: text for name, text in files(run).items() if Path(name).suffix in (".json", ".jsonl", ".md")}

    def faults(self, folder: Path, reference: Result) -> list[str]:
        """See `Scenario`; the files of the end are there whole, or not at all."""
        found = files(folder / "logs" / "run", "*/*") if (folder / "logs" / "run").exists() else {}
        names = {path.partition("/")[2]: text for path, text in found.items()}
        return [f"{name} is half a file" for name in reference if names.get(name, reference[name]) != reference[name]]


@dataclass(frozen=True, kw_only=True)
class Prediction(Scenario):
    """`predict`, which begins anew into another folder."""

    def argv(self, folder: Path) -> list[str]:
        """See `Scenario`."""
        out = folder / f"answers-{len(list(folder.glob('answers-*')))}"
        return ["predict", str(self.inputs / "run"), str(self.inputs / "pictures"), "--query=red ring", f"--out={out}"]

    def result(self, folder: Path) -> Result:
        """See `Scenario`."""
        number = max(int(path.name.rpartition("-")[2]) for path in folder.glob("answers-*"))
        return files(folder / f"answers-{number}")

    def faults(self, folder: Path, reference: Result) -> list[str]:
        """See `Scenario`; answers come line by line, of which the last one may be cut."""
        found = []
        for path in folder.glob("answers-*/*.png"):
            if files(path.parent, path.name)[path.name] != reference[path.name]:
                found.append(f"{path.relative_to(folder)} is half a picture")
        for path in folder.glob("answers-*/predictions.jsonl"):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            found += [f"{path.relative_to(folder)} has a broken line" for line in lines[:-1] if not _is_json(line)]
        return found


@dataclass(frozen=True, kw_only=True)
class Export(Scenario):
    """`export`, which begins anew into the same folder."""

    def argv(self, folder: Path) -> list[str]:
        """See `Scenario`."""
        return ["export", str(self.inputs / "run"), "--to=model", *self.options]

    def result(self, folder: Path) -> Result:
        """See `Scenario`."""
        return files(folder / "model")

    def faults(self, folder: Path, reference: Result) -> list[str]:
        """See `Scenario`."""
        is_whole = not (folder / "model").exists() or self.result(folder) == reference
        return [] if is_whole else ["the exported folder is half of one"]

    def is_done(self, folder: Path) -> bool:
        """See `Scenario`."""
        return (folder / "model").exists()


@dataclass(frozen=True, kw_only=True)
class Conversion(Scenario):
    """`data convert` of a table with pictures in it, which begins anew into the same folder."""

    def argv(self, folder: Path) -> list[str]:
        """See `Scenario`."""
        return ["data", "convert", "--task=counting", "-c", str(self.inputs / "table.yaml"), "--to=lines"]

    def result(self, folder: Path) -> Result:
        """See `Scenario`."""
        return files(folder / "lines")

    def faults(self, folder: Path, reference: Result) -> list[str]:
        """See `Scenario`; once the rows are there, so are all pictures."""
        is_whole = not self.is_done(folder) or self.result(folder) == reference
        return [] if is_whole else ["data.jsonl is there, and not all is"]

    def is_done(self, folder: Path) -> bool:
        """See `Scenario`."""
        return any(folder.glob("lines/*/data.jsonl"))


@dataclass(frozen=True, kw_only=True)
class Fetch(Scenario):
    """`data fetch`, which fetches the rest.

    Attributes:
        server: Address of the pictures, see `web.serving`.
    """

    server: str

    def argv(self, folder: Path) -> list[str]:
        """See `Scenario`."""
        config = folder / "urls.yaml"
        if not config.exists():
            write_urls(folder / "urls.parquet", self.inputs / "pictures", self.server)
            init = {"path": str(folder / "urls.parquet"), "images": str(folder / "images")}
            source = {"pictures": {"class_path": "PixMoCount", "init_args": init}}
            config.write_text(yaml.safe_dump({"data": {"init_args": {"train": source}}}))
        return ["data", "fetch", "--task=counting", "-c", "urls.yaml", "--num_threads=2"]

    def result(self, folder: Path) -> Result:
        """See `Scenario`."""
        return {name: text for name, text in files(folder / "images").items() if not name.startswith(".")}

    def faults(self, folder: Path, reference: Result) -> list[str]:
        """See `Scenario`; a name tells what is in a file."""
        there = [path for path in folder.glob("images/*") if not path.name.startswith(".")]
        return [
            f"images/{path.name} is half a file" for path in there if sha256(path.read_bytes()).hexdigest() != path.name
        ]


def scenarios(inputs: Path, server: str) -> list[Scenario]:
    """All of them; those that read a run need the first one's, see `make_inputs`."""
    own = (f"--data.train_file={inputs / 'rows.jsonl'}", "--data.num_workers=2")
    two = ("--trainer.devices=2", "--trainer.strategy=ddp")
    grpo = ("--task=grounding", *_GRPO)
    trainings: dict[str, Sequence[str]] = {
        "GRPO": grpo,
        "supervised": ("--task=counting", "--variant=sft", "--model.max_new_tokens=64"),
        "two updates": (*grpo, "--model.num_iterations=2"),
        "LoRA": (*grpo, "--variant=lora", "--model.policy.lora.r=4"),
        "growing groups": (*grpo, "--model.group_size=2", "--model.final_group_size=4"),
        "own data with workers": ("--task=detection", *_GRPO, *own),
        "two processes": (*grpo, *two),
    }
    found: list[Scenario] = [
        Training(name=name, inputs=inputs, options=tuple(options)) for name, options in trainings.items()
    ]
    return [
        *found,
        Evaluation(name="evaluation", inputs=inputs),
        Prediction(name="predict", inputs=inputs),
        Export(name="export", inputs=inputs),
        Conversion(name="convert", inputs=inputs),
        Fetch(name="fetch", inputs=inputs, server=server),
    ]


def make_inputs(folder: Path) -> None:
    """Pictures, rows and a table; nothing where they are there."""
    if (folder / "table.yaml").exists():
        return
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    draw, rows = random.Random(0), []
    for number in range(_NUM_PICTURES):
        boxes = [_box(draw) for _ in range(1 + number % 3)]
        picture(folder / "pictures" / f"{number}.png", boxes)
        objects = [{"box": box, "label": draw.choice(["red ring", "blue square"])} for box in boxes]
        rows.append({"image": f"pictures/{number}.png", "objects": objects})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pages = [{"bytes": (folder / str(row["image"])).read_bytes(), "path": None} for row in rows]
    table = {"image": pages, "label": ["ring"] * len(pages), "count": [3] * len(pages)}
    datasets.Dataset.from_dict(table).to_parquet(folder / "table.parquet")
    columns = {"image": "image", "label": "label", "count": "count"}
    source = {"class_path": "Hub", "init_args": {"path": str(folder / "table.parquet"), "columns": columns}}
    (folder / "table.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"train": {"table": source}}}}))


def write_urls(table: Path, pictures: Path, server: str) -> None:
    """A table of pictures by their addresses, as PixMo-Count has them."""
    found = sorted(pictures.glob("*.png"))
    digests = [sha256(path.read_bytes()).hexdigest() for path in found]
    columns = {"image_url": [f"{server}/{path.name}" for path in found], "image_sha256": digests}
    columns |= {"label": ["ring"] * len(found), "count": [3] * len(found)}
    datasets.Dataset.from_dict(columns).to_parquet(table)


def picture(path: Path, boxes: Sequence[Sequence[int]] = ()) -> Path:
    """A picture with rings where boxes are, and one pixel that makes it different from any other."""
    image = Image.new("RGB", SIZE, (200, 200, 190))
    draw = ImageDraw.Draw(image)
    for box in boxes:
        draw.ellipse(tuple(box), outline=(200, 30, 30), width=4)
    image.putpixel((0, 0), tuple(sha256(path.name.encode()).digest()[:3]))
    image.save(path)
    return path


def _box(draw: random.Random) -> list[int]:
    x, y = draw.randint(0, 70), draw.randint(0, 50)
    return [x, y, x + draw.randint(16, 40), y + draw.randint(16, 32)]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
