"""vLLM in the process that trains, on the same device: its copy of the weights is renewed after every update."""

import os
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from perception_r1.engines.base import NEVER, EngineContext, EngineError, GenerationEngine, Phase, unmeasured
from perception_r1.engines.vllm_worker import WORKER
from perception_r1.engines.weights import named_weights, save_adapter
from perception_r1.errors import UserError
from perception_r1.policy.batch import PromptBatch, to_device
from perception_r1.policy.load import Dtype, model_path
from perception_r1.policy.policy import Policy
from perception_r1.policy.precision import at_least_fp32
from perception_r1.policy.processor import Processor
from perception_r1.policy.prompt_states import PromptStates
from perception_r1.policy.rollout import Rollout, SamplingParams


class VLLMEngine(GenerationEngine):
    """vLLM in this process, with prefix caching. An adapter is handed over as such, all other weights in place.

    Args:
        gpu_memory_utilization: Share of a GPU's memory that vLLM may take, its copy of the weights included.
        kv_cache_gb: Gigabytes for keys and values, instead of what `gpu_memory_utilization` leaves; for the CPU.
        max_model_len: Longest prompt and completion together, in tokens; null: what the model allows.
        max_images: Most pictures of a prompt.
        dtype: Type of vLLM's weights; null: that in which the trainer computes.
        enforce_eager: Run without CUDA graphs, which take memory and a minute of the start.
        sleeps: Free the memory of weights and of keys and values while training needs it; only on a GPU.
        engine_args: Further arguments of vLLM's `LLM`, by name.
    """

    def __init__(
        self,
        gpu_memory_utilization: float = 0.3,
        kv_cache_gb: float | None = None,
        max_model_len: int | None = None,
        max_images: int = 1,
        dtype: Dtype | None = None,
        enforce_eager: bool = False,
        sleeps: bool = True,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        if not 0 < gpu_memory_utilization <= 1:
            raise UserError(f"gpu_memory_utilization is {gpu_memory_utilization}; it must be above 0 and at most 1.")
        self.gpu_memory_utilization = gpu_memory_utilization
        self.kv_cache_gb = kv_cache_gb
        self.max_model_len = max_model_len
        self.max_images = max_images
        self.dtype = dtype
        self.enforce_eager = enforce_eager
        self.sleeps = sleeps
        self.engine_args = engine_args or {}
        self._llm: Any = None
        self._is_current = self._is_asleep = False
        self._num_adapters = 0
        self._adapter: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def memory_share(self) -> float:
        """See `GenerationEngine`."""
        return 0.0 if self.sleeps else self.gpu_memory_utilization

    def connect(self, policy: Policy, context: EngineContext) -> None:
        """See `GenerationEngine`: it starts with the weights of the model's folder."""
        if find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed beside this program: see `make install-vllm`, or leave out the engine."
            )
        processor = policy.processor
        if processor.hub_options is None:
            raise UserError(f"vLLM in this process does not work with {policy.family.name}; leave out the engine.")
        processor.keeps_pictures = not processor.restores_pictures
        self._llm = self._start(processor.hub_options, context)

    def invalidate(self) -> None:
        """See `GenerationEngine`."""
        self._is_current = False

    def sleep(self) -> None:
        """See `GenerationEngine`: the weights are dropped too, for they are renewed at the next completion."""
        if self._llm is not None and self._can_sleep and not self._is_asleep:
            self._llm.sleep(level=1 if self._adapter else 2)
            self._is_asleep = True
            self._is_current = self._is_current and self._adapter is not None

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
            self._prepare(policy)
        with phase("decode"):
            requests = _requests(policy.processor, prompts)
            sampling = [_sampling_params(params, group_size, seed) for seed in seeds]
            try:
                outputs = self._llm.generate(requests, sampling, use_tqdm=False, lora_request=self._adapter)
            except Exception as error:  # whatever vLLM raises; a prompt that does not fit is the likeliest
                raise EngineError(f"vLLM cannot answer: {' '.join(str(error).split())}") from error
        return _rollout([output for each in outputs for output in each.outputs], policy)

    @property
    def _can_sleep(self) -> bool:
        return self.sleeps and torch.cuda.is_available()

    def _prepare(self, policy: Policy) -> None:
        """Wake up, and take over the policy's weights where they have changed."""
        if self._is_asleep:
            self._llm.wake_up()
            self._is_asleep = False
        if self._is_current or not policy.has_weights:
            return
        if policy.network is not policy.model:
            self._load_adapter(policy)
        else:
            self._llm.collective_rpc("load_policy", kwargs={"weights_iterator": named_weights(policy)})
            self._llm.reset_prefix_cache()  # what was computed with the old weights
            self._llm.llm_engine.reset_encoder_cache()
        self._is_current = True

    def _load_adapter(self, policy: Policy) -> None:
        """Let the next completions be those of the policy's adapter; each has a name and number of its own."""
        from vllm.lora.request import LoRARequest

        folder = tempfile.TemporaryDirectory(prefix="adapter-")
        save_adapter(policy, Path(folder.name))
        self._num_adapters += 1
        self._adapter = LoRARequest(f"adapter-{self._num_adapters}", self._num_adapters, folder.name)
        self._folder = folder  # the one before is removed; vLLM has read it

    def _start(self, processor_options: dict[str, Any], context: EngineContext) -> Any:
        """An `LLM` of vLLM, with the weights of the model's folder."""
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights are handed over by reference
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        warnings.filterwarnings("ignore", message="It is recommended to use `self.log")  # vLLM's is a group of one
        from lightning.pytorch.utilities.seed import isolate_rng  # vLLM seeds the whole process
        from vllm import LLM

        config = context.config
        arguments: dict[str, Any] = {
            "dtype": self.dtype or context.dtype,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "max_model_len": self.max_model_len,
            "enforce_eager": self.enforce_eager,
            "enable_prefix_caching": True,
            "enable_sleep_mode": self._can_sleep,
            "logprobs_mode": "processed_logprobs",
            "limit_mm_per_prompt": {"image": self.max_images, "video": 0},
            "mm_processor_kwargs": processor_options,
            "worker_extension_cls": WORKER,
            "disable_log_stats": True,
        }
        if self.kv_cache_gb is not None:
            arguments["kv_cache_memory_bytes"] = int(self.kv_cache_gb * 2**30)
        if config.lora is not None:
            arguments |= {"enable_lora": True, "max_lora_rank": _lora_rank(config.lora.r), "max_loras": 1}
        if context.world_size > 1:  # it joins the processes that there are, each of which has an engine of its own
            arguments["distributed_executor_backend"] = "external_launcher"
            ranks = {"RANK": context.rank, "LOCAL_RANK": context.local_rank, "WORLD_SIZE": context.world_size}
            os.environ |= {name: str(value) for name, value in ranks.items()}
        try:
            with isolate_rng():
                return LLM(model_path(config.name), **(arguments | self.engine_args))
        except Exception as error:  # whatever vLLM or a wrong argument raises
            raise UserError(f"vLLM cannot start with {config.name}: {' '.join(str(error).split())}") from error


def _lora_rank(r: int) -> int:
    """The least rank that vLLM knows which is no smaller."""
    return next((rank for rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) if rank >= r), r)


def _requests(processor: Processor, prompts: PromptBatch) -> list[dict[str, Any]]:
    """Prompts as vLLM takes them: one token for each picture, and the picture."""
    return [
        {"prompt_token_ids": processor.without_repeats(ids), "multi_modal_data": {"image": pictures}}
        for ids, pictures in zip(prompts.input_ids, processor.pictures(prompts), strict=True)
    ]


def _sampling_params(params: SamplingParams, group_size: int, seed: int) -> Any:
    from vllm import SamplingParams as VLLMSamplingParams

    return VLLMSamplingParams(
        n=group_size,
        seed=None if params.is_greedy else seed,
        temperature=0.0 if params.is_greedy else params.temperature,
        top_p=params.top_p,
        repetition_penalty=params.repetition_penalty,
        max_tokens=params.max_new_tokens,
        stop_token_ids=params.eos_token_ids.tolist(),
        logit_bias={token: NEVER for token in params.suppress_tokens.tolist()},
        logprobs=0,  # of the token that was written
        detokenize=False,
    )


def _rollout(outputs: Sequence[Any], policy: Policy) -> Rollout:
    """Completions of vLLM as ours."""
    rows = [[each[token].logprob for token, each in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs]
    dtype = at_least_fp32(policy.model.dtype) if policy.has_weights else torch.float32
    logprobs = [to_device(torch.tensor(row, dtype=dtype), policy.device) for row in rows]
    return Rollout(
        completions=[torch.tensor(list(output.token_ids), dtype=torch.long) for output in outputs],
        logprobs=logprobs,
        is_truncated=[output.finish_reason == "length" for output in outputs],
        entropies=[torch.full_like(row, float("nan")) for row in logprobs],
    )
