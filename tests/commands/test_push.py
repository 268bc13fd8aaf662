"""Folders on a hub of this machine: what arrives there, byte by byte, and what a user can get wrong."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

from perception_r1.cli import main
from tests.hub import TOKEN, reachable

FILES = {
    "README.md": b"---\nlibrary_name: transformers\n---\n\n# A model\n",
    "config.json": b'{"model_type": "qwen2_vl"}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 40,
    "model-00002-of-00002.safetensors": b"\x00weights\xff" * 100,
    "chat_template.jinja": "{{ messages }} \N{SNOWMAN}".encode(),
}


@pytest.fixture
def folder(tmp_path):
    """What an export leaves behind, in small."""
    place = tmp_path / "exported"
    place.mkdir()
    for name, content in FILES.items():
        (place / name).write_bytes(content)
    return place


@pytest.fixture
def hub():
    """A hub on this machine."""
    with reachable() as hub:
        yield hub


def push(*arguments):
    return main(["push", *map(str, arguments)])


def fails(capsys, *arguments):
    """The sentence of a command that fails."""
    capsys.readouterr()
    assert push(*arguments) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("perception-r1 push: error: ")
    return text


def test_all_files_arrive_in_one_commit(folder, hub, capsys):
    assert push(folder, "me/model", "--message", "Step 40") == 0
    assert hub.folder("me/model") == FILES
    assert hub.repositories == {"me/model": False}
    assert hub.messages == ["Step 40"]
    assert f"{hub.url}/me/model/commit/" in capsys.readouterr().err


def test_the_command_finds_hub_and_token_in_the_environment(folder, hub, tmp_path):
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "perception_r1", "push", str(folder), "model", "--private"]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "Uploading 5 files, 0.0 MB, to model."
    assert hub.folder("me/model") == FILES  # a name alone is one of the user whose token it is
    assert hub.repositories == {"me/model": True}


def test_a_repository_that_is_there_gets_another_commit(folder, hub):
    assert push(folder, "me/model") == 0
    (folder / "config.json").write_bytes(b"{}")
    assert push(folder, "me/model") == 0
    assert hub.folder("me/model") == FILES | {"config.json": b"{}"}
    assert len(hub.messages) == 2


def test_a_branch_is_made(folder, hub):
    assert push(folder, "me/model", "--revision", "step/40") == 0
    assert hub.branches == [("me/model", "step/40")]
    assert hub.folder("me/model", "step/40") == FILES
    assert hub.folder("me/model") == {}


def test_an_adapter_is_uploaded_too(folder, hub):
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert push(folder, "me/adapter") == 0
    assert hub.folder("me/adapter").keys() == {*FILES, "adapter_config.json"} - {"config.json"}


def test_what_is_meant_to_be_private_is_never_public(folder, hub, capsys):
    hub.repositories["me/model"] = False
    assert "me/model is there already and public" in fails(capsys, folder, "me/model", "--private")
    assert hub.files == hub.blobs == {}


@pytest.mark.parametrize("missing", ["README.md", "config.json"])
def test_a_folder_that_is_no_export_is_refused(folder, hub, capsys, missing):
    (folder / missing).unlink()
    assert f"has no {missing}: give a folder that" in fails(capsys, folder, "me/model")
    assert hub.repositories == {}


def test_a_folder_without_weights_or_none_at_all_is_refused(folder, hub, capsys, tmp_path):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert "has no safetensors: give a folder" in fails(capsys, folder, "me/model")
    assert "there is no folder" in fails(capsys, tmp_path / "nowhere", "me/model")
    assert "there is no folder" in fails(capsys, folder / "README.md", "me/model")
    assert hub.repositories == {}


@pytest.mark.parametrize("name", ["me/my model", "a/b/c", "me/-model", "me/" + "x" * 100])
def test_a_name_that_cannot_be_is_refused(folder, hub, capsys, name):
    assert f"{name} is no name of a repository, which is USER/NAME" in fails(capsys, folder, name)
    assert hub.repositories == {}


def test_without_a_token_nothing_is_sent(folder, hub, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "there is no token of the hub: log in with `hf auth login`" in fails(capsys, folder, "me/model")
    assert hub.repositories == {}


def test_a_token_that_is_not_accepted_is_named(folder, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "the hub does not accept the token: log in" in fails(capsys, folder, "me/model")
    assert hub.repositories == {}


@pytest.mark.parametrize("route", ["create", "preupload", "batch", "commit"])
def test_a_token_that_may_not_write_is_named(folder, hub, capsys, route):
    hub.statuses[route] = 403
    assert "the token may not write to me/model (Forbidden: you have no write access.)" in fails(
        capsys, folder, "me/model"
    )
    assert hub.files == {}


def test_weights_that_cannot_be_uploaded_leave_no_commit(folder, hub, capsys):
    hub.statuses["blob"] = 403
    assert "the token may not write to me/model" in fails(capsys, folder, "me/model")
    assert hub.files == {}


def test_what_the_hub_says_is_passed_on(folder, hub, capsys):
    hub.statuses["commit"] = 413
    assert "the hub refuses" in fails(capsys, folder, "me/model")
    (folder / "README.md").write_text("no card")
    assert "Invalid metadata in README.md. - no metadata" in fails(capsys, folder, "me/model")
    assert hub.files == {}


@pytest.mark.parametrize("route", ["create", "preupload", "blob", "commit"])
def test_a_connection_that_breaks_is_one_sentence_and_the_same_command_goes_on(folder, hub, capsys, route):
    hub.dropped.add(route)
    assert "cannot be reached" in fails(capsys, folder, "me/model")
    assert hub.files == {}
    hub.dropped.clear()
    if route == "commit":
        hub.statuses["blob"] = 500  # the weights are there already and not sent again
    assert push(folder, "me/model") == 0
    assert hub.folder("me/model") == FILES


def test_a_hub_that_is_not_there_is_one_sentence(folder, hub, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in fails(capsys, folder, "me/model")


def test_what_an_export_leaves_behind_is_uploaded(runs, hub, tmp_path):
    place = tmp_path / "to"
    assert main(["export", str(runs["full"]), "--to", str(place)]) == 0
    assert push(place, "me/grounding") == 0
    assert hub.folder("me/grounding") == {path.name: path.read_bytes() for path in Path(place).iterdir()}


def test_help_is_no_error(capsys):
    assert push("--help") == 0
    assert "--revision" in capsys.readouterr().out
