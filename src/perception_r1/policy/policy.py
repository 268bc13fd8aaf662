"""The policy: a vision-language model that writes completions and says how probable they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from perception_r1.codecs import Codec
from perception_r1.errors import UserError
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.cuda_graphs import GraphGenerator
from perception_r1.policy.decoder import Decoder
from perception_r1.policy.families import Family, VisionLanguageModel, family_of
from perception_r1.policy.load import (
    PolicyConfig,
    WithoutWeights,
    load_model,
    load_processor,
    model_family,
    prepare_for_training,
)
from perception_r1.policy.logprobs import completion_logprobs
from perception_r1.policy.prefill import prefill, prompt_states
from perception_r1.policy.processor import Processor
from perception_r1.policy.prompt_cache import PromptCache
from perception_r1.policy.prompt_states import PromptStates
from perception_r1.policy.repeated import PaddedPrompts, generate_repeated, prefill_padded, repeated_logprobs
from perception_r1.policy.rollout import Rollout, SamplingParams, generate

_VISION_TOKENS = (
    *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    *("boi_token_id", "eoi_token_id"),
)
"""By their names in configurations."""


class Policy(nn.Module):
    """A network (the causal model, or a peft model around it) with its processor and its codec."""

    suppress_tokens: Tensor
    eos_token_ids: Tensor

    def __init__(
        self, network: nn.Module, processor: Processor, codec: Codec, *, max_prompt_length: int | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.processor = processor
        self.codec = codec
        self.max_prompt_length = max_prompt_length
        self._graphs: GraphGenerator | None = None
        config = self.model.config
        found = {getattr(config, name, None) for name in _VISION_TOKENS}
        found |= {processor.tokenizer.convert_tokens_to_ids(token) for token in self.family.vision_tokens}
        suppress_tokens = sorted(token for token in found if token is not None)
        eos_token_ids = self._end_tokens()
        self._closing_token = eos_token_ids[0]
        self._forbidden_in_targets = frozenset(suppress_tokens + eos_token_ids)
        self.register_buffer("suppress_tokens", torch.tensor(suppress_tokens), persistent=False)
        self.register_buffer("eos_token_ids", torch.tensor(eos_token_ids), persistent=False)

    @classmethod
    def load(cls, config: PolicyConfig, *, is_trained: bool = True) -> Self:
        """Read a policy; one that is not trained (a reference) has no adapter, and every weight is frozen."""
        family = model_family(config.name)
        processor = load_processor(config.name, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        return cls.from_model(load_model(config), processor, family.codec, config, is_trained=is_trained)

    @classmethod
    def without_weights(cls, config: PolicyConfig) -> Self:
        """A policy that encodes prompts and reads completions, while another engine has its weights."""
        family, network = model_family(config.name), WithoutWeights(config.name)
        processor = load_processor(config.name, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        return cls(network, processor, family.codec, max_prompt_length=config.max_prompt_length)

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, processor: Processor, codec: Codec, config: PolicyConfig, *, is_trained: bool
    ) -> Self:
        """A policy around a model; see `load`."""
        network = prepare_for_training(model, config) if is_trained else model.requires_grad_(False)
        network.train(is_trained)  # as loaded it is in evaluation mode, without dropout and gradient checkpointing
        return cls(network, processor, codec, max_prompt_length=config.max_prompt_length)

    @property
    def model(self) -> VisionLanguageModel:
        """The causal model of transformers, inside its adapter if it has one."""
        network: Any = self.network
        return network.get_base_model() if hasattr(network, "get_base_model") else network

    @property
    def family(self) -> Family:
        """That of the model."""
        return family_of(self.model)

    @property
    def has_weights(self) -> bool:
        """Whether it can compute itself; see `without_weights`."""
        return not isinstance(self.network, WithoutWeights)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.suppress_tokens.device

    def encode(self, chats: Sequence[list[dict[str, Any]]], images: Sequence[Sequence[Image.Image]]) -> PromptBatch:
        """Prompts, with their pixels on the policy's device; see `Processor.encode`.

        Raises:
            UserError: A prompt is too long, or the model cannot take it for another reason.
        """
        return self.receive(self.processor.encode_bytes(chats, images, max_tokens=self.max_prompt_length))

    def receive(self, prompts: PromptBatch) -> PromptBatch:
        """Prompts of `Processor.encode_bytes`, whoever called it, as `encode` returns them."""
        return self.processor.normalize(prompts.to(self.device))

    def encode_targets(self, texts: Sequence[str]) -> list[Tensor]:
        """Token ids of ideal answers, each closed by the end token that the model itself writes first; on the CPU.

        Raises:
            UserError: A text spells out a token that no completion can hold.
        """
        rows = self.processor.encode_targets(texts, self._closing_token)
        for number, (text, row) in enumerate(zip(texts, rows, strict=True), 1):
            if not self._forbidden_in_targets.isdisjoint(row[:-1].tolist()):
                raise UserError(
                    f"Answer {number} of {len(texts)}, {text[:60]!r}, spells out a token that ends a completion or "
                    "stands for a picture; remove it from the text."
                )
        return rows

    @property
    def is_vision_frozen(self) -> bool:
        """Nothing of the vision tower is trained: its features are the same in rollout, reference and loss."""
        modules = self.family.vision_modules(self.model)
        return not any(parameter.requires_grad for module in modules for parameter in module.parameters())

    @property
    def has_dropout(self) -> bool:
        """Whether passes of training draw which values they leave out, as those of adapters can."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())

    @torch.no_grad()
    def encode_images(self, prompts: PromptBatch) -> PromptBatch:
        """The prompts with the features of their images, so that no later pass runs the vision tower again."""
        return replace(prompts, image_features=self.family.encode_images(self.model, prompts))

    def prefill(self, prompts: PromptBatch, states: PromptStates | None = None) -> PromptCache | PaddedPrompts:
        """Compute prompts once for any number of completions; see `policy/prefill.py`, `policy/repeated.py`."""
        if not self.family.shares_prompts:
            return prefill_padded(self.model, prompts)
        return prefill(self.model, prompts, states)

    def generate(
        self, prompts: PromptCache | PaddedPrompts, *, group_size: int, params: SamplingParams, seeds: Sequence[int]
    ) -> Rollout:
        """`group_size` completions of each prompt; see `policy/rollout.py`, and on CUDA `policy/cuda_graphs.py`."""
        if isinstance(prompts, PaddedPrompts):
            return generate_repeated(self.model, prompts, group_size=group_size, params=params, seeds=seeds)
        if self.device.type != "cuda":
            return generate(Decoder(self.model), prompts, group_size=group_size, params=params, seeds=seeds)
        if self._graphs is None or not self._graphs.decoder.is_compatible(self.model):
            self._graphs = GraphGenerator(Decoder(self.model))
        rollout = self._graphs.generate(prompts, group_size=group_size, params=params, seeds=seeds)
        self._release_copies()
        return rollout

    def prompt_states(self, prompts: PromptBatch) -> PromptStates:
        """Prompts for passes over completions that need not compute them again; see `policy/prompt_states.py`."""
        return prompt_states(self.model, prompts)

    def sampling_params(
        self,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        is_greedy: bool = False,
        repetition_penalty: float = 1.0,
    ) -> SamplingParams:
        """How completions are written, with the tokens that end them and those that may not stand in them."""
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            eos_token_ids=self.eos_token_ids,
            suppress_tokens=self.suppress_tokens,
            temperature=1.0 if is_greedy else temperature,
            top_p=1.0 if is_greedy else top_p,
            is_greedy=is_greedy,
            repetition_penalty=repetition_penalty,
        )

    def forward(
        self,
        prompts: PromptBatch,
        completions: Sequence[Tensor],
        temperature: float = 1.0,
        top_p: float = 1.0,
        states: PromptStates | None = None,
    ) -> Tensor:
        """[B*G, T] log-probabilities of the completions' tokens; see `policy/logprobs.py`, `policy/repeated.py`."""
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "suppress_tokens": self.suppress_tokens}
        if not self.family.shares_prompts:
            return repeated_logprobs(self.model, prompts, completions, **options)
        return completion_logprobs(self.model, prompts, completions, states=states, **options)

    @contextmanager
    def without_adapter(self) -> Iterator["Policy"]:
        """The policy before training: the same network with its adapter switched off."""
        with cast(Any, self.network).disable_adapter():
            yield self

    def release_graphs(self) -> None:
        """Forget captured steps, and what they copied of weights that are whole only for a while."""
        self._graphs = None

    def save(self, folder: Path) -> None:
        """Write a folder in the hub's layout that `load` and transformers read; an adapter is saved as such."""
        cast(Any, self.network).save_pretrained(folder)
        self.processor.save(folder)

    def _release_copies(self) -> None:
        """Leave the memory of generation to training, where no captured step is kept: weights are copied each time."""
        if self._graphs is not None and self._graphs.is_empty:
            self._graphs = None

    def _end_tokens(self) -> list[int]:
        """All tokens that end a completion, the one which closes a chat turn first."""
        tokenizer, listed = self.processor.tokenizer, self.model.generation_config.eos_token_id
        named = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
        if self.processor.end_of_turn is not None:
            named.insert(0, tokenizer.convert_tokens_to_ids(self.processor.end_of_turn))
        tokens = list(dict.fromkeys(token for token in named if token is not None))
        room = self.model.config.get_text_config().vocab_size
        if odd := [token for token in tokens if type(token) is not int or not 0 <= token < room]:
            raise UserError(f"The generation config names {odd[0]!r} as an end token, which the model does not have.")
        if not tokens:
            raise UserError("Neither the generation config nor the tokenizer names an end token.")
        return tokens
