"""What a prompt leaves in the layers of the language model, which is all that its completions need to know of it.

Legend: n prompts, P tokens of each, K key-value heads, D head size, V value heads, D_k and D_v sizes of keys and of
values in linear attention, C channels and W width of its convolution, H hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby, pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from perception_r1.policy.batch import argsort_by_length, to_device


class KeysAndValues(NamedTuple):
    """What full attention leaves of prompts: it grows with them.

    Attributes:
        keys: [n, K, P, D].
        values: [n, K, P, D].
    """

    keys: Tensor
    values: Tensor


class LinearStates(NamedTuple):
    """What linear attention leaves of prompts, however long they are.

    Attributes:
        recurrent: [n, V, D_k, D_v] what has been read, in at least fp32.
        inputs: [n, C, W - 1] the last inputs of the convolution; zeros where a prompt has fewer tokens.
    """

    recurrent: Tensor
    inputs: Tensor


LayerStates: TypeAlias = KeysAndValues | LinearStates
"""What a layer leaves of prompts, by its kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptStates:
    """Prompts for passes over their completions, which need not compute them again.

    Shorter ones come first, and equally long ones are a bucket.

    Attributes:
        order: Number of each in the batch that was computed, n entries.
        lengths: Tokens of each, n entries.
        layers: What each layer has left of them, by its number, bucket by bucket.
        hidden: [n, H] last hidden state of the last token of each, which predicts the first completion token.
    """

    order: Sequence[int]
    lengths: Sequence[int]
    layers: Mapping[int, Sequence[LayerStates]]
    hidden: Tensor

    def select(self, numbers: Sequence[int]) -> "PromptStates":
        """The prompts with these numbers as a batch in this order; nothing is copied where these are all."""
        if list(numbers) == list(range(len(self.order))):
            return self
        rows = [self.order.index(number) for number in numbers]
        order = argsort_by_length([self.lengths[row] for row in rows])
        rows = [rows[number] for number in order]
        ends = accumulate(len(list(members)) for _, members in groupby(self.lengths))
        buckets = [[row - start for row in rows if start <= row < end] for start, end in pairwise([0, *ends])]
        parts = [None if not bucket else torch.tensor(bucket) for bucket in buckets]
        device = self.hidden.device

        def pick(states: LayerStates, part: Tensor) -> LayerStates:
            return type(states)(*(tensor.index_select(0, part) for tensor in states))

        chosen = [None if part is None else to_device(part, device) for part in parts]
        return PromptStates(
            order=order,
            lengths=[self.lengths[row] for row in rows],
            layers={
                number: [pick(each, part) for each, part in zip(states, chosen, strict=True) if part is not None]
                for number, states in self.layers.items()
            },
            hidden=self.hidden.index_select(0, to_device(torch.tensor(rows), device)),
        )

    def copy(self) -> "PromptStates":
        """The same values, to collect gradients."""
        layers = {number: [type(each)(*map(_leaf, each)) for each in states] for number, states in self.layers.items()}
        return replace(self, layers=layers, hidden=_leaf(self.hidden))

    def tensors(self) -> list[Tensor]:
        """All of them, in an order."""
        states = (each for number in sorted(self.layers) for each in self.layers[number])
        return [self.hidden, *chain.from_iterable(states)]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()
