"""PixMo-Count: a data set whose images have to be fetched by URL."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from perception_r1.data.sources.base import SHA256, DataError, Download
from perception_r1.data.sources.hub import Hub


class PixMoCount(Hub):
    """PixMo-Count: objects of one kind, with points in pixels or only their number.

    `perception-r1 data fetch` puts the images into a folder, each under the SHA-256 of its file; a row whose image is
    not there cannot be used.

    Args:
        images: Folder of the fetched images.
        path: Hub id, or parquet file.
        split: "train", "validation" or "test".
        revision: Commit or tag on the hub; the newest unless given.
        take: See `Source`.
        seed: See `Source`.
    """

    images: Path

    def __init__(
        self,
        images: Path,
        *,
        path: str = "allenai/pixmo-count",
        split: str = "train",
        revision: str | None = None,
        take: str = "all",
        seed: int = 0,
    ) -> None:
        columns = {"image": "image_sha256", "label": "label", "count": "count", "points": "points"}
        super().__init__(path, columns, split=split, revision=revision, images=images, take=take, seed=seed)

    @cached_property
    def table(self) -> Any:
        """See `Hub`; validation and test may lack the column of points."""
        table = super().table
        return table if "points" in table.column_names else table.add_column("points", [None] * len(table))

    def values(self, entry: Mapping[str, Any]) -> dict[str, object]:
        """See `Hub`; where nobody pointed at the objects, the list of points is empty and only the count is known."""
        row = super().values(entry)
        return row if row.get("points") else row | {"points": None}

    def downloads(self) -> Iterable[Download]:
        """The images of the rows, each once; what a row lacks is empty.

        Raises:
            DataError: The data set cannot be read or names no images.
        """
        columns = ["image_url", "image_sha256"]
        for column in columns:
            if column not in self.table.column_names:
                raise DataError(f"{self}: has no column {column!r}, so there is nothing to fetch")
        table = self.table.select_columns(columns)
        seen: set[str] = set()
        for number in self.numbers:
            entry = table[number]
            url, sha256 = (entry[column] if isinstance(entry[column], str) else "" for column in columns)
            if sha256 not in seen:
                seen.add(sha256)
                name = sha256 if SHA256.fullmatch(sha256) else f"malformed-{number + 1}"  # may be any path
                yield Download(url=url, sha256=sha256, path=self.images / name)
