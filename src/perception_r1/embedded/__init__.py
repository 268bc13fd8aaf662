"""The embedded default: a tiny but real Qwen-VL, built and warmed up on this machine, so that nothing is downloaded."""
