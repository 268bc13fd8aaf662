"""The documentation is true: every command in it is run or checked, and runs log and leave behind what it says."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perception_r1.cli import main
from perception_r1.commands import serve
from perception_r1.commands.engine import read_engine
from perception_r1.data.samples import load
from perception_r1.data.sources import JsonLines
from perception_r1.tasks import TASKS
from tests.hub import reachable
from tests.public_data import from_the_hub
from tests.readme import DOCUMENTS, ROOT, commands, names, repeated, table
from tests.readme_data import example_rows, option, task_of, write_data, write_rows

COMMANDS = list(dict.fromkeys(command for document in DOCUMENTS for command in commands(document)))
REPEATED = repeated(COMMANDS)
"""Trainings that choose nothing new: their configuration is composed, and that is all."""
SHORT = shlex.split(
    "--trainer.accelerator cpu --trainer.devices 1 --trainer.max_steps 2 --trainer.val_check_interval 2"
    " --data.batch_size 2 --data.global_batch_size null --data.eval_batch_size 2 --data.num_workers 0"
    " --model.max_new_tokens 4"
)
FEW = {"train_take": "all", "num_val": "2", "num_test": "2"}
SMALL = [*SHORT, *(word for name, value in FEW.items() for word in (f"--data.{name}", value))]
"""What makes a training of any task a matter of a second."""
SMALL_MIXTURE = [
    *SHORT,
    *(
        word
        for task in ("grounding", "counting", "detection", "ocr")
        for name, value in FEW.items()
        for word in (f"--data.tasks.{task}.init_args.{name}", value)
    ),
]
"""The same of all tasks."""
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
    "Qwen/Qwen3-VL-30B-A3B-Instruct": "qwen3_vl_moe",
    "Qwen/Qwen3.5-0.8B": "qwen3_5",
    "Qwen/Qwen3.5-2B": "qwen3_5",
    "Qwen/Qwen3.5-4B": "qwen3_5",
    "Qwen/Qwen3.5-9B": "qwen3_5",
    "Qwen/Qwen3.5-27B": "qwen3_5",
    "Qwen/Qwen3.5-35B-A3B": "qwen3_5_moe",
    "OpenGVLab/InternVL3-2B-hf": "internvl",
    "OpenGVLab/InternVL3-8B-hf": "internvl",
    "google/gemma-3-4b-it": "gemma3",
    "google/gemma-3-12b-it": "gemma3",
    "zai-org/GLM-4.1V-9B-Thinking": "glm4v",
    "zai-org/GLM-4.6V-Flash": "glm4v",
}
"""Hub ids of the documentation; a tiny model of the same family stands for each."""
EXPORTED = "supervised"
"""The folder that a command exports a model to and another one trains."""
FIFTH_TASK = "TASK=colour"
"""The task that is not in the repository; `test_fifth_task.py` runs its command."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: like the repository's root, but what is written there is lost."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["perception-r1"])
    monkeypatch.setattr(datasets, "load_dataset", from_the_hub(tmp_path / "data"))
    return tmp_path


def marked(command: str) -> Any:
    """Programs of benchmarks/, which take longer, and commands of other pages belong to the slow tests."""
    is_slow = "benchmarks/" in command or command not in commands("README.md")
    return pytest.param(command, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize("command", [marked(command) for command in COMMANDS if FIFTH_TASK not in command])
def test_command_works(
    command: str,
    place: Path,
    model_folders: dict[str, Path],
    run_folder: Path,
    runs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in expanded(command):
        program = Path(arguments[0]).name.rstrip(";")
        is_of_several_devices = "--trainer.strategy" in arguments  # `test_strategies.py` has these
        has_engine = "--engine" in arguments  # tests/engines/ has these
        if has_engine and arguments[1] == "predict":
            assert read_engine(arguments[2:])[0] is not None
        elif has_engine or is_of_several_devices or (command in REPEATED and arguments[1] == "fit"):
            check_output([*arguments[1:], "--print_config"], capsys)
        elif program == "perception-r1" and arguments[1] in RUN_RULES:
            put_run(arguments, place, runs["lora"] if "--adapter" in arguments else run_folder)
            RUN_RULES[arguments[1]](arguments[1:], place, model_folders, capsys)
        elif program == "perception-r1":
            check_own_command(arguments[1:], place, model_folders, capsys)
        elif program in RULES:
            RULES[program](arguments)
        else:
            pytest.fail(f"no rule covers {shlex.join(arguments)}")


def test_an_unknown_command_would_fail() -> None:
    assert "curl" not in RULES


def test_every_example_row_can_be_read(place: Path) -> None:
    rows = example_rows()
    assert {task_of(row) for row in rows} == set(TASKS)
    for number, row in enumerate(rows):
        if "completion" not in row:
            path = place / f"{number}.jsonl"
            write_rows(path, [row])
            assert len(load(JsonLines(path), TASKS[task_of(row)]())) == 1


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a training with the first command's configuration."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        place = tmp_path_factory.mktemp("run")
        (place / "configs").symlink_to(ROOT / "configs")
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["perception-r1"])
        monkeypatch.setenv("PL_GLOBAL_SEED", "0")
        (arguments,) = (found for found in expanded("make train TASK=counting") if "fit" in found)
        assert main([*arguments[1:], *SMALL]) == 0
        yield place / "logs" / "counting" / "version_0"


def test_every_file_of_a_run_is_there(run_folder: Path) -> None:
    files = [name for name in first_cells("| file |") if not name.endswith("...")]
    assert len(files) >= 5
    assert [name for name in files if not (run_folder / name).exists()] == []


def test_every_tag_is_logged(run_folder: Path) -> None:
    events = EventAccumulator(str(run_folder))
    events.Reload()
    logged = {*events.Tags()["scalars"], *events.Tags()["images"]}
    tags = first_cells("| tag |")
    assert len(tags) >= 20
    missing = [tag for tag in tags if not any(re.fullmatch(re.sub(r"[A-Z]+", r"\\w+", tag), name) for name in logged)]
    assert missing == []


def test_every_model_file_is_known_to_these_tests() -> None:
    assert {model_name(path) for path in (ROOT / "configs" / "model").glob("*.yaml")} == {"tiny", *FAMILIES}


# ------------------------------------------------------------------------------------------------- commands


def expanded(command: str) -> list[list[str]]:
    """The commands that a line stands for: what make would do, or the line itself."""
    arguments = shlex.split(command)
    if arguments[0] != "make":
        return [arguments]
    outside = ("TASK", "MODEL", "DATA", "SEED", "CKPT", "ARGS", "PYTHON", "TORCH", "MAKE", "MFLAGS")
    outside += ("RUN", "TO", "FROM", "REPO", "IMAGES", "RECIPE", "VARIANT", "PROTOCOL", "ENGINE", "VLLM")
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
    model_folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run perception-r1 in this process."""
    if any(argument in ("--print_config", "--help") or argument.endswith(".help") for argument in arguments):
        check_output(arguments, capsys)
        return
    write_data(arguments, place)
    if arguments[0] == "score":
        assert main(arguments) == 0
        assert [json.loads(line)["reward"] > 1 for line in capsys.readouterr().out.splitlines()] == [True]
        return
    small = SMALL_MIXTURE if option(arguments, "--task") == "all" else SMALL
    arguments = [*arguments, *small, *BARE]
    name = policy_name(arguments)
    if name == EXPORTED:
        (place / EXPORTED).symlink_to(model_folders["qwen2_vl"])
    elif name != "tiny":
        arguments += ["--model.policy.name", str(model_folders[FAMILIES[name]])]
    if arguments[0] == "data":
        assert main(arguments) == (1 if arguments[1] == "fetch" else 0)  # nothing can be fetched here
        assert capsys.readouterr().out
        return
    if option(arguments, "--ckpt_path") in ("last", "best"):
        at = arguments.index("--ckpt_path")
        assert main(["fit", *arguments[1:at], *arguments[at + 2 :]]) == 0
        arguments += ["--trainer.max_steps", "3"]
    assert main(arguments) == 0
    if arguments[0] == "fit":
        check_run(arguments, place)


def check_output(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A command that prints something and ends, by itself or in its parser."""
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 0
    assert capsys.readouterr().out


def check_run(arguments: list[str], place: Path) -> None:
    """What a training leaves behind."""
    is_sft = "sft" in [value for key, value in pairwise(arguments) if key == "--variant"]
    name = option(arguments, "--run_name") or f"{option(arguments, '--task')}{'-sft' * is_sft}"
    (path,) = (place / "logs" / name).glob("version_*/run.json")
    card = json.loads(path.read_text(encoding="utf-8"))
    assert (card["status"], card["steps"]) == ("finished", int(option(arguments, "--trainer.max_steps") or 0))
    assert (card["resumed_from"] is not None) == (option(arguments, "--ckpt_path") == "last")


def put_run(arguments: Sequence[str], place: Path, source: Path) -> None:
    """The run that a command names."""
    for argument in arguments:
        if argument.startswith("logs/"):
            (place / argument).parent.mkdir(parents=True, exist_ok=True)
            (place / argument).symlink_to(source)


def check_predict(
    arguments: list[str], place: Path, model_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two images where a folder is named, answers in a few tokens."""
    images = [argument for argument in arguments if argument.startswith("photos")]
    for path in [place / name for name in images]:
        files = [path] if path.suffix else [path / "1.jpg", path / "2.png"]
        for file in files:
            file.parent.mkdir(exist_ok=True)
            Image.new("RGB", (120, 90), (40, 90, 160)).save(file)
    models = [str(model_folders[FAMILIES[name]]) if name in FAMILIES else name for name in arguments]
    assert main([*models, "--max_new_tokens", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == sum(1 if Path(name).suffix else 2 for name in images) > 0
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


def check_report(
    arguments: list[str], place: Path, model_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A page that tells of all runs; tests/reporting/ looks into it."""
    assert main(arguments) == 0
    text = (place / (option(arguments, "--output") or "report.html")).read_text(encoding="utf-8")
    assert text.count('class="run"') == len([argument for argument in arguments if argument.startswith("logs/")])


def check_serve(
    arguments: list[str], place: Path, model_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its options; tests/commands/test_serve.py starts it."""
    assert serve.read_options(arguments[1:]).model == arguments[1]


def check_vllm(arguments: list[str]) -> None:
    """What vLLM is told to import can be imported; tests/engines/test_vllm.py starts its server."""
    module, _, name = str(option(arguments, "--worker-extension-cls")).rpartition(".")
    assert hasattr(import_module(module), name)


def check_push(
    arguments: list[str], place: Path, model_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A model with a card arrives on a hub of this machine."""
    folder, repo_id = place / arguments[1], arguments[2]
    shutil.copytree(model_folders["qwen2_vl"], folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    with reachable() as hub:
        assert main(arguments) == 0
        branch = option(arguments, "--revision") or "main"
        assert hub.folder(repo_id, branch) == {path.name: path.read_bytes() for path in folder.iterdir()}


RUN_RULES: dict[str, Callable[..., None]] = {
    "predict": check_predict,
    "export": check_export,
    "push": check_push,
    "report": check_report,
    "serve": check_serve,
}
"""Commands that start from a run, and how they are checked."""


def has_tool(arguments: list[str]) -> None:
    """The program is installed beside this Python; the paths that it is given exist."""
    assert (Path(sys.executable).parent / Path(arguments[0]).name).exists()
    paths = [argument for argument in arguments[1:] if "/" in argument and not argument.startswith("-")]
    assert [path for path in paths if not (ROOT / path).exists()] == []


SMALLER = {
    "engine": ["--sizes", "100,4", "--group-sizes", "2", "--rounds", "1", "--other-rounds", "1"],
    "gpu": ["--smoke"],
    "memory": ["--recipes", "grounding", "--trained", "LoRA"],
    "scale": [],
}
"""Options with which a program of benchmarks/ is done in seconds."""


def run_benchmark(arguments: list[str]) -> None:
    """A program of benchmarks/ from end to end, in its smallest form, away from the committed results."""
    name = Path(arguments[1]).stem
    if name == "repair_vllm":  # tests/engines/test_repair_vllm.py
        return
    if name == "learning":
        run_learning(arguments)
        return
    if name == "campaign":
        run_campaign(arguments)
        return
    if name == "host":
        run_host(arguments)
        return
    if name == "protocol":
        run_protocol(arguments)
        return
    if name == "red_team":
        run_red_team(arguments)
        return
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as monkeypatch:
        path = Path(place) / "results.json"
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        monkeypatch.setattr(sys, "argv", [*arguments[1:], *SMALLER[name], "--results", str(path)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / arguments[1]), run_name="__main__")  # a process of its own would import for long
        assert not end.value.code
        results = json.loads(path.read_text(encoding="utf-8"))
        num_rows = 12 if name == "scale" else 1
        assert len(results.get("cells") or results.get("rows") or [results["stages"]]) == num_rows
        assert not any("error" in stage for stage in results.get("stages", {}).values())
        assert re.search(r"\| (P|recipe|model) \| ", printed.getvalue())


def run_campaign(arguments: list[str]) -> None:
    """Malformed rows alone of one, nothing of the others: tests/benchmarks/test_campaigns.py has trials of each."""
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as monkeypatch:
        number = ["--only", "10"] if arguments[2] == "fuzz" else ["--trials", "0"]
        folders = ["--place", f"{place}/trials", "--results", f"{place}/results"]
        monkeypatch.setattr(sys, "argv", [*arguments[1:], *number, *folders])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / arguments[1]), run_name="__main__")
        assert not end.value.code
        summary = json.loads((Path(place) / "results" / f"{arguments[2]}.json").read_text(encoding="utf-8"))
        assert summary["num_trials"] == (arguments[2] == "fuzz")
        assert "|---|" in printed.getvalue()


def run_host(arguments: list[str]) -> None:
    """With few small images, away from the committed results."""
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as monkeypatch:
        path = Path(place) / "results.json"
        small = ["--width", "80", "--height", "60", "--pause", "0", "--steps", "1", "--rounds", "1"]
        monkeypatch.setattr(sys, "argv", [*arguments[1:], *small, "--results", str(path)])
        monkeypatch.setenv("PERCEPTION_R1_CACHE", place)  # the program sets it; so it is restored
        with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / arguments[1]), run_name="__main__")
        assert not end.value.code
        assert json.loads(printed.getvalue()) == json.loads(path.read_text(encoding="utf-8"))
        assert {"0 workers", "2 workers"} < set(json.loads(path.read_text(encoding="utf-8")))


def run_protocol(arguments: list[str]) -> None:
    """With few images of one task, away from the committed results."""
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as monkeypatch:
        path = Path(place) / "results.json"
        small = ["--tasks", "ocr", "--num_images", "4", "--results", str(path)]
        monkeypatch.setattr(sys, "argv", [*arguments[1:], *small])
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / arguments[1]), run_name="__main__")
        assert not end.value.code
        assert printed.getvalue().splitlines()[-1].startswith("| ocr | edit distance | 0.0")
        assert set(json.loads(path.read_text(encoding="utf-8"))["tasks"]["ocr"]) >= {"strict", "reading", "published"}


def run_red_team(arguments: list[str]) -> None:
    """In one scene of one task, away from the committed results."""
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as monkeypatch:
        path = Path(place) / "results.json"
        monkeypatch.setattr(
            sys, "argv", [*arguments[1:], "--tasks", "ocr", "--num_scenes", "1", "--results", str(path)]
        )
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / arguments[1]), run_name="__main__")
        assert not end.value.code
        assert printed.getvalue().startswith("ocr similarity: ")
        assert set(json.loads(path.read_text(encoding="utf-8"))["rewards"]) == {
            f"ocr {reward}" for reward in ("similarity", "lines", "unit_tests")
        }


def run_learning(arguments: list[str]) -> None:
    """With few images of one task, away from the committed results."""
    with tempfile.TemporaryDirectory() as place:
        small = ["--tasks", "ocr", "--num_tested", "8", "--results", place, "--runs", f"{place}/runs"]
        done = subprocess.run(
            [sys.executable, *arguments[1:], *small], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "1/1 ocr/base-seed-0.json"
        result = json.loads((Path(place) / "ocr" / "base-seed-0.json").read_text(encoding="utf-8"))
        assert result["levels"]["pretraining"]["reward"] > 0.8


def is_on_path(arguments: list[str]) -> None:
    assert shutil.which(arguments[0].rstrip(";"))


RULES: dict[str, Callable[[list[str]], None]] = {
    **dict.fromkeys(("pip", "pytest", "ruff", "mypy", "mkdocs", "tensorboard", "pre-commit"), has_tool),
    **dict.fromkeys(("python3", "touch", "grep", "echo"), is_on_path),
    "python": run_benchmark,
    "vllm": check_vllm,
}
"""How programs that are not run here are checked."""


def policy_name(arguments: Sequence[str]) -> str:
    """The model of a command line: one that is named, that of its file in configs/model, or the hub id or folder."""
    if named := option(arguments, "--model.policy.name"):
        return named
    model = option(arguments, "--model") or "tiny"
    path = ROOT / "configs" / "model" / f"{model}.yaml"
    return model_name(path) if path.exists() else model


def model_name(path: Path) -> str:
    """The model that a file of configs/model names."""
    return str(yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"]["policy"]["name"])


def first_cells(header: str) -> list[str]:
    """The names in the first column of a table about what a run leaves behind."""
    return [name for cells in table("docs/getting-started.md", header) for name in names(cells[0])]
