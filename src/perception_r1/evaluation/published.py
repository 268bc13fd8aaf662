"""Metrics that others have published, for the report of an evaluation to stand beside.

Source: Perception-R1 (NeurIPS 2025, arXiv 2504.07954), tables of grounding, counting, OCR and detection: the model
before training and after. Qwen2-VL 2B, for detection Qwen2.5-VL 3B. The keys are the names of sources in
`configs/data`, then of metrics; values are shares, not percentages.
"""

PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "refcoco_val": {"accuracy_50": (0.868, 0.891)},
    "refcoco_testA": {"accuracy_50": (0.896, 0.914)},
    "refcoco_testB": {"accuracy_50": (0.820, 0.845)},
    "refcocoplus_val": {"accuracy_50": (0.771, 0.817)},
    "refcocoplus_testA": {"accuracy_50": (0.825, 0.868)},
    "refcocoplus_testB": {"accuracy_50": (0.701, 0.743)},
    "refcocog_val": {"accuracy_50": (0.833, 0.857)},
    "refcocog_test": {"accuracy_50": (0.831, 0.854)},
    "pixmo_count_val": {"count_accuracy": (0.602, 0.781)},
    "pixmo_count_test": {"count_accuracy": (0.505, 0.756)},
    "coco_val2017": {"ap": (0.161, 0.319), "ap50": (0.237, 0.467), "ap75": (0.167, 0.334)},
    "pageocr": {"edit_distance": (0.080, 0.035), "word_f1": (0.944, 0.982)},
}
"""Source -> metric -> before and after."""
