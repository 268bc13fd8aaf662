"""What a run card says of code and machine."""

import subprocess
from pathlib import Path

from perception_r1.callbacks.environment import git_state, hardware, versions


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_repository_is_told_by_commit_and_dirtiness(tmp_path: Path):
    git(tmp_path, "init")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a.txt").write_text("one")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "is_dirty": False}
    (tmp_path / "a.txt").write_text("two")
    assert git_state(tmp_path) == {"commit": commit, "is_dirty": True}


def test_a_plain_folder_and_a_missing_one_have_no_state(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "missing") is None
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None


def test_versions_and_hardware_are_known_here():
    assert all(versions().values())
    machine = hardware()
    assert machine["cpu"]
    assert machine["memory_gib"] is None or machine["memory_gib"] > 0.1
