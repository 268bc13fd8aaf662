"""The weights of a run in a folder that servers see too, from which they take them over."""

import shutil
import time
import weakref
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from perception_r1.engines.base import EngineContext, EngineError
from perception_r1.engines.client import Server
from perception_r1.engines.weights import save_adapter, save_weights, share_weights
from perception_r1.errors import UserError
from perception_r1.policy.policy import Policy

_POLL_SECONDS = 0.1
_PROCESSED = "processed_logprobs"
_OWNER = "owner.lock"
"""Is locked as long as the run goes on to which the weights belong."""


class SharedWeights:
    """The present weights: of the whole model, or of its adapter.

    What runs have left there that were killed is removed.

    Args:
        folder: The folder.
        context: The run; its first device writes.

    Attributes:
        adapter: Name of the present adapter; None where there is none.

    Raises:
        UserError: The folder cannot be written.
    """

    def __init__(self, folder: Path, context: EngineContext) -> None:
        self.adapter: str | None = None
        self._folder = folder.resolve()  # servers have another working directory
        self._run = self._folder / context.run_id
        self._run_id, self._is_writer = context.run_id, context.rank == 0
        self._has_adapter = context.config.lora is not None
        self._version: str | None = None
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            if self._is_writer:
                self._owner = FileLock(self._run / _OWNER)
                self._owner.acquire()
                _remove_orphans(self._folder)
        except OSError as error:
            raise UserError(f"weights_folder {folder} cannot be written: {error.strerror}") from error
        if self._is_writer:
            weakref.finalize(self, shutil.rmtree, self._run, ignore_errors=True)

    def write(self, policy: Policy, number: int) -> None:
        """Let these be the present weights, if they are not yet; other devices wait for the first one.

        Args:
            policy: Has them, and the same on all devices.
            number: Of the update that made them.

        Raises:
            EngineError: They cannot be written.
        """
        version = f"{self._run_id}-{number}"
        if version == self._version:
            return
        old, folder = self._version, self._run / version
        if self._is_writer:
            part = folder.with_suffix(".part")
            try:
                part.mkdir()
                (save_adapter if self._has_adapter else save_weights)(policy, part)
                share_weights(part)
                part.rename(folder)
            except (OSError, SafetensorError) as error:
                why = getattr(error, "strerror", None) or error
                raise EngineError(f"weights_folder {self._folder} cannot be written: {why}") from error
            if old is not None:
                shutil.rmtree(self._run / old, ignore_errors=True)
        while not folder.is_dir():
            if not self._run.is_dir():
                raise self._gone()
            time.sleep(_POLL_SECONDS)
        self._version = version
        self.adapter = version if self._has_adapter else None

    def load(self, server: Server) -> None:
        """Let a server take over the present weights, if it has not yet; one device at a time.

        Raises:
            ServerLostError: It does not answer.
            EngineError: It cannot take over weights.
        """
        if self._version is None:
            return
        if not (self._run / self._version).is_dir():
            raise self._gone()
        with FileLock(self._run / "lock"):
            self._load(server, self._version)

    def _load(self, server: Server, version: str) -> None:
        folder = self._run / version
        if self._has_adapter:
            served = server.models()
            if version in served:
                return
            server.load_adapter(folder, version)
            for name in served:
                if name.startswith(self._run_id):
                    server.unload_adapter(name)
        elif server.weight_version() != version:
            if (mode := server.logprobs_mode()) != _PROCESSED:
                raise EngineError(
                    f"The server {server.url} tells {mode}, and training needs those of sampling: start it with "
                    f"--logprobs-mode {_PROCESSED}."
                )
            server.load_weights(folder, version)

    def _gone(self) -> EngineError:
        return EngineError(
            f"The weights of this run in {self._folder} are gone: the process that wrote them has ended."
        )


def _remove_orphans(folder: Path) -> None:
    """Remove the weights of runs whose process is gone. A run that has written some has locked its folder before."""
    for run in folder.iterdir():
        if (run / _OWNER).is_file() and any(run.glob(f"{run.name}-*")):
            owner = FileLock(run / _OWNER)
            try:
                owner.acquire(timeout=0)
            except (Timeout, OSError):
                continue
            shutil.rmtree(run, ignore_errors=True)
            owner.release()
