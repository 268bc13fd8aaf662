"""Completions from servers at other addresses: vLLM's own, or any OpenAI-compatible ones."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from perception_r1.engines.base import EngineContext, EngineError, GenerationEngine, Phase, unmeasured
from perception_r1.engines.client import Completion, Server, chat_request, read_completions
from perception_r1.engines.servers import Servers, map_in_threads
from perception_r1.engines.shared_weights import SharedWeights
from perception_r1.errors import UserError
from perception_r1.policy.batch import PromptBatch, to_device
from perception_r1.policy.policy import Policy
from perception_r1.policy.prompt_states import PromptStates
from perception_r1.policy.rollout import Rollout, SamplingParams


class ServerEngine(GenerationEngine):
    """One or several servers, over which prompts are spread.

    A server that stops answering is left out, and taken back with the present weights once it answers again.

    Args:
        urls: Their addresses, `http://host:port`. A key, where they ask for one, is in `PERCEPTION_R1_API_KEY`.
        model: Name of the model there; null: the first that a server names.
        weights_folder: A folder that this program and the servers see: in it weights are handed over, or adapters.
            null: the servers keep the weights that they have, so that they can be evaluated but not trained.
        max_requests: Prompts that a server answers at once.
        timeout: Longest time for an answer, in seconds.
        restart_timeout: How long a run waits for a server when none is left, and tries a prompt that fails, in seconds.
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
        self._servers = Servers(
            [Server(url, timeout=timeout, max_requests=max_requests) for url in urls], restart_timeout=restart_timeout
        )
        self._num_threads = max_requests * len(urls)
        self._num_updates = 0
        self._weights: SharedWeights | None = None

    def connect(self, policy: Policy, context: EngineContext) -> None:
        """See `GenerationEngine`; at least one server answers."""
        policy.processor.keeps_pictures = not policy.processor.restores_pictures
        if self.weights_folder is not None:
            self._weights = SharedWeights(self.weights_folder, context)
            self._servers.welcome = self._weights.load
        self._servers.check()

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
            self._renew(policy)
        pictures = policy.processor.pictures(prompts)

        def answer(index: int, is_over: threading.Event) -> list[Completion]:
            request = chat_request(
                prompts.chats[index],
                pictures[index],
                group_size=group_size,
                params=params,
                seed=seeds[index],
                template_options=policy.processor.template_options,
            )
            told = self._servers.complete(index, lambda server: self._complete(server, request), is_over)
            return read_completions(told, prompts.input_ids[index], group_size=group_size, params=params, policy=policy)

        with phase("decode"):
            groups = map_in_threads(answer, len(prompts), num_threads=self._num_threads)
        rows = [row for group in groups for row in group]
        logprobs = [to_device(row.logprobs, policy.device) for row in rows]
        return Rollout(
            completions=[row.tokens for row in rows],
            logprobs=logprobs,
            is_truncated=[row.is_truncated for row in rows],
            entropies=[torch.full_like(row, float("nan")) for row in logprobs],
        )

    def _renew(self, policy: Policy) -> None:
        """Hand over the weights that have changed, also to servers that were started again."""
        if policy.has_weights:
            if self._weights is None:
                raise EngineError(
                    "weights_folder of the engine is needed where weights are trained or come from a checkpoint: a "
                    "folder that this program and the servers see."
                )
            self._weights.write(policy, self._num_updates)
        self._servers.renew()

    def _complete(self, server: Server, request: dict[str, Any]) -> Any:
        adapter = None if self._weights is None else self._weights.adapter
        return server.complete(request | {"model": adapter or self.model or server.first_model()})
