"""What is added to vLLM's workers, here and in servers (`--worker-extension-cls`), so that they take over weights."""

from typing import Any

WORKER = "perception_r1.engines.vllm_worker.PolicyWorker"
"""Under this name vLLM imports it."""


class PolicyWorker:
    """Becomes a part of vLLM's own worker class, whose methods it calls."""

    def load_policy(self, **source: Any) -> None:
        """Take over weights in place.

        Args:
            **source: `weights_iterator`, pairs of name and tensor, or `weights_path`, a folder; see vLLM's
                `reload_weights`.
        """
        worker: Any = self
        worker.reload_weights(**source)
        for module in worker.get_model().modules():
            _pack_again(module)


def _pack_again(module: Any) -> None:
    """On a CPU vLLM (0.32) computes with packed weights, and forgets to pack some of them again.

    These are a vocabulary head that is tied to the embedding, and experts.
    """
    if hasattr(module, "cpu_linear") and module.weight.numel() > 0:
        module.quant_method.process_weights_after_loading(module)
    elif hasattr(module, "w13_weight") and module.w13_weight.is_cpu:
        module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)
