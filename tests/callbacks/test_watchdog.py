import os
import signal
import time
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from perception_r1.callbacks.watchdog import Watch, Watchdog
from perception_r1.errors import UserError
from tests.modules import two_processes


def wait_for(path):
    for _ in range(1200):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.1)
    raise AssertionError("no process came so far")


def end_of(tmp_path, still, how, number=signal.SIGKILL, seconds=30):
    """Output and status of the other rank, once one stands still and gets a signal."""
    processes = two_processes.start("tests.callbacks.run_watched", str(tmp_path), str(still), how, str(seconds))
    try:
        if number is not None:
            os.kill(wait_for(tmp_path / "pid"), number)
        other = processes[1 - still]
        output, _ = other.communicate(timeout=60)
        return output, other.returncode
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "still"), [("waiting", 0), ("waiting", 1), ("asleep", 1)])
def test_a_kill_of_one_rank_ends_the_other_with_a_sentence(tmp_path, still, how):
    """Whether it waits where the backend notices, or where nothing would."""
    output, status = end_of(tmp_path, still, how)
    sentence = f"Rank {still} is gone: it was killed, or it crashed; it was last seen at step 1, decode, and rank "
    assert f"{sentence}{1 - still} waits at step 1, backward: the run stands still" in output
    assert "Traceback" not in output
    assert status == 1


@pytest.mark.slow
def test_a_rank_that_stands_still_is_noticed_by_its_silence(tmp_path):
    output, status = end_of(tmp_path, 1, "silent", signal.SIGSTOP, seconds=3)
    assert "Rank 1 has given no sign of life for 3 seconds; it was last seen at step 1, decode" in output
    assert status == 1


@pytest.mark.slow
def test_a_rank_that_failed_is_named_while_the_other_waits(tmp_path):
    output, status = end_of(tmp_path, 1, "failed", None)
    assert "Rank 1 stopped with an error, which its own output tells; it was last seen at step 1, decode" in output
    assert status == 1


@pytest.mark.slow
@pytest.mark.parametrize("still", [0, 1])
def test_a_rank_that_is_stopped_alone_stops_the_other(tmp_path, still):
    output, status = end_of(tmp_path, still, "stopped", None, seconds=3)
    sentence = (
        f"Rank {still} was stopped by a signal, and this one was not; it was last seen at step 1, decode, and rank "
    )
    assert f"{sentence}{1 - still} waits at step 1, backward: the run stands still" in output
    assert status == 1


@pytest.mark.slow
@pytest.mark.parametrize("still", [0, 1])
def test_both_heed_sigterm_after_the_same_step_whoever_got_it_and_how_often(tmp_path, still):
    processes = two_processes.start("tests.callbacks.run_watched", str(tmp_path), str(still), "terminated", "30")
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1]
    assert ["stopped after 2 steps" in output for output in outputs] == [True, True], outputs
    assert len(list(tmp_path.rglob("last.ckpt"))) == 1


def test_the_first_rank_hears_all_and_the_others_its_verdict(monkeypatch):
    """Three machines, one of which falls silent; what is read grows with the processes, not with their square."""
    ended, read = {}, {}

    def end(watch, verdict):
        ended[watch._own] = verdict
        watch._has_ended.set()

    class Counted:
        def __init__(self, store, rank):
            self.set, self.store, self.rank = store.set, store, rank

        def multi_get(self, keys):
            read[self.rank] = keys
            return self.store.multi_get(keys)

    monkeypatch.setattr(Watch, "_end_process", end)
    store = TCPStore("127.0.0.1", port=0, is_master=True, wait_for_workers=False)
    state = SimpleNamespace(stage=None)
    watches = []
    for rank in range(3):
        trainer = SimpleNamespace(global_rank=rank, local_rank=0, num_devices=1, world_size=3, global_step=7)
        trainer.training, trainer.state = False, state
        own = store if rank == 0 else TCPStore("127.0.0.1", port=store.port, wait_for_workers=False)
        watches.append(Watch(Counted(own, rank), trainer, None, 3.0))
    for watch in watches[:2]:
        watch.start()
    for watch in watches[:2]:
        watch.join(30)
    verdict = "Rank 2 has given no sign of life for 3 seconds; it was last seen at step 7, start"
    assert ended == {0: verdict, 1: verdict}
    assert read == {0: ["verdict", "1", "2"], 1: ["verdict", "0"]}


def test_a_time_that_is_too_short_is_an_error():
    with pytest.raises(UserError, match=r"watchdog.seconds is 1; use 3 or more"):
        Watchdog(1)
