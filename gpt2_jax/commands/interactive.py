"""A conversation at the terminal: lines that are typed, and the model's turns as they grow.

Knows a `Conversation`, nothing of arguments or of how models are loaded.
"""

import contextlib
import sys
import time
from collections.abc import Sequence

from gpt2_jax.commands.common import Report, unwinding
from gpt2_jax.files import BYTE_ORDER_MARK
from gpt2_jax.generation.conversation import Conversation

GREETING = (
    "Begin a text, and the model goes on. Enter alone lets it write more; /new begins another text,"
    " Ctrl-C ends a turn, Ctrl-D ends all."
)


def converse(
    conversation: Conversation, prompts: Sequence[str], *, max_new_tokens: int, report: Report
) -> None:
    """Continues the prompts, then each line that is typed, until none comes."""
    given = list(prompts)
    if sys.stdin.isatty():
        report(GREETING)
        # Arrow keys and history, where Python was built with them.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while True:
        if given:
            text = given.pop(0)
            print(text, end="", flush=True)
        else:
            try:
                text = read_line()
            except EOFError:
                return
        if text == "/new":
            conversation.reset()
        # An empty line lets the model go on, if there is something to go on from.
        elif text or conversation.ids:
            answer(conversation, text, max_new_tokens=max_new_tokens, report=report)


def read_line() -> str:
    """Returns a line that is typed, or piped in.

    Raises:
      EOFError: there is none.
    """
    # Interrupted, `input` must have its chance to restore the terminal.
    with unwinding():
        line = input("> " if sys.stdin.isatty() else "")
    return line.removeprefix(BYTE_ORDER_MARK)  # before the first, where a file is piped in


def answer(conversation: Conversation, text: str, *, max_new_tokens: int, report: Report) -> None:
    """Prints the model's turn as it grows; Ctrl-C ends the turn."""
    begun = time.perf_counter()
    n_tokens = 0
    stopped = False
    # What is typed is a line of its own. Enter alone goes on, in the middle of a word if need be.
    addition = "\n" + text if conversation.ids and text else text
    # The context keeps what has been written when a turn is broken off.
    try:
        with unwinding():
            for row in conversation.reply(addition, max_new_tokens=max_new_tokens):
                print(row.new, end="", flush=True)
                n_tokens = len(row.ids)
                stopped = row.finish_reason == "stop"
    except KeyboardInterrupt:
        pass
    # Behind a turn that was broken off as well: what follows begins a line.
    print(flush=True)
    rate = n_tokens / (time.perf_counter() - begun)
    n_known = len(conversation.ids)
    # Without stop texts, only the model's own end of text stops a turn.
    is_end = stopped and not conversation.stop
    what_next = "; the text ends here: add a line, or /new" if is_end else ""
    report(f"{n_tokens} tokens, {rate:.1f} tokens/s; {n_known} in the context{what_next}")
