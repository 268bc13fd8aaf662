"""Sources in JSON: the project's own lines, and pages of text as conversations.

A file is a list of objects (`.json`) or has one object a line (any other name). Lines are read when they are asked for;
only where each begins is in memory.
"""

import json
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from perception_r1.data.sources.base import DataError, Lazy, Source, SourceRow
from perception_r1.rows import Row, RowError


class JsonSource(Source):
    """Objects in a JSON file.

    Args:
        file: The file.
        images: Folder to which the paths of images are relative; that of the file unless given.
        take: See `Source`.
        seed: See `Source`.
    """

    def __init__(self, file: Path, *, images: Path | None = None, take: str = "all", seed: int = 0) -> None:
        super().__init__(take=take, seed=seed)
        self.file = Path(file)
        self.images: Path = self.file.parent if images is None else Path(images)

    @abstractmethod
    def convert(self, values: dict[str, Any]) -> Mapping[str, object]:
        """An entry in the project's own form, "image" included.

        Raises:
            RowError: It cannot be read.
        """

    def read(self) -> Sequence[SourceRow]:
        """See `Source`."""
        if self.file.is_fifo() or self.file.is_char_device():  # `<(...)` of a shell: lines are read again and again
            raise DataError(f"{self.file}: must be a file, not a pipe or a device")
        try:
            return self._listed() if self.file.suffix == ".json" else self._lines()
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read ({error.strerror or error})") from error

    def _listed(self) -> list[SourceRow]:
        """The objects of one JSON list."""
        try:
            values = json.loads(self.file.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.file}: must be a JSON list of objects ({error})") from error
        if not isinstance(values, list):
            raise DataError(f"{self.file}: must be a JSON list of objects")
        return [self.row(number, partial(values.__getitem__, number - 1)) for number in range(1, len(values) + 1)]

    def _lines(self) -> Sequence[SourceRow]:
        """The lines of the file that are not blank, read one at a time."""
        self._starts, self._numbers = array("q"), array("q")
        start = 0
        with self.file.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(line)
        return Lazy(self._line, len(self._starts))

    def _line(self, index: int) -> SourceRow:
        def read() -> object:
            with self.file.open("rb") as file:
                file.seek(self._starts[index])
                return json.loads(file.readline().decode("utf-8-sig"))

        return self.row(self._numbers[index], read)

    def contents(self) -> Iterable[Path | str]:
        """See `Source`."""
        return [self.file]

    def __str__(self) -> str:
        return str(self.file)

    def row(self, number: int, read: Any) -> SourceRow:
        """Row number `number` of the file from a function that reads its values."""
        location = f"{self.file}:{number}"
        try:
            values = read()
            if not isinstance(values, dict):
                raise RowError("the line must be a JSON object in braces")
            values = self.convert(values)
            row = Row(values, width=1, height=1)
            image = self.images / row.text("image") if "image" in row else None
            return SourceRow(location=location, number=number, values=values, image=image)
        except RowError as error:
            problem = str(error)
        except UnicodeDecodeError:
            problem = "the line must be UTF-8 text"
        except (ValueError, RecursionError) as error:
            problem = f"the line must be a JSON object ({error})"
        return SourceRow(location=location, number=number, values={}, problem=problem)


class JsonLines(JsonSource):
    """Rows of the project's own form."""

    def convert(self, values: dict[str, Any]) -> Mapping[str, object]:
        """They are in it already."""
        return values


class Conversations(JsonSource):
    """Pages with their text as the last turn of a conversation: the form of PageOCR and Fox, as of LLaVA.

    An entry is `{"image": ..., "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": TEXT}]}`.
    """

    def convert(self, values: dict[str, Any]) -> Mapping[str, object]:
        """Keep the answer of the last turn as the text of the page."""
        turns = values.get("conversations")
        answers = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        texts = [turn.get("value") for turn in answers if turn.get("from") in ("gpt", "assistant")]
        if not texts:
            raise RowError('conversations: must have a turn from "gpt" with the text of the page')
        return {"image": values.get("image"), "id": values.get("id"), "text": texts[-1]}
