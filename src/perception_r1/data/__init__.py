"""Where samples come from: synthetic scenes, the project's own JSON lines, and the data module that serves both."""
