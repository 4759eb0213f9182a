"""bench.py: every table and figure is produced, on a shape too small for the figures to mean anything."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import random_checkpoint
import torch
import transformers
from random_checkpoint import write_gguf, write_large_checkpoint

import bench
from extras import limits, matmul
from llava import LlavaForConditionalGeneration
from load import weight_bytes

CPU_CONTENDERS = [name for name in bench.CONTENDERS if not name.startswith("llama.cpp")]
SPEED_FIGURES = {bench.LOAD, bench.VISION, bench.FIRST, bench.SPEED, bench.MEMORY, bench.ANONYMOUS}


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs bench.py and its measurements in this process, because starting many is slow; returns what it printed."""
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    monkeypatch.setattr(bench, "measure_alone", lambda *job: json.loads(json.dumps(bench.measure(*job))))

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "1", "--tokens", "3", *map(str, args)])
        bench.main()
        return capsys.readouterr()

    return call


def test_every_table_is_printed_and_every_figure_written(call, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "CONTEXTS", [600, 700])
    monkeypatch.setattr(bench, "OURS", [*bench.OURS, "llava bfloat16"])
    printed = call("--json", tmp_path / "figures.json").out
    for title in bench.TABLES.values():
        assert f"\n{title}\n\n| {limits.cpu_kind()} | llava float32 | " in printed or title == bench.TABLES["plan"]
    assert "This machine's limits, with 128 x 256 matrices:" in printed
    report = json.loads((tmp_path / "figures.json").read_text())
    assert {*bench.TABLES, "limits", "at best", "machine", "shape", "command"} == report.keys()
    assert list(report["speed"]) == CPU_CONTENDERS
    for name in CPU_CONTENDERS:
        assert report["speed"][name].keys() == SPEED_FIGURES
        assert report["at best"][name].keys() == {bench.VISION, bench.FIRST, bench.SPEED}
    assert len(report["limits"]) == 2 * len(limits.KINDS)
    for name in bench.OURS:
        assert list(report["batch"][name]) == [f"batch of {size}" for size in (1, 2, 4, 8)]
        assert len(report["context"][name]) == 4
        assert list(report["chat"][name]) == [
            "first question: time to first token, s",
            "second question: time to first token, s",
        ]
    values = [
        values for table in bench.TABLES if table != "plan" for one in report[table].values() for values in one.values()
    ]
    assert all(len(rounds) == 1 and rounds[0] >= 0 for rounds in values)
    for table in re.findall(r"(?:^\|.*\n)+", printed, flags=re.MULTILINE):  # every line has the same number of cells
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert len(re.findall(r"\d%", printed)) == 3 * len(CPU_CONTENDERS)


def test_each_contender_is_measured_in_its_own_process(tmp_path, request):
    options = ["--tables", "chat", "--rounds", "1", "--tokens", "3", "--folder", tmp_path]
    command = [sys.executable, request.config.rootpath / "bench.py", *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (
        len(
            re.findall(
                r"^\| (first|second) question: .* \| [\d.e-]+ \| [\d.e-]+ \| [\d.e-]+ \|$", result.stdout, re.MULTILINE
            )
        )
        == 2
    )
    assert [line for line in result.stderr.splitlines() if "round" in line] == [
        f"chat, round 1 of 1: {name}" for name in bench.OURS
    ]
    assert not list(tmp_path.iterdir())


def test_a_contender_that_fails_leaves_its_column_empty(call, monkeypatch):
    measure = bench.measure_alone
    monkeypatch.setattr(bench, "measure_alone", lambda name, *job: {} if name == "llava int8" else measure(name, *job))
    printed = call("--tables", "batch", "--rounds", "3").out
    number = r"[\d.e+-]+"
    assert (
        len(
            re.findall(
                rf"^\| batch of \d \| {number} \({number} to {number}\) \| - \| {number} \({number} to {number}\) \|$",
                printed,
                re.MULTILINE,
            )
        )
        == 4
    )


def test_a_process_that_fails_is_named(capfd):
    assert bench.measure_alone("llava int8", "speed", "tiny", "/nowhere", 3) == {}
    error = capfd.readouterr().err
    assert "bench.py: llava int8 has no figures: its process ended with exit code 1" in error
    assert "there is no folder /nowhere" in error and "Traceback" not in error


def test_a_contender_that_is_not_installed_is_left_out_with_a_reason(call, monkeypatch):
    find_spec = importlib.util.find_spec
    absent = ("llama_cpp", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    printed = call("--tables", "batch", "--only", "llama.cpp", "transformers", "int8", "llava float32")
    assert "llama.cpp Q8_0 is left out: it is not installed; run: pip install llama-cpp-python gguf" in printed.err
    assert "transformers float32 is left out: it is not installed; run: pip install transformers" in printed.err
    assert "| llava float32 | llava int8 |" in printed.out


def test_a_contender_that_does_not_fit_into_memory_is_left_out_with_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(bench, "free_memory", lambda device: 16 * 10**9)
    small = ["llava bfloat16", "llava float16", "llava int8", "llava int4", "transformers bfloat16"]
    assert bench.find_contenders([], "7b") == small
    error = capsys.readouterr().err
    assert "llava float32 is left out: it needs about 29.3 GB of memory, and 16.0 GB are free" in error


def test_weights_that_do_not_fit_on_the_disk_end_in_a_sentence(call, monkeypatch):
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda folder: bench.argparse.Namespace(free=10**6))
    with pytest.raises(SystemExit, match=r"the weights need 0\.0 GB of disk, more than is free"):
        call("--tables", "batch")


def test_13b_has_only_the_plan(call):
    printed = call("--shape", "13b")
    sizes = "53.41 + 1.64 | 26.70 + 0.82 | 18.81 + 1.64 | 10.91 + 1.64"
    assert f"| 13b: weights + cache of 1000 tokens | {sizes} |" in printed.out
    assert bench.TABLES["speed"] not in printed.out and "writing" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--shape", "13b", "--tables", "speed"), "shape 13b has only the table plan"),
        (("--json", "/no/such/file.json"), "--json: there is no folder /no/such"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(arguments, sentence, call, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(*arguments)
    printed = capsys.readouterr()
    assert sentence in printed.err and printed.out == ""


def test_shape_7b_works_with_shards_and_another_folder(call, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "7b", bench.SHAPES["tiny"])
    monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 700_000)
    room_for_all_but_float32 = 10**9 + weight_bytes(bench.meta_model("7b")) - 1
    monkeypatch.setattr(bench, "free_memory", lambda device: room_for_all_but_float32)
    files = []
    measure = bench.measure_alone

    def watched(*job):
        figures = measure(*job)
        files.extend(sorted(file.name for file in tmp_path.glob("*/*.safetensors")) if job[0] == bench.WRITER else [])
        return figures

    monkeypatch.setattr(bench, "measure_alone", watched)
    printed = call("--shape", "7b", "--tables", "speed", "--folder", tmp_path)
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert "| llava bfloat16 | llava float16 | llava int8 | llava int4 | transformers bfloat16 |" in printed.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "llava float32",
        "llava float16",
        "transformers bfloat16",
        "llava int8",
        "llava int4",
        "llama.cpp Q8_0",
        "llama.cpp Q4_0",
    ],
)
def test_the_figures_at_best_count_the_work_of_each_contender(name):
    ones = {f"{kind}: {figure}": 1 for kind in limits.KINDS for figure in (limits.GB_S, limits.GFLOP_S)}
    best = bench.at_best(name, "tiny", ones)
    layer, head = 4 * 128 * 128 + 3 * 128 * 256, 448 * 128
    sizes = {"llava float32": 4 * (4 * layer + head), "transformers bfloat16": 2 * (4 * layer + head)}
    sizes |= {"llava float16": 2 * (4 * layer + head)}
    sizes |= {"llava int8": 4 * layer + 4 * head, "llava int4": 4 * layer / 2 + head}
    sizes |= {"llama.cpp Q8_0": (4 * layer + head) * 34 / 32, "llama.cpp Q4_0": (4 * layer * 18 + head * 34) / 32}
    assert best[bench.SPEED] == pytest.approx(1e9 / sizes[name])
    text = 2 * (600 * 4 * layer + head) + 4 * 4 * 600 * 600 * 128
    mlp = 3 * 128 * 256
    if name.startswith("llava"):  # beyond queries, keys and values, the last of the 4 layers computes one token only
        text -= 599 * (2 * (128 * 128 + mlp) + 4 * 600 * 128)
    if name.startswith("llama.cpp"):
        text -= 599 * 2 * mlp
    # 17 positions through 2 of 3 layers with their attention, the patch embedding, and the projector
    image = (
        2 * (2 * 17 * (4 * 64**2 + 2 * 64 * 128) + 16 * 3 * 14**2 * 64 + 16 * (64 * 128 + 128**2)) + 2 * 4 * 17**2 * 64
    )
    image *= not name.startswith("llama.cpp")
    assert best[bench.VISION] == pytest.approx(image / 1e9)
    assert best[bench.FIRST] == pytest.approx((image + text) / 1e9)


def test_quantised_weights_have_limits_without_onnx_runtime_too(monkeypatch):
    monkeypatch.setattr(matmul, "is_installed", lambda: False)
    found = limits.machine_limits(128, 256, layers=4)
    assert found.keys() == {f"{kind}: {figure}" for kind in limits.KINDS for figure in (limits.GB_S, limits.GFLOP_S)}
    assert all(limit > 0 for limit in found.values())


def test_contenders_are_chosen_by_words_in_their_names(monkeypatch, capsys):
    assert bench.find_contenders([], "tiny") == CPU_CONTENDERS
    assert bench.find_contenders(["int4", "transformers b"], "tiny") == ["llava int4", "transformers bfloat16"]


def test_a_word_in_no_name_ends_in_the_names(call):
    with pytest.raises(SystemExit, match="there is no contender to measure; their names are llava float32, llava b"):
        call("--tables", "speed", "--only", "int3")


def test_the_speed_of_each_peer_is_divided_out():
    results = {
        "llava int4": {bench.FIRST: [1.0, 9.0, 2.0], bench.SPEED: [30.0]},
        "llama.cpp Q4_0": {bench.FIRST: [3.0], bench.SPEED: [20.0]},
    }
    rows = {"llama.cpp Q4_0: first token": "1.50", "llama.cpp Q4_0: decoding": "1.50"}
    assert bench.ratios(results) == {"llava int4": rows}


# The files it writes


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@torch.no_grad()
def test_the_compact_checkpoint_loads_and_answers(quantize, tmp_path):
    write_large_checkpoint(tmp_path, bench.meta_model("tiny", quantize=quantize))
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert ours.config.quantize == quantize
    weight = ours.language_model.model.layers[0].mlp.up_proj.dequantized()
    assert weight.mean().item() == pytest.approx(0, abs=0.01) and weight.std().item() == pytest.approx(
        128**-0.5, rel=0.1
    )
    assert ours.generate(torch.randint(300, 400, (1, 20)), max_new_tokens=40).shape == (1, 60)  # no answer ends early


def test_the_checkpoint_loads_here_and_in_transformers(tmp_path, monkeypatch, check):
    monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 700_000)
    write_large_checkpoint(tmp_path, bench.meta_model("tiny"))
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(300, 400, (1, 20))
    check("checkpoint written tensor by tensor", ours(ids).logits, theirs(ids).logits)
    assert 2 not in ours.generate(ids, max_new_tokens=40)[0, 20:]  # no answer ends early


WRITE = """
import pathlib, re, sys
import torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import bench
from random_checkpoint import write_large_checkpoint
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
bench.SHAPES["tiny"] = (bench.SMALL, bench.LLAMA(32000, 1024, 4096, 12, 8))
model = bench.meta_model("tiny")
before = peak()
write_large_checkpoint(pathlib.Path({folder!r}), model)
print(peak() - before, max(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_writing_needs_memory_for_one_tensor_at_a_time(tmp_path, request):
    script = WRITE.format(root=str(request.config.rootpath), folder=str(tmp_path))
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    peak, largest, total = map(int, output.split())
    print(
        f"peak {peak / 1e6:.0f} MB for {2 * total / 1e6:.0f} MB of weights, at most {largest / 1e6:.0f} M in a tensor"
    )
    assert peak < 6 * largest + 60e6 < 2 * total  # the largest tensor in 32 and in 16 bits, and the libraries


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_the_gguf_file_has_everything_that_llama_cpp_needs(kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = bench.meta_model("tiny")
    file = tmp_path / ("int8.gguf" if kind == "Q8_0" else "int4.gguf")
    write_gguf(file, model, kind)
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    sizes = {"block_count": 4, "embedding_length": 128, "feed_forward_length": 256, "attention.head_count_kv": 8}
    assert all(fields[f"llama.{name}"] == size for name, size in sizes.items())
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 448
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(list(model.language_model.parameters()))
    up = tensors["blk.3.ffn_up.weight"]
    assert up.tensor_type == gguf.GGMLQuantizationType[kind] and up.shape.tolist() == [128, 256]  # rows last
    weights = gguf.quants.dequantize(up.data, up.tensor_type)
    assert weights.shape == (256, 128) and np.isfinite(weights).all()
    assert weights.std() == pytest.approx(128**-0.5, rel=0.05)
    if importlib.util.find_spec("llama_cpp"):
        bench.measure(f"llama.cpp {kind}", "speed", "tiny", str(tmp_path), 3)
