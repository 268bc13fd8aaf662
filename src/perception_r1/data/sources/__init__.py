"""Where annotated images come from: one interface, and a reader for each form in which people have them."""

from pathlib import Path

from perception_r1.data.sources.base import DataError, Download, Source, SourceRow
from perception_r1.data.sources.coco import Coco
from perception_r1.data.sources.hub import Hub
from perception_r1.data.sources.json_files import Conversations, JsonLines
from perception_r1.data.sources.pixmo import PixMoCount
from perception_r1.data.sources.refcoco import RefCoco
from perception_r1.data.sources.rex_omni import RexOmni
from perception_r1.data.sources.trainers import MsSwift, PerceptionR1, VlmR1

__all__ = [
    "Coco",
    "Conversations",
    "DataError",
    "Download",
    "Hub",
    "JsonLines",
    "MsSwift",
    "PerceptionR1",
    "PixMoCount",
    "RefCoco",
    "RexOmni",
    "Source",
    "SourceRow",
    "VlmR1",
    "open_source",
]


def open_source(file: Path) -> Source:
    """A file of the project's own form as a source."""
    return JsonLines(file)
