"""Where annotated pictures come from: one interface, and a reader for each form in which people have them."""

from perception_r1.data.sources.base import DataError, Source, SourceRow
from perception_r1.data.sources.coco import Coco, RefCoco
from perception_r1.data.sources.hub import Hub, PixMoCount
from perception_r1.data.sources.json_files import Conversations, JsonLines, PerceptionR1

__all__ = [
    "Coco",
    "Conversations",
    "DataError",
    "Hub",
    "JsonLines",
    "PerceptionR1",
    "PixMoCount",
    "RefCoco",
    "Source",
    "SourceRow",
]
