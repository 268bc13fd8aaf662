"""The documentation is true: every command in it is run or checked, every file that it names is there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perception_r1.cli import main
from perception_r1.data.samples import load
from perception_r1.data.sources import JsonLines
from perception_r1.tasks import TASKS
from tests.public_data import from_the_hub, make_coco, make_fox, make_pageocr, make_refcoco
from tests.readme import ROOT, blocks, commands

COMMANDS = list(dict.fromkeys(commands("README.md") + commands("CONTRIBUTING.md")))
SMALL = shlex.split(
    "--trainer.accelerator cpu --trainer.devices 1 --trainer.max_steps 2 --trainer.val_check_interval 2"
    " --data.train_take all --data.batch_size 2 --data.eval_batch_size 2 --data.num_workers 0"
    " --data.num_val 2 --data.num_test 2 --model.max_new_tokens 4 --embedded.max_steps 2"
)
"""What makes a training of any task a matter of a second."""
BARE = ["--log_samples.num_samples", "0", "--before_after.enabled", "false"]
"""What makes it shorter still, where nobody looks at the results."""
FAMILIES = {
    "Qwen/Qwen2-VL-2B-Instruct": "qwen2_vl",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2_vl",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3_vl",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl",
}
"""Hub ids of the documentation; a tiny model of the same family stands for each."""
KEYS = {"grounding": "question", "counting": "label", "detection": "objects", "ocr": "text"}
"""A key by which an example row can be told from those of other tasks."""
PUBLIC: dict[str, Callable[[Path], None]] = {
    "coco": make_coco,
    "refcoco": make_refcoco,
    "fox": make_fox,
    "pageocr": make_pageocr,
    "pixmo_count": lambda root: None,
}
"""What makes the public data sets of commands."""
EXPORTED = "supervised"
"""The folder that a command exports a model to and another one trains."""
FIFTH_TASK = "TASK=colour"
"""The task that is not in the repository; `test_fifth_task.py` runs its command."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: like the repository's root, but what is written there is lost."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["perception-r1"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seeding everything sets it; so it is restored
    monkeypatch.setattr(datasets, "load_dataset", from_the_hub(tmp_path / "data"))
    return tmp_path


@pytest.mark.parametrize("command", [command for command in COMMANDS if FIFTH_TASK not in command])
def test_command_works(
    command: str,
    place: Path,
    cache: Path,
    model_folders: dict[str, Path],
    run_folder: Path,
    runs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in expanded(command):
        program = Path(arguments[0]).name
        if program == "perception-r1" and arguments[1] in RUN_RULES:
            put_run(arguments, place, runs["lora"] if "--adapter" in arguments else run_folder)
            RUN_RULES[arguments[1]](arguments[1:], place, model_folders, capsys)
        elif program == "perception-r1":
            check_own_command(arguments[1:], place, cache, model_folders, capsys)
        elif program in RULES:
            RULES[program](arguments)
        else:
            pytest.fail(f"no rule covers {shlex.join(arguments)}")


def test_an_unknown_command_would_fail() -> None:
    assert "curl" not in RULES


def test_the_fifth_task_is_in_the_readme() -> None:
    assert [command for command in COMMANDS if FIFTH_TASK in command]


def test_every_example_row_can_be_read(place: Path) -> None:
    rows = example_rows()
    assert {task_of(row) for row in rows} == set(TASKS)
    for number, row in enumerate(rows):
        if "completion" not in row:
            path = place / f"{number}.jsonl"
            write_rows(path, [row])
            assert len(load(JsonLines(path), TASKS[task_of(row)]())) == 1


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Path]:
    """The folder of a training with the first command's configuration."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        place = tmp_path_factory.mktemp("run")
        (place / "configs").symlink_to(ROOT / "configs")
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["perception-r1"])
        monkeypatch.setenv("PL_GLOBAL_SEED", "0")
        (arguments,) = (found for found in expanded("make train TASK=counting") if "fit" in found)
        assert main([*arguments[1:], *SMALL, "--embedded.cache_dir", str(cache)]) == 0
        yield place / "logs" / "counting" / "version_0"


def test_every_file_of_a_run_is_there(run_folder: Path) -> None:
    names = [name for name in table_names("A run leaves") if not name.endswith("...")]
    assert len(names) >= 5
    assert [name for name in names if not (run_folder / name).exists()] == []


def test_every_tag_is_logged(run_folder: Path) -> None:
    events = EventAccumulator(str(run_folder))
    events.Reload()
    logged = {*events.Tags()["scalars"], *events.Tags()["images"]}
    tags = table_names("Every step is logged")
    assert len(tags) >= 20
    missing = [tag for tag in tags if not any(re.fullmatch(re.sub(r"[A-Z]+", r"\\w+", tag), name) for name in logged)]
    assert missing == []


def test_tree_names_files_that_exist_and_all_of_the_package() -> None:
    tree = [path for block in blocks("README.md", "text") if "pyproject.toml" in block for path in tree_paths(block)]
    assert [path for path in tree if not (ROOT / path).exists()] == []
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "src" / "perception_r1").rglob("*.py")}
    assert {path for path in package if not path.endswith("__init__.py")} <= set(tree)
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs <= set(tree)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/golden/README.md"])
def test_links_lead_to_files(document: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    assert [link for link in local if not ((ROOT / document).parent / link).exists()] == []


def test_paths_of_contributing_exist() -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    paths = re.findall(r"`([\w./-]+(?:/|\.py|\.yaml|\.md)[\w./-]*)`", text)
    places = [ROOT, ROOT / "src" / "perception_r1", ROOT / "configs"]
    unknown = [path for path in paths if not any((place / path).exists() for place in places)]
    assert len(paths) > 10
    assert set(unknown) == {"NAME.py", "NAME.yaml"}


def test_every_model_file_is_known_to_these_tests() -> None:
    names = [policy_name(["-c", str(path)]) for path in (ROOT / "configs" / "model").glob("*.yaml")]
    assert {name for name in names if name is not None} == {"tiny", *FAMILIES}


# ------------------------------------------------------------------------------------------------- commands


def expanded(command: str) -> list[list[str]]:
    """The commands that a line stands for: what make would do, or the line itself."""
    arguments = shlex.split(command)
    if arguments[0] != "make":
        return [arguments]
    outside = ("TASK", "MODEL", "DATA", "SEED", "CKPT", "ARGS", "PYTHON", "TORCH", "MAKE", "MFLAGS")
    outside += ("RUN", "TO", "IMAGES", "RECIPE", "VARIANT")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    done = subprocess.run(
        ["make", "-n", *arguments[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith("make")]
    return [shlex.split(line) for line in lines]


def check_own_command(
    arguments: list[str],
    place: Path,
    cache: Path,
    model_folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run perception-r1 in this process."""
    if any(argument in ("--print_config", "--help") or argument.endswith(".help") for argument in arguments):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        assert capsys.readouterr().out
        return
    write_data(arguments, place)
    if arguments[0] == "score":
        assert main(arguments) == 0
        assert [json.loads(line)["reward"] > 1 for line in capsys.readouterr().out.splitlines()] == [True]
        return
    arguments = [*arguments, *SMALL, *BARE, "--embedded.cache_dir", str(cache)]
    name = policy_name(arguments)
    if name != "tiny":
        family = "qwen2_vl" if name == EXPORTED else FAMILIES[name or ""]
        arguments += ["--model.policy.name", str(model_folders[family])]
    if arguments[0] == "data":
        assert main(arguments) == (1 if arguments[1] == "fetch" else 0)  # nothing can be fetched here
        assert capsys.readouterr().out
        return
    if option(arguments, "--ckpt_path") in ("last", "best"):
        at = arguments.index("--ckpt_path")
        assert main(["fit", *arguments[1:at], *arguments[at + 2 :]]) == 0
        arguments += ["--trainer.max_steps", "3"]
    assert main(arguments) == 0
    check_results(arguments, place)


def check_results(arguments: list[str], place: Path) -> None:
    """What a command leaves behind."""
    name = option(arguments, "--task") or task_name(arguments)
    runs = place / "logs" / (f"{name}-sft" if "configs/variant/sft.yaml" in " ".join(arguments) else name)
    if arguments[0] == "fit":
        (path,) = runs.glob("version_*/run.json")
        card = json.loads(path.read_text(encoding="utf-8"))
        assert (card["status"], card["steps"]) == ("finished", int(option(arguments, "--trainer.max_steps") or 0))
        assert (card["resumed_from"] is not None) == (option(arguments, "--ckpt_path") == "last")


def put_run(arguments: Sequence[str], place: Path, source: Path) -> None:
    """The run that a command names."""
    for argument in arguments:
        if argument.startswith("logs/"):
            (place / argument).parent.mkdir(parents=True)
            (place / argument).symlink_to(source)


def check_predict(
    arguments: list[str], place: Path, model_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two pictures where a folder is named, answers in a few tokens."""
    pictures = [argument for argument in arguments if argument.startswith("photos")]
    for path in [place / name for name in pictures]:
        files = [path] if path.suffix else [path / "1.jpg", path / "2.png"]
        for file in files:
            file.parent.mkdir(exist_ok=True)
            Image.new("RGB", (120, 90), (40, 90, 160)).save(file)
    models = [str(model_folders[FAMILIES[name]]) if name in FAMILIES else name for name in arguments]
    assert main([*models, "--max_new_tokens", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == sum(1 if Path(name).suffix else 2 for name in pictures) > 0
    out = option(arguments, "--out")
    assert out is None or len(list((place / out).iterdir())) == len(lines) + 1


def check_export(
    arguments: list[str], place: Path, model_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with weights and a card."""
    assert main(arguments) == 0
    folder = place / str(option(arguments, "--to"))
    assert (folder / "README.md").exists()
    assert len(list(folder.glob("*.safetensors"))) == 1


RUN_RULES: dict[str, Callable[..., None]] = {"predict": check_predict, "export": check_export}
"""Commands that start from a run, and how they are checked."""


def has_tool(arguments: list[str]) -> None:
    """The program is installed beside this Python; the paths that it is given exist."""
    assert (Path(sys.executable).parent / Path(arguments[0]).name).exists()
    paths = [argument for argument in arguments[1:] if "/" in argument and not argument.startswith("-")]
    assert [path for path in paths if not (ROOT / path).exists()] == []


SMALLER = {
    "engine": ["--sizes", "100,4", "--group-sizes", "2", "--rounds", "1", "--other-rounds", "1"],
    "gpu": ["--smoke"],
    "memory": ["--models", "smoke", "--prompts", "400"],
}
"""Options with which a program of benchmarks/ is done in seconds."""


def run_benchmark(arguments: list[str]) -> None:
    """A program of benchmarks/ from end to end, in its smallest form, away from the committed results."""
    name = Path(arguments[1]).stem
    if name == "learning":
        run_learning(arguments)
        return
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "results.json"
        done = subprocess.run(
            [sys.executable, *arguments[1:], *SMALLER[name], "--results", str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results = json.loads(path.read_text(encoding="utf-8"))
        assert len(results.get("cells") or results.get("runs") or results["rows"]) == 1
        assert "| P | " in done.stdout


def run_learning(arguments: list[str]) -> None:
    """With runs of two steps."""
    with tempfile.TemporaryDirectory() as place:
        small = shlex.join([*SMALL, "--embedded.cache_dir", place])
        done = subprocess.run(
            [sys.executable, *arguments[1:], "--runs", place, "--results", place, "--options", small],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (row,) = json.loads((Path(place) / "learning.json").read_text(encoding="utf-8"))["rows"]
        assert (row["task"], row["variant"], row["seed"], row["steps"]) == ("ocr", "grpo", 0, 2)
        assert done.stdout == (Path(place) / "learning.md").read_text(encoding="utf-8")


def is_on_path(arguments: list[str]) -> None:
    assert shutil.which(arguments[0])


RULES: dict[str, Callable[[list[str]], None]] = {
    **dict.fromkeys(("pip", "pytest", "ruff", "mypy", "tensorboard", "pre-commit"), has_tool),
    **dict.fromkeys(("python3", "touch"), is_on_path),
    "python": run_benchmark,
}
"""How programs that are not run here are checked."""


def option(arguments: Sequence[str], name: str) -> str | None:
    """The last value of an option."""
    values = [value for key, value in pairwise(arguments) if key == name]
    return values[-1] if values else None


def task_name(arguments: Sequence[str]) -> str:
    """The task of a command line, from the file of configs/task."""
    (name,) = re.findall(r"configs/task/(\w+)\.yaml", " ".join(arguments))
    return name


def policy_name(arguments: Sequence[str]) -> str | None:
    """The model of a command line: its last word on `model.policy.name`."""
    name: str | None = None
    for key, value in pairwise(arguments):
        if key == "-c":
            config: dict[str, Any] = yaml.safe_load((ROOT / value).read_text(encoding="utf-8")) or {}
            policy = config.get("model", {}).get("init_args", {}).get("policy", {})
            name = policy.get("name", name)
        elif key == "--model.policy.name":
            name = value
    return name


# ------------------------------------------------------------------------------------------------ documents


def example_rows() -> list[dict[str, Any]]:
    """The rows of the README's JSON blocks."""
    return [json.loads(line) for block in blocks("README.md", "json") for line in block.splitlines()]


def task_of(row: dict[str, Any]) -> str:
    (task,) = (task for task, key in KEYS.items() if key in row)
    return task


def write_data(arguments: Sequence[str], place: Path) -> None:
    """Every JSON-lines file that a command names, made of the README's rows for its task; public data sets in small."""
    for name in re.findall(r"configs/data/(\w+)\.yaml", " ".join(arguments)):
        PUBLIC[name](place / "data")
    is_score = arguments[0] == "score"
    task = option(arguments, "--task") if is_score else task_name(arguments)
    rows = [row for row in example_rows() if task_of(row) == task and ("completion" in row) == is_score]
    for path in [place / argument for argument in arguments if argument.endswith(".jsonl")]:
        copies = 1 if is_score else max(2, 6 // len(rows))
        write_rows(path, [numbered(row, path.stem, copy) for copy in range(copies) for row in rows])


def numbered(row: dict[str, Any], stem: str, copy: int) -> dict[str, Any]:
    """The row with an image of its own, so that images can be held out."""
    return {**row, "image": f"{stem}-{copy}-{row['image']}"} if "image" in row else row


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A data file and its pictures."""
    for index, row in enumerate(rows):
        if "image" in row:
            image = path.parent / row["image"]
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (420, 252), (index % 256, 90, 160)).save(image)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table_names(before: str) -> list[str]:
    """The names in the first column of the README's first table after some words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(before)[2]
    cells = [line.split("|")[1] for line in text.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    first = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert first is not None
    rows = [line.split("|")[1] for line in first[0].splitlines()]
    return [name for cell in cells if cell in rows for name in re.findall(r"`([^`]+)`", cell)]


def tree_paths(block: str) -> list[str]:
    """The paths of an indented tree, two spaces a level."""
    folders: list[str] = []
    paths = []
    for line in block.splitlines():
        name = line.split()[0]
        level = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:level], name]
        paths.append("".join(folders))
    return paths
