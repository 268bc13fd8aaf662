"""The name of an evaluation: equal for the same question to the same policy, so that one that was killed goes on."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import perception_r1

_WITHOUT_EFFECT = ("num_workers", "batch_size", "eval_batch_size", "eval_batch_tokens", "optimizer", "schedule")
"""Settings that change how long an evaluation takes, or nothing; and devices may be others."""


def evaluation_key(config: Mapping[str, Any]) -> str:
    """Twelve hex digits of everything that determines the answers: settings, files that they name, and the code.

    Files count by name, size and time of change: weights of gigabytes are not read for this.

    Args:
        config: The parsed configuration of `test`, as nested mappings; its "ckpt_path" is a file or None.
    """
    parts = {name: config.get(name) for name in ("data", "model", "embedded", "seed_everything", "ckpt_path")}
    trainer = config.get("trainer") or {}
    parts |= {name: trainer.get(name) for name in ("precision", "limit_test_batches")}
    values = list(_leaves(parts))
    package = Path(perception_r1.__file__).parent
    digest = hashlib.sha256(json.dumps(values, default=str).encode())
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _leaves(value: Any) -> Iterator[object]:
    """All keys and values, files with size and time of change."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _WITHOUT_EFFECT:
                yield key
                yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield str(value)
        if isinstance(value, str | Path) and len(str(value)) < 4096 and Path(value).is_file():
            state = Path(value).stat()
            yield [state.st_size, state.st_mtime_ns]
