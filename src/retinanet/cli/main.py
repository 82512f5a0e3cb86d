"""`retinanet COMMAND`: find the command, run it, turn errors into one message and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Protocol, cast

import tyro

from retinanet.cli.arguments import command_of, in_order
from retinanet.cli.bench import Bench
from retinanet.cli.data import DATA_SETS, Data
from retinanet.cli.demo import Demo
from retinanet.cli.doctor import Doctor
from retinanet.cli.evaluate import Evaluate
from retinanet.cli.paper import Paper
from retinanet.cli.predict import Predict
from retinanet.cli.train import Train, options_of_config
from retinanet.errors import RetinaNetError, Stopped
from retinanet.version import __version__

DESCRIPTION = (
    f"RetinaNet and the focal loss, {__version__}: train, evaluate and run a detector of your own. "
    "--version prints the version; --debug with any command shows the traceback of an error."
)
COMMANDS: dict[str, type] = {
    "demo": Demo,
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "data": Data,
    "paper": Paper,
    "bench": Bench,
    "doctor": Doctor,
}
DONE, WRONG, INTERRUPTED = 0, 2, 130


class Command(Protocol):
    """What every command is: options, and what to do with them; the result is the exit code."""

    def run(self) -> int: ...


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 done in part, 2 the request was wrong, 130 or 143 stopped by a signal."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    if given == ["--version"]:
        print(f"retinanet {__version__}")
        sys.exit(DONE)
    try:
        code = parse([argument for argument in given if argument != "--debug"]).run()
    except RetinaNetError as error:
        if debug:
            raise
        print(f"retinanet: {_who()}{error}", file=sys.stderr)
        code = WRONG
    except Stopped as stop:
        print(f"retinanet: {_who()}{stop}", file=sys.stderr)
        code = stop.exit_code
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    except OSError as error:  # a full disk, a folder without permission
        if debug:
            raise
        what = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        print(f"retinanet: {what}; free space or choose another --output", file=sys.stderr)
        code = WRONG
    except KeyboardInterrupt:
        if debug:
            raise
        print("retinanet: stopped", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def _who() -> str:
    """Return which of several processes of `torchrun` speaks; the first needs no name."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank}: "


def parse(given: list[str]) -> Command:
    """Return the command that the arguments ask for; wrong ones are a `ConfigError`. Help is printed, and exits."""
    given, train = options_of_config(given) if given[:1] == ["train"] else (given, None)
    if not given or {"-h", "--help"} & set(given):
        given = given or ["--help"]
    else:
        given = _checked(given, train)
    of_train = tyro.conf.subcommand("train", default=train) if train else tyro.conf.subcommand("train")
    commands = (
        Annotated[Demo, tyro.conf.subcommand("demo")]
        | Annotated[Train, of_train]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[Data, tyro.conf.subcommand("data")]
        | Annotated[Paper, tyro.conf.subcommand("paper")]
        | Annotated[Bench, tyro.conf.subcommand("bench")]
        | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    )
    style = (
        tyro.conf.OmitArgPrefixes,
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.DisallowNone,
    )
    return cast(
        Command, tyro.cli(commands, args=given, prog="retinanet", description=DESCRIPTION, config=style)
    )


def _checked(given: list[str], train: Train | None) -> list[str]:
    command = command_of(COMMANDS, given)
    if command == "data":
        made = command_of(DATA_SETS, given[1:], command)
        return [command, made, *in_order(f"{command} {made}", DATA_SETS[made], given[2:])]
    known = [name for name, value in vars(train).items() if value is not tyro.MISSING] if train else []
    return [command, *in_order(command, COMMANDS[command], given[1:], known)]
