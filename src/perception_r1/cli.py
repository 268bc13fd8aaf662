"""The command line: one verb, one file in `commands/`, imported when it is asked for so that each starts quickly."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from perception_r1.errors import UserError

_SIGTERM_STATUS = 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["score"]:
        from perception_r1.commands import score  # needs no trainer: starts in a fraction of the time

        return score.main(args[1:])
    _quieten()
    if args[:1] == ["data"]:
        from perception_r1.commands import data

        return guarded(lambda: data.main(args[1:]))
    if args[:1] == ["export"]:
        from perception_r1.commands import export

        return export.main(args[1:])
    if args[:1] == ["predict"]:
        from perception_r1.commands import predict

        return predict.main(args[1:])
    from perception_r1.commands.training import PerceptionCLI

    return guarded(lambda: PerceptionCLI.of(None if argv is None else args))


def guarded(run: Callable[[], object]) -> int:
    """Run something; an error that speaks to the user ends in its sentence, any other in a traceback.

    Returns:
        The exit status: that of `run` if it returns one, 0 if not, 2 after a user's error.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        status = run()
    except SIGTERMException:
        sys.stderr.write("Stopped by SIGTERM; --ckpt_path last goes on from the last checkpoint.\n")
        return _SIGTERM_STATUS
    except Exception as error:
        known = _known_error(error)
        if known is None or os.environ.get("PERCEPTION_R1_TRACEBACK"):
            raise
        sys.stderr.write(f"perception-r1: error: {known}\n")
        return 2
    return status if isinstance(status, int) else 0


def _known_error(error: BaseException | None) -> BaseException | None:
    """The error that speaks to the user, which the parser may have wrapped in others of its own."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    while error is not None and not isinstance(error, UserError | MisconfigurationException):
        error = error.__cause__ or error.__context__
    return error


def _quieten() -> None:
    """Leave the screen to the progress display: no advertisements, no notes about workers or missing torchvision."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # the reference, rightly
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # of verbs that are ours
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


if __name__ == "__main__":
    sys.exit(main())
