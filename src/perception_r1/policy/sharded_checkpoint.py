"""A checkpoint as a folder of shards: every device writes and reads its part, with torch.distributed.checkpoint.

The tensors of weights and of optimiser states are shards, each named by its place in the checkpoint, such as
`state_dict/NAME` or `optimizer_states/0/state/7/exp_avg`. All else is in one file beside them, which also has the
SHA-256 of every other file of the folder, taken by each device while it wrote. That file proves itself, see
`checkpoint_file.py`.
"""

import os
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from perception_r1.errors import UserError
from perception_r1.policy.checkpoint_file import (
    Advance,
    DamagedCheckpointError,
    HashingWriter,
    load_file,
    save_file,
    verification,
    verify_digest,
)

META = "meta.pt"
"""The file with all that is not sharded; Lightning's own name for it."""
_DIGESTS = "digests"
"""Its key for the digests of the other files, by their names."""
_SHARDED = ("state_dict", "optimizer_states")
_ALLOWED = frozenset(
    {
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "TensorProperties",
                "_MEM_FORMAT_ENCODING",
                "ChunkStorageMetadata",
                "MetadataIndex",
                "StorageMeta",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
    }
)
"""What the index of a folder is made of, besides the types of tensors: records, no code."""


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return (path / META).is_file()


def save_shards(checkpoint: Mapping[str, Any], folder: Path, *, is_global_zero: bool) -> None:
    """Write a checkpoint; all devices take part, and one of them writes what is not sharded."""
    tensors: dict[str, Tensor] = {}
    rest = {key: _without(value, key, tensors) if key in _SHARDED else value for key, value in checkpoint.items()}
    writer = filesystem.FileSystemWriter(folder)
    writer.fs = files = _HashingFiles()
    save(tensors, storage_writer=writer)
    digests = {name: digest for part in _gathered(files.digests) for name, digest in part.items()}
    if is_global_zero:
        save_file(rest | {_DIGESTS: digests}, folder / META)


def load_shards(
    folder: Path, layouts: Mapping[str, Tensor] | None = None, *, parts: Sequence[str] = _SHARDED
) -> dict[str, Any]:
    """Read a checkpoint, whatever the number of devices that wrote it, once all of it has proved itself.

    Args:
        folder: Where it is.
        layouts: Tensors by their place in the checkpoint; those of the optimiser's states by that of their parameter.
            What is read is sharded as these are; all else is whole. All devices of a sharded tensor take part.
        parts: Of what is sharded, what is read; the rest is left out.

    Raises:
        UserError: As `verify_shards`.
    """
    verify_shards(folder, is_divided=True)
    layouts = layouts or {}
    entries = _Reader(folder).read_metadata().state_dict_metadata
    tensors = {}
    for name, entry in entries.items():
        if not name.startswith(tuple(f"{part}/" for part in parts)):
            continue
        if not isinstance(entry, TensorStorageMetadata):  # torch would read it with all that a pickle can do
            raise DamagedCheckpointError(f"The checkpoint {folder} holds something else than tensors in {name}.")
        layout = layouts.get(name, layouts.get(name.rpartition("/")[0]))
        size, dtype = entry.size, entry.properties.dtype
        if layout is None or layout.shape != size:
            tensors[name] = torch.empty(size, dtype=dtype)
        else:
            tensors[name] = torch.empty_like(layout.detach(), dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads it all: export
        try:
            load(tensors, storage_reader=_Reader(folder))
        except UserError:
            raise
        except Exception as error:  # those of all devices in one, of many lines
            raise DamagedCheckpointError(f"The checkpoint {folder} has an index that does not fit it.") from error
    rest = {key: value for key, value in load_meta(folder).items() if key not in _SHARDED or key in parts}
    return {key: _with(value, key, tensors) if key in parts else value for key, value in rest.items()}


def load_meta(folder: Path) -> dict[str, Any]:
    """What of a checkpoint is not sharded; raises as `load_file` does."""
    meta = load_file(folder / META)
    del meta[_DIGESTS]
    return meta


def verify_shards(folder: Path, *, is_divided: bool = False) -> None:
    """Make sure that every file of a checkpoint is what one of our runs has written.

    Args:
        folder: Where it is.
        is_divided: All devices take part, each with its share of the files.

    Raises:
        DamagedCheckpointError: A file is damaged, gone, or not that of this checkpoint.
        UserError: A file cannot be read.
    """
    digests = load_file(folder / META).get(_DIGESTS)
    if not isinstance(digests, dict) or any(Path(name).name != name for name in digests):
        raise DamagedCheckpointError(f"The checkpoint {folder} was not written by a run of this program.")
    is_divided = is_divided and dist.is_initialized()
    rank, number = (dist.get_rank(), dist.get_world_size()) if is_divided else (0, 1)
    names = sorted(digests)[rank::number]

    num_bytes = sum(path.stat().st_size for name in names if (path := folder / name).is_file())
    with verification(folder.name, num_bytes) as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda name: _problem(folder / name, digests[name], advance), names))
    for error in (error for part in (_gathered(found) if is_divided else [found]) for error in part):
        if error is not None:
            raise error


def _problem(path: Path, digest: str, advance: Advance) -> UserError | None:
    """What is wrong with a file."""
    try:
        verify_digest(path, digest, advance)
    except UserError as error:
        return error
    return None


class _HashingFiles(filesystem.FileSystem):
    """Files of this device, with the digest of each."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """A file that is hashed while it is written."""
        with open(path, mode) as file, HashingWriter(cast(Any, file)) as writer:
            yield writer
        self.digests[Path(path).name] = writer.hexdigest()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Its digest goes with it."""
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _Reader(filesystem.FileSystemReader):
    """Reads the index of a folder without running what a pickle may hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index."""
        path = cast(Path, self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _IndexUnpickler(file).load()
        except Exception as error:  # what a reader of pickles raises has no end
            raise DamagedCheckpointError(f"The checkpoint {self.path} has no usable index: {error}.") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return cast(Metadata, metadata)


class _IndexUnpickler(pickle.Unpickler):
    """Reads records of torch.distributed.checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_type and (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _gathered(own: Any) -> list[Any]:
    """What every device has, on all of them."""
    if not dist.is_initialized():
        return [own]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts


def _without(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of dictionaries and lists without its tensors, which are collected by their place."""
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return None
    if isinstance(tree, dict):
        return {key: _without(value, f"{name}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without(value, f"{name}/{index}", tensors) for index, value in enumerate(tree)]
    return tree


def _with(tree: Any, name: str, tensors: Mapping[str, Tensor]) -> Any:
    """The tree with its tensors again."""
    if name in tensors:
        return tensors[name]
    if isinstance(tree, dict):
        return {key: _with(value, f"{name}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with(value, f"{name}/{index}", tensors) for index, value in enumerate(tree)]
    return tree
