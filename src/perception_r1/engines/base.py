"""The interface of what writes completions: the engine of this package, vLLM in this process, or a server."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from perception_r1.errors import UserError
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.load import Dtype, PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.policy.prompt_states import PromptStates
from perception_r1.policy.rollout import Rollout, SamplingParams

NEVER = -100.0
"""Added to the logits of tokens that may not be written. Servers and vLLM accept no lower bias; it makes such a token
about 10^43 times less probable."""
Phase: TypeAlias = Callable[[str], AbstractContextManager[None]]
"""Measures a part of a step under a name."""


class EngineError(UserError):
    """An engine cannot write completions any more; the policy is as it was."""


@contextmanager
def unmeasured(name: str) -> Iterator[None]:
    """A `Phase` that measures nothing."""
    yield


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineContext:
    """What an engine has to know of the run that it serves.

    Attributes:
        config: The model, and what of it is trained.
        dtype: In which the trainer computes.
        run_id: Tells this run from all others, and is the same on all devices.
        rank: Of this device.
        local_rank: Of this device on its machine.
        world_size: Number of devices.
    """

    config: PolicyConfig
    dtype: Dtype
    run_id: str
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


class GenerationEngine(ABC):
    """Writes completions of prompts.

    Attributes:
        has_own_weights: It computes with a copy of the policy's weights, and can do without a policy that has any.
        knows_entropies: Its rollouts tell the entropies of the distributions; those of others are NaN.
    """

    has_own_weights: ClassVar[bool] = True
    knows_entropies: ClassVar[bool] = False

    @property
    def memory_share(self) -> float:
        """Share of a device's memory that training cannot have."""
        return 0.0

    @abstractmethod
    def connect(self, policy: Policy, context: EngineContext) -> None:
        """Get ready to serve a run; all devices call it together, and before the first completion.

        Raises:
            UserError: It cannot serve this run.
        """

    @abstractmethod
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
        """Write G completions of each of B prompts with the present weights of a policy.

        Args:
            policy: The policy, in evaluation mode.
            prompts: B prompts, their pixels on the policy's device.
            group_size: G.
            params: How completions are written.
            seeds: B numbers, on each of which the completions of one prompt depend.
            states: What the policy has computed of the prompts; an engine with weights of its own has no use for it.
            phase: Measures what is done.

        Returns:
            N = B*G completions, the G of a prompt after one another; log-probabilities on the policy's device.

        Raises:
            EngineError: It has failed, or cannot be reached.
        """

    @abstractmethod
    def invalidate(self) -> None:
        """The policy's weights have changed."""

    @abstractmethod
    def sleep(self) -> None:
        """Leave as much memory as can be to training, until the next completion is wanted."""


class NativeEngine(GenerationEngine):
    """The engine of this package: each prompt is computed once, its completions share it."""

    has_own_weights = False
    knows_entropies = True

    def connect(self, policy: Policy, context: EngineContext) -> None:
        """Nothing: it serves every run."""

    def invalidate(self) -> None:
        """Nothing: it reads the policy's own weights, and so always the present ones."""

    def sleep(self) -> None:
        """Nothing: it holds no weights, and the steps that the policy has captured are needed again."""

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
        with phase("prefill"):
            cache = policy.prefill(prompts, states)
        with phase("decode"):
            return policy.generate(cache, group_size=group_size, params=params, seeds=seeds)
