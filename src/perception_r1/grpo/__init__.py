"""The arithmetic of GRPO: advantages and loss, tensors in, tensors out."""
