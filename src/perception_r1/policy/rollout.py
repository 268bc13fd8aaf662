"""Writing completions: token by token, from the keys and values that all rows of a prompt share.

Exact sampling from the softmax, full or nucleus, by inverse transform: token = first index whose cumulative probability
exceeds a uniform number. The numbers of a row depend on its prompt's seed alone, so a completion does not depend on its
neighbours.

On CUDA a step is a captured graph (`policy/cuda_graphs.py`); elsewhere it runs eagerly and finished rows
leave the cache.

Legend: B prompts, G completions per prompt, N = B*G completions, R rows that are still being written, T longest
completion, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from perception_r1.policy.batch import to_device
from perception_r1.policy.cache import ContiguousCache, SharedPromptCache
from perception_r1.policy.decoder import Decoder
from perception_r1.policy.logits import process_logits
from perception_r1.policy.precision import at_least_fp32
from perception_r1.policy.prompt_cache import PromptCache

_COMPACTION_THRESHOLD = 0.75
"""Finished rows leave once the rest is at most this share: moving the others costs a copy of their keys and values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How completions are written.

    Attributes:
        max_new_tokens: Longest completion, end token included.
        eos_token_ids: Any of these ends a completion.
        suppress_tokens: Ids of tokens that are never written.
        temperature: Above 0; log-probabilities and entropy are those at this temperature.
        top_p: Above 0 and at most 1; log-probabilities and entropy are those in this nucleus, see `process_logits`.
        is_greedy: Take the most probable token each time.
        repetition_penalty: Logits of tokens that are in the prompt or in what is written are divided by it where they
            are positive, and multiplied by it elsewhere (CTRL, arXiv 1909.05858); 1 leaves them as they are.
    """

    max_new_tokens: int
    eos_token_ids: Tensor
    suppress_tokens: Tensor
    temperature: float = 1.0
    top_p: float = 1.0
    is_greedy: bool = False
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """Completions as they were written, the G completions of a prompt after one another.

    Attributes:
        completions: N tensors of token ids on the CPU, the end token included where one was written.
        logprobs: N tensors: of each token, in the distribution from which it was drawn.
        is_truncated: N flags: the length limit came before an end token.
        entropies: N tensors: of the distribution from which each token was drawn, in nats.
    """

    completions: list[Tensor]
    logprobs: list[Tensor]
    is_truncated: list[bool]
    entropies: list[Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationBuffer:
    """What has been written so far; behind a row's end token stands anything.

    Attributes:
        tokens: [N, T] ids.
        logprobs: [N, T].
        entropies: [N, T] of the distributions, in nats.
        is_repeated: [N, V] True for tokens that are in the prompt or in what is written; None where it does not matter.
    """

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor
    is_repeated: Tensor | None

    @classmethod
    def empty(cls, num_rows: int, params: SamplingParams, logits: Tensor) -> "GenerationBuffer":
        """Nothing written yet; `logits` are any of the model's, [rows, V]."""
        tokens = torch.zeros(num_rows, params.max_new_tokens, dtype=torch.long, device=logits.device)
        values = torch.zeros(tokens.shape, dtype=at_least_fp32(logits.dtype), device=tokens.device)
        is_repeated = None
        if params.repetition_penalty != 1.0:
            is_repeated = torch.zeros(num_rows, logits.shape[1], dtype=torch.bool, device=logits.device)
        return cls(tokens=tokens, logprobs=values, entropies=values.clone(), is_repeated=is_repeated)

    def load(self, prompts: Sequence[Tensor], group_size: int) -> None:
        """Note the tokens of the prompts, and no others, where they matter; they are ids on the CPU."""
        if self.is_repeated is None:
            return
        self.is_repeated.zero_()
        for rows, input_ids in zip(self.is_repeated.split(group_size), prompts, strict=True):
            rows.index_fill_(1, to_device(input_ids, rows.device), True)

    def select(self, rows: Tensor) -> "GenerationBuffer":
        """A copy of rows."""
        is_repeated = None if self.is_repeated is None else self.is_repeated[rows]
        return GenerationBuffer(
            tokens=self.tokens[rows],
            logprobs=self.logprobs[rows],
            entropies=self.entropies[rows],
            is_repeated=is_repeated,
        )

    def update(self, rows: Tensor, other: "GenerationBuffer") -> None:
        """Take over what was written in rows, which are those of another buffer."""
        self.tokens[rows] = other.tokens
        self.logprobs[rows] = other.logprobs
        self.entropies[rows] = other.entropies


@torch.no_grad()
def generate(
    decoder: Decoder, prompts: PromptCache, *, group_size: int, params: SamplingParams, seeds: Sequence[int]
) -> Rollout:
    """Write G completions of each of B prompts, eagerly, from B seeds; the decoder's model computed the prompts."""
    position_embeddings = decoder.position_embeddings(prompts, params.max_new_tokens)
    cache: SharedPromptCache | ContiguousCache
    if group_size == 1:
        cache = ContiguousCache(prompts, position_embeddings, dtype=decoder.dtype)
    else:
        cache = SharedPromptCache(prompts, position_embeddings, num_rows=group_size, dtype=decoder.dtype)
    logits = decoder.first_logits(prompts)
    return decode(decoder, cache, logits, prompts.input_ids, group_size=group_size, params=params, seeds=seeds)


class SelectsRows(Protocol):
    """What has been computed of rows."""

    def select_rows(self, rows: Tensor) -> None:
        """Let go of all rows but these, given as [B', S'] numbers; those of one line share a prompt."""


C = TypeVar("C", bound=SelectsRows)


def decode(
    next_logits: Callable[[Tensor, C], Tensor],
    cache: C,
    logits: Tensor,
    prompts: Sequence[Tensor],
    *,
    group_size: int,
    params: SamplingParams,
    seeds: Sequence[int],
) -> Rollout:
    """Write G completions of each of B prompts that are computed, token by token.

    Args:
        next_logits: [R, V] from a token of each row [R], which the cache takes up.
        cache: Of the rows.
        logits: [B, V] of the first completion token.
        prompts: Token ids on the CPU.
        group_size: G.
        params: How completions are written.
        seeds: B numbers.
    """
    num_tokens = params.max_new_tokens
    uniforms = draw_uniforms(seeds, group_size, params, logits.device)  # [N, T]
    logits = logits.repeat_interleave(group_size, 0)
    buffer = GenerationBuffer.empty(len(uniforms), params, logits)
    buffer.load(prompts, group_size)
    indices = torch.arange(len(uniforms), device=logits.device).view(-1, group_size)  # completion of each row
    ended = torch.zeros(indices.shape, dtype=torch.bool, device=logits.device)
    for step in range(num_tokens):
        flat = indices.flatten()
        is_repeated = None if buffer.is_repeated is None else buffer.is_repeated[flat]
        tokens, logprobs, entropies = sample_token(logits, uniforms[flat, step], params, is_repeated)
        buffer.tokens[flat, step] = tokens
        buffer.logprobs[flat, step] = logprobs
        buffer.entropies[flat, step] = entropies
        if buffer.is_repeated is not None:
            buffer.is_repeated[flat, tokens] = True
        ended |= is_any_of(tokens, params.eos_token_ids).view(ended.shape)
        if step + 1 == num_tokens or bool(ended.all()):
            break
        rows = rows_to_keep(ended)
        if rows.numel() <= _COMPACTION_THRESHOLD * ended.numel():
            cache.select_rows(rows)
            tokens, indices, ended = tokens[rows.flatten()], indices.flatten()[rows], ended.flatten()[rows]
        logits = next_logits(tokens, cache)
    return trim_completions(buffer, params)


def rows_to_keep(ended: Tensor) -> Tensor:
    """[B', S'] numbers of rows: prompts that still write, each with as many rows as the busiest one needs."""
    waiting = ended.sort(dim=1, stable=True)  # unfinished rows come first
    num_rows = int((~ended).sum(1).max())
    prompts = (~ended).any(1).nonzero()[:, 0]
    return prompts[:, None] * ended.shape[1] + waiting.indices[prompts, :num_rows]


def trim_completions(buffer: GenerationBuffer, params: SamplingParams) -> Rollout:
    """Cut every row behind its first end token; the result does not share memory with what was written."""
    tokens = buffer.tokens.cpu()  # texts and the layout of the training pass are made on the host
    is_end = is_any_of(tokens, params.eos_token_ids.cpu())
    has_ended = is_end.any(1)
    lengths = torch.where(has_ended, is_end.int().argmax(1) + 1, params.max_new_tokens)
    counts = lengths.tolist()

    def trim(values: Tensor) -> Tensor:
        return torch.cat([row[:count] for row, count in zip(values, counts, strict=True)])

    return Rollout(
        completions=list(trim(tokens).split(counts)),
        logprobs=list(trim(buffer.logprobs).split(counts)),
        is_truncated=(~has_ended).tolist(),
        entropies=list(trim(buffer.entropies).split(counts)),
    )


def draw_uniforms(seeds: Sequence[int], group_size: int, params: SamplingParams, device: torch.device) -> Tensor:
    """[N, T] numbers in [0, 1), a prompt's own from its own seed; drawn on the CPU so that devices agree."""
    shape = (group_size, params.max_new_tokens)
    if params.is_greedy:
        return torch.zeros(len(seeds) * group_size, params.max_new_tokens, device=device)
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return to_device(torch.cat(rows), device)


def is_any_of(tokens: Tensor, ids: Tensor) -> Tensor:
    """True where a token is one of the ids; unlike `torch.isin` it never waits for the device."""
    return (tokens[..., None] == ids).any(-1)


def sample_token(
    logits: Tensor, uniforms: Tensor, params: SamplingParams, is_repeated: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of each row.

    Args:
        logits: [R, V] of the vocabulary head.
        uniforms: [R] numbers in [0, 1); unused when greedy.
        params: Temperature, nucleus, suppressed tokens, penalty.
        is_repeated: [R, V] True for tokens that the penalty makes less probable; None without penalty.

    Returns:
        Ids, their log-probabilities, and the entropies of the distributions, [R] each.
    """
    if is_repeated is not None:
        logits = logits.to(at_least_fp32(logits.dtype))
        penalized = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = torch.where(is_repeated, penalized, logits)
    logprobs = process_logits(
        logits, suppress_tokens=params.suppress_tokens, temperature=params.temperature, top_p=params.top_p
    ).log_softmax(-1)
    probs = logprobs.exp()
    entropies = -(probs * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(-1)
    if params.is_greedy:
        tokens = logprobs.argmax(-1)
    else:
        cumulative = probs.double().cumsum(-1)
        threshold = uniforms[:, None] * cumulative[:, -1:]  # rounding may leave the last sum a hair off 1
        tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0], entropies
