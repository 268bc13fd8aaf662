"""Bytes on a device while code runs there: a dispatch mode that sees every tensor come and go.

Tensors on the meta device have shapes and no values, so a meter counts the real code of a run without the memory that
it takes. On the CPU it counts real ones, which is how the plan is checked.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS = "activations"
"""Kind of what nobody claims."""
_BLOCK = 512
"""Bytes to whose multiples the allocator of CUDA rounds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The moment at which a phase held most.

    Attributes:
        phase: Its name.
        bytes: What it held.
        kinds: Bytes of each kind at that moment.
    """

    phase: str
    bytes: int
    kinds: Mapping[str, int]


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of all tensors on a device that are made, or claimed, while the mode is on.

    Args:
        device_type: "meta", or "cpu" to count real tensors.
        vocabulary: Floating-point tensors whose last dimension has this size are of the kind "logits".
        shares: What counts of the kinds that several devices divide among themselves, once they are claimed.
    """

    def __init__(
        self, device_type: str, vocabulary: int | None = None, shares: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.vocabulary = vocabulary
        self.shares = shares or {}
        self.peaks: dict[str, Peak] = {}
        """Of each phase that was entered, in their order."""
        self._totals: Counter[str] = Counter()
        self._total = 0
        self._held: dict[int, _Held] = {}
        self._kinds: list[str] = []
        self._phase: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it has made."""
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.device.type == self.device_type:
                self._add(value)
        return output

    def claim(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say of what kind tensors are; those that were not seen before are counted from now on."""
        for tensor in tensors:
            if tensor.device.type == self.device_type:
                held = self._held.get(tensor.untyped_storage()._cdata)
                if held is None:
                    self._add(tensor, kind)
                else:
                    self._count(held.kind, -held.size)
                    held.kind, held.size = kind, self._size_of(tensor, kind)
                    self._count(kind, held.size)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Do not count tensors: what holds them is counted already."""
        for tensor in tensors:
            held = self._held.get(tensor.untyped_storage()._cdata)
            if held is not None:
                self._count(held.kind, -held.size)
                held.size = 0

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """What is made meanwhile is of this kind."""
        self._kinds.append(name)
        try:
            yield
        finally:
            self._kinds.pop()

    def watch(self, module: nn.Module, kind: str) -> None:
        """What a module makes in its forward passes is of this kind."""

        def begin(*_: Any) -> None:
            self._kinds.append(kind)

        def end(*_: Any) -> None:
            self._kinds.pop()

        module.register_forward_pre_hook(begin, prepend=True)
        module.register_forward_hook(end, always_call=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the run with a peak of its own; one within another belongs to the inner one."""
        outer, self._phase = self._phase, name
        self._note()
        try:
            yield
        finally:
            self._phase = outer

    def measure(self, step: Callable[[], None]) -> int:
        """Run a step; the most bytes that it held besides those before."""
        before, name = self._total, "measured"
        with self.phase(name):
            step()
        return self.peaks.pop(name).bytes - before

    def _add(self, tensor: Tensor, kind: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held or storage.nbytes() == 0:
            return
        kind = kind or self._kind_of(tensor)
        held = self._held[key] = _Held(kind, self._size_of(tensor, kind))
        held.reference = weakref.ref(storage, lambda _: self._remove(key))
        self._count(kind, held.size)
        self._note()

    def _remove(self, key: int) -> None:
        held = self._held.pop(key)
        self._count(held.kind, -held.size)

    def _count(self, kind: str, size: int) -> None:
        self._totals[kind] += size
        self._total += size

    def _size_of(self, tensor: Tensor, kind: str) -> int:
        share = tensor.untyped_storage().nbytes() * self.shares.get(kind, 1.0)
        return -(-math.ceil(share) // _BLOCK) * _BLOCK

    def _kind_of(self, tensor: Tensor) -> str:
        if tensor.is_floating_point() and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
            return "logits"
        return self._kinds[-1] if self._kinds else ACTIVATIONS

    def _note(self) -> None:
        if self._phase is None:
            return
        if self._phase not in self.peaks or self._total > self.peaks[self._phase].bytes:
            self.peaks[self._phase] = Peak(phase=self._phase, bytes=self._total, kinds=dict(self._totals))


class _Held:
    """A storage: its kind, its bytes, and a reference whose callback tells its end."""

    __slots__ = ("kind", "reference", "size")

    def __init__(self, kind: str, size: int) -> None:
        self.kind, self.size = kind, size
        self.reference: Any = None
