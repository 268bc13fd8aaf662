"""The engine: a Qwen-VL model that reads prompts, writes completions and says how probable they are."""
