"""What it costs to split a group over several micro-batches: its prompt computed once, and once for each part.

    python benchmarks/split_groups.py

A group of 12 completions of 96 tokens, of prompts of 653 and 1,301 tokens, whole and in 2, 3, 6 and 12 parts: forward
and backward passes of a randomly initialised Qwen2-VL on one thread, in turn. Compared are medians of CPU-seconds with
those of the whole group. Writes benchmarks/results/split_groups.json and the table of docs/engine.md.
"""

import argparse
import json
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

import torch
from pages import fill, table
from PIL import Image
from random_model import Shape, make_folder

from perception_r1.modules.shared_prompts import SharedPrompts
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.packing import plan_micro_batches
from perception_r1.policy.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "split_groups.json"
PAGE = ROOT / "docs" / "engine.md"
GROUP_SIZE, COMPLETION = 12, 96
SHAPES = {653: Shape(prompt_tokens=653, picture=(24, 24)), 1301: Shape(prompt_tokens=1301, picture=(35, 35))}
"""By prompt length."""
NUM_PARTS = (1, 2, 3, 6, 12)


def seconds(policy: Policy, prompts: PromptBatch, *, parts: int, once: bool) -> float:
    """CPU-seconds of the passes over one group in so many parts."""
    completions = [torch.randint(0, 256, (COMPLETION,)) for _ in range(GROUP_SIZE)]
    budget = prompts.lengths[0] + COMPLETION * (GROUP_SIZE // parts)
    micro_batches = plan_micro_batches(prompts.lengths, [COMPLETION] * GROUP_SIZE, [0], budget)
    assert len(micro_batches) == parts
    shared = SharedPrompts(policy)
    policy.network.zero_grad()
    started = time.process_time()
    for micro_batch in micro_batches:
        states = shared.states(prompts, micro_batch) if once else None
        logprobs = policy(prompts, [completions[row] for row in micro_batch.rows], 1.0, 1.0, states)
        for loss in shared.losses(logprobs.sum(), micro_batch) if once else [logprobs.sum()]:
            loss.backward()
    return time.process_time() - started


def measure(shape: Shape, num_rounds: int) -> list[dict[str, float]]:
    """Of each number of parts: how many times the seconds of the whole group it takes, either way."""
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name), shape)
        row = json.loads((Path(name) / "prompts.jsonl").read_text().splitlines()[0])
        policy = Policy.load(PolicyConfig(name=name)).train()
        image = Image.open(Path(name) / row["image"]).convert("RGB")
        chat: list[dict[str, object]] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["text"]}]}
        ]
        prompts = policy.processor.encode([chat], [[image]], max_tokens=None)
        taken: dict[tuple[int, bool], list[float]] = {}
        for _ in range(num_rounds + 1):
            for parts in NUM_PARTS:
                for once in (True, False)[: 1 + (parts > 1)]:
                    taken.setdefault((parts, once), []).append(seconds(policy, prompts, parts=parts, once=once))
    typical = {key: median(values[1:]) for key, values in taken.items()}  # the first is a warm-up
    whole = typical[1, True]
    return [
        {
            "prompt": shape.prompt_tokens,
            "parts": parts,
            "whole_cpu_s": round(whole, 3),
            "once": round(typical[parts, True] / whole, 3),
            "for_each_part": round(typical[parts, False] / whole, 3),
        }
        for parts in NUM_PARTS[1:]
    ]


def ratios(rows: list[dict[str, float]]) -> str:
    """Markdown."""
    heads = ["P", "parts", "prompt computed once", "prompt computed for each part"]
    return table(
        heads,
        [[f"{row['prompt']}", f"{row['parts']}", f"{row['once']:.2f}", f"{row['for_each_part']:.2f}"] for row in rows],
    )


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=int, default=tuple(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULT, help="File of the results.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for prompt in args.prompts for row in measure(SHAPES[prompt], args.rounds)]
    told = {"torch": torch.__version__, "date": date.today().isoformat(), "group_size": GROUP_SIZE}
    args.results.write_text(json.dumps(told | {"completion": COMPLETION, "rows": rows}, indent=1) + "\n")
    if args.results == RESULT:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), "split_groups", {"ratios": ratios(rows)}))
    print(ratios(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
