"""Training that is killed, fills the disk or gets broken data: nothing that was saved is lost."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_training import CAPTIONS, MIXED, Workbench, entry, losses

import train
from extras import saving
from extras.data import read_data
from llava import LlavaForConditionalGeneration, LlavaProcessor

TRAIN = str(Path(train.__file__).resolve())
SHORT = ("--batch", 4, "--epochs", 6, "--save-every", 1, "--learning-rate", 1e-3)  # 24 steps, saved after each


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    torch.set_num_threads(1)  # as in the processes that are started, so that sums are added in the same order
    return Workbench(tmp_path_factory.mktemp("training"))


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


# Killed


def test_a_run_that_is_killed_repeatedly_ends_with_the_same_losses(bench):
    """It saves after every step, so most of its time is spent saving."""
    whole = bench.train("whole", MIXED, *SHORT)
    command = [sys.executable, TRAIN, *bench.arguments("killed", MIXED, *SHORT)]
    folder, rng, kills = bench.folder / "killed", random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
        state, deadline = folder / train.STATE_FILE, time.monotonic() + 60
        before = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None and not (state.exists() and state.stat().st_mtime_ns > before):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(rng.random() * 0.1)
        kills += process.poll() is None
        process.kill()
        process.wait()
        if state.exists():
            with safe_open(state, "pt") as saved:  # complete, whenever the run was killed
                assert saved.get_tensor("history:").shape[1] == 2
    assert kills
    if not (folder / "config.json").exists() or (folder / train.STATE_FILE).exists():
        bench.train("killed", MIXED, *SHORT)
    assert losses(folder) == losses(whole)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


SAVE_FOREVER = """
import sys
sys.path.insert(0, {root!r})
import torch
from extras import saving
from llava import LlavaForConditionalGeneration
saving.SHARD_BYTES = {shard_bytes}
model = LlavaForConditionalGeneration.from_pretrained({base!r})
norm = model.language_model.model.norm.weight  # in the last shard; the projector is in an earlier one
for number in range({first}, 10**6):
    norm.data.fill_(number)
    model.multi_modal_projector.linear_1.bias.data.fill_(number)
    model.save_pretrained({folder!r})
    print(number, flush=True)
"""


@pytest.mark.parametrize("shard_bytes", [10**9, 200_000], ids=["one file", "shards"])
def test_a_save_that_is_killed_leaves_the_old_model_or_the_new_one(shard_bytes, bench, tmp_path, request):
    root, rng, last = str(request.config.rootpath), random.Random(1), -1
    for _ in range(4):
        options = {"base": str(bench.folder / "base"), "folder": str(tmp_path / "saved"), "first": last + 1}
        script = SAVE_FOREVER.format(root=root, shard_bytes=shard_bytes, **options)
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment())
        process.stdout.readline()  # the first save is complete
        time.sleep(rng.random() * 0.2)
        process.kill()
        finished = [last + 1, *map(int, process.stdout.read().split())]
        process.wait()
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
        norm, bias = model.language_model.model.norm.weight, model.multi_modal_projector.linear_1.bias
        last = int(norm[0])
        assert (norm == last).all() and (bias == last).all(), "parts of two models"
        assert last in (finished[-1], finished[-1] + 1)


# Full disks


def limited(size: int):
    """Makes a function that limits the size of every file that the process writes."""

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")
@pytest.mark.parametrize(("size", "file"), [(100_000, train.STATE_FILE), (10, "loss.csv|reading or writing failed")])
def test_a_full_disk_ends_in_a_sentence_and_the_run_resumes_once_there_is_room(size, file, bench):
    output = f"full{size}"
    command = [sys.executable, TRAIN, *bench.arguments(output, MIXED, *SHORT[:2], "--save-every", 2)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, preexec_fn=limited(size))
    said = result.stderr.splitlines()[-1]
    assert result.returncode == 1, said
    assert "Traceback" not in result.stderr
    assert any(name in said for name in file.split("|")) and said.startswith("train.py: "), said
    folder = bench.folder / output
    assert not list(folder.glob("*.part")), "an incomplete file is left behind"
    bench.train(output, MIXED, *SHORT[:2], "--save-every", 2)
    LlavaForConditionalGeneration.from_pretrained(folder)


def test_a_model_that_cannot_be_saved_leaves_the_previous_one(bench, tmp_path, monkeypatch):
    folder = shutil.copytree(bench.folder / "base", tmp_path / "copy")
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()

    def fail(tensors: dict, file: Path, metadata: dict) -> None:
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", fail)
    with pytest.raises(OSError, match=r"copy/model.safetensors could not be written: No space left on device"):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob("*.part"))


def test_a_damaged_state_is_named(bench):
    folder = bench.folder / "damaged"
    folder.mkdir()
    (folder / train.STATE_FILE).write_bytes(b"half of a file")
    with pytest.raises(SystemExit, match=r"trainer.state is damaged .*: delete it to start over"):
        bench.train("damaged", CAPTIONS, stage="align")


# Broken data


@pytest.fixture(scope="module")
def processor(bench):
    (bench.folder / "pictures" / "cut.png").write_bytes((bench.folder / "pictures" / "red.png").read_bytes()[:20])
    (bench.folder / "pictures" / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("L", (9, 9)).save(bench.folder / "pictures" / "grey.png")
    return LlavaProcessor.from_pretrained(bench.folder / "base")


FILES = {
    "empty": ("", "contains no entries"),
    "truncated": ('[{"conversations": ', "is not valid JSON"),
    "deep": ("[" * 100_000, "is not valid JSON"),
    "not a list": ("5", "is neither a JSON array nor JSON lines"),
    "no entries": ("[]", "contains no entries"),
}


@pytest.mark.parametrize("name", FILES)
def test_an_invalid_data_file_is_refused(name, processor, bench, tmp_path):
    text, sentence = FILES[name]
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=f"data.json {sentence}"):
        read_data(tmp_path / "data.json", "instruct", processor, bench.folder / "pictures", "", 2048, False)


ENTRIES = {
    "not an object": (["red.png"], "expected an object with conversations or messages"),
    "no turns": ({"conversations": []}, "has no list of conversations"),
    "turns that are strings": ({"conversations": ["What?", "red"]}, "has no list of conversations"),
    "roles out of order": (
        {"conversations": [{"from": "gpt", "value": "a"}] * 2},
        "the roles are gpt; human and gpt .* must alternate",
    ),
    "two questions": ({"conversations": [{"from": "user", "value": "a"}] * 2}, "the roles are user, user; human"),
    "a question without an answer": (entry(None, "How?", "so", "Why?"), "human and gpt .* must alternate, gpt last"),
    "value a number": (
        {"conversations": [{"from": "human", "value": 3}, {"from": "gpt"}]},
        "turn 0: its value is 3; expected a string",
    ),
    "no image token": (entry("red.png", "Which?", "red"), "0 <image> marks .* it names 1 images"),
    "no image": (entry(None, "<image> Which?", "red"), "1 <image> marks .* it names 0 images"),
    "two image tokens": (entry("red.png", "<image><image> Which?", "red"), "2 <image> marks .* it names 1 images"),
    "image missing": (entry("gone.png", "<image> Which?", "red"), "image is missing or damaged"),
    "image is a folder": (entry(".", "<image> Which?", "red"), "image is missing or damaged"),
    "image truncated": (entry("cut.png", "<image> Which?", "red"), "image is missing or damaged"),
    "image is a program": (entry("program.png", "<image> Which?", "red"), "image is missing or damaged"),
    "image not a path": (entry("a\0b", "<image> Which?", "red"), "image is missing or damaged"),
    "image is a number": (
        {**entry("red.png", "<image> Which?", "red"), "image": 5},
        "its image is 5; expected the path",
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_broken_entry_is_named_or_skipped(name, processor, bench, tmp_path):
    broken, sentence = ENTRIES[name]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([MIXED[0], broken, entry("grey.png", "<image> Which?", "gr\ud800ey")]))
    with pytest.raises(ValueError, match=f"(?s)1 of 3 entries.*entry 1: .*{sentence}"):
        read_data(file, "instruct", processor, bench.folder / "pictures", "", 2048, skip_broken=False)
    samples, said = read_data(file, "instruct", processor, bench.folder / "pictures", "", 2048, skip_broken=True)
    assert [sample.entry for sample in samples] == [0, 2]
    assert said.startswith(f"1 of 3 entries in {file} are broken and were skipped:\n  entry 1: ")


def test_ctrl_c_says_how_to_resume(bench):
    command = [sys.executable, TRAIN, *bench.arguments("stopped", MIXED, *SHORT)]
    process = subprocess.Popen(
        command,
        env=environment(),
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (bench.folder / "stopped" / train.STATE_FILE).exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.endswith(b"\ntrain.py: interrupted; the same command resumes from the last save\n")
    assert b"Traceback" not in stderr
