"""The scripts of the page about several devices: their syntax, and that each command in them can be parsed."""

import shlex
import subprocess

import pytest
from torch.distributed.run import get_args_parser

from perception_r1.cli import main
from tests.readme import blocks

SCRIPTS = blocks("docs/scale.md", "sh")


def command(script: str) -> list[str]:
    """The words of the last command, without what the shell adds."""
    lines = script.replace("\\\n", " ").splitlines()
    return [word for word in shlex.split(lines[-1]) if word != "$@"]


@pytest.mark.parametrize("script", SCRIPTS, ids=["torchrun", "slurm"])
def test_a_script_is_right_and_its_command_can_be_parsed(script, capsys, monkeypatch, tmp_path):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    words = command(script)
    start = words.index("fit")
    assert main([*words[start:], "--print_config"]) == 0
    assert "strategy: fsdp2" in capsys.readouterr().out


def test_the_launchers_start_as_many_processes_as_the_trainer_expects():
    torchrun, slurm = SCRIPTS
    options = get_args_parser().parse_args(command(torchrun)[1:])
    assert (options.module, options.training_script) == (True, "perception_r1")
    expected = {"--trainer.num_nodes": "2", "--trainer.devices": "8"}
    for words in (options.training_script_args, command(slurm)):
        assert {name: words[words.index(name) + 1] for name in expected} == expected
    assert (options.nnodes, options.nproc_per_node) == ("2", "8")
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=8\n" in slurm
