"""Servers of completions at other addresses: vLLM's own, or any OpenAI-compatible one.

A server that stops answering is left out, and taken back with the present weights once it answers again.
"""

import logging
import shutil
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from perception_r1.engines.base import EngineContext, EngineError, GenerationEngine, Phase, unmeasured
from perception_r1.engines.client import Completion, Server, ServerLostError, chat_request, read_completions
from perception_r1.engines.weights import save_adapter, save_weights, share_weights
from perception_r1.errors import UserError
from perception_r1.policy.batch import PromptBatch, to_device
from perception_r1.policy.policy import Policy
from perception_r1.policy.prompt_states import PromptStates
from perception_r1.policy.rollout import Rollout, SamplingParams

_POLL_SECONDS = 1.0
_PROCESSED = "processed_logprobs"
_log = logging.getLogger(__name__)


class ServerEngine(GenerationEngine):
    """One or several servers, over which prompts are spread.

    Args:
        urls: Their addresses, `http://host:port`. A key, where they ask for one, is in `PERCEPTION_R1_API_KEY`.
        model: Name of the model there; null: the first that a server names.
        weights_folder: A folder that this program and the servers see: in it weights are handed over, or adapters.
            null: the servers keep the weights that they have, so that they can be evaluated but not trained.
        max_requests: Prompts that a server answers at once.
        timeout: Longest time for an answer, in seconds.
        restart_timeout: How long a run waits for a server when none is left, in seconds.
    """

    def __init__(
        self,
        urls: list[str],
        model: str | None = None,
        weights_folder: Path | None = None,
        max_requests: int = 64,
        timeout: float = 600.0,
        restart_timeout: float = 600.0,
    ) -> None:
        if not urls:
            raise UserError("urls of the engine is empty: give the address of a server, such as http://localhost:8000")
        for name, value in {"max_requests": max_requests, "timeout": timeout}.items():
            if value <= 0:
                raise UserError(f"{name} of the engine is {value}; it must be above 0.")
        self.model = model
        self.weights_folder = weights_folder
        self.restart_timeout = restart_timeout
        self._servers = [Server(url, timeout=timeout, max_requests=max_requests) for url in urls]
        self._num_threads = max_requests * len(urls)
        self._lock = threading.Lock()
        self._all_lost_since: float | None = None
        self._num_updates = 0
        self._weights: Weights | None = None

    def connect(self, policy: Policy, context: EngineContext) -> None:
        """See `GenerationEngine`; at least one server answers."""
        policy.processor.keeps_pictures = not policy.processor.restores_pictures
        if self.weights_folder is not None:
            self._weights = Weights(self.weights_folder, context)
        for server in self._servers:
            server.is_lost = not server.is_healthy()
        self._choose(0)

    def invalidate(self) -> None:
        """See `GenerationEngine`."""
        self._num_updates += 1

    def sleep(self) -> None:
        """Nothing: servers compute elsewhere."""

    def generate(
        self,
        policy: Policy,
        prompts: PromptBatch,
        *,
        group_size: int,
        params: SamplingParams,
        seeds: Sequence[int],
        states: PromptStates | None = None,
        phase: Phase = unmeasured,
    ) -> Rollout:
        """See `GenerationEngine`."""
        with phase("weights"):
            self._prepare(policy)
        pictures = policy.processor.pictures(prompts)

        def answer(index: int) -> list[Completion]:
            request = chat_request(
                prompts.chats[index],
                pictures[index],
                group_size=group_size,
                params=params,
                seed=seeds[index],
                template_options=policy.processor.template_options,
            )
            return read_completions(self._complete(index, request), prompts.input_ids[index], group_size, policy)

        with phase("decode"):
            pool = ThreadPoolExecutor(self._num_threads)
            try:
                rows = [row for group in pool.map(answer, range(len(prompts))) for row in group]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        logprobs = [to_device(row.logprobs, policy.device) for row in rows]
        return Rollout(
            completions=[row.tokens for row in rows],
            logprobs=logprobs,
            is_truncated=[row.is_truncated for row in rows],
            entropies=[torch.full_like(row, float("nan")) for row in logprobs],
        )

    def _prepare(self, policy: Policy) -> None:
        """Hand over the weights that have changed, also to servers that were started again."""
        if policy.has_weights:
            if self._weights is None:
                raise UserError(
                    "weights_folder of the engine is needed where weights are trained or come from a checkpoint: a "
                    "folder that this program and the servers see."
                )
            self._weights.write(policy, self._num_updates)
        for server in self._servers:
            if not server.is_lost or server.is_healthy():
                self._renew(server)

    def _renew(self, server: Server) -> None:
        """Let a server have the present weights; it is lost if it cannot, and no longer lost if it can."""
        try:
            if self._weights is not None:
                self._weights.load(server)
            server.is_lost = False
        except ServerLostError as error:
            self._lose(server, error)

    def _lose(self, server: Server, error: ServerLostError) -> None:
        if not server.is_lost:
            _log.warning("The server %s does not answer (%s).", server.url, error)
        server.is_lost = True
        server.failure = str(error)

    def _complete(self, index: int, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of one of the servers, whichever are left."""
        while True:
            server = self._choose(index)
            try:
                adapter = None if self._weights is None else self._weights.adapter
                return server.complete(request | {"model": adapter or self.model or server.models()[0]})
            except ServerLostError as error:
                self._lose(server, error)

    def _choose(self, index: int) -> Server:
        """One of the servers that answer, another for every index; waits where there is none.

        Raises:
            EngineError: None has answered for too long.
        """
        while True:
            if left := [server for server in self._servers if not server.is_lost]:
                return left[index % len(left)]
            with self._lock:
                self._wait()

    def _wait(self) -> None:
        """Return once a server answers."""
        if all(server.is_lost for server in self._servers) and self._all_lost_since is None:
            _log.warning("No server answers; they are waited for, %.0f s at most.", self.restart_timeout)
            self._all_lost_since = time.monotonic()
        while all(server.is_lost for server in self._servers):
            for server in self._servers:
                if server.is_healthy():
                    self._renew(server)
            if self._all_lost_since is not None and time.monotonic() > self._all_lost_since + self.restart_timeout:
                failures = ", ".join(f"{server.url} ({server.failure})" for server in self._servers)
                raise EngineError(f"No server has answered for {self.restart_timeout:.0f} s: {failures}.")
            time.sleep(_POLL_SECONDS)
        self._all_lost_since = None


class Weights:
    """The present weights in a folder that servers see too: of the whole model, or of its adapter.

    Args:
        folder: The folder.
        context: The run; its first device writes.

    Attributes:
        adapter: Name of the present adapter; None where there is none.
    """

    def __init__(self, folder: Path, context: EngineContext) -> None:
        self.adapter: str | None = None
        self._run = folder.resolve() / context.run_id  # servers have another working directory
        self._run_id, self._is_writer = context.run_id, context.rank == 0
        self._has_adapter = context.config.lora is not None
        self._version: str | None = None
        try:
            self._run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"weights_folder {folder} cannot be written: {error.strerror}") from error
        if self._is_writer:
            weakref.finalize(self, shutil.rmtree, self._run, ignore_errors=True)

    def write(self, policy: Policy, number: int) -> None:
        """Let these be the present weights, if they are not yet; other devices wait for the first one.

        Args:
            policy: Has them, and the same on all devices.
            number: Of the update that made them.
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
                raise EngineError(f"weights_folder {self._run.parent} cannot be written: {why}") from error
            if old is not None:
                shutil.rmtree(self._run / old, ignore_errors=True)
        while not folder.is_dir():
            time.sleep(_POLL_SECONDS / 10)
        self._version = version
        self.adapter = version if self._has_adapter else None

    def load(self, server: Server) -> None:
        """Let a server take over the present weights, if it has not yet; one device at a time.

        Raises:
            ServerLostError: It does not answer.
            UserError: It cannot take over weights.
        """
        if self._version is None:
            return
        folder = self._run / self._version
        with FileLock(self._run / "lock"):
            if self._has_adapter:
                served = server.models()
                if self._version in served:
                    return
                server.load_adapter(folder, self._version)
                for name in served:
                    if name.startswith(self._run_id):
                        server.unload_adapter(name)
            elif server.weight_version() != self._version:
                if (mode := server.logprobs_mode()) != _PROCESSED:
                    raise UserError(
                        f"The server {server.url} tells {mode}, and training needs those of sampling: start it with "
                        f"--logprobs-mode {_PROCESSED}."
                    )
                server.load_weights(folder, self._version)
