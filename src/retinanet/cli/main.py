"""`retinanet COMMAND`: find the command, run it, turn errors into one message and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Protocol, cast

import tyro

from retinanet.cli.data import Data
from retinanet.cli.demo import Demo
from retinanet.cli.doctor import Doctor
from retinanet.cli.evaluate import Evaluate
from retinanet.cli.predict import Predict
from retinanet.cli.train import Train, options_of_config
from retinanet.errors import RetinaNetError, Stopped
from retinanet.version import __version__

DESCRIPTION = (
    f"RetinaNet and the focal loss, {__version__}: train, evaluate and run a detector of your own. "
    "--debug with any command shows the traceback of an error."
)
DONE, WRONG, INTERRUPTED = 0, 2, 130


class Command(Protocol):
    """What every command is: options, and what to do with them; the result is the exit code."""

    def run(self) -> int: ...


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 done in part, 2 the request was wrong, 130 or 143 stopped by a signal."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        code = parse([argument for argument in given if argument != "--debug"]).run()
    except RetinaNetError as error:
        if debug:
            raise
        print(f"retinanet: {error}", file=sys.stderr)
        code = error.exit_code if isinstance(error, Stopped) else WRONG
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    except OSError as error:  # a full disk, a folder without permission: the system's words name the file
        if debug:
            raise
        print(f"retinanet: {error}; free space or choose another --output", file=sys.stderr)
        code = WRONG
    except KeyboardInterrupt:
        if debug:
            raise
        print("retinanet: stopped", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def parse(given: list[str]) -> Command:
    """Return the command that the arguments ask for; wrong ones exit with 2 and name the nearest right one."""
    given, train = options_of_config(given) if given[:1] == ["train"] else (given, None)
    of_train = tyro.conf.subcommand("train", default=train) if train else tyro.conf.subcommand("train")
    commands = (
        Annotated[Demo, tyro.conf.subcommand("demo")]
        | Annotated[Train, of_train]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[Data, tyro.conf.subcommand("data")]
        | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    )
    given = given or ["--help"]
    style = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
    return cast(
        Command, tyro.cli(commands, args=given, prog="retinanet", description=DESCRIPTION, config=style)
    )
