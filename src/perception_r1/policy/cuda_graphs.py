"""Writing completions on CUDA: a step is captured once as a graph and replayed, so launching kernels costs nothing.

A graph is bound to addresses and shapes: every buffer is static, the room for prompts is rounded up, and rows stay to
the end, since a step takes the time of reading the weights whether few or many rows are left. Small graphs are kept
from one rollout to the next. The eager `policy/rollout.py` computes the same and is the oracle.

Legend: B prompts, G completions per prompt, N = B*G rows, T longest completion, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from perception_r1.policy import rollout
from perception_r1.policy.cache import StaticCache
from perception_r1.policy.decoder import Decoder
from perception_r1.policy.prefill import PromptCache
from perception_r1.policy.rollout import GenerationBuffer, Rollout, SamplingParams, sample_token

_PROMPT_BUCKET = 256
"""The room for prompts is a multiple of this, so that few different graphs are needed."""

_CHECK_INTERVAL = 8
"""Steps between two checks whether all rows have ended: each of them waits for the device."""

_NUM_WARM_UP_STEPS = 2

_MAX_GRAPHS = 4
"""Graphs that are kept."""

_MAX_KEPT_BYTES = 2**30
"""Buffers of graphs that are kept from one rollout to the next: what they hold, training cannot have. To capture a
larger one again costs little beside the rollout that needs it."""

Step: TypeAlias = Callable[[], None]


def capture(step: Step) -> Step:
    """A CUDA graph of a step that changes buffers in place; capturing leaves them in any state."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm_up(step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def warm_up(step: Step) -> None:
    """Libraries set themselves up in the first calls of a step, which must not be captured."""
    for _ in range(_NUM_WARM_UP_STEPS):
        step()


class GraphGenerator:
    """Generates like `rollout.generate`, by replaying steps of a decoder that `capture` has made replayable.

    Args:
        decoder: What a step runs.
        capture: Makes a step replayable.
        max_kept_bytes: Buffers that may be held between rollouts.
    """

    def __init__(
        self, decoder: Decoder, capture: Callable[[Step], Step] = capture, max_kept_bytes: int = _MAX_KEPT_BYTES
    ) -> None:
        self.decoder = decoder
        self._capture = capture
        self._max_kept_bytes = max_kept_bytes
        self._captured: dict[tuple[object, ...], CapturedStep] = {}

    @torch.no_grad()
    def generate(
        self, prompts: PromptCache, *, group_size: int, params: SamplingParams, seeds: Sequence[int]
    ) -> Rollout:
        """Write G completions of each prompt; see `rollout.generate`."""
        captured = self.prepare(prompts, group_size=group_size, params=params, seeds=seeds)
        for step in range(params.max_new_tokens):
            captured.replay()
            if (step + 1) % _CHECK_INTERVAL == 0 and bool(captured.ended.all()):
                break
        completions = rollout.trim_completions(captured.buffer, params)
        self.release()
        return completions

    @property
    def is_empty(self) -> bool:
        """No step is kept, so nothing needs the decoder's copies of the weights to stay."""
        return not self._captured

    def release(self) -> None:
        """Let go of the steps that were not used for the longest time, until the others are few and small enough."""
        sizes = {key: step.num_bytes for key, step in self._captured.items()}
        while len(sizes) > _MAX_GRAPHS or sum(sizes.values()) > self._max_kept_bytes:
            oldest = next(iter(sizes))
            del sizes[oldest], self._captured[oldest]

    @torch.no_grad()
    def prepare(
        self, prompts: PromptCache, *, group_size: int, params: SamplingParams, seeds: Sequence[int]
    ) -> "CapturedStep":
        """The step that writes the next token of each row, captured or found again, at its beginning."""
        self.decoder.sync_weights()
        num_prompts, _, longest, _ = prompts.keys[0].shape
        room = -(-longest // _PROMPT_BUCKET) * _PROMPT_BUCKET
        shape = (num_prompts, group_size, room, params.max_new_tokens)
        ids = id(params.eos_token_ids), id(params.suppress_tokens)  # a captured step reads, and holds, these tensors
        sampling = params.temperature, params.top_p, params.is_greedy, params.repetition_penalty
        key = (shape, ids, sampling, self.decoder.adapters)
        captured = self._captured.pop(key, None)
        if captured is None:
            captured = CapturedStep(self.decoder, prompts, room, group_size, params, self._capture)
        self._captured[key] = captured
        captured.load(prompts, rollout.draw_uniforms(seeds, group_size, params, self.decoder.device))
        return captured


class CapturedStep:
    """Sample a token of each row, record it, read it: with all that the step reads and writes."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: PromptCache,
        room: int,
        group_size: int,
        params: SamplingParams,
        capture: Callable[[Step], Step],
    ) -> None:
        num_prompts, num_tokens = len(prompts.hidden), params.max_new_tokens
        num_rows = num_prompts * group_size
        self._decoder = decoder
        self._group_size = group_size
        self._params = params
        self._cache = StaticCache(
            prompts, prompt_room=room, num_rows=group_size, num_tokens=num_tokens, dtype=decoder.dtype
        )
        self._uniforms = torch.zeros(num_rows, num_tokens, dtype=torch.float64, device=decoder.device)
        self._logits = decoder.first_logits(prompts).repeat_interleave(group_size, 0)  # [N, V]
        self.buffer = GenerationBuffer.empty(num_rows, params, self._logits)
        self.ended = torch.zeros(num_rows, dtype=torch.bool, device=decoder.device)
        self._cache.load(prompts, decoder.position_embeddings(prompts, num_tokens))
        self.replay = capture(self._step)

    @property
    def num_bytes(self) -> int:
        """Of the buffers of keys and values, by far the largest."""
        return self._cache.num_bytes

    def load(self, prompts: PromptCache, uniforms: Tensor) -> None:
        """Begin anew."""
        self._cache.load(prompts, self._decoder.position_embeddings(prompts, self._params.max_new_tokens))
        self._uniforms.copy_(uniforms)
        self.buffer.load(prompts, self._group_size)
        self._logits.copy_(self._decoder.first_logits(prompts).repeat_interleave(self._group_size, 0))
        self.ended.zero_()

    def _step(self) -> None:
        step = self._cache.step
        uniforms = self._uniforms.index_select(1, step)[:, 0]
        is_repeated = self.buffer.is_repeated
        tokens, logprobs, entropies = sample_token(self._logits, uniforms, self._params, is_repeated)
        if is_repeated is not None:
            is_repeated.scatter_(1, tokens[:, None], True)
        self.buffer.tokens.index_copy_(1, step, tokens[:, None])
        self.buffer.logprobs.index_copy_(1, step, logprobs[:, None])
        self.buffer.entropies.index_copy_(1, step, entropies[:, None])
        self.ended.logical_or_(rollout.is_any_of(tokens, self._params.eos_token_ids))
        self._logits.copy_(self._decoder(tokens, self._cache))
