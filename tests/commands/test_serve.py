import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import torch

from perception_r1.cli import main
from perception_r1.commands import serve as module
from perception_r1.serving.app import Served
from perception_r1.tasks.grounding import Grounding
from tests.serving.test_app import PICTURE
from tests.serving.test_chat import data_url


@pytest.fixture
def address(folder):
    """A server in a process of its own, and what it says."""
    words = [sys.executable, "-m", "perception_r1", "serve", str(folder), "--port", "0", "--max_new_tokens", "12"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    said = process.stderr.readline()
    yield re.search(r"at (http://127\.0\.0\.1:\d+),", said)[1], process
    process.kill()
    process.wait()


def test_it_answers_until_it_is_stopped(address, folder):
    url, process = address
    found = httpx2.post(f"{url}/answer", json={"task": "ocr", "query": "", "image": data_url(PICTURE)}, timeout=60)
    assert found.json()["completion"]
    assert httpx2.get(f"{url}/v1/models").json()["data"][0]["id"] == folder.name
    process.send_signal(signal.SIGINT)
    assert process.wait(20) in (0, 130)
    assert "Traceback" not in process.stderr.read()


@pytest.fixture
def started(monkeypatch):
    """What would be served."""
    found = []
    plain = Served.__init__

    def spy(self, *args, **options):
        plain(self, *args, **options)
        found.append(self)

    monkeypatch.setattr(Served, "__init__", spy)
    monkeypatch.setattr(module.web, "run_app", lambda app, **options: None)
    return found


def test_a_run_is_served_with_its_tasks_and_weights(runs, started):
    assert main(["serve", str(runs["full"]), "--port=0"]) == 0
    (served,) = started
    assert list(served.tasks) == ["grounding"]
    assert served.name == "full-sft-version_0"
    card = json.loads((runs["full"] / "run.json").read_text())
    assert served.tasks["grounding"] == Grounding(**card["task"]["init_args"])
    trained = torch.load(runs["full"] / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    name = "policy.network.lm_head.weight"
    assert torch.equal(served.generator.policy.model.lm_head.weight, trained[name])


def test_a_model_is_served_with_the_tasks_that_are_chosen(folder, started):
    assert main(["serve", str(folder), "--port=0", '--tasks=["ocr", "counting"]', "--max_pixels=5000"]) == 0
    (served,) = started
    assert list(served.tasks) == ["ocr", "counting"]
    assert served.generator.policy.processor.image_processor.size["longest_edge"] == 5000


def test_only_an_address_of_this_machine_checks_its_name(folder, started):
    assert main(["serve", str(folder), "--port=0"]) == 0
    assert main(["serve", str(folder), "--port=0", "--host=0.0.0.0"]) == 0
    assert [served._hosts is None for served in started] == [False, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "There is no model folder"),
        (["FOLDER", "--tasks=[singing]"], "--tasks must be one of"),
        (["FOLDER", "--ckpt=last"], "--ckpt is for a run"),
        (["FOLDER", "--host=256.0.0.1"], "cannot listen at 256.0.0.1"),
        (["FOLDER", "--port=99999"], "cannot listen at"),
        (["FOLDER", "--timeout=0"], "--timeout is 0"),
        (["FOLDER", "--max_requests=0"], "--max_requests is 0"),
        (["FOLDER", "--engine=other"], "--engine other: there is no configs/engine/other.yaml"),
        (["FOLDER", "--engine.urls=[a]"], "goes with --engine"),
        (["FOLDER", "--engine=server", "--engine.urls=[]"], "urls of the engine is empty"),
        (["FOLDER", "--engine=server", "--engine.nothing=1"], "nothing"),
    ],
)
def test_what_cannot_be_served_is_told_in_a_sentence(words, message, folder, started, capsys):
    words = [word.replace("FOLDER", str(folder)) for word in words]
    assert main(["serve", *words, *([] if any("port" in word for word in words) else ["--port=0"])]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_port_that_is_taken_is_told_before_the_model_is_read(folder, started, capsys, monkeypatch):
    monkeypatch.setattr(module, "open_policy", None)
    with module._listen("127.0.0.1", 0) as taken:
        assert main(["serve", str(folder), f"--port={taken.getsockname()[1]}"]) == 2
    assert "give another --port" in capsys.readouterr().err


def test_the_page_s_files_come_with_the_package():
    folder = Path(module.__file__).parents[1] / "serving" / "page"
    assert {path.name for path in folder.iterdir()} == {"index.html", "page.js", "page.css"}
