"""Requests of many clients as batches of one engine, in a thread of their own.

Legend: G completions of a request.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from perception_r1.engines import GenerationEngine
from perception_r1.engines.base import NEVER
from perception_r1.errors import UserError
from perception_r1.policy.batch import Chat, PromptBatch
from perception_r1.policy.policy import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionParams:
    """How completions are written; requests with the same are answered together.

    Attributes:
        group_size: G.
        max_new_tokens: Longest completion, end token included.
        temperature: 0 takes the most probable token each time.
        top_p: Of nucleus sampling.
        repetition_penalty: Above 1 it makes tokens that are there already less probable.
    """

    group_size: int = 1
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A completion with its tokens.

    Attributes:
        text: Without the end token, with other special tokens.
        plain_text: Without any special token.
        tokens: Ids, the end token included.
        token_texts: Text of each token.
        logprobs: Of each token, in the distribution from which it was drawn.
        is_truncated: The length limit came before an end token.
    """

    text: str
    plain_text: str
    tokens: list[int]
    token_texts: list[str]
    logprobs: list[float]
    is_truncated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a request gets.

    Attributes:
        prompt_ids: Tokens of the prompt.
        completions: G of them.
    """

    prompt_ids: list[int]
    completions: list[Completion]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Request:
    prompt: PromptBatch
    sampling: CompletionParams
    seed: int
    future: "Future[Answer]"

    @property
    def num_values(self) -> int:
        """Values of its pixels."""
        return sum(values.numel() for values in self.prompt.pixel_values)


class Generator(threading.Thread):
    """Answers requests; those that wait with the same sampling become one batch.

    Args:
        policy: In evaluation mode.
        engine: Connected to it.
        autocast: Around every batch.
        max_batch: Most completions at once.
        max_batch_values: Most values of pixels at once, unless a single request has more.
    """

    def __init__(
        self,
        policy: Policy,
        engine: GenerationEngine,
        *,
        autocast: AbstractContextManager[object] | None = None,
        max_batch: int = 32,
        max_batch_values: int = 150_000_000,
    ) -> None:
        super().__init__(name="generation", daemon=True)
        self.policy, self.engine = policy, engine
        self.max_batch, self.max_batch_values = max_batch, max_batch_values
        self._autocast = nullcontext() if autocast is None else autocast
        self._waiting: list[_Request] = []
        self._changed = threading.Condition()
        self._encoding = threading.Lock()
        self._seeds = count()

    @property
    def num_waiting(self) -> int:
        """Requests whose turn has not come."""
        return len(self._waiting)

    @property
    def settings(self) -> dict[str, Any]:
        """What is said of sampling by the model itself, in the words of vLLM's interface."""
        return {
            "stop_token_ids": self.policy.eos_token_ids.tolist(),
            "logit_bias": {str(token): NEVER for token in self.policy.suppress_tokens.tolist()},
            "chat_template_kwargs": self.policy.processor.template_options,
        }

    def encode(self, chat: Chat, images: Sequence[Image.Image]) -> PromptBatch:
        """The prompt of a request.

        Args:
            chat: Messages; their pictures stand as `{"type": "image"}`.
            images: RGB pictures, in their order.

        Raises:
            UserError: The prompt is too long, or the model cannot take the pictures or the messages.
        """
        with self._encoding:  # neither tokenizers nor image processors are made for several threads
            return self.policy.processor.encode_bytes([chat], [images], max_tokens=self.policy.max_prompt_length)

    def submit(self, prompt: PromptBatch, sampling: CompletionParams, seed: int | None = None) -> "Future[Answer]":
        """Hand over a request; it is forgotten if its future is cancelled before its turn.

        Args:
            prompt: Of `encode`.
            sampling: How completions are written.
            seed: On which they depend; None takes another one each time.
        """
        future: Future[Answer] = Future()
        seed = next(self._seeds) if seed is None else seed
        with self._changed:
            self._waiting.append(_Request(prompt=prompt, sampling=sampling, seed=seed, future=future))
            self._changed.notify()
        future.add_done_callback(self._forget)
        return future

    def run(self) -> None:
        """Answer batch after batch."""
        while True:
            batch = self._next_batch()
            if not batch:  # nobody waits for it any more
                continue
            try:
                answers = self._answer(batch)
            except Exception as error:  # the next batch may do better
                for request in batch:
                    request.future.set_exception(error)
                continue
            for request, answer in zip(batch, answers, strict=True):
                request.future.set_result(answer)

    def _next_batch(self) -> list[_Request]:
        """The request that waits longest, and others with the same sampling."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            sampling = self._waiting[0].sampling
            same = [request for request in self._waiting if request.sampling == sampling]
            same = same[: max(1, self.max_batch // sampling.group_size)]
            num_values = accumulate(request.num_values for request in same)
            room = max(1, sum(total <= self.max_batch_values for total in num_values))
            batch = same[:room]
            self._waiting = [request for request in self._waiting if request not in batch]
        return [request for request in batch if request.future.set_running_or_notify_cancel()]

    def _forget(self, future: "Future[Answer]") -> None:
        with self._changed:
            self._waiting = [request for request in self._waiting if request.future is not future]

    @torch.no_grad()
    def _answer(self, batch: Sequence[_Request]) -> list[Answer]:
        sampling = batch[0].sampling
        prompts = self.policy.receive(PromptBatch.concat([request.prompt for request in batch]))
        params = self.policy.sampling_params(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature or 1.0,
            top_p=sampling.top_p,
            is_greedy=sampling.temperature == 0,
            repetition_penalty=sampling.repetition_penalty,
        )
        with self._autocast:
            rollout = self.engine.generate(
                self.policy,
                prompts,
                group_size=sampling.group_size,
                params=params,
                seeds=[request.seed for request in batch],
            )
        rows = zip(rollout.completions, rollout.logprobs, rollout.is_truncated, strict=True)
        with self._encoding:
            completions = [self._completion(*row) for row in rows]
        size = sampling.group_size
        return [
            Answer(prompt_ids=ids.tolist(), completions=completions[index * size : (index + 1) * size])
            for index, ids in enumerate(prompts.input_ids)
        ]

    def _completion(self, tokens: Tensor, logprobs: Tensor, is_truncated: bool) -> Completion:
        decode, shown = self.policy.processor.decode, tokens if is_truncated else tokens[:-1]
        return Completion(
            text=decode([shown])[0],
            plain_text=decode([shown], has_special_tokens=False)[0],
            tokens=tokens.tolist(),
            token_texts=decode(list(tokens.split(1))),
            logprobs=logprobs.tolist(),
            is_truncated=is_truncated,
        )


def check_sampling(sampling: CompletionParams, *, max_new_tokens: int, max_group_size: int) -> None:
    """Refuse, with a `UserError`, sampling that no model can do, or that this one may not."""
    if not 1 <= sampling.group_size <= max_group_size:
        raise UserError(f"n is {sampling.group_size}; it must be from 1 to {max_group_size}.")
    if not 1 <= sampling.max_new_tokens <= max_new_tokens:
        raise UserError(f"max_tokens is {sampling.max_new_tokens}; it must be from 1 to {max_new_tokens}.")
    if not 0 <= sampling.temperature <= 2:
        raise UserError(f"temperature is {sampling.temperature}; it must be from 0 to 2.")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"top_p is {sampling.top_p}; it must be above 0 and at most 1.")
    if not 0.01 <= sampling.repetition_penalty <= 100:
        raise UserError(f"repetition_penalty is {sampling.repetition_penalty}; it must be from 0.01 to 100.")
