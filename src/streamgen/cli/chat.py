"""`streamgen chat`: a conversation. Every turn sends the whole chat; the prefix cache makes that cheap."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from streamgen.cli import exit_codes
from streamgen.cli.options import (
    SAMPLING_FIELDS,
    add_model_arguments,
    add_sampling_arguments,
    chosen,
    open_engine,
)
from streamgen.cli.output import complain, note
from streamgen.errors import AdmissionError, EngineClosed, GenerationError, RequestError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from streamgen import sync

SUMMARY = "talk with a model"
DESCRIPTION = """\
Talk with a model. Ctrl-C cancels the answer under way, ctrl-D leaves. With piped input each line is a turn.

  /reset         forget the conversation
  /system TEXT   set the system message and start over; without TEXT: remove it
  /quit          leave
"""
PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, a system message, sampling."""
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    add_sampling_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Open the model and take turns until the input ends."""
    with open_engine(arguments) as engine:
        engine.render([{"role": "user", "content": "."}])  # a model without a template is refused before the first turn
        if sys.stdin.isatty():
            _enable_line_editing()
            note("/reset, /system TEXT, /quit; ctrl-C cancels an answer, ctrl-D leaves.")
        conversation = Conversation(engine, arguments.system, chosen(arguments, SAMPLING_FIELDS))
        for line in _lines():
            if not conversation.take(line):
                break
    return exit_codes.OK


class Conversation:
    """The messages so far, and what one line of input does to them."""

    def __init__(self, engine: sync.Engine, system: str | None, sampling: dict[str, Any]) -> None:
        self._engine = engine
        self._system = system
        self._sampling = sampling
        self._messages: list[dict[str, Any]] = []
        self.reset()

    @property
    def messages(self) -> tuple[dict[str, Any], ...]:
        """The conversation as chat messages, the system message first."""
        return tuple(self._messages)

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def take(self, line: str) -> bool:
        """Run a command or a turn; False ends the conversation."""
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                return True
            case "/quit":
                return False
            case "/reset":
                self.reset()
            case "/system":
                self._system = rest.strip() or None
                self.reset()
            case _ if command.startswith("/"):
                complain(f"{command}: expected /reset, /system or /quit")
            case _:
                self._turn(line)
        return True

    def _turn(self, text: str) -> None:
        """Ask, and print the answer as it comes. A cancelled answer stays in the chat as far as it went."""
        asked = [*self._messages, {"role": "user", "content": text}]
        stream = self._engine.stream(asked, **self._sampling)
        try:
            with stream:
                for piece in stream.texts():
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            note("\n(cancelled)")
        except EngineClosed:
            raise
        except (RequestError, AdmissionError, GenerationError) as error:
            complain(f"{error} (this turn is forgotten)")
            return
        else:
            print(flush=True)
        self._messages = [*asked, stream.result.message]


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401  importing it gives input() its history and editing
    except ImportError:  # not on every platform; the chat works without
        return


def _lines() -> Iterator[str]:
    """Lines of the user until the end of the input; ctrl-C at the prompt drops the line."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
