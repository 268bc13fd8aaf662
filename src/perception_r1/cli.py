"""The command line: one verb, one file in `commands/`, imported when it is asked for so that each starts quickly."""

import logging
import os
import signal
import sys
import warnings
from _thread import interrupt_main
from collections.abc import Sequence
from importlib import import_module
from threading import Timer
from typing import Any

from perception_r1.processes import end_with_parent

_COMMANDS = ("data", "export", "plan", "predict", "push", "report", "score", "serve")
"""All but the trainer's own verbs, which belong together."""
_TRAINER_VERBS = ("fit", "validate", "test")
_WITHOUT_TRAINER = ("push", "report", "score")
"""Those that need none: it takes a second to import."""
_SIGINT_STATUS, _SIGPIPE_STATUS = 130, 141
_MOMENT = 0.05
"""Seconds after which a Ctrl-C that was lost comes again."""
_SPIN_COUNT = "1000"
"""How often a thread of GNU OpenMP looks whether there is work before it sleeps; libgomp's own value for a process with
more threads than processors. Its default for others keeps a core busy for milliseconds, so that two runs on one machine
wait for each other's idle threads: see benchmarks/two_runs.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _interrupt_again
    if os.environ.get("LOCAL_RANK", "0") != "0":  # it would wait half an hour for the others to come
        end_with_parent(signal.SIGTERM)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)  # read when torch is imported
    if args and not args[0].startswith("-") and args[0] not in (*_TRAINER_VERBS, *_COMMANDS):
        commands = ", ".join((*_TRAINER_VERBS, *_COMMANDS))
        sys.stderr.write(f"perception-r1: error: there is no command {args[0]}; there are {commands}\n")
        return 2
    name, rest = (args[0], args[1:]) if args and args[0] in _COMMANDS else ("training", args)
    try:
        if not args or args[0] not in _WITHOUT_TRAINER:
            _quieten()
        return int(import_module(f"perception_r1.commands.{name}").main(rest))
    except BrokenPipeError:  # who reads the output has seen enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - what is left is flushed at the end
        return _SIGPIPE_STATUS
    except KeyboardInterrupt:  # in a fit the trainer heeds it, and saves
        sys.stderr.write("Stopped by Ctrl-C.\n")
        return _SIGINT_STATUS


def _interrupt_again(unraisable: Any) -> None:
    """Let a Ctrl-C that comes where Python cannot raise it, as in a fork, come once more instead of being lost."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        Timer(_MOMENT, interrupt_main).start()  # at once, it would come in here
    else:
        sys.__unraisablehook__(unraisable)


def _quieten() -> None:
    """Leave the screen to the progress display: no advertisements, no notes about devices that are not in use."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lightning.pytorch  # noqa: F401 - its import sets the level that is set below
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # the reference, rightly
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # the parts are put in their place
    warnings.filterwarnings("ignore", message=r"\s*Unable to serialize instance")  # an error tells why
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # peft still says it so


if __name__ == "__main__":
    sys.exit(main())
