"""Where samples come from: made scenes, the project's own JSON lines, and the data module that serves both."""
