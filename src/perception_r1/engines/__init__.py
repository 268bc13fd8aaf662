"""What writes completions: the engine of this package, vLLM in this process, or a server."""

from perception_r1.engines.base import GenerationEngine, NativeEngine
from perception_r1.engines.server import ServerEngine
from perception_r1.engines.vllm import VLLMEngine

__all__ = ["GenerationEngine", "NativeEngine", "ServerEngine", "VLLMEngine"]
