"""The last section of a report: everything that it takes to do the runs again."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from perception_r1.callbacks.files import EVALUATION_CARD, RUN_CARD
from perception_r1.reporting.folder import Record
from perception_r1.reporting.html import Markup, element, join
from perception_r1.reporting.parts import chip, section
from perception_r1.reporting.values import is_number, mapping


def reproduction_section(records: Sequence[Record], names: Sequence[str]) -> Markup:
    """Everything that it takes to do the runs again."""
    cards = [_again(index, record, name) for index, (record, name) in enumerate(zip(records, names, strict=True))]
    return section("again", "To do it again", *cards)


def _again(index: int, record: Record, name: str) -> Markup:
    card, command = record.card, f"command-{index}"
    parts: list[str] = [element("h3", chip(index, name))]
    if told := _command(card.get("command")):
        parts.append(_copied(element("pre", told, id=command), command, "Copy the command"))
    entries = list(_entries(record))
    if entries:
        rows = [join([element("dt", label), element("dd", value)]) for label, value in entries]
        parts.append(element("dl", *rows))
    if card:
        everything = f"card-{index}"
        text = element("pre", json.dumps(card, indent=2, ensure_ascii=False, default=str), id=everything)
        whole = _copied(text, everything, "Copy it all")
        file = EVALUATION_CARD if record.is_evaluation else RUN_CARD
        parts.append(element("details", element("summary", f"All of {file}"), whole))
    return element("article", *parts, class_="again")


def _command(words: Any) -> str:
    """A command line to be entered again; empty where there is none."""
    return shlex.join(["perception-r1", *map(str, words[1:])]) if isinstance(words, list) and words else ""


def _copied(content: Markup, identifier: str, label: str) -> Markup:
    return element("div", content, element("button", label, type="button", data_copies=identifier), class_="copied")


def _entries(record: Record) -> Iterator[tuple[str, str]]:
    """What decides the numbers of a run, by name."""
    card = record.card
    git = mapping(card.get("git"))
    if git:
        yield "commit", f"{git.get('commit')}{', with changes' if git.get('is_dirty') else ''}"
    versions = mapping(card.get("versions"))
    if versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    hardware = mapping(card.get("hardware"))
    if hardware:
        yield "machine", _machine(hardware)
    trainer = mapping(card.get("trainer"))
    if trainer:
        yield "trainer", ", ".join(f"{key} {value}" for key, value in trainer.items())
    seeds = {key: value for key, value in mapping(card.get("seeds")).items() if value is not None}
    if seeds:
        yield "seeds", ", ".join(f"{key} {value}" for key, value in seeds.items())
    data = mapping(card.get("data"))
    if data:
        splits = {name: mapping(split).get("num_samples") for name, split in mapping(data.get("splits")).items()}
        told = ", ".join(f"{name} {number:,}" for name, number in splits.items() if is_number(number))
        yield "data", f"{told}; fingerprint {data.get('fingerprint')}".removeprefix("; ")
    policy = mapping(card.get("policy"))
    if is_number(policy.get("num_parameters")) and is_number(policy.get("num_trainable")):
        yield "weights", f"{policy['num_trainable']:,} of {policy['num_parameters']:,} trained"
    if card.get("resumed_from"):
        yield "goes on from", str(card["resumed_from"])
    earlier = card.get("earlier_commands")
    for number, words in enumerate(earlier if isinstance(earlier, list) else ()):
        yield "went on with" if number else "began with", _command(words)
    if record.is_evaluation:
        yield "checkpoint", str(record.config.get("ckpt_path") or "none, the model as it is")
    if "seed_everything" in record.config and not card:
        yield "seed", str(record.config["seed_everything"])
    yield "folder", str(record.folder)


def _machine(hardware: Mapping[str, Any]) -> str:
    parts = [str(hardware.get("cpu")), f"{hardware.get('cores')} cores", f"{hardware.get('memory_gib')} GiB"]
    gpus = hardware.get("gpus")
    parts += [str(mapping(gpu).get("name")) for gpu in gpus] if isinstance(gpus, list) else []
    return ", ".join(parts)
