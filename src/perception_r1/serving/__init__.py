"""A model behind HTTP: an OpenAI-compatible interface, and a page to try it on pictures."""
