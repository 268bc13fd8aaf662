"""The options `--engine NAME` and `--engine.OPTION value` of commands that need no data set."""

from collections.abc import Sequence

import jsonargparse

from perception_r1.commands.compose import engine_settings
from perception_r1.commands.options import first_options, parse
from perception_r1.engines import GenerationEngine
from perception_r1.errors import UserError

HELP = "What writes completions: vllm or server, see configs/engine, with their options as --engine.OPTION."
_OPTION = "--engine"


def read_engine(argv: Sequence[str]) -> tuple[GenerationEngine | None, list[str]]:
    """The engine that a command line names, None for our own; and the other words.

    Raises:
        UserError: There is no such engine, or it refuses its options.
    """
    names, rest = first_options(argv, _OPTION.removeprefix("--"))
    own, others, is_value = list[str](), list[str](), False
    for word in rest:
        is_option = word.startswith(f"{_OPTION}.")
        (own if is_option or is_value else others).append(word)
        is_value = is_option and "=" not in word
    if not names:
        if own:
            raise UserError(f"{own[0]} goes with {_OPTION}, one of vllm and server")
        return None, others
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(GenerationEngine, "engine", required=True)
    parser.set_defaults({"engine": engine_settings(names["engine"][-1])})
    engine: GenerationEngine = parser.instantiate(parse(parser, own)).engine
    return engine, others
