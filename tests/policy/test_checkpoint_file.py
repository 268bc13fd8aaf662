"""No byte of a checkpoint changes unnoticed, and nothing in one is ever run."""

import hashlib
import io
import os
import pickle
import random
import zipfile

import pytest
import torch

from perception_r1.errors import UserError
from perception_r1.policy import checkpoint_file
from perception_r1.policy.checkpoint import verify
from perception_r1.policy.checkpoint_file import DamagedCheckpointError, load_file, save_file
from perception_r1.policy.sharded_checkpoint import META, load_shards, save_shards

CHECKPOINT = {"state_dict": {"weight": torch.arange(12.0).view(3, 4)}, "run": {"name": "a"}, "global_step": 3}


@pytest.fixture
def path(tmp_path):
    save_file(CHECKPOINT, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.fixture
def shards(tmp_path):
    save_shards(CHECKPOINT, tmp_path / "folder", is_global_zero=True)
    return tmp_path / "folder"


class Code:
    """Leaves a file behind when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_is_read_as_it_was_written(path):
    for is_mapped in (False, True):
        loaded = load_file(path, is_mapped=is_mapped)
        assert torch.equal(loaded["state_dict"].pop("weight"), CHECKPOINT["state_dict"]["weight"])
        assert loaded == CHECKPOINT | {"state_dict": {}}


def test_the_comment_of_the_archive_is_the_digest_of_the_file_without_it(path):
    """By another reader of zip archives."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        comment = archive.comment
    mark, _, digest = comment.decode().rpartition(" ")
    content = path.read_bytes()[: -len(comment) - 2] + b"\0\0"
    torch.save(CHECKPOINT, plain := io.BytesIO())
    assert content == plain.getvalue()
    assert mark == "perception-r1 sha256"
    assert digest == hashlib.sha256(content).hexdigest()


def test_other_programs_read_it(path):
    assert torch.load(path, weights_only=True).keys() == CHECKPOINT.keys()


def test_a_single_bit_anywhere_is_noticed(path, tmp_path):
    content, generator = path.read_bytes(), random.Random(0)
    passed = []
    for index in range(len(content)):
        changed = bytearray(content)
        changed[index] ^= 1 << generator.randrange(8)
        other = tmp_path / f"{index % 2}.ckpt"
        other.write_bytes(changed)
        try:
            load_file(other)
            passed.append(index)
        except DamagedCheckpointError:
            pass
    assert passed == []


def test_a_file_that_was_cut_off_or_goes_on_is_noticed(path, tmp_path):
    content = path.read_bytes()
    lengths = {0, 1, 3, 4, 5, len(content) - 1, len(content) - 87, len(content) - 88, *range(7, len(content), 11)}
    for number, changed in enumerate([*(content[:length] for length in lengths), content + b"\0", content + content]):
        other = tmp_path / f"{number}.ckpt"
        other.write_bytes(changed)
        with pytest.raises(DamagedCheckpointError) as error:
            load_file(other)
        assert str(other) in str(error.value)
        assert "\n" not in str(error.value)


def test_what_is_no_checkpoint_of_ours_is_one_sentence(tmp_path):
    torch.save(CHECKPOINT, tmp_path / "plain.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(CHECKPOINT["run"]))
    expected = {"plain": "was not written by a run of this", "folder": "is a folder", "empty": "is empty"}
    for name, words in (expected | {"gone": "There is no", "pickle": "no checkpoint at all"}).items():
        with pytest.raises(DamagedCheckpointError, match=words):
            verify(tmp_path / f"{name}.ckpt")


def test_a_file_that_may_not_be_read_is_not_called_damaged(path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint_file, "_verify", refuse)
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read: Permission denied") as error:
        verify(path)
    assert not isinstance(error.value, DamagedCheckpointError)


def test_code_in_a_file_is_not_run(tmp_path):
    save_file({"run": Code(tmp_path / "ran")}, tmp_path / "code.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    for name, words in {
        "code.ckpt": "holds something else than numbers and text",
        "plain.ckpt": "no checkpoint",
    }.items():
        with pytest.raises(DamagedCheckpointError, match=words):
            load_file(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_file_is_verified_once_until_another_takes_its_place(path, tmp_path, monkeypatch):
    hashed = []
    hash_file = checkpoint_file._hash
    monkeypatch.setattr(checkpoint_file, "_hash", lambda *args: hashed.append(1) or hash_file(*args))
    for _ in range(3):
        load_file(path)
    assert len(hashed) == 1
    save_file(CHECKPOINT | {"global_step": 4}, tmp_path / "new.ckpt")
    os.replace(tmp_path / "new.ckpt", path)
    assert load_file(path)["global_step"] == 4
    assert len(hashed) == 2


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(path, tmp_path, monkeypatch):
    save_file(CHECKPOINT | {"global_step": 4}, tmp_path / "new.ckpt")
    load, verify_file = torch.load, checkpoint_file.verify_file
    monkeypatch.setattr(checkpoint_file, "verify_file", lambda path: seen.append(1) or verify_file(path))
    seen = []

    def slow_load(*args, **options):
        if (tmp_path / "new.ckpt").exists():
            os.replace(tmp_path / "new.ckpt", path)
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", slow_load)
    assert load_file(path)["global_step"] == 4
    assert len(seen) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("is_handling", [False, True])
def test_what_breaks_off_the_writing_is_what_is_raised(tmp_path, monkeypatch, error, is_handling):
    write, sizes = checkpoint_file.HashingWriter.write, []

    def broken(self, data):
        sizes.append(len(data))
        if len(sizes) == 3:
            raise error
        return write(self, data)

    def save():
        save_file({"weights": torch.zeros(1000)}, tmp_path / "a.ckpt")

    def save_while_handling():
        try:
            raise ValueError
        except ValueError:
            save()

    monkeypatch.setattr(checkpoint_file.HashingWriter, "write", broken)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        (save_while_handling if is_handling else save)()


def test_shards_are_read_as_they_were_written(shards):
    loaded = load_shards(shards)
    assert torch.equal(loaded["state_dict"].pop("weight"), CHECKPOINT["state_dict"]["weight"])
    assert loaded == CHECKPOINT | {"state_dict": {}}


def test_the_digests_of_shards_are_those_of_their_files(shards):
    digests = torch.load(shards / META, weights_only=True)["digests"]
    files = {path.name: path.read_bytes() for path in shards.iterdir() if path.name != META}
    assert sorted(files) == [".metadata", "__0_0.distcp"]
    assert digests == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


@pytest.mark.parametrize("name", [META, ".metadata", "__0_0.distcp"])
def test_a_bit_in_any_file_of_a_folder_is_noticed(shards, name):
    path, generator = shards / name, random.Random(1)
    content = path.read_bytes()
    for index in [0, len(content) - 1, *generator.sample(range(len(content)), 100)]:
        changed = bytearray(content)
        changed[index] ^= 1 << generator.randrange(8)
        path.unlink()
        path.write_bytes(changed)
        with pytest.raises(DamagedCheckpointError, match=name if name != ".metadata" else "metadata"):
            verify(shards)
    path.unlink()
    with pytest.raises(DamagedCheckpointError, match="is a folder" if name == META else "is gone"):
        verify(shards)


def test_a_shard_of_another_checkpoint_is_noticed(shards, tmp_path):
    other = CHECKPOINT | {"state_dict": {"weight": torch.zeros(3, 4)}}
    save_shards(other, tmp_path / "other", is_global_zero=True)
    verify(tmp_path / "other")
    os.replace(tmp_path / "other" / "__0_0.distcp", shards / "__0_0.distcp")
    with pytest.raises(DamagedCheckpointError, match="__0_0"):
        verify(shards)


def test_code_in_the_index_of_a_folder_is_not_run(shards, tmp_path):
    """Whose digests are right."""
    content = pickle.dumps(Code(tmp_path / "ran"))
    (shards / ".metadata").unlink()
    (shards / ".metadata").write_bytes(content)
    meta = load_file(shards / META)
    meta["digests"][".metadata"] = hashlib.sha256(content).hexdigest()
    save_file(meta, shards / "new")
    os.replace(shards / "new", shards / META)
    with pytest.raises(DamagedCheckpointError, match=r"no usable index: it asks for posix\.mkdir"):
        load_shards(shards)
    assert not (tmp_path / "ran").exists()
