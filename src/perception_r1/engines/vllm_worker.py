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
            # On a CPU vLLM (0.32) multiplies with a packed copy of the weights, and forgets that of a head which is
            # tied to the embedding.
            if hasattr(module, "cpu_linear") and module.weight.numel() > 0:
                module.quant_method.process_weights_after_loading(module)
