"""`perception-r1 export`: a run's checkpoint as a folder in the hub's layout, for transformers, vLLM or the hub.

Run -> policy with the checkpoint's weights -> adapter merged -> weights, configuration, processor, model card.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import PROCESSOR_NAME, VIDEO_PROCESSOR_NAME
from transformers.utils.hub import cached_file

from perception_r1.commands.card_metadata import Export
from perception_r1.commands.evaluations import evaluations_of
from perception_r1.commands.model_card import CONFIG, model_card
from perception_r1.commands.options import check_unused, known, new_parser, parse, run_command
from perception_r1.commands.runs import Run, checkpoint_path, load_checkpoint, open_run
from perception_r1.engines.weights import save_adapter, share_weights
from perception_r1.errors import UserError
from perception_r1.locks import locked
from perception_r1.policy.families import family_of
from perception_r1.policy.load import model_path
from perception_r1.policy.policy import Policy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types in which weights can be written."""


def main(argv: Sequence[str]) -> int:
    """Export a checkpoint; the result is the exit status."""
    return run_command("export", _export, argv)


def _export(argv: Sequence[str]) -> int:
    parser = new_parser("export", "Write a run's checkpoint as a folder in the hub's layout.")
    parser.add_argument("run", type=Path, help="Folder of the run: logs/TASK/version_N.")
    parser.add_argument("--to", type=Path, required=True, help="Folder to write; it must not exist or be empty.")
    parser.add_argument("--ckpt", default="best", help="best, last, or a file of the run.")
    parser.add_argument("--adapter", action="store_true", help="Write the adapter alone, in the layout of peft.")
    parser.add_argument(
        "--dtype", type=str | None, help=f"Type of the weights written, one of {', '.join(DTYPES)}; else as trained."
    )
    options = parse(parser, argv)
    dtype = None if options.dtype is None else known("--dtype", options.dtype, DTYPES)
    run = open_run(options.run)
    if options.adapter and run.policy.lora is None:
        raise UserError(f"the run {run.folder} trained no adapter: leave out --adapter to export its weights")
    with locked(options.to, "an export"):
        check_unused("--to", options.to)
        step = _write(run, checkpoint_path(run, options.ckpt), options.to, dtype=dtype, is_adapter=options.adapter)
    sys.stderr.write(f"Wrote step {step} of {run.folder} to {options.to}.\n")
    return 0


def _write(run: Run, checkpoint: Path, to: Path, *, dtype: torch.dtype | None, is_adapter: bool) -> int:
    """Write a checkpoint as a folder; returns its step."""
    policy, step = load_checkpoint(run.policy, checkpoint)
    family = policy.family.name
    with _whole_folder(to) as folder:
        if is_adapter:
            save_adapter(policy if dtype is None else policy.to(dtype), folder)
        else:
            save_merged(policy, folder, dtype=dtype)
            _copy_processor_settings(model_path(run.policy.name), folder)
        export = Export(
            run=run,
            checkpoint=checkpoint,
            step=step,
            family=family,
            codec=policy.codec,
            processor=policy.processor,
            is_adapter=is_adapter,
            evaluations=evaluations_of(checkpoint),
        )
        (folder / "README.md").write_text(model_card(export), encoding="utf-8")
        shutil.copyfile(run.folder / "config.yaml", folder / CONFIG)
    return step


def save_merged(policy: Policy, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a policy as a plain model, its adapter merged into the weights; the policy is used up.

    Without `dtype` the weights are written as the model itself was trained.
    """
    dtype, network = dtype or policy.model.dtype, cast(Any, policy.network)
    if network is not policy.model:
        network = network.float().merge_and_unload()  # in float32, so that the sum is rounded once
    family_of(network).save(network.to(dtype), folder)
    policy.processor.save(folder)
    _name_special_tokens(folder / TOKENIZER_CONFIG_FILE)


def _name_special_tokens(file: Path) -> None:
    """Call the list of special tokens as transformers 4 does, which cannot read a tokenizer that has it as 5 does.

    Version 5 reads both; the converter of llama.cpp runs on 4.57.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_processor_settings(name: str, folder: Path) -> None:
    """Keep what the base model's own processor reads besides: its name and lengths, and the settings for videos."""
    for file in (PROCESSOR_NAME, VIDEO_PROCESSOR_NAME):
        try:
            settings = json.loads(Path(cast(str, cached_file(name, file))).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not every family has it
            continue
        if not isinstance(settings, dict):
            continue
        settings.pop("image_processor", None)  # written already, with the bounds of the run
        (folder / file).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside another, which replaces it once all is written; a failure leaves nothing of it."""
    folder = folder.absolute()
    draft = folder.with_name(f".{folder.name}-{os.getpid()}.part")
    try:
        draft.mkdir(parents=True)
        yield draft
        share_weights(draft)
        os.replace(draft, folder)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            why = getattr(error, "strerror", None) or error
            raise UserError(f"--to {folder} cannot be written: {why}") from error
        raise
