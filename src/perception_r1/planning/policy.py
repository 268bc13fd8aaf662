"""A policy whose weights have shapes and no values: what the model's configuration tells, nothing is downloaded.

The configurations of the models in `configs/model` are in `shapes/`, so that they can be planned offline.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForImageTextToText

from perception_r1.engines.base import NativeEngine
from perception_r1.planning.meter import MemoryMeter
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.cuda_graphs import GraphGenerator, Step, warm_up
from perception_r1.policy.decoder import Decoder
from perception_r1.policy.families import FAMILIES, family_of
from perception_r1.policy.load import EMBEDDED, PolicyConfig, load_processor, model_family, model_path
from perception_r1.policy.policy import Policy
from perception_r1.policy.processor import Processor
from perception_r1.policy.prompt_cache import PromptCache
from perception_r1.policy.prompt_states import PromptStates
from perception_r1.policy.repeated import PaddedPrompts, RepeatedCache, next_logits
from perception_r1.policy.rollout import Rollout, SamplingParams

_SHAPES = Path(__file__).parent / "shapes"


def read_config(name: str) -> Any:
    """The configuration of a model, from `shapes/` where it is there.

    Raises:
        UserError: There is none, or its family is not one of ours.
    """
    path = _SHAPES / f"{name.rpartition('/')[2]}.json"
    if name.count("/") == 1 and path.is_file() and not Path(name).is_dir():
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    model_family(name)
    return AutoConfig.from_pretrained(model_path(name), trust_remote_code=False)


def empty_model(config: PolicyConfig) -> Any:
    """The model of a policy on the meta device, without adapter, everything trainable."""
    settings = read_config(config.name)
    FAMILIES[settings.model_type].check(config.name, settings)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            settings,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
        )
    family_of(model).prepare(model)
    return model


def read_processor(config: PolicyConfig) -> Processor:
    """That of the model where it lies in a folder, else with the embedded model's tokenizer, which has more tokens."""
    bounds = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    if Path(model_path(config.name)).is_dir():
        return load_processor(config.name, **bounds)
    shapes = read_config(config.name)
    processor = FAMILIES[shapes.model_type].processor.from_config(load_processor(EMBEDDED).tokenizer, shapes)
    processor.set_bounds(**bounds)
    return processor


class ShapePolicy(Policy):
    """A policy on the meta device that writes completions of the greatest length."""

    meter: MemoryMeter
    """Set before the first completion."""

    @classmethod
    def load(cls, config: PolicyConfig, *, is_trained: bool = True) -> Self:
        """The policy that `Policy.load` would read."""
        model = empty_model(config)
        codec = family_of(model).codec
        return cls.from_model(model, read_processor(config), codec, config, is_trained=is_trained).to("meta")

    @property
    def keeps_copies(self) -> bool:
        """Buffers and copied weights of the last rollout are still held."""
        return self._graphs is not None

    def prefill(self, prompts: PromptBatch, states: PromptStates | None = None) -> PromptCache | PaddedPrompts:
        """As on any device."""
        cache = super().prefill(prompts, states)
        if isinstance(cache, PromptCache):  # the meter sees those of transformers anyway
            self.meter.claim(cache.tensors(), "caches")
        return cache

    def generate(
        self, prompts: PromptCache | PaddedPrompts, *, group_size: int, params: SamplingParams, seeds: Sequence[int]
    ) -> Rollout:
        """As on CUDA, up to the first token: the buffers of its step are those of every other.

        Where prompts are not shared, keys and values grow, and it is the last token.
        """
        if isinstance(prompts, PaddedPrompts):
            with self.meter.kind("caches"):
                cache = RepeatedCache(prompts, group_size)
                _fill(cache, params.max_new_tokens - 1)
            tokens = torch.empty(len(cache.positions), dtype=torch.long, device=self.device)
            next_logits(self.model, tokens, cache)
            return longest_rollout(len(seeds) * group_size, params.max_new_tokens)
        if self._graphs is None or not self._graphs.decoder.is_compatible(self.model):
            with self.meter.kind("generation copy"):
                decoder = Decoder(self.model)
            self._graphs = GraphGenerator(decoder, lambda: self._capture)
        with self.meter.kind("caches"):
            self._graphs.prepare(prompts, group_size=group_size, params=params, seeds=seeds).replay(0)
        self._release_copies()
        return longest_rollout(len(seeds) * group_size, params.max_new_tokens)

    def _capture(self, step: Step) -> Step:
        """A captured graph keeps the memory that its step needs besides the buffers."""
        warm_up(step)
        pool = torch.empty(self.meter.measure(step), dtype=torch.uint8, device=self.device)

        def replay() -> None:
            pool.zero_()

        return replay


def _fill(cache: RepeatedCache, num_tokens: int) -> None:
    """Let rows of equally long prompts have written tokens."""
    for layer in cache.cache.layers:
        room = layer.sliding_window - 1 - layer.keys.shape[2] if layer.is_sliding else num_tokens
        filling = (0, 0, 0, max(0, min(num_tokens, room)))
        layer.keys, layer.values = F.pad(layer.keys, filling), F.pad(layer.values, filling)
        if layer.is_sliding:
            layer.cumulative_length += num_tokens


class WrittenElsewhere(NativeEngine):
    """In place of an engine that writes completions in memory of its own: they are as long as can be."""

    def generate(
        self, policy: Policy, prompts: PromptBatch, *, group_size: int, params: SamplingParams, **options: Any
    ) -> Rollout:
        """See `GenerationEngine`."""
        return longest_rollout(len(prompts) * group_size, params.max_new_tokens)


def longest_rollout(num_rows: int, num_tokens: int) -> Rollout:
    """Completions that all reach the greatest length."""
    return Rollout(
        completions=[torch.zeros(num_tokens, dtype=torch.long) for _ in range(num_rows)],
        logprobs=list(torch.zeros(num_rows, num_tokens, device="meta")),
        is_truncated=[True] * num_rows,
        entropies=list(torch.zeros(num_rows, num_tokens, device="meta")),
    )
