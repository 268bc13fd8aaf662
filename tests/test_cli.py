import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perception_r1 import cli
from perception_r1.cli import main
from perception_r1.commands.options import run_command
from perception_r1.commands.training import PerceptionCLI, find_checkpoint
from perception_r1.errors import UserError
from perception_r1.modules import GRPO, SFT
from perception_r1.policy.checkpoint_file import save_file
from perception_r1.tasks import TASKS
from tests.evaluation.evaluating import write_sources

CONFIGS = Path(__file__).parents[1] / "configs"
SHARED_OPTIONS = (
    *("--model.optimizer", "Optimiser of the trainable weights.", "--model.lr_scheduler.warmup_steps"),
    *("--model.max_grad_norm", "--model.seed", "Seed of sampling and dropout", "--model.policy.name"),
    *("--model.max_new_tokens", "Longest completion, end token included.", "--model.eval_batch_tokens"),
)
"""What the two trainings inherit, with a part of its explanation."""
OWN_COMMANDS = ("data", "predict", "export", "score")
"""What is not a verb of the trainer."""


FEW = ["--data.num_val", "2", "--data.num_test", "2"]
COUNTING = ["--task", "counting", *FEW]


def print_config(capsys, *arguments):
    assert main(["fit", *arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def fails(capsys, *arguments):
    """Exit status and what is written to standard error."""
    return main(list(arguments)), capsys.readouterr().err


@pytest.fixture
def fitted(monkeypatch, tmp_path, folder):
    """Runs the command line without any training: what the trainer would have got."""
    monkeypatch.chdir(tmp_path)
    seen = {}

    def record(trainer, model=None, datamodule=None, ckpt_path=None, **kwargs):
        seen.update(trainer=trainer, model=model, datamodule=datamodule, ckpt_path=ckpt_path)

    def run(*arguments, command="fit", task="counting"):
        for name in ("fit", "validate", "test"):
            monkeypatch.setattr(Trainer, name, record)
        assert main([command, "--task", task, *FEW, "--model.policy.name", str(folder), *arguments]) == 0
        return type("Seen", (), dict(seen))

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["fit", "validate", "test", *(f"perception-r1 {name} --help" for name in OWN_COMMANDS)]),
        (
            ["fit", "--help"],
            [
                "--task NAME",
                "--variant NAME",
                "--run_name",
                "--checkpoints.enabled",
                "--trainer.max_steps",
            ],
        ),
        (["fit", "--model.help", "GRPO"], ["--model.group_size", "Completions of each prompt (G)", *SHARED_OPTIONS]),
        (["fit", "--model.help", "SFT"], ["Teach the ideal answers", *SHARED_OPTIONS]),
        (["fit", "--data.help", "CountingData"], ["--data.train_file", "--data.batch_size", "--data.on_bad_row"]),
    ],
)
def test_help_names_the_options_and_explains_them(capsys, arguments, words):
    assert main(arguments) == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert [word for word in words if word not in text] == []


def test_the_command_line_has_the_last_word(fitted):
    run = fitted(
        *["--model.group_size", "5", "--model.temperature", "0.7", "--model.kl_coef", "0.5"],
        *["--model.optimizer", "SGD", "--model.optimizer.lr", "0.25", "--data.batch_size", "3"],
        *["--trainer.max_steps", "7", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "elsewhere"],
        *["--trainer.callbacks+=DeviceStatsMonitor", "--trainer.precision", "bf16-mixed", "--seed_everything", "4"],
    )
    module = run.model
    assert isinstance(module, GRPO)
    assert (module.group_size, module.temperature, module.kl_coef) == (5, 0.7, 0.5)
    optimizer = module.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
    assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (torch.optim.SGD, 0.25)
    assert (run.datamodule.batch_size, run.datamodule.seed, module.seed) == (3, 4, 4)
    assert run.trainer.max_steps == 7
    assert run.trainer.precision == "bf16-mixed"
    assert isinstance(run.trainer.logger, CSVLogger)
    names = [type(callback).__name__ for callback in run.trainer.callbacks]
    assert {
        "DeviceStatsMonitor",
        "Progress",
        "Checkpoints",
        "LogSamples",
        "BeforeAfter",
        "RunCard",
        "Evaluation",
    } <= set(names)


def test_the_module_gets_the_task_of_the_data(fitted):
    run = fitted("--data.task.iou_weight", "3", "--data.task.think", "true", task="grounding")
    assert run.model.task is run.datamodule.task
    assert run.model.task == TASKS["grounding"](iou_weight=3.0, think=True)


def test_sft_is_a_variant_with_runs_of_its_own(fitted):
    run = fitted("--variant", "sft")
    assert isinstance(run.model, SFT)
    assert run.model.max_new_tokens == 360  # of the task, as with GRPO
    assert Path(run.trainer.log_dir).parent == Path("logs/counting-sft")


@pytest.mark.parametrize("variant", [[], ["--variant", "sft"]])
def test_the_name_of_a_run_is_that_of_its_folder(fitted, variant):
    assert Path(fitted(*variant, "--run_name", "mine").trainer.log_dir) == Path("logs/mine/version_0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.group_size", "1"], "group_size is 1; a completion is compared with its group, so use 2 or more."),
        (["--data.batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--data.train_file", "none.jsonl"], "none.jsonl: cannot be read (No such file or directory)"),
        (["--data.task.matching", "greedy"], "matching"),
        (["--ckpt_path", "last"], "No run under logs/counting has a checkpoints/last.ckpt yet; train first"),
        (["--ckpt_path", "best"], "--ckpt_path best has no state of the optimiser; training goes on from last"),
        (["--model.policy.name", "/nowhere"], "There is no model folder /nowhere."),
        (["--model.optimizer.lr", "-1"], "model.optimizer cannot be made: Invalid learning rate: -1"),
        (["--trainer.gradient_clip_val", "1"], "trainer.gradient_clip_val has no effect here; set model.max_grad_norm"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_clear_sentence(capsys, tmp_path, monkeypatch, folder, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, text = fails(capsys, "fit", *COUNTING, "--model.policy.name", str(folder), *arguments)
    assert status == 2
    assert message in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", *COUNTING, "--nonsense", "1"], "nonsense"),
        (["fit", *COUNTING, "--run_name", "${oc.env:NOT_THERE}"], "NOT_THERE"),
        (["fit", *COUNTING, "--model.nonsense", "1"], "nonsense"),
        (["fit", *COUNTING, "--data.task.nonsense", "1"], "nonsense"),
        (["fit", "-c", "configs/task/no_such_task.yaml"], "no_such_task.yaml"),
        (["fit", *COUNTING, "--model.group_size", "many"], "group_size"),
        (["fit", *COUNTING, "--model.loss_type", "median"], "loss_type"),
        (["fit", *COUNTING, "--trainer.precision", "7"], "precision"),
        (["train"], "there is no command train; there are fit, validate, test, data"),
    ],
)
def test_an_option_that_does_not_exist_or_fit_is_an_error(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, text = fails(capsys, *arguments)
    assert status == 2
    assert message in text
    assert text.startswith("perception-r1")
    assert text.count("\n") == 1


EARLY = [
    (["--trainer.accelerator", "foo"], "trainer: You selected an invalid accelerator name: `accelerator='foo'`"),
    (["--trainer.devices", "99"], "trainer.devices is 99, and this machine has "),
    (["--trainer.devices", "0"], "value is not a valid input"),
    (["--trainer.strategy", "foo"], "trainer: You selected an invalid strategy name: `strategy='foo'`"),
    (["--trainer.strategy", "fsdp"], "requires a GPU"),
    (
        ["--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy"],
        "ModelParallelStrategy is not",
    ),
    (["--trainer.precision", "16-true"], "trainer.precision 16-true is not supported; use bf16-mixed or 32-true."),
    (["--trainer.gradient_clip_val", "1"], "trainer.gradient_clip_val has no effect here"),
    (["--trainer.accumulate_grad_batches", "2"], "trainer.accumulate_grad_batches has no effect here"),
    (["--trainer.max_steps", "-1"], "max_steps or max_epochs"),
    (["--trainer.overfit_batches", "2"], "overfit_batches is not supported"),
    (["--model.optimizer.lr", "-1"], "Invalid learning rate: -1.0"),
    (["--model.max_grad_norm", "0"], "max_grad_norm is 0.0; it must be above 0."),
    (["--data.batch_size", "9000"], "8192 training samples do not fill one step of 9000"),
    (["--data.batch_size", "5000", "--trainer.devices", "2"], "do not fill one step of 10000"),
    (["--data.train_file", "none.jsonl"], "none.jsonl: cannot be read"),
]


@pytest.mark.parametrize("model", ["tiny", pytest.param("folder", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("arguments", "message"), EARLY)
def test_what_needs_no_model_is_checked_before_one_is_made(
    capsys, tmp_path, monkeypatch, folder, model, arguments, message
):
    def too_late(*args, **kwargs):
        raise AssertionError("a model is made before the check")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("perception_r1.policy.policy.Policy.load", too_late)
    policy = [] if model == "tiny" else ["--model.policy.name", str(folder)]
    status, text = fails(capsys, "fit", *COUNTING, *policy, *arguments)
    assert status == 2
    assert message in text
    assert text.startswith("perception-r1 fit: error: ")
    assert text.count("\n") == 1
    assert not (tmp_path / "logs").exists()


def test_an_evaluation_of_few_rows_does_not_ask_for_a_training_step(capsys, tmp_path, fitted):
    for number in range(4):
        Image.new("RGB", (60, 40)).save(tmp_path / f"{number}.png")
    row = {"label": "cup", "points": [[3, 4]]}
    rows = [json.dumps(row | {"image": f"{number}.png"}) for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    fitted("--data.test_file", "rows.jsonl", command="test")
    status, text = fails(capsys, "fit", *COUNTING, "--data.train_file", "rows.jsonl", "--data.held_out_share", "0.3")
    assert status == 2
    assert re.search(r"\d training samples do not fill one step of 16", text)


@pytest.mark.parametrize(("command", "word"), [("fit", "Training"), ("test", "Evaluating")])
def test_one_line_tells_the_device_in_use(capfd, console, fitted, command, word):
    fitted("--trainer.precision", "bf16-mixed", command=command)
    assert console.file.getvalue() == f"{word} on cpu, 1 device, bf16-mixed.\n"
    assert "".join(capfd.readouterr()) == ""


def test_an_error_of_the_program_keeps_its_traceback(tmp_path, monkeypatch, folder):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "fit", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["fit", *COUNTING, "--model.policy.name", str(folder)])


def test_a_disk_that_refuses_is_one_sentence(capsys):
    def full(argv):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "logs/run.json")
        except OSError:
            raise RuntimeError("while another error was handled")  # noqa: B904 - as the trainer's hooks do

    assert run_command("fit", full, []) == 2
    sentence = "logs/run.json cannot be written (No space left on device); make room or give another folder"
    assert capsys.readouterr().err == f"perception-r1 fit: error: {sentence}\n"
    with pytest.raises(ConnectionError):
        run_command("fit", unreachable, [])


def unreachable(argv):
    raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")


def test_a_worker_that_ends_with_a_run_by_sigterm_is_no_error_of_its_own(capsys, tmp_path, monkeypatch):
    def stop(trainer, *args, **kwargs):
        trainer._signal_connector.received_sigterm = is_told
        raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Terminated.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "fit", stop)
    is_told = True
    assert main(["fit", *COUNTING, *SMALL]) == 143
    assert "Stopped by SIGTERM" in capsys.readouterr().err
    is_told = False
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        main(["fit", *COUNTING, *SMALL])


def test_a_stop_by_sigterm_has_its_own_status(capsys, tmp_path, monkeypatch, folder):
    def stop(*args, **kwargs):
        raise SIGTERMException

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "fit", stop)
    assert main(["fit", *COUNTING, "--model.policy.name", str(folder)]) == 143
    assert "--ckpt_path last" in capsys.readouterr().err


def test_a_stop_by_the_keyboard_says_how_to_go_on(capsys, tmp_path, monkeypatch, folder):
    def stop(*args, **kwargs):  # as Lightning does it
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "fit", stop)
    assert main(["fit", *COUNTING, "--model.policy.name", str(folder)]) == 1
    assert "Stopped by Ctrl-C; --ckpt_path last" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "export", "data"])
def test_ctrl_c_is_no_traceback_wherever_it_comes(capsys, monkeypatch, command):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert main([command]) == 130
    assert capsys.readouterr().err == "Stopped by Ctrl-C.\n"


def test_a_reader_that_has_seen_enough_is_no_traceback(monkeypatch, capsys):
    def closed(name):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "import_module", closed)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert main(["data"]) == 141
    assert capsys.readouterr().err == ""


def test_ctrl_c_is_not_lost_where_python_cannot_raise_it(capsys):
    def interrupted():
        cli._interrupt_again(SimpleNamespace(exc_type=KeyboardInterrupt))
        time.sleep(5)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored here
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""


def test_a_traceback_is_there_for_who_asks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERCEPTION_R1_TRACEBACK", "1")
    with pytest.raises(UserError):
        main(["fit", *COUNTING, "--ckpt_path", "last"])


def make_checkpoint(folder, version, name, *, age):
    path = folder / f"version_{version}" / "checkpoints" / f"{name}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    loops = {"epoch_loop.batch_progress": {"total": {"completed": version}}}
    content = {"run": {}, "global_step": 2 * version, "loops": {"fit_loop": loops}, "callbacks": {"Checkpoints": {}}}
    save_file(content, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_newest_checkpoint_of_a_name_is_found(tmp_path):
    make_checkpoint(tmp_path, 2, "last", age=50)
    newest = make_checkpoint(tmp_path, 10, "last", age=5)
    best = make_checkpoint(tmp_path, 9, "best", age=1)
    assert find_checkpoint(tmp_path, "last") == newest
    assert find_checkpoint(tmp_path, "best") == best


def test_going_on_from_the_last_checkpoint_stays_in_its_folder(fitted, tmp_path):
    logs = tmp_path / "logs" / "counting"
    make_checkpoint(logs, 0, "last", age=50)
    newest = make_checkpoint(logs, 3, "last", age=5)
    run = fitted("--ckpt_path", "last")
    assert Path(run.ckpt_path).resolve() == newest
    assert Path(run.trainer.log_dir).resolve() == newest.parents[1]
    assert run.trainer.logger._kwargs["purge_step"] == 3, "batches are logged under their number, whatever the updates"
    other = fitted("--ckpt_path", "last", command="test")
    assert Path(other.ckpt_path).resolve() == newest
    assert Path(other.trainer.log_dir).resolve().parent == logs
    assert Path(other.trainer.log_dir).name.startswith("eval-")


def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(fitted, tmp_path, caplog):
    logs = tmp_path / "logs" / "counting"
    last, before = make_checkpoint(logs, 3, "last", age=5), make_checkpoint(logs, 3, "previous", age=9)
    good = before.read_bytes()
    last.write_bytes(last.read_bytes()[:-30])
    damaged = last.read_bytes()
    tested = fitted("--ckpt_path", "last", command="test")
    assert Path(tested.ckpt_path).resolve() == before
    assert last.read_bytes() == damaged  # an evaluation changes nothing
    caplog.clear()
    run = fitted("--ckpt_path", "last")
    assert Path(run.ckpt_path).resolve() == last
    assert last.read_bytes() == good
    assert last.with_name("damaged.ckpt").read_bytes() == damaged
    assert not before.exists()
    (record,) = caplog.records
    assert "last.ckpt is damaged" in record.getMessage()
    assert "previous.ckpt, of step 6" in record.getMessage()


def test_without_a_checkpoint_before_a_damaged_one_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    last = make_checkpoint(tmp_path / "logs" / "counting", 0, "last", age=5)
    last.write_bytes(b"")
    for command in ("fit", "test"):
        assert main([command, *COUNTING, "--ckpt_path", "last"]) == 2
        error = capsys.readouterr().err
        assert "last.ckpt is empty, cut off or no checkpoint at all." in error
        assert error.count("\n") == 1


def _spoilt(last):
    """Contents of files that are no checkpoints of ours, by what each is."""
    whole = last.read_bytes()
    buffer = io.BytesIO()
    torch.save({"hyper_parameters": {"_class_path": "perception_r1.modules.GRPO", "kl_coef": 0.77}}, buffer)
    return {"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"weights", "foreign": buffer.getvalue()}


def test_a_checkpoint_that_is_none_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    last = make_checkpoint(tmp_path / "other", 0, "last", age=0)
    ours = {"run": {}, "global_step": 1, "loops": {}, "state_dict": {}, "callbacks": {}}
    odd = [{"run": 3}, {"global_step": "y"}, {"loops": []}, {"state_dict": {"a": 1}}]
    for content in _spoilt(last).values():
        (tmp_path / "a.ckpt").write_bytes(content)
        for command in ("fit", "test", "validate"):
            assert main([command, *COUNTING, "--ckpt_path", "a.ckpt"]) == 2
            error = capsys.readouterr().err
            assert "a.ckpt" in error
            assert error.count("\n") == 1
    for part in odd:
        save_file(ours | part, tmp_path / "b.ckpt")
        assert main(["fit", *COUNTING, "--ckpt_path", "b.ckpt"]) == 2
        assert "was not written by a run of this program" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt", "other"]


def test_a_checkpoint_changes_no_setting(fitted, tmp_path):
    content = {"run": {}, "global_step": 1, "loops": {}, "state_dict": {}, "callbacks": {}}
    settings = {"_class_path": "perception_r1.modules.GRPO", "kl_coef": 0.77}
    save_file(content | {"hyper_parameters": settings}, tmp_path / "b.ckpt")
    assert fitted("--ckpt_path", str(tmp_path / "b.ckpt"), "--model.kl_coef", "0.01").model.kl_coef == 0.01


def test_checkpoints_are_looked_for_where_the_logger_writes(fitted, tmp_path):
    newest = make_checkpoint(tmp_path / "elsewhere" / "mine", 1, "last", age=0)
    run = fitted(
        *["--trainer.logger.save_dir", "elsewhere", "--trainer.logger.name", "mine", "--ckpt_path", "last"],
    )
    assert Path(run.ckpt_path).resolve() == newest


SMALL = ["--before_after.enabled", "false"]
SMALL += ["--data.batch_size", "2", "--data.num_val", "2", "--model.max_new_tokens", "4"]


def test_the_embedded_model_is_trained_at_once_and_a_run_goes_on(tmp_path, monkeypatch, console):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *COUNTING, *SMALL, "--trainer.max_steps", "1"]) == 0
    lines = console.file.getvalue().splitlines()
    assert [" ".join(line.split()[:2]) for line in lines[:2]] == ["Training on", "training 1/1"]
    run_card = tmp_path / "logs" / "counting" / "version_0" / "run.json"
    first = json.loads(run_card.read_text())
    assert main(["fit", *COUNTING, *SMALL, "--trainer.max_steps", "2", "--ckpt_path", "last"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    assert [path.name for path in (tmp_path / "logs" / "counting").iterdir()] == ["version_0"]
    card = json.loads(run_card.read_text())
    assert card["steps"] == 2
    assert card["resumed_from"].endswith("last.ckpt")
    assert card["start"] == first["start"]
    assert (first["earlier_commands"], card["earlier_commands"]) == ([], [first["command"]])
    assert card["seconds"] > first["seconds"] > 0
    assert card["seconds"] >= sum(card["phase_seconds"].values())


def test_a_run_that_cannot_go_on_stays_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["fit", *COUNTING, *SMALL, "--trainer.max_steps", "1"]
    assert main(options) == 0
    files = [tmp_path / "logs" / "counting" / "version_0" / name for name in ("config.yaml", "run.json")]
    before = [file.read_bytes() for file in files]
    capsys.readouterr()
    for other, words in {
        "--data.num_train=9": "num_samples=9",
        "--data.world.skew=0.5": "these training samples, it was written with others",
        "--model.policy.freeze_vision=true": "has unexpected",
    }.items():
        assert main([*options[:-1], "2", "--ckpt_path", "last", other]) == 2
        assert words in capsys.readouterr().err
        assert [file.read_bytes() for file in files] == before
    assert main([*options, "--ckpt_path", "last"]) == 0  # no step is left
    assert [file.read_bytes() for file in files] == before


def test_a_run_keeps_its_settings_and_they_make_another_run(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    policy = ["--model.policy.name", str(folder), "--trainer.max_steps", "1"]
    assert main(["fit", *COUNTING, *SMALL, *policy, "--model.group_size", "3"]) == 0
    run = tmp_path / "logs" / "counting" / "version_0"
    settings = yaml.safe_load((run / "hparams.yaml").read_text())
    assert settings == yaml.safe_load((run / "config.yaml").read_text())
    assert not list(run.glob("*.tmp"))
    assert (settings["model"]["init_args"]["group_size"], settings["data"]["init_args"]["batch_size"]) == (3, 2)
    assert (settings["task"], settings["run_name"]) == ("counting", "counting")
    events = EventAccumulator(str(run))
    events.Reload()
    assert "hp_metric" not in events.Tags()["scalars"]
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert not checkpoint.get("hyper_parameters")
    assert main(["fit", "-c", str(run / "config.yaml"), "--run_name", "again"]) == 0
    again = yaml.safe_load((tmp_path / "logs" / "again" / "version_0" / "config.yaml").read_text())
    assert again == settings | {"run_name": "again"}


def test_a_training_writes_what_is_asked_for_and_nothing_else(tmp_path):
    words = [sys.executable, "-m", "perception_r1", "fit", *COUNTING, *SMALL, "--trainer.max_steps", "1"]
    done = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert text.splitlines()[0] == "Training on cpu, 1 device, 32-true."
    assert [word for word in ("GPU", "TPU", "Tip", "Warning", "warn(", "Seed", "stopped") if word in text] == []


def test_a_run_says_how_many_rows_a_validation_answers(tmp_path, monkeypatch, console):
    monkeypatch.chdir(tmp_path)
    files = write_sources(tmp_path, "counting", {"train": 6, "val": 5})
    data = [
        "--data.train_file",
        str(files["train"]),
        "--data.val_file",
        str(files["val"]),
        "--log_samples.num_samples=0",
    ]
    assert main(["validate", *COUNTING, *SMALL, *data]) == 0
    first = console.file.getvalue().splitlines()[0]
    assert first == "Validating on cpu, 1 device, 32-true. A validation answers 2 of 5 samples (num_val)."


def test_the_trainer_s_own_predict_is_no_subcommand(capsys):
    assert set(PerceptionCLI.subcommands()) == {"fit", "validate", "test"}
    assert main(["--help"]) == 0
    assert "{fit,validate,test}" in capsys.readouterr().out


def test_an_error_is_told_without_warnings_before_it(capsys):
    with warnings.catch_warnings(record=True) as told:
        status, text = fails(capsys, "fit", *COUNTING, "--model.init_args.optimizer=${model}")
    assert (status, text.count("\n")) == (2, 1)
    assert "Interpolation key 'model' not found" in text
    assert not [warning for warning in told if "serialize" in str(warning.message)]


def test_scoring_needs_no_trainer(capsys):
    assert main(["score", "--help"]) == 0
    assert "score" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP is that of Linux")
@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_threads_that_wait_leave_their_core_to_others_soon_unless_the_user_decides(given, expected):
    """What libgomp itself says that it has read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "perception_r1", "export", "--help"],
        env=kept | {"OMP_DISPLAY_ENV": "VERBOSE", **given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)[:1] == [expected]
