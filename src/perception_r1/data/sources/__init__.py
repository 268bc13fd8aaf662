"""Where annotated pictures come from: one interface, and a reader for each form in which people have them."""

from perception_r1.data.sources.base import DataError, Source, SourceRow
from perception_r1.data.sources.coco import Coco
from perception_r1.data.sources.hub import Hub
from perception_r1.data.sources.json_files import Conversations, JsonLines, PerceptionR1
from perception_r1.data.sources.pixmo import Download, PixMoCount
from perception_r1.data.sources.refcoco import RefCoco

__all__ = [
    "Coco",
    "Conversations",
    "DataError",
    "Download",
    "Hub",
    "JsonLines",
    "PerceptionR1",
    "PixMoCount",
    "RefCoco",
    "Source",
    "SourceRow",
]
