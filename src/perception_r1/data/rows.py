"""One row of annotated data: checked access to its keys, pixels turned into fractions."""


class RowError(ValueError):
    """A row that cannot be used; the message names the key and says what would be right."""


class Row:
    """A JSON object of the project's own data format with the size of its image."""

    def __init__(self, values: dict, width: int, height: int) -> None: ...
