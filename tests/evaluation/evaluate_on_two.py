"""Evaluates on two processes, in one folder after the other; started by `test_evaluation.py`."""

import json
import os
import sys
from pathlib import Path

import torch

from perception_r1.cli import main


def run(file: str) -> None:
    torch.set_num_threads(1)
    for place, words in json.loads(Path(file).read_text()):
        os.chdir(place)
        assert main([*words, "--trainer.devices=2", "--trainer.strategy=ddp"]) == 0


if __name__ == "__main__":
    run(*sys.argv[1:])
