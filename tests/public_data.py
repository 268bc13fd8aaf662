"""Small data sets in the forms of the public ones, for tests: files that `configs/data` can read."""

import base64
import hashlib
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

SIZE = (200, 100)
"""Width and height of every picture."""
CATEGORIES = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 90, "name": "toothbrush"}]


def picture(path: Path, shade: int = 0, size: tuple[int, int] = SIZE) -> Path:
    """A picture file in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade % 256, 90, 160)).save(path)
    return path


def write_json(path: Path, values: object) -> Path:
    """A JSON file in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def coco_image(number: int, name: str) -> dict[str, Any]:
    """An image of an annotation file."""
    return {"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1], "license": 3}


def instance(number: int, image: int, category: int, bbox: Sequence[float], **values: Any) -> dict[str, Any]:
    """An annotation, with the outline of its box."""
    x, y, width, height = bbox
    outline = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    known = {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox), "iscrowd": 0}
    return known | {"segmentation": outline, "area": width * height} | values


def coco_file(images: Sequence[Any], annotations: Sequence[Any], categories: Sequence[Any] = CATEGORIES) -> Any:
    """An annotation file."""
    return {"info": {}, "images": list(images), "annotations": list(annotations), "categories": list(categories)}


def make_coco(root: Path) -> None:
    """COCO 2017: six images in train, three in val."""
    for split, size in (("train", 6), ("val", 3)):
        names = [f"{number:012d}.jpg" for number in range(1, size + 1)]
        for shade, name in enumerate(names):
            picture(root / "coco" / f"{split}2017" / name, shade)
        file = coco_file(
            [coco_image(number, name) for number, name in enumerate(names, start=1)],
            [instance(10 + number, number, 18, (20, 10, 50, 40)) for number in range(1, size + 1)],
        )
        write_json(root / "coco" / "annotations" / f"instances_{split}2017.json", file)


def reference(number: int, annotation: int, image: int, split: str, *sentences: str) -> dict[str, Any]:
    """A reference; sentences are numbered from ten times its number on."""
    return {
        "ref_id": number,
        "ann_id": annotation,
        "image_id": image,
        "category_id": 18,
        "file_name": f"COCO_train2014_{image:012d}_{annotation}.jpg",
        "split": split,
        "sent_ids": [10 * number + k for k in range(len(sentences))],
        "sentences": [
            {"sent_id": 10 * number + k, "sent": sent, "raw": sent.title(), "tokens": sent.split()}
            for k, sent in enumerate(sentences)
        ],
    }


def make_refcoco(root: Path) -> None:
    """RefCOCO, RefCOCO+ and RefCOCOg: six images in each split, two sentences about an object."""
    splits = {
        "refcoco": ("refs(unc).p", ("train", "val", "testA", "testB")),
        "refcoco+": ("refs(unc).p", ("train", "val", "testA", "testB")),
        "refcocog": ("refs(umd).p", ("train", "val", "test")),
    }
    for name, (file_name, parts) in splits.items():
        numbers = range(1, 6 * len(parts) + 1)
        names = {number: f"COCO_train2014_{number:012d}.jpg" for number in numbers}
        for number in numbers:
            picture(root / "coco" / "train2014" / names[number], number)
        file = coco_file(
            [coco_image(number, names[number]) for number in numbers],
            [instance(100 + number, number, 18, (20, 10, 50, 40)) for number in numbers],
        )
        write_json(root / name / "instances.json", file)
        references = [
            reference(n, 100 + n, n, parts[n % len(parts)], f"dog {n}", f"the brown dog {n}") for n in numbers
        ]
        (root / name / file_name).write_bytes(pickle.dumps(references, protocol=2))


def hub_refcoco(folder: Path, size: int = 3) -> datasets.Dataset:
    """A split as lmms-lab has it: the picture in the table, several expressions an entry."""
    rows = [
        {
            "question_id": str(number),
            "image": {"bytes": picture(folder / f"{number}.jpg", number).read_bytes(), "path": f"{number}.jpg"},
            "question": "Please carefully observe the area circled in the image and come up with a caption.",
            "answer": [f"dog {number}", "the brown dog"][: 1 + number % 2],
            "segmentation": [20.0, 10.0, 70.0, 10.0, 70.0, 50.0],
            "bbox": [20.0, 10.0, 50.0, 40.0],
            "iscrowd": 0,
            "file_name": f"COCO_train2014_{number:012d}_{number}.jpg",
        }
        for number in range(size)
    ]
    strings = {name: datasets.Value("string") for name in ("question_id", "question", "file_name")}
    numbers = {name: datasets.List(datasets.Value("float32")) for name in ("segmentation", "bbox")}
    features = datasets.Features(
        {
            **strings,
            **numbers,
            "image": datasets.Image(),
            "answer": datasets.List(datasets.Value("string")),
            "iscrowd": datasets.Value("int64"),
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


def hub_pixmo(folder: Path, *, has_points: bool, size: int = 4) -> datasets.Dataset:
    """A split of PixMo-Count; all of its pictures but the last are in the folder."""
    rows = []
    for number in range(size):
        draft = picture(folder / "draft.png", number)
        sha256 = hashlib.sha256(draft.read_bytes()).hexdigest()
        draft.rename(folder / sha256)
        points = {"x": [20.0, 100.0], "y": [10.0, 50.0]}
        rows.append(
            {
                "image_url": f"https://example.org/{number}.png",
                "image_sha256": sha256,
                "count": 2,
                "points": points if has_points else {"x": [], "y": []},
                "label": "dogs",
            }
        )
    (folder / rows[-1]["image_sha256"]).unlink()
    floats = datasets.List(datasets.Value("float64"))
    features = datasets.Features(
        {
            "image_url": datasets.Value("string"),
            "image_sha256": datasets.Value("string"),
            "count": datasets.Value("int64"),
            "points": {"x": floats, "y": floats},
            "label": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


def make_conversations(path: Path, size: int = 6) -> None:
    """Pages as Fox and PageOCR have them, with their pictures beside the file."""
    pages = [
        {
            "image": f"en_{number}.png",
            "len": 9,
            "conversations": [
                {"from": "human", "value": "<image>\nOCR this image."},
                {"from": "gpt", "value": f"page\n{number}"},
            ],
        }
        for number in range(1, size + 1)
    ]
    for number, page in enumerate(pages):
        picture(path.parent / page["image"], number)
    write_json(path, pages)


def make_fox(root: Path) -> None:
    """Fox: two pages in either language."""
    for language in ("en", "cn"):
        make_conversations(root / "fox" / f"{language}_page_ocr.json", size=2)
        for number in (1, 2):
            picture(root / "fox" / f"{language}_pdf_png" / f"en_{number}.png", number)


def make_pageocr(root: Path) -> None:
    """PageOCR: six pages."""
    make_conversations(root / "pageocr" / "pageocr.json")
    for number in range(1, 7):
        picture(root / "pageocr" / "images" / f"en_{number}.png", number)


def make_perception_r1(root: Path) -> None:
    """The files of Perception-R1 for counting and detection: six pictures each."""
    names = [f"{number}.png" for number in range(6)]
    folder = root / "perception-r1-counting"
    clicks = [{"image": f"images/{name}", "problem": "dogs", "clicks": [[100, 200], [300, 400]]} for name in names]
    write_json(folder / "json" / "pr1_counting_10k.json", clicks)
    objects = {"target_id": [18], "target_box": [[10, 10, 60, 60]]}
    detected = [{"image": name, "problem": "detect", "solution": objects} for name in names]
    write_json(root / "perception-r1-detection" / "pr1_dataset_detection.json", detected)
    for number, name in enumerate(names):
        picture(folder / "images" / name, number)
        picture(root / "perception-r1-detection" / "images" / name, number)


def make_vlm_r1(root: Path) -> None:
    """Four referring expressions of each of VLM-R1's files."""
    for number in range(4):
        picture(root / "coco" / "train2014" / f"{number}.png", number)
    request = "Please provide the bounding box coordinate of the region this sentence describes: the dog."
    rows = [
        {"image": f"train2014/{number}.png", "problem": request, "solution": [10.5, 10, 60, 60]} for number in range(4)
    ]
    for name in ("refcoco", "refcocop", "refcocog"):
        write_json(root / "vlm-r1" / "rec_jsons_processed" / f"{name}_train.json", rows)


def picture_bytes(root: Path, number: int) -> dict[str, Any]:
    """A picture as a cell of a table."""
    return {"bytes": picture(root / "draft.png", number).read_bytes(), "path": None}


def make_v_triune(root: Path) -> None:
    """Six rows of V-Triune's detection."""
    answer = "[{'bbox_2d': [100, 100, 350, 500], 'label': 'shiba dog'}]"
    rows = [
        {
            "images": [picture_bytes(root, number)],
            "prompt": [{"content": "<image>\nLocate all objects of the class: shiba dog", "role": "user"}],
            "ability": "cv_detection",
            "reward_model": {"answer": answer, "ground_truth": f"<answer>{answer}</answer>", "verifier": "detection"},
        }
        for number in range(6)
    ]
    path = root / "orsta" / "train" / "train_detection_v3det_4000.parquet"
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


def make_rex_omni(root: Path) -> None:
    """Six pictures as Rex-Omni has them."""
    images, annotations = b"", b""
    for number in range(6):
        annotation = {"boxes": [{"bbox": [10, 10, 60, 60], "phrase": "dog"}, {"bbox": None, "phrase": "cow"}]}
        annotations += f"{len(images)}\t{json.dumps(annotation)}\n".encode()
        images += b"%d\t%s\n" % (number, base64.b64encode(picture_bytes(root, number)["bytes"]))
    folder = root / "rex-omni"
    folder.mkdir(parents=True)
    (folder / "detection.images.tsv").write_bytes(images)
    (folder / "detection.annotations.tsv").write_bytes(annotations)


def hub_solutions(root: Path, solution: str) -> datasets.Dataset:
    """Six problems whose solutions are texts."""
    rows = [
        {"id": str(number), "image": picture_bytes(root, number), "problem": "the dog", "solution": solution}
        for number in range(6)
    ]
    return datasets.Dataset.from_list(rows)


def from_the_hub(root: Path) -> Callable[..., datasets.Dataset]:
    """In place of `load_dataset`: a small data set for those that the configurations name."""
    splits = {
        "lmms-lab/RefCOCO": ("val", "testA", "testB"),
        "lmms-lab/RefCOCOplus": ("val", "testA", "testB"),
        "lmms-lab/RefCOCOg": ("val", "test"),
        "allenai/pixmo-count": ("train", "validation", "test"),
        "linkangheng/refcoco_320k": ("train",),
        "Ricky06662/VisionReasoner_multi_object_7k_840": ("train",),
    }
    solutions = {"linkangheng/refcoco_320k": "[100, 100, 350, 500]"}
    solutions["Ricky06662/VisionReasoner_multi_object_7k_840"] = '[{"bbox_2d": [10, 10, 60, 60], "point_2d": [30, 30]}]'
    load_files = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **options: Any) -> datasets.Dataset:
        if path == "parquet":
            return load_files(path, **options)
        split = options["split"]
        assert split in splits[path]
        if path in solutions:
            return hub_solutions(root, solutions[path])
        if path == "allenai/pixmo-count":
            return hub_pixmo(root / "pixmo-count", has_points=split == "train", size=6)
        return hub_refcoco(root)

    return load_dataset
