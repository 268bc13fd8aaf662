"""Real processes that want the same folder at the same time."""

import errno
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock

from perception_r1.errors import UserError
from perception_r1.locks import claim_version, locked
from tests.readme_data import write_rows

FORK = multiprocessing.get_context("fork")


def run(target, number, *args):
    """The same function in several processes that begin together; what each has returned."""
    queue, barrier = FORK.Queue(), FORK.Barrier(number)

    def work():
        barrier.wait()
        queue.put(target(*args))

    processes = [FORK.Process(target=work) for _ in range(number)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * number
    return results


def enter(folder, name, count):
    """Enter a folder so many times; how often that was tried."""
    inside, done, tries = folder.parent / "inside", 0, 0
    while done < count:
        tries += 1
        try:
            with locked(folder, "a test", name=name):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where another is inside
                time.sleep(0.001)
                inside.unlink()
                done += 1
        except UserError:
            pass
    return tries


@pytest.mark.parametrize("name", [None, ".lock"])
def test_no_two_processes_are_in_a_folder_at_once(tmp_path, name):
    tries = run(enter, 4, tmp_path / "folder", name, 50)
    assert sum(tries) > 200  # some were refused
    assert sorted(path.name for path in tmp_path.iterdir()) == ([] if name is None else ["folder"])


def test_no_two_processes_get_the_same_version(tmp_path):
    (tmp_path / "version_x").mkdir()
    found = run(lambda: [claim_version(tmp_path).name for _ in range(20)], 6)
    names = [name for names in found for name in names]
    assert sorted(names) == sorted(f"version_{number}" for number in range(120))


def test_who_comes_second_is_told_who_is_there(tmp_path):
    def second():
        with pytest.raises(UserError) as error, locked(tmp_path / "run", "an export"):
            pass
        return str(error.value)

    with locked(tmp_path / "run", "a training"):
        (message,) = run(second, 1)
    place, who = (
        re.escape(str(tmp_path / "run")),
        re.escape(f"a training, process {os.getpid()} on {socket.gethostname()}"),
    )
    since = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\+00:00"
    assert re.fullmatch(
        f"{place} is in use by {who}, since {since}; wait until it is done, or give another folder", message
    )
    with locked(tmp_path / "run", "an export"):
        pass


def test_a_lock_ends_with_its_process_though_its_workers_live_on(tmp_path):
    program = """if True:
        import os, sys, time
        from pathlib import Path
        from perception_r1.locks import locked
        with locked(Path(sys.argv[1]), "a training"):
            if os.fork() == 0:  # by now it has let go of the lock
                print("there", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout.readline() == "there\n"
        with pytest.raises(UserError, match=f"a training, process {holder.pid} on"), locked(tmp_path / "run", "a test"):
            pass
        holder.kill()
        holder.wait(60)
        with locked(tmp_path / "run", "a test"):
            assert json.loads((tmp_path / ".run.lock").read_text())["pid"] == os.getpid()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_disk_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def refuse(self, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with locked(tmp_path / "run", "a test"):
        pass
    (record,) = caplog.records
    assert "the disk has no locks (No locks available)" in record.getMessage()


def test_a_place_that_cannot_be_written_to_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"), locked(tmp_path / "file" / "run", "a test"):
        pass


def start(tmp_path: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "perception_r1", *words]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_runs_at_once_do_each_other_no_harm(tmp_path, folder):
    """First starts on own data without a cache, resumed runs, evaluations: two of each at the same time."""
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, [{"image": f"{k}.png", "label": "cup", "count": 1} for k in range(24)])
    options = ["--task", "counting", "--data", str(rows), "--model.policy.name", str(folder)]
    options += ["--data.batch_size", "2", "--data.num_val", "2", "--model.max_new_tokens", "4"]
    options += ["--before_after.enabled", "false", "--trainer.val_check_interval", "2", "--trainer.max_steps"]

    def both(*words):
        processes = [start(tmp_path, *words) for _ in range(2)]
        told = [process.communicate(timeout=600) for process in processes]
        return sorted((process.returncode, error) for process, (_, error) in zip(processes, told, strict=True))

    ended = both("fit", *options, "2")
    assert [code for code, _ in ended] == [0, 0], ended
    runs = tmp_path / "logs" / "counting"
    assert sorted(path.name for path in runs.iterdir()) == ["version_0", "version_1"]
    for run_folder in runs.iterdir():
        assert json.loads((run_folder / "run.json").read_text())["status"] == "finished"
        assert len(list(run_folder.glob("events*"))) == 1
    (code, _), (refused, error) = both("fit", *options, "6", "--ckpt_path", "last")
    assert (code, refused) == (0, 2)
    assert re.search(r"version_\d is in use by a training, process \d+ on ", error)
    (code, told), (second, error) = both("test", *options, "2", "--ckpt_path", "best")
    assert code == 0, told
    if second:  # it came before the first had ended
        assert (second, "is in use by an evaluation, process" in error) == (2, True)
    (evaluated,) = runs.glob("eval-*")
    answers = [json.loads(line)["id"] for line in (evaluated / "predictions.jsonl").read_text().splitlines()]
    assert set(Counter(answers).values()) == {1}
    assert not list(runs.glob(".*"))


@pytest.mark.parametrize("folder", ["/", "a" * 300, "a\0b", "/proc/nowhere/x"])
def test_a_folder_that_cannot_be_is_one_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="written to"), locked(Path(folder), "a test"):
        pass
