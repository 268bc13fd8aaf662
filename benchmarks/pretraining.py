"""The curve of a pretraining of the embedded model, short enough to be kept.

    make pretrain
    python benchmarks/pretraining.py logs/pretraining

Reads the folder of `make pretrain`; writes means over every hundred steps, settings and hours to
benchmarks/results/pretraining.json, and a plot to docs/pretraining.png.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "pretraining.json"
PLOT = ROOT / "docs" / "pretraining.png"
WINDOW = 100
SHOWN = {
    "seeing: nats": ("scene/name", "scene/colour", "page/name"),
    "seeing: distance of a box": ("scene/box", "page/box"),
    "looking: nats": ("scene/attention", "page/attention"),
    "answering: nats per token": ("detection", "counting", "grounding", "ocr"),
}


def summarise(steps: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Means over every WINDOW steps of what was logged; seconds are sums."""
    rows = []
    for start in range(0, len(steps), WINDOW):
        part = steps[start : start + WINDOW]
        row: dict[str, float] = {"step": part[-1]["step"]}
        for name in sorted({name for entry in part for name in entry} - {"step"}):
            values = [entry[name] for entry in part if name in entry]
            row[name] = round(sum(values) if name.endswith("seconds") else mean(values), 4)
        rows.append(row)
    return rows


def plot(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """The losses by step."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SHOWN), figsize=(15, 3.6))
    for axis, (title, names) in zip(axes, SHOWN.items(), strict=True):
        for name in names:
            found = [(row["step"], row[name]) for row in rows if row.get(name)]
            axis.plot(*zip(*found, strict=True), label=name)
        axis.set(title=title, xlabel="step", yscale="log")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> int:
    """Read, summarise, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder of a pretraining.")
    args = parser.parse_args()
    lines = (args.folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()
    rows = summarise([json.loads(line) for line in lines])
    state = torch.load(args.folder / "checkpoint.pt", weights_only=True)
    result: dict[str, Any] = {
        "settings": state["settings"],
        "torch": torch.__version__,
        "hours": round(sum(row["seconds"] for row in rows) / 3600, 2),
        "cpu_hours": round(sum(row["cpu_seconds"] for row in rows) / 3600, 2),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
