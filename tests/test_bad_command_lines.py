"""Wrong options, closed or full streams and Ctrl-C end in one sentence, a defined exit code and no traceback."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from extras import terminal
from extras.chat import parse_arguments

SCRIPTS = ("llava.py", "train.py", "evaluate.py")
USAGES = {
    "nothing to do": ([], "give a question, an --image, or both"),
    "an empty question": ([""], "give a question, an --image, or both"),
    "unknown option": (["--colour", "red", "Hello"], "unrecognized arguments: --colour"),
    "negative temperature": (["--temperature", "-1", "Hello"], "temperature is -1.0; it must be 0"),
    "NaN temperature": (["--temperature", "nan", "Hello"], "temperature is nan; it must be 0"),
    "infinite temperature": (["--temperature", "inf", "Hello"], "temperature is inf; it must be 0"),
    "temperature too small": (["--temperature", "1e-99", "Hello"], "temperature is 1e-99; it must be 0"),
    "temperature not a number": (
        ["--temperature", "hot", "Hello"],
        "argument --temperature: invalid float value: 'hot'",
    ),
    "top-p 0": (["--temperature", "1", "--top-p", "0", "Hello"], "top_p is 0.0; it must be above 0 and at most 1"),
    "top-p above 1": (["--temperature", "1", "--top-p", "2", "Hello"], "top_p is 2.0; it must be above 0"),
    "top-p at temperature 0": (["--top-p", "0.5", "Hello"], "top_k and top_p need a temperature above 0"),
    "top-k 0": (["--temperature", "1", "--top-k", "0", "Hello"], "top_k is 0; it must be 1 or more"),
    "max-new-tokens 0": (["--max-new-tokens", "0", "Hello"], "--max-new-tokens must be 1 or more"),
    "negative max-new-tokens": (["--max-new-tokens", "-5", "Hello"], "--max-new-tokens must be 1 or more"),
    "fractional max-new-tokens": (["--max-new-tokens", "1.5", "Hello"], "invalid int value: '1.5'"),
    "negative seed": (["--seed", "-1", "Hello"], "--seed must be 0 or more"),
    "seed too large": (["--seed", str(2**63), "Hello"], "--seed must be 0 or more, and below 2**63"),
    "unknown device": (["--device", "tpu", "Hello"], "argument --device: invalid choice: 'tpu'"),
    "unknown dtype": (["--dtype", "int4", "Hello"], "argument --dtype: invalid choice: 'int4'"),
    "standard input twice": (["--image", "-", "--image", "-", "Hello"], "standard input (-) can be one image"),
    "standard input for image and chat": (["--image", "-", "--chat"], "standard input (-) can be one image"),
}


@pytest.mark.parametrize("name", USAGES)
def test_invalid_options_end_in_a_sentence_and_exit_code_2(name, capsys):
    arguments, sentence = USAGES[name]
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--model", "anything", *arguments])
    assert stop.value.code == 2
    usage, _, error = capsys.readouterr().err.rpartition("llava.py: error: ")
    assert usage.startswith("usage: llava.py")
    assert sentence in error


SENTENCES = {
    "system error with a file": (
        FileNotFoundError(2, "No such file or directory", "a.jpg"),
        "a.jpg: No such file or directory",
    ),
    "system error without a file": (
        OSError(28, "No space left on device"),
        "reading or writing failed: No space left on device",
    ),
    "error of this project": (ValueError("top_k is 0"), "top_k is 0"),
    "unforeseen error": (KeyError("x"), "KeyError: 'x' (LLAVA_DEBUG=1 shows where)"),
    "unforeseen error without a message": (MemoryError(), "MemoryError:  (LLAVA_DEBUG=1 shows where)"),
    "control characters": (ValueError("a\x1b[31mb\u202ec\nd"), "a\ufffd[31mb\ufffdc\nd"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_each_error_becomes_a_sentence(name):
    error, expected = SENTENCES[name]
    assert terminal.sentence(error) == expected


@pytest.fixture
def start(request, checkpoint):
    """Starts a script from bash, with the test's checkpoint if it is llava.py; bash runs `before` first."""

    def start(script: str, *args, before: str = "", **options) -> subprocess.Popen:
        arguments = ["--model", str(checkpoint), *args] if script == "llava.py" else args
        # A test that runs in the background ignores Ctrl-C; its child must not inherit that.
        return subprocess.Popen(
            [
                "bash",
                "-c",
                f'{before} exec "$@"',
                "-",
                sys.executable,
                str(request.config.rootpath / script),
                *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            **options,
        )

    return start


# Redirection by the shell -> exit code and content of stderr
REDIRECTIONS = {
    "stdout is full": ("exec > /dev/full;", 1, b"llava.py: reading or writing failed: No space left on device\n"),
    "stdout is closed early": (
        "exec > >(:); sleep 0.3;",
        1,
        b"llava.py: standard output was closed before all output was written\n",
    ),
    "stdout is closed": ("exec >&-;", 0, b""),
    "stdin is closed": ("exec <&-;", 0, b""),
    "stderr is closed": ("exec 2>&-;", 0, b""),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize("name", REDIRECTIONS)
def test_a_closed_or_full_stream_ends_without_a_traceback(name, start):
    before, code, expected = REDIRECTIONS[name]
    process = start("llava.py", "--max-new-tokens", "200", "Hello", before=before)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr.replace(b"llava.py: the answer is cut off after 200 tokens\n", b"") in (expected, b"")
    assert bool(stderr) >= bool(code)


@pytest.mark.parametrize("arguments", [["--image", "-", "What?"], ["--chat"]], ids=["image", "chat"])
def test_a_closed_stdin_fails_for_an_image_and_ends_a_chat(arguments, start):
    process = start("llava.py", *arguments, before="exec <&-;")
    _, stderr = process.communicate(timeout=60)
    if "--chat" in arguments:
        assert (process.returncode, stderr) == (0, b"")  # as with Ctrl-D
    else:
        assert process.returncode == 1
        assert stderr == b"llava.py: standard input is closed, so no image can be read from it\n"


def test_a_chat_accepts_bytes_that_are_not_valid_text(start):
    process = start("llava.py", "--chat", "--max-new-tokens", "3", stdin=subprocess.PIPE)
    stdout, stderr = process.communicate(b"\xff\xfe?\nAnd why?\n", timeout=60)
    assert process.returncode == 0
    assert stdout.count(b"\n") >= 2
    assert b"Traceback" not in stderr


@pytest.mark.parametrize("delay", [1.5, 2.5, 4.0])
def test_ctrl_c_at_any_moment_ends_without_a_traceback(delay, start):
    process = start("llava.py", "--max-new-tokens", "100000", "Hello")
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert b"Traceback" not in stderr
    if process.returncode == 1:
        assert b"llava.py: interrupted" in stderr
    else:  # before Python could handle it, or after the answer
        assert process.returncode in (0, -signal.SIGINT, 130)


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_the_imports_ends_in_a_sentence(script, start, monkeypatch, tmp_path):
    """A module that replaces torch waits for the signal."""
    (tmp_path / "torch.py").write_text("print(flush=True); import time; time.sleep(60)")
    (tmp_path / "tqdm.py").write_text((tmp_path / "torch.py").read_text())  # evaluate.py imports it first
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start(script, "Hello")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, b"\n" + script.encode() + b": interrupted\n")


def test_a_command_started_with_ctrl_c_ignored_keeps_ignoring_it(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(signal, "signal", lambda *args: pytest.fail("a handler was installed"))
    terminal.command_line("llava.py", lambda: None)


def test_llava_debug_raises_the_error_with_its_traceback(monkeypatch):
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(SystemExit, match=r"^train.py: KeyError: 'x' \(LLAVA_DEBUG=1 shows where\)$"):
        terminal.command_line("train.py", fail)
    monkeypatch.setenv("LLAVA_DEBUG", "1")
    with pytest.raises(KeyError):
        terminal.command_line("train.py", fail)
