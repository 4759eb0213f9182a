"""Whatever is typed, closed, full or interrupted: one sentence on stderr, a code that means something, no traceback."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llava
from check import sentence
from llava import parse_arguments

SCRIPTS = ("llava.py", "train.py", "evaluate.py")
USAGES = {
    "nothing to do": ([], "give a question, an --image, or both"),
    "an empty question": ([""], "give a question, an --image, or both"),
    "unknown option": (["--colour", "red", "Hello"], "unrecognized arguments: --colour"),
    "temperature negative": (["--temperature", "-1", "Hello"], "temperature is -1.0; it must be 0"),
    "temperature NaN": (["--temperature", "nan", "Hello"], "temperature is nan; it must be 0"),
    "temperature infinite": (["--temperature", "inf", "Hello"], "temperature is inf; it must be 0"),
    "temperature too small": (["--temperature", "1e-99", "Hello"], "temperature is 1e-99; it must be 0"),
    "temperature a word": (["--temperature", "hot", "Hello"], "argument --temperature: invalid float value: 'hot'"),
    "top-p 0": (["--temperature", "1", "--top-p", "0", "Hello"], "top_p is 0.0; it must be above 0 and at most 1"),
    "top-p above 1": (["--temperature", "1", "--top-p", "2", "Hello"], "top_p is 2.0; it must be above 0"),
    "top-p without temperature": (["--top-p", "0.5", "Hello"], "top_k and top_p need a temperature above 0"),
    "top-k 0": (["--temperature", "1", "--top-k", "0", "Hello"], "top_k is 0; it must be 1 or more"),
    "no tokens": (["--max-new-tokens", "0", "Hello"], "--max-new-tokens must be 1 or more"),
    "fewer than no tokens": (["--max-new-tokens", "-5", "Hello"], "--max-new-tokens must be 1 or more"),
    "a fraction of tokens": (["--max-new-tokens", "1.5", "Hello"], "invalid int value: '1.5'"),
    "negative seed": (["--seed", "-1", "Hello"], "--seed must be 0 or more"),
    "seed too large": (["--seed", str(2**63), "Hello"], "--seed must be 0 or more, and below 2**63"),
    "unknown device": (["--device", "tpu", "Hello"], "argument --device: invalid choice: 'tpu'"),
    "unknown dtype": (["--dtype", "int4", "Hello"], "argument --dtype: invalid choice: 'int4'"),
    "standard input twice": (["--image", "-", "--image", "-", "Hello"], "standard input (-) can be one image"),
    "standard input for image and chat": (["--image", "-", "--chat"], "standard input (-) can be one image"),
}


@pytest.mark.parametrize("name", USAGES)
def test_a_wrong_usage_is_a_sentence_and_exit_code_2(name, capsys):
    arguments, said = USAGES[name]
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--model", "anything", *arguments])
    assert stop.value.code == 2
    usage, _, error = capsys.readouterr().err.rpartition("llava.py: error: ")
    assert usage.startswith("usage: llava.py")
    assert said in error


SENTENCES = {
    "with a file": (FileNotFoundError(2, "No such file or directory", "a.jpg"), "a.jpg: No such file or directory"),
    "without one": (OSError(28, "No space left on device"), "reading or writing failed: No space left on device"),
    "ours": (ValueError("the text has 1 mark"), "the text has 1 mark"),
    "unforeseen": (KeyError("x"), "KeyError: 'x' (LLAVA_DEBUG=1 shows where)"),
    "one without words": (MemoryError(), "MemoryError:  (LLAVA_DEBUG=1 shows where)"),
    "of a terminal's commands": (ValueError("a\x1b[31mb\u202ec\nd"), "a\ufffd[31mb\ufffdc\nd"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_errors_become_sentences(name):
    error, expected = SENTENCES[name]
    assert sentence(error) == expected


@pytest.fixture
def start(request, checkpoint):
    """Starts a script of this project, with the test's checkpoint if it is llava.py, as a shell in front does."""

    def start(script: str, *args, before: str = "", **options) -> subprocess.Popen:
        arguments = ["--model", str(checkpoint), *args] if script == "llava.py" else args
        # The test may run in the background, where Ctrl-C is ignored; its child must not inherit that.
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


# What the shell does before -> exit code, what stderr says
SURROUNDINGS = {
    "stdout is full": ("exec > /dev/full;", 1, b"llava.py: reading or writing failed: No space left on device\n"),
    "stdout is closed early": (
        "exec > >(:); sleep 0.3;",
        1,
        b"llava.py: standard output was closed before all was written\n",
    ),
    "stdout is closed": ("exec >&-;", 0, b""),
    "stdin is closed": ("exec <&-;", 0, b""),
    "stderr is closed": ("exec 2>&-;", 0, b""),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_streams_that_are_closed_or_full(name, start):
    before, code, said = SURROUNDINGS[name]
    process = start("llava.py", "--max-new-tokens", "200", "Hello", before=before)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr.replace(b"llava.py: the answer is cut off after 200 tokens\n", b"") in (said, b"")
    assert bool(stderr) >= bool(code)


@pytest.mark.parametrize("arguments", [["--image", "-", "What?"], ["--chat"]], ids=["image", "chat"])
def test_a_closed_stdin_that_is_needed(arguments, start):
    process = start("llava.py", *arguments, before="exec <&-;")
    _, stderr = process.communicate(timeout=60)
    if "--chat" in arguments:
        assert (process.returncode, stderr) == (0, b"")  # as at Ctrl-D
    else:
        assert process.returncode == 1
        assert stderr == b"llava.py: standard input, where an image was to come from, is closed\n"


def test_bytes_that_are_no_text_can_be_typed_in_a_chat(start):
    process = start("llava.py", "--chat", "--max-new-tokens", "3", stdin=subprocess.PIPE)
    stdout, stderr = process.communicate(b"\xff\xfe?\nAnd why?\n", timeout=60)
    assert process.returncode == 0
    assert stdout.count(b"\n") >= 2
    assert b"Traceback" not in stderr


@pytest.mark.parametrize("delay", [1.5, 2.5, 4.0])
def test_ctrl_c_at_any_moment_ends_it_without_a_traceback(delay, start):
    process = start("llava.py", "--max-new-tokens", "100000", "Hello")
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert b"Traceback" not in stderr
    if process.returncode == 1:
        assert b"llava.py: interrupted" in stderr
    else:  # before Python itself was there, or after the answer
        assert process.returncode in (0, -signal.SIGINT, 130)


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_the_libraries_load_is_a_sentence(script, start, monkeypatch, tmp_path):
    """A module in the place of torch waits for the signal."""
    (tmp_path / "torch.py").write_text("print(flush=True); import time; time.sleep(60)")
    (tmp_path / "tqdm.py").write_text((tmp_path / "torch.py").read_text())  # what evaluate.py imports first
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start(script, "Hello")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, b"\n" + script.encode() + b": interrupted\n")


def test_a_command_that_is_told_to_ignore_ctrl_c_ignores_it(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(signal, "signal", lambda *args: pytest.fail("took Ctrl-C over"))
    llava.command_line("llava.py", lambda: None)


def test_debugging_shows_where_it_failed(monkeypatch):
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(SystemExit, match=r"^train.py: KeyError: 'x' \(LLAVA_DEBUG=1 shows where\)$"):
        llava.command_line("train.py", fail)
    monkeypatch.setenv("LLAVA_DEBUG", "1")
    with pytest.raises(KeyError):
        llava.command_line("train.py", fail)
