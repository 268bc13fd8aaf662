"""perception-r1: GRPO post-training of vision-language models on visual perception."""

__version__ = "0.1.0"
