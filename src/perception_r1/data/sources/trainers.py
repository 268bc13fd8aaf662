"""Files of other trainers: Perception-R1 and VLM-R1, VLM-R1's conversations, and ms-swift.

Sources of their forms: github.com/linkangheng/PR1 (src/open_r1/dataset.py), github.com/om-ai-lab/VLM-R1
(src/open-r1-multimodal/src/open_r1/grpo_jsonl.py), github.com/modelscope/ms-swift (docs, Custom-dataset).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from perception_r1.data.sources.json_files import JsonSource
from perception_r1.data.sources.solutions import (
    TOLERANCE,
    Unit,
    box_keys,
    point_pairs,
    problem_text,
    solution_keys,
    spelled,
)
from perception_r1.rows import RowError, short_repr


class PerceptionR1(JsonSource):
    """The public files of Perception-R1, and VLM-R1's of referring expressions: problem and solution.

    A solution is a box (grounding), points or clicks (counting), a number (counting), a text (ocr), or
    `{"target_id": [COCO's numbers], "target_box": [...]}` (detection). Where there is a `normalized_solution` it is
    preferred: it is in thousandths, whatever the unit of the solution. A text that spells out a list is read as one.

    Args:
        file: The file.
        images: Folder to which the paths of images are relative; that of the file unless given.
        unit: Unit of boxes, points and clicks. Unless given it is that of the public files: thousandths for grounding
            and counting, whose solutions the public code compares with what Qwen2-VL writes, and pixels for detection.
        take: See `Source`.
        seed: See `Source`.
    """

    def __init__(
        self, file: Path, *, images: Path | None = None, unit: Unit | None = None, take: str = "all", seed: int = 0
    ) -> None:
        super().__init__(file, images=images, take=take, seed=seed)
        self.unit = unit

    def contents(self) -> Iterable[Path | str]:
        """See `Source`."""
        return [self.file, str(self.unit)]

    def convert(self, values: dict[str, Any]) -> Mapping[str, object]:
        """Tell by the form of the solution what it is."""
        row = {"image": values.get("image"), "id": values.get("id"), "tolerance": TOLERANCE}
        row["unit"] = self.unit or "thousandths"
        problem = problem_text(values.get("problem"))
        if values.get("clicks") is not None:
            clicks = point_pairs(spelled(values["clicks"]))
            if not isinstance(clicks, list):
                raise RowError("clicks: must be a list of points")
            return row | {"label": problem, "points": clicks}
        if values.get("normalized_solution") is not None:
            return row | {"question": problem, "box": spelled(values["normalized_solution"]), "unit": "thousandths"}
        keys = solution_keys(problem, values.get("solution"))
        return row | keys | ({"unit": self.unit or "pixels"} if "objects" in keys else {})


class VlmR1(JsonSource):
    """Conversations of VLM-R1, a question and its solution: `{"image": ..., "conversations": [human, gpt]}`.

    A solution is a box, a number, a text, or a fenced list of labelled boxes; `None` stands for an empty one. A row has
    one image.

    Args:
        file: The file.
        images: Folder to which the paths of images are relative; that of the file unless given.
        unit: Unit of boxes and points.
        take: See `Source`.
        seed: See `Source`.
    """

    def __init__(
        self, file: Path, *, images: Path | None = None, unit: Unit = "pixels", take: str = "all", seed: int = 0
    ) -> None:
        super().__init__(file, images=images, take=take, seed=seed)
        self.unit = unit

    def contents(self) -> Iterable[Path | str]:
        """See `Source`."""
        return [self.file, self.unit]

    def convert(self, values: dict[str, Any]) -> Mapping[str, object]:
        """Keep the last question and its answer."""
        found = values.get("conversations")
        turns = [turn for turn in found if isinstance(turn, dict)] if isinstance(found, list) else []
        questions = [turn.get("value") for turn in turns if turn.get("from") in ("human", "user")]
        answers = [turn.get("value") for turn in turns if turn.get("from") in ("gpt", "assistant")]
        if not questions or not answers:
            raise RowError('conversations: must have a turn from "human" and one from "gpt"')
        keys = solution_keys(problem_text(questions[-1]), [] if answers[-1] is None else answers[-1])
        image = only_image(values.get("image"))
        return {"image": image, "id": values.get("id"), "unit": self.unit, "tolerance": TOLERANCE} | keys


class MsSwift(JsonSource):
    """Rows of ms-swift: messages, images, and objects with names and boxes, or a solution.

    `objects` is `{"ref": [names], "bbox": [boxes], "bbox_type": "real"}` (pixels) or "norm1" (fractions); a bbox of two
    numbers is a point. Names and boxes belong together where there are as many of both; one name is that of all boxes.
    Without objects the solution is `solution`, or what the assistant says last.
    """

    def convert(self, values: dict[str, Any]) -> Mapping[str, object]:
        """Tell by the keys what it is."""
        image = only_image(values.get("images", values.get("image")))
        row = {"image": image, "id": values.get("id"), "tolerance": TOLERANCE}
        found = values.get("messages")
        messages = [turn for turn in found if isinstance(turn, dict)] if isinstance(found, list) else []
        problem = problem_text(messages)
        objects = values.get("objects")
        if isinstance(objects, Mapping) and objects.get("bbox"):
            return row | {"unit": _unit(objects)} | _objects(problem, objects)
        said = [turn.get("content") for turn in messages if turn.get("role") == "assistant"]
        solution = values.get("solution", said[-1] if said else None)
        return row | {"unit": "pixels"} | solution_keys(problem, solution)


def only_image(value: Any) -> object:
    """The path of the image of a row, also from a list of one or from an object with a path.

    Raises:
        RowError: There are several images, or it is not in a file.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise RowError(f"images: must be one, got {len(value)}")
        value = value[0]
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            raise RowError("images: must be paths here; read a table with bytes as a Hub source")
        value = value.get("path")
    return value


def _unit(objects: Mapping[str, Any]) -> str:
    kinds = {"real": "pixels", "norm1": "fractions"}
    kind = objects.get("bbox_type", "real")
    if not isinstance(kind, str) or kind not in kinds:
        raise RowError(f"objects.bbox_type: must be one of {', '.join(kinds)}, got {short_repr(kind)}")
    return kinds[kind]


def _objects(problem: object, objects: Mapping[str, Any]) -> dict[str, object]:
    """Keys of boxes or points with their names."""
    boxes, names = objects["bbox"], objects.get("ref") or []
    if not isinstance(boxes, list) or not isinstance(names, list):
        raise RowError("objects: ref and bbox must be lists")
    if len(names) == 1:
        problem, names = names[0], names * len(boxes)
    labels = names if len(names) == len(boxes) else [None] * len(boxes)
    if all(isinstance(box, list) and len(box) == 2 for box in boxes):
        return {"label": problem, "points": boxes}
    return box_keys(problem, boxes, labels)
