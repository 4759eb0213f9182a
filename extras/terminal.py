"""What the commands have in common: one sentence for every error, exit codes, Ctrl-C, closed pipes."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable


def handle_early_interrupt(program: str) -> None:
    """Makes Ctrl-C during the imports, which take seconds, end in a sentence instead of a traceback."""
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, lambda *_: (os.write(2, f"\n{program}: interrupted\n".encode()), os._exit(1)))


def sentence(error: BaseException) -> str:
    """What went wrong, for a person. For an unforeseen error it names the type and says how to see the traceback."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'reading or writing failed'}: {error.strerror}"
    elif isinstance(error, OSError | ValueError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (LLAVA_DEBUG=1 shows where)"
    # Names in a stranger's file may contain characters that control a terminal.
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def command_line(program: str, run: Callable[[], object], interrupted: str = "interrupted") -> None:
    """Runs a command that was started from a terminal: exit code 0, or 1 and one sentence on stderr."""
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for stream in (sys.stdin, sys.stdout):  # replace characters that the terminal's encoding cannot represent
            with contextlib.suppress(AttributeError):  # None, if it was closed from the start
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        run()
        return
    except BrokenPipeError:
        message = "standard output was closed before all output was written"
    except KeyboardInterrupt:
        program, message = f"\n{program}", interrupted
    except Exception as error:
        if os.environ.get("LLAVA_DEBUG"):
            raise
        message = sentence(error)
    try:
        print(end="", flush=True)
    except OSError:  # a closed pipe, a full disk: Python would complain about it again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(f"{program}: {message}")
