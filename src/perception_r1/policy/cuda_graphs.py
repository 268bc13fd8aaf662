"""Writing completions on CUDA: a step is captured once as a graph and replayed, so launching kernels costs nothing.

A graph is bound to addresses and shapes: every buffer is static, and the room for prompts is rounded up. Attention
reads the written tokens in widths that double, each with a graph of its own. Small buffers are kept from one rollout to
the next, with all their rows to the end, since a step takes the time of reading the weights whether few or many rows
are left. Where keys and values are large, finished rows leave them when half of the rows have finished. The eager
`policy/rollout.py` computes the same and is the oracle.

Legend: B prompts, G completions per prompt, N = B*G rows, T longest completion, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from perception_r1.policy import rollout
from perception_r1.policy.cache import StaticCache
from perception_r1.policy.decoder import Decoder
from perception_r1.policy.prompt_cache import PromptCache
from perception_r1.policy.rollout import GenerationBuffer, Rollout, SamplingParams, sample_token

_PROMPT_BUCKET = 256
"""The room for prompts is a multiple of this, so that few different graphs are needed."""

_TOKEN_BUCKET = 128
"""Written tokens that attention reads at first; twice as many whenever they are full."""

_MIN_STEPS = 16
"""Steps that must be left for another graph to be worth its capture, which itself makes some of them."""

_CHECK_INTERVAL = 8
"""Steps between two looks at which rows have ended: each of them waits for the device."""

_NUM_WARM_UP_STEPS = 2

_MAX_GRAPHS = 4
"""Buffers that are kept, with their graphs."""

_MAX_KEPT_BYTES = 2**30
"""Buffers that are kept from one rollout to the next: what they hold, training cannot have. To capture the steps of
larger ones again costs little beside the rollout that needs them."""

Step: TypeAlias = Callable[[], None]


class Capture:
    """Makes CUDA graphs of steps that change buffers in place; capturing leaves these in any state.

    Its graphs share the memory of what is computed within a step, for they are replayed one after another.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, step: Step) -> Step:
        """A step that can be replayed."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            warm_up(step)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        self._pool = graph.pool()
        return graph.replay


def warm_up(step: Step) -> None:
    """Libraries set themselves up in the first calls of a step, which must not be captured."""
    for _ in range(_NUM_WARM_UP_STEPS):
        step()


class GraphGenerator:
    """Generates like `rollout.generate`, by replaying steps of a decoder that a capture has made replayable.

    Args:
        decoder: What a step runs.
        make_capture: Makes what makes the steps of some buffers replayable.
        max_kept_bytes: Buffers that may be held between rollouts.
    """

    def __init__(
        self,
        decoder: Decoder,
        make_capture: Callable[[], Callable[[Step], Step]] = Capture,
        max_kept_bytes: int = _MAX_KEPT_BYTES,
    ) -> None:
        self.decoder = decoder
        self._make_capture = make_capture
        self._max_kept_bytes = max_kept_bytes
        self._captured: dict[tuple[object, ...], CapturedStep] = {}

    @torch.no_grad()
    def generate(
        self, prompts: PromptCache, *, group_size: int, params: SamplingParams, seeds: Sequence[int]
    ) -> Rollout:
        """Write G completions of each prompt; see `rollout.generate`."""
        captured = self.prepare(prompts, group_size=group_size, params=params, seeds=seeds)
        is_kept = captured.num_bytes <= self._max_kept_bytes
        for step in range(params.max_new_tokens):
            captured.replay(step)
            if (step + 1) % _CHECK_INTERVAL:
                continue
            if bool(captured.ended.all()):
                break
            if not is_kept and step + 1 + _MIN_STEPS <= params.max_new_tokens:
                captured.release_rows()
        return rollout.trim_completions(captured.written(), params)

    @property
    def is_empty(self) -> bool:
        """No step is kept, so nothing needs the decoder's copies of the weights to stay."""
        return not self._captured

    @torch.no_grad()
    def prepare(
        self, prompts: PromptCache, *, group_size: int, params: SamplingParams, seeds: Sequence[int]
    ) -> "CapturedStep":
        """The step that writes the next token of each row, made or found again, at its beginning."""
        self.decoder.sync_weights()
        room = -(-max(prompts.lengths) // _PROMPT_BUCKET) * _PROMPT_BUCKET
        shape = (len(prompts.lengths), group_size, room, params.max_new_tokens)
        ids = id(params.eos_token_ids), id(params.suppress_tokens)  # a captured step reads, and holds, these tensors
        sampling = params.temperature, params.top_p, params.is_greedy, params.repetition_penalty
        key = (shape, ids, sampling, self.decoder.adapters)
        captured = self._captured.pop(key, None)
        if captured is None:
            captured = CapturedStep(self.decoder, prompts, room, group_size, params, self._make_capture())
        self._captured[key] = captured
        self._release()
        captured.load(prompts, rollout.draw_uniforms(seeds, group_size, params, self.decoder.device))
        return captured

    def _release(self) -> None:
        """Let go of the buffers that were not used for the longest time, until the others are few and small enough."""
        sizes = {key: step.num_bytes for key, step in self._captured.items()}
        while len(sizes) > _MAX_GRAPHS or sum(sizes.values()) > self._max_kept_bytes:
            oldest = next(iter(sizes))
            del sizes[oldest], self._captured[oldest]


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
        self._capture = capture
        self._replays: dict[int, Step] = {}
        self._cache = StaticCache(
            prompts, prompt_room=room, num_rows=group_size, num_tokens=num_tokens, dtype=decoder.dtype
        )
        self.num_bytes = self._cache.num_bytes
        """Of the buffers of the layers, by far the largest, before rows leave them."""
        self._uniforms = torch.zeros(num_rows, num_tokens, dtype=torch.float64, device=decoder.device)
        self._logits = decoder.first_logits(prompts).repeat_interleave(group_size, 0)  # [N, V]
        self._buffer = GenerationBuffer.empty(num_rows, params, self._logits)
        self._rows = torch.arange(num_rows, device=decoder.device)  # those that the buffers hold
        self._left = self._buffer  # where all rows are put together in the end
        self.ended = torch.zeros(num_rows, dtype=torch.bool, device=decoder.device)

    def load(self, prompts: PromptCache, uniforms: Tensor) -> None:
        """Begin anew; not after rows have left."""
        self._cache.load(prompts, self._decoder.position_embeddings(prompts, self._params.max_new_tokens))
        self._uniforms.copy_(uniforms)
        self._buffer.load(prompts.input_ids, self._group_size)
        self._logits.copy_(self._decoder.first_logits(prompts).repeat_interleave(self._group_size, 0))
        self.ended.zero_()

    def replay(self, step: int) -> None:
        """Write the token of a step; all before it have been written."""
        width = _width(step, self._params.max_new_tokens)
        if width not in self._replays:
            self._cache.width = width
            state = [*self._cache.changing(), self._logits, self.ended]
            state += [] if self._buffer.is_repeated is None else [self._buffer.is_repeated]
            before = [tensor.clone() for tensor in state]
            self._replays[width] = self._capture(self._step)
            for tensor, values in zip(state, before, strict=True):  # what was written besides will be written again
                tensor.copy_(values)
        self._replays[width]()

    def release_rows(self) -> None:
        """Let go of finished rows, if they are half of all: then what is left is moved, and captured anew."""
        rows = rollout.rows_to_keep(self.ended.view(-1, self._cache.num_rows))
        if 2 * rows.numel() > self.ended.numel():
            return
        self._replays.clear()
        self._put_down()
        self._cache.select_rows(rows)
        flat = rows.flatten()
        self._rows, self._logits, self._uniforms, self.ended = (
            tensor[flat] for tensor in (self._rows, self._logits, self._uniforms, self.ended)
        )
        self._buffer = self._buffer.select(flat)

    def written(self) -> GenerationBuffer:
        """All rows, those that have left too."""
        self._put_down()
        return self._left

    def _put_down(self) -> None:
        if self._left is not self._buffer:
            self._left.update(self._rows, self._buffer)

    def _step(self) -> None:
        step = self._cache.step
        uniforms = self._uniforms.index_select(1, step)[:, 0]
        is_repeated = self._buffer.is_repeated
        tokens, logprobs, entropies = sample_token(self._logits, uniforms, self._params, is_repeated)
        if is_repeated is not None:
            is_repeated.scatter_(1, tokens[:, None], True)
        self._buffer.tokens.index_copy_(1, step, tokens[:, None])
        self._buffer.logprobs.index_copy_(1, step, logprobs[:, None])
        self._buffer.entropies.index_copy_(1, step, entropies[:, None])
        self.ended.logical_or_(rollout.is_any_of(tokens, self._params.eos_token_ids))
        self._logits.copy_(self._decoder(tokens, self._cache))


def _width(step: int, num_tokens: int) -> int:
    """How many written tokens attention reads in a step.

    >>> [_width(step, 1024) for step in (0, 127, 128, 700)]
    [128, 128, 256, 1024]
    >>> _width(0, 130)  # a few more are no reason for another graph
    130
    """
    width = _TOKEN_BUCKET
    while width <= step:
        width *= 2
    return width if width + _MIN_STEPS <= num_tokens else num_tokens
