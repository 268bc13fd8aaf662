"""How much memory the recipes of the paper need, and which card has it: `perception-r1 plan` for all of them.

    python benchmarks/memory.py

Every recipe is planned with all weights, on one card and on two, and with a LoRA adapter. Nothing is downloaded, and no
GPU is needed. Writes benchmarks/results/memory.json and the table of docs/memory.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pages import fill, table

from perception_r1.cli import _quieten
from perception_r1.commands.plan import CARDS, read
from perception_r1.planning.report import GB

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
PAGE = ROOT / "docs" / "memory.md"
RECIPES = {
    "grounding": ("qwen2_vl_2b", "refcoco"),
    "counting": ("qwen2_vl_2b", "pixmo_count"),
    "ocr": ("qwen2_vl_2b", "pageocr"),
    "detection": ("qwen2_5_vl_3b", "coco"),
}
"""Recipe -> model and data."""
TRAINED: dict[str, list[str]] = {
    "all weights": [],
    "all weights, fsdp2 on 2 cards": ["--trainer.devices", "2", "--trainer.strategy", "fsdp2"],
    "LoRA": ["--variant", "lora"],
}


def options_of(recipe: str, trained: str) -> list[str]:
    """The options of a run by a recipe."""
    model, data = RECIPES[recipe]
    return ["--task", recipe, "--model", model, "--data", data, "--recipe", recipe, *TRAINED[trained]]


def plan(recipe: str, trained: str) -> dict[str, Any]:
    """A row of the results: bytes of each phase, of each kind at the highest, and the numbers of weights."""
    found = read(options_of(recipe, trained)).plan()
    return {
        "recipe": recipe,
        "model": RECIPES[recipe][0],
        "trained": trained,
        "prompt_tokens": found.prompt.num_tokens,
        "phase": found.highest.phase,
        "phases": {peak.phase: peak.bytes for peak in found.peaks},
        "kinds": dict(found.highest.kinds),
    }


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    cards = [f"{card} GB" for card in CARDS]
    heads = ["recipe", "model", "trained", "highest phase", "resting, GB", "peak, GB", *cards]
    lines = []
    for row in rows:
        peak = max(row["phases"].values())
        sizes = [f"{size / GB:.1f}" for size in (row["phases"]["save"], peak)]
        fits = ["yes" if peak <= card * GB else "no" for card in CARDS]
        lines.append([row["recipe"], row["model"], row["trained"], row["phase"], *sizes, *fits])
    return table(heads, lines)


def main() -> int:
    """Every recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--trained", nargs="+", default=list(TRAINED), choices=list(TRAINED))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    _quieten()
    rows: list[dict[str, Any]] = []
    for recipe in args.recipes:
        for trained in args.trained:
            print(f"{recipe}, {trained} ...", file=sys.stderr, flush=True)
            rows.append(plan(recipe, trained))
            results = {
                "date": date.today().isoformat(),
                "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
                "rows": rows,
            }
            args.results.parent.mkdir(parents=True, exist_ok=True)
            args.results.write_text(json.dumps(results, indent=1) + "\n")
    print(rows_table(rows))
    if args.results == RESULTS:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), "memory", {"table": rows_table(rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
