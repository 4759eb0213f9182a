"""The command line, end to end: only the answer on stdout, everything else on stderr, and defined exit codes."""

import io
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import transformers
from conftest import encoded, random_image
from PIL import Image
from reference_tokenizer import reference_tokenizer
from transformers.image_utils import load_image as transformers_load_image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import llama
import llava
from tokenizer import VICUNA_SYSTEM


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    """A JPEG with an EXIF rotation, as phones write them."""
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    path.write_bytes(encoded(random_image(np.random.default_rng(0), (90, 60)), "JPEG", exif=exif))
    return path


@pytest.fixture
def run(request, checkpoint):
    """Runs llava.py in a process of its own, with these arguments and the test's checkpoint."""

    def run(*args, stdin: bytes = b"", **options) -> subprocess.CompletedProcess:
        command = [sys.executable, request.config.rootpath / "llava.py", "--model", checkpoint, *args]
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        return subprocess.run(command, input=stdin, capture_output=True, timeout=120, env=environment, **options)

    return run


@pytest.fixture
def call(checkpoint, monkeypatch, capfdbinary):
    """Runs llava.py within this process, which is faster."""

    def call(*args) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["llava.py", "--model", str(checkpoint), *map(str, args)])
        try:
            llava.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # Python prints it and exits with 1
                print(code, file=sys.stderr)
                code = 1
        return subprocess.CompletedProcess(args, code, *capfdbinary.readouterr())

    return call


def their_answer(checkpoint, paths, text: str, do_pad: bool = False, **options) -> str:
    """The answer of transformers to a raw prompt."""
    processor = transformers.LlavaProcessor(
        LlavaImageProcessorPil.from_pretrained(checkpoint, do_pad=do_pad),
        reference_tokenizer(checkpoint / "tokenizer.model", {"<image>": 420, "<pad>": 421}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    model = transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint)
    images = [transformers_load_image(str(path)) for path in paths]
    inputs = processor(images=images or None, text=text, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, **options)
    return processor.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_the_answer_matches_transformers(run, checkpoint, photo):
    result = run("--image", photo, "--max-new-tokens", "24", "What is shown here?")
    expected = their_answer(checkpoint, [photo], "USER: <image>\nWhat is shown here? ASSISTANT:", max_new_tokens=24)
    assert result.stdout.decode() == expected + "\n"
    assert result.stderr == b"llava.py: the answer is cut off after 24 tokens\n"
    assert result.returncode == 0


def test_several_images_pad_mode_and_short_match_transformers(call, checkpoint, photo):
    options = ["--image", photo, "--image", photo, "--image-mode", "pad", "--short", "--max-new-tokens", "24"]
    prompt = "USER: <image>\n<image>\nWhat? \nAnswer the question using a single word or phrase. ASSISTANT:"
    expected = their_answer(checkpoint, [photo, photo], prompt, do_pad=True, max_new_tokens=24)
    assert call(*options, "What? ").stdout.decode() == expected + "\n"


def test_an_image_can_be_read_from_standard_input(run, photo):
    piped = run("--image", "-", "--max-new-tokens", "8", stdin=photo.read_bytes())
    assert piped.returncode == 0
    assert piped.stdout == run("--image", photo, "--max-new-tokens", "8", "What is shown in this image?").stdout


def test_a_question_without_an_image_is_answered(call, checkpoint):
    expected = their_answer(checkpoint, [], "USER: Hello ASSISTANT:", max_new_tokens=8)
    assert call("--max-new-tokens", "8", "Hello").stdout.decode() == expected + "\n"


def type_in(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.mark.parametrize("options", [[], ["--system"]])
def test_each_answer_of_a_chat_matches_transformers_on_the_whole_conversation(
    options, call, checkpoint, photo, monkeypatch
):
    type_in(monkeypatch, "What?", "", "And why?")
    answers = call("--chat", *options, "--image", photo, "--max-new-tokens", "8").stdout.decode()
    conversation = f"{VICUNA_SYSTEM} USER: <image>\nWhat? ASSISTANT:" if options else "USER: <image>\nWhat? ASSISTANT:"
    first = their_answer(checkpoint, [photo], conversation, max_new_tokens=8)
    conversation += f" {first.removeprefix(' ')}</s>USER: And why? ASSISTANT:"
    second = their_answer(checkpoint, [photo], conversation, max_new_tokens=8)
    assert answers == f"{first}\n{second}\n"


@pytest.mark.parametrize("at", [0, 1, 5])
def test_the_generated_part_of_an_interrupted_answer_stays_in_the_conversation(
    at, call, checkpoint, photo, monkeypatch
):
    interrupt_forward(monkeypatch, at)
    type_in(monkeypatch, "What?", "And why?")
    answers = call("--chat", "--image", photo, "--max-new-tokens", "8").stdout.decode()
    conversation = "USER: <image>\n"
    first = ""
    if at > 0:  # otherwise there was no answer yet, and the first question is dropped
        first = their_answer(checkpoint, [photo], "USER: <image>\nWhat? ASSISTANT:", max_new_tokens=at)
        conversation += f"What? ASSISTANT: {first.removeprefix(' ')}</s>USER: "
    second = their_answer(checkpoint, [photo], conversation + "And why? ASSISTANT:", max_new_tokens=8)
    assert answers.endswith(f"\n{second}\n")


def interrupt_forward(monkeypatch, at: int) -> None:
    """Raises a KeyboardInterrupt, as Ctrl-C does, in forward pass number `at` of the model, counted from 0."""
    forward, calls = llama.LlamaModel.forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(llama.LlamaModel, "forward", interrupted)


def test_a_seed_makes_sampling_reproducible(call):
    options = ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--max-new-tokens", "20", "Hello"]
    first, again, other = (call("--seed", seed, *options).stdout for seed in ("1", "1", "2"))
    assert first == again != other


def test_stats_go_to_stderr(call):
    result = call("--stats", "--max-new-tokens", "8", "Hello")
    assert b"tokens/s" in result.stderr
    assert b"peak memory" in result.stderr
    assert result.stdout == call("--max-new-tokens", "8", "Hello").stdout


FAILURES = {
    "missing image": (["--image", "gone.jpg", "What?"], "gone.jpg: No such file or directory"),
    "not an image": (["--image", __file__, "What?"], "is not an image that Pillow can read"),
    "image token without an image": (
        ["<image> What?"],
        "the numbers of <image> tokens in the text and of images differ: 1 and 0",
    ),
    "prompt too long": (["word " * 3000], "tokens, but at most 1023 fit"),
    "unavailable device": (["--device", "mps", "Hello"], "there is no mps device"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_ends_in_one_sentence_and_exit_code_1(name, call):
    args, sentence = FAILURES[name]
    result = call(*args)
    assert result.returncode == 1
    assert result.stdout == b""
    assert sentence in result.stderr.decode()
    assert result.stderr.count(b"\n") == 1


def test_llava_debug_raises_the_error_with_its_traceback(call, monkeypatch):
    monkeypatch.setenv("LLAVA_DEBUG", "1")
    with pytest.raises(ValueError, match="the numbers of <image> tokens in the text and of images differ"):
        call("<image> What?")


def test_a_pipe_closed_by_its_reader_ends_without_a_traceback(request, checkpoint):
    command = f"{sys.executable} {request.config.rootpath / 'llava.py'} --model {checkpoint} --max-new-tokens 900 Hello"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | head -c 1"], capture_output=True, timeout=120)
    assert b"Traceback" not in result.stderr
    assert result.returncode in (0, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a Unix terminal")
def test_ctrl_c_stops_an_answer_and_ctrl_d_quits_the_chat(request, checkpoint):
    main, terminal = pty.openpty()
    command = [
        sys.executable,
        request.config.rootpath / "llava.py",
        "--model",
        checkpoint,
        "--chat",
        "--max-new-tokens",
        "900",
    ]
    # A test that runs in the background ignores Ctrl-C; its child must not inherit that.
    process = subprocess.Popen(
        command,
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    notes = []
    threading.Thread(target=lambda: notes.extend(iter(lambda: process.stderr.read(1), b"")), daemon=True).start()

    def wait_for_prompt(count: int) -> None:
        deadline = time.monotonic() + 60
        while b"".join(notes).count(b"> ") < count:
            assert time.monotonic() < deadline and process.poll() is None, b"".join(notes)
            time.sleep(0.02)

    wait_for_prompt(1)
    os.write(main, b"Hello\n")
    assert process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    wait_for_prompt(2)
    process.send_signal(signal.SIGINT)  # at the prompt, Ctrl-C has no effect
    wait_for_prompt(3)
    os.write(main, b"\x04")
    assert process.wait(timeout=60) == 0
    assert process.stdout.read().count(b"\n") == 1
    assert b"Traceback" not in b"".join(notes)
