"""The name of an evaluation: equal for the same question to the same policy, so that one that was killed goes on."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import perception_r1
from perception_r1.policy.load import model_path
from perception_r1.policy.sharded_checkpoint import META

EVALUATION = "eval-"
"""How the names of folders begin that have the name of their evaluation behind it."""
_WITHOUT_EFFECT = {
    "data": ("num_workers", "batch_size", "global_batch_size", "eval_batch_size", "longest_first"),
    "model": ("eval_batch_tokens", "optimizer", "lr_scheduler"),
}
"""Settings that change how long an evaluation takes, or nothing; and devices may be others."""


def evaluation_key(config: Mapping[str, Any]) -> str:
    """Twelve hex digits of everything that determines the answers: settings, files that they name, and the code.

    Files count by name, size and time of change: weights of gigabytes are not read for this. So do those in the folder
    of a model or of a checkpoint.

    Args:
        config: The parsed configuration of `test`, as nested mappings; its "ckpt_path" is a file, a folder or None.
    """
    parts = {name: config.get(name) for name in ("data", "model", "seed_everything", "ckpt_path")}
    trainer = config.get("trainer") or {}
    parts |= {name: trainer.get(name) for name in ("precision", "limit_test_batches")}
    values = [value for name, part in parts.items() for value in (name, *_leaves(part, _WITHOUT_EFFECT.get(name, ())))]
    values += [version("torch"), version("transformers")]
    package = Path(perception_r1.__file__).parent
    digest = hashlib.sha256(json.dumps(values, default=str).encode())
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _leaves(value: Any, left_out: Collection[str]) -> Iterator[object]:
    """All keys and values, files with size and time of change."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in left_out:
                yield key
                yield from _leaves(item, left_out)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, left_out)
    else:
        yield str(value)
        if isinstance(value, str | Path):
            for file in _files(str(value)):
                state = file.stat()
                yield [file.name, state.st_size, state.st_mtime_ns]


def _files(name: str) -> list[Path]:
    """The file of this name, or the files of a model's or a checkpoint's folder; none where a setting is no name."""
    if os.path.isfile(name):  # unlike pathlib's, it takes any text
        return [Path(name)]
    folder = model_path(name)
    is_known = folder != "" and any(os.path.isfile(os.path.join(folder, mark)) for mark in ("config.json", META))
    return sorted(path for path in Path(folder).iterdir() if path.is_file()) if is_known else []
