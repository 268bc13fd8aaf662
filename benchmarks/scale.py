"""What bounds each phase of a step on 1 to 1,024 cards: arithmetic with the shapes of models and published rates.

    python benchmarks/scale.py

Nothing is measured. Every time is a lower bound: what a phase computes, reads or sends, at the full rate of the card
or the link that is slowest. Numbers of weights come from the configurations that `perception-r1 plan` uses. Writes
benchmarks/results/scale.json and the tables of docs/scale.md.

Legend: B prompts of a device, P prompt tokens, N patches of a picture, G completions per prompt, C completion tokens.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pages import fill, table

from perception_r1.planning.policy import empty_model
from perception_r1.policy.load import PolicyConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
PAGE = ROOT / "docs" / "scale.md"
NAMES = {size: f"Qwen/Qwen2-VL-{size}-Instruct" for size in ("2B", "7B", "72B")}
NUM_CARDS = (1, 8, 64, 1024)
ACTIVATIONS, WORKSPACE = 20e9, 5e9
"""Bytes for the passes of training, which `micro_batch_tokens` makes as small as that, and for those of decoding."""
PHASES = ("prefill", "decode", "reference", "forward and backward", "exchange", "update")


@dataclass(frozen=True, kw_only=True)
class Card:
    """Published rates of a card, per second, and of its links in one direction.

    Attributes:
        flops: Of dense products in bfloat16.
        memory: Bytes read or written.
        link: Bytes to the other cards of its machine.
        network: Bytes of a whole machine to the others.
        gigabytes: Of memory.
    """

    flops: float = 989e12
    memory: float = 3.35e12
    link: float = 450e9
    network: float = 400e9
    gigabytes: float = 80


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a device does in a step; as in the paper's counting, with answers of middle length."""

    num_prompts: int = 4
    prompt_tokens: int = 1326
    patches: int = 5040
    group_size: int = 8
    completion_tokens: int = 256
    micro_batches: int = 4


@dataclass(frozen=True, kw_only=True)
class Model:
    """Numbers of a model.

    Attributes:
        language: Weights of its layers.
        head: Weights of the vocabulary head.
        vision: Weights of the vision tower.
        total: All weights.
        width: Layers of the language model times the size of all their heads.
        kv_bytes: Bytes of keys and values of a token in bfloat16.
        vision_width: The same as width for the tower.
    """

    language: int
    head: int
    vision: int
    total: int
    width: int
    kv_bytes: int
    vision_width: int


def read(name: str) -> Model:
    """The numbers of a model, from its configuration."""
    model = empty_model(PolicyConfig(name=name))
    text, vision = model.config.text_config, model.config.vision_config
    size = text.hidden_size // text.num_attention_heads
    layers = text.num_hidden_layers
    return Model(
        language=sum(weight.numel() for weight in model.model.language_model.layers.parameters()),
        head=text.vocab_size * text.hidden_size,
        vision=sum(weight.numel() for weight in model.model.visual.parameters()),
        total=sum(weight.numel() for weight in model.parameters()),
        width=layers * text.hidden_size,
        kv_bytes=layers * 2 * text.num_key_value_heads * size * 2,
        vision_width=vision.depth * vision.embed_dim,
    )


def flops(model: Model, load: Load) -> dict[str, float]:
    """Operations of a forward pass over the prompts, and over prompts and completions."""
    tower = 2 * model.vision * load.patches + 4 * load.patches**2 * model.vision_width
    prompt = 2 * model.language * load.prompt_tokens + 2 * load.prompt_tokens**2 * model.width
    seen = load.prompt_tokens + load.completion_tokens / 2  # by a token of a completion, on average
    completion = load.completion_tokens * (2 * (model.language + model.head) + 4 * seen * model.width)
    prompts = load.num_prompts * (tower + prompt)
    return {"prompts": prompts, "all": prompts + load.num_prompts * load.group_size * completion}


def strategy(model: Model, load: Load, card: Card, num_cards: int) -> str | None:
    """What shards as little as can be; None where a card has no room even for the whole weights to decode with.

    In bytes a weight, ddp holds weights 4, gradients 4, moments 8, a reference 2, a copy for decoding 2, and on several
    cards buckets 4. fsdp2 holds its share of weights, gradients, moments and reference while it trains, and while it
    decodes its share of all but gradients beside the whole weights 4 and the copy 2.
    """
    room = card.gigabytes * 1e9
    if (24 if num_cards > 1 else 20) * model.total + ACTIVATIONS <= room:
        return "ddp"
    decoding = (6 + 14 / num_cards) * model.total + num_cached(load) * model.kv_bytes + WORKSPACE
    training = 18 / num_cards * model.total + ACTIVATIONS
    return "fsdp2" if num_cards > 1 and max(decoding, training) <= room else None


def num_cached(load: Load) -> int:
    """Tokens whose keys and values are held at the end of a rollout."""
    return load.num_prompts * (load.prompt_tokens + load.group_size * load.completion_tokens)


def seconds(model: Model, load: Load, card: Card, num_cards: int, kind: str) -> dict[str, float]:
    """The lower bound of each phase."""
    work, weights = flops(model, load), 2 * (model.language + model.head)
    rows = load.num_prompts * load.group_size
    cached = load.num_prompts * load.prompt_tokens + rows * load.completion_tokens / 2
    step = weights + cached * model.kv_bytes
    multiplied = rows * 2 * (model.language + model.head)
    share = (num_cards - 1) / num_cards
    rate = card.link if num_cards <= 8 else min(card.link, card.network)
    # fsdp2 gathers for rollout, reference (2 bytes) and both passes of a micro-batch, and scatters its gradients
    sent = (2 * 4 if kind == "ddp" else 4 + 2 + load.micro_batches * 3 * 4) * model.total
    return {
        "prefill": work["prompts"] / card.flops,
        "decode": load.completion_tokens * max(step / card.memory, multiplied / card.flops),
        "reference": work["all"] / card.flops,
        "forward and backward": 3 * work["all"] / card.flops,
        "exchange": sent * share / rate,
        "update": 28 * model.total / (1 if kind == "ddp" else num_cards) / card.memory,
    }


def rows_of(load: Load, card: Card, models: Mapping[str, Model]) -> list[dict[str, Any]]:
    """A row for each model and number of cards."""
    rows = []
    for name, model in models.items():
        for num_cards in NUM_CARDS:
            kind = strategy(model, load, card, num_cards)
            row: dict[str, Any] = {"model": name, "cards": num_cards, "strategy": kind}
            rows.append(row if kind is None else row | seconds(model, load, card, num_cards, kind))
    return rows


def phase_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: seconds of each phase."""
    cells = []
    for row in rows:
        times = [f"{row[phase]:.2f}" if row["strategy"] else "" for phase in PHASES]
        cells.append([row["model"], f"{row['cards']:,}", row["strategy"] or "not here", *times])
    return table(["model", "cards", "strategy", *(f"{phase}, s" for phase in PHASES)], cells)


def longest_table(load: Load) -> str:
    """Markdown: how probable it is that some completion of a step runs into the length limit."""
    shares, numbers = (1e-2, 1e-3, 1e-4, 1e-5), (1, 8, 64, 1024, 10_000)
    rows = load.num_prompts * load.group_size
    cells = [[f"{share:.3%}", *(f"{1 - (1 - share) ** (rows * number):.0%}" for number in numbers)] for share in shares]
    return table(["of completions", *(f"{number:,} devices" for number in numbers)], cells)


def main() -> int:
    """Compute and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="File of the results.")
    args = parser.parse_args()
    load, card, models = Load(), Card(), {size: read(name) for size, name in NAMES.items()}
    rows = rows_of(load, card, models)
    told = {
        "load": asdict(load),
        "card": asdict(card),
        "models": {name: asdict(model) for name, model in models.items()},
    }
    args.results.write_text(json.dumps(told | {"rows": rows}, indent=1) + "\n")
    tables = {"phases": phase_table(rows), "longest": longest_table(load)}
    if args.results == RESULTS:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), "scale", tables))
    print(*tables.values(), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
