"""The command line refuses a model that does not fit into memory before loading it, and says what would fit."""

import re
from pathlib import Path

import pytest
import torch
from conftest import make_judge

import config
import llava
from extras import config_file, memory
from extras.machine import free_memory
from extras.memory import check_memory
from extras.quantize import CompactLinear
from llava import KVCache, LlavaConfig, LlavaForConditionalGeneration
from load import weight_bytes

CPU = torch.device("cpu")
GROUP = "user.slice/app.scope"


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_the_planned_size_matches_the_loaded_model_to_the_byte(stored, dtype, quantize, tmp_path, monkeypatch):
    make_judge().to(stored).save_pretrained(tmp_path)
    planned = LlavaForConditionalGeneration.planned(LlavaConfig.from_pretrained(tmp_path), dtype, "cpu", quantize)
    assert all(tensor.is_meta for tensor in [*planned.parameters(), *planned.buffers()])
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype, quantize=quantize)
    size = sum(tensor.nbytes for tensor in [*loaded.parameters(), *loaded.buffers()])
    compact = [module for module in loaded.modules() if isinstance(module, CompactLinear)]
    scales = [module.scale for module in compact if module.uses_runtime]
    size += 2 * sum(scale.nbytes for scale in scales)  # ONNX Runtime has three numbers for each scale
    assert weight_bytes(planned) == weight_bytes(loaded) == size

    cache = KVCache(loaded, max_length=200)
    monkeypatch.setattr(memory, "WORKING_MEMORY", 0)
    total = size + cache.keys.nbytes + cache.values.nbytes
    monkeypatch.setattr(memory, "free_memory", lambda device: total)
    check_memory(tmp_path, LlavaForConditionalGeneration.planned, dtype, CPU, quantize, 200)
    monkeypatch.setattr(memory, "free_memory", lambda device: total - 1)
    with pytest.raises(ValueError, match="needs"):
        check_memory(tmp_path, LlavaForConditionalGeneration.planned, dtype, CPU, quantize, 200)


GB = 10**9
# (free GB, dtype, quantize) -> the sentence, for the 7B model and 1000 tokens
SENTENCES = {
    "every option that fits": (
        (20, "auto", None),
        r"needs 28\.3 GB \+ 1\.0 GB cache \+ 0\.5 GB to work with, 20\.0 GB free: try --dtype bfloat16 \(15\.2 GB in "
        r"all\) or --quantize int8 \(11\.6 GB in all\) or --dtype bfloat16 --quantize int8 \(10\.8 GB in all\) or "
        r"--quantize int4 \(7\.4 GB in all\) or --dtype bfloat16 --quantize int4 \(6\.9 GB in all\)$",
    ),
    "only options that fit": (
        (10, "float16", None),
        r"needs 14\.1 GB \+ 0\.5 GB cache \+ 0\.5 GB to work with, 10\.0 GB free: "
        r"try --quantize int4 \(6\.9 GB in all\)$",
    ),
    "no option that is larger": (
        (11, "auto", "int8"),
        r"needs 10\.1 GB .*, 11\.0 GB free: try --dtype bfloat16 \(10\.8 GB in all\) or --quantize int4 ",
    ),
    "no option fits": (
        (4, "auto", None),
        r"even --dtype bfloat16 --quantize int4 takes 6.9 GB in all; close other programs, or use a smaller model or",
    ),
    "no smaller option": ((4, "bfloat16", "int4"), "no option makes it smaller; close other programs"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_the_sentence_gives_the_sizes_and_the_options_that_fit(case, monkeypatch):
    (free, dtype, quantize), sentence = SENTENCES[case]
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": 336, "patch_size": 14}
    text = {"vocab_size": 32064, "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default"}}
    text["rope_parameters"]["rope_theta"] = 1e4
    raw = {"vision_config": vision, "text_config": text, "dtype": "float16"}
    monkeypatch.setattr(config, "find_folder", lambda name: name)
    monkeypatch.setattr(config, "read_config", lambda folder: raw)
    monkeypatch.setattr(memory, "stored_tensors", lambda model, folder: None)
    monkeypatch.setattr(memory, "free_memory", lambda device: int(free * GB))
    with pytest.raises(ValueError) as error:
        check_memory(Path("llava-7b"), LlavaForConditionalGeneration.planned, dtype, CPU, quantize, 1000)
    assert re.search(sentence, str(error.value)), str(error.value)
    for total in re.findall(r"\(([\d.]+) GB in all\)", str(error.value)):
        assert float(total) <= free


def test_the_command_line_checks_memory_before_loading(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**8)
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", None)
    monkeypatch.setattr("sys.argv", ["llava.py", "--model", str(checkpoint), "Hello"])
    with pytest.raises(SystemExit, match=r"needs 0\.0 GB .*, 0\.1 GB free: "):
        llava.main()
    assert capsys.readouterr().out == ""


def test_from_pretrained_does_not_check_memory(checkpoint, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    LlavaForConditionalGeneration.from_pretrained(checkpoint)


def test_nothing_is_refused_if_free_memory_is_unknown(checkpoint, tmp_path, monkeypatch):
    assert free_memory(CPU, root=tmp_path) is None  # no /proc, as on macOS and Windows
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    check_memory(checkpoint, LlavaForConditionalGeneration.planned, "auto", CPU, None, 10**9)


def test_a_config_that_does_not_match_the_weights_is_reported_before_memory(checkpoint, monkeypatch):
    read_config = config_file.read_config

    def larger(folder):
        raw = read_config(folder)
        return {**raw, "text_config": {**raw["text_config"], "hidden_size": 8192}}

    monkeypatch.setattr(config, "read_config", larger)
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**6)
    with pytest.raises(ValueError, match=r"do not match its config\.json"):
        check_memory(checkpoint, LlavaForConditionalGeneration.planned, "auto", CPU, None, 100)


# Free memory


def machine(root: Path, groups: str, files: dict[str, str | int]) -> Path:
    """Writes the /proc and /sys files of a Linux machine with 8 GB available to a folder."""
    everything = {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n", "proc/self/cgroup": groups}
    for name, text in (everything | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return root


STAT = "anon 3000000000\ninactive_file 400000000\nactive_file 100000000\n"
V1 = {"memory.usage_in_bytes": 3 * GB, "memory.stat": STAT + "total_inactive_file 1000000000\ntotal_active_file 0\n"}


def version_2(folder: str, limit: int | str, used: int = 3 * GB) -> dict[str, str | int]:
    return {f"{folder}memory.max": limit, f"{folder}memory.current": used, f"{folder}memory.stat": STAT}


# (/proc/self/cgroup, files in /sys/fs/cgroup, free GB)
MACHINES = {
    "no limit": (f"0::/{GROUP}\n", version_2(f"{GROUP}/", "max"), 8.192),
    "version 2": (f"0::/{GROUP}\n", version_2(f"{GROUP}/", 4 * GB), 1.5),
    "version 2, limit on a parent group": (
        f"0::/{GROUP}\n",
        version_2(f"{GROUP}/", "max") | version_2("user.slice/", 5 * GB),
        2.5,
    ),
    "version 2, in a container": ("0::/\n", version_2("", 6 * GB), 3.5),
    "version 2, limit above the machine's memory": (f"0::/{GROUP}\n", version_2(f"{GROUP}/", 100 * GB), 8.192),
    "version 2, over the limit": ("0::/\n", version_2("", 2 * GB), 0),
    "version 1": (
        "5:cpu:/x\n4:rdma,memory:/docker/ab\n0::/\n",
        {f"memory/docker/ab/{name}": text for name, text in (V1 | {"memory.limit_in_bytes": 5 * GB}).items()},
        3,
    ),
    "version 1, in a container": (
        "4:memory:/docker/ab\n",
        {f"memory/{name}": text for name, text in (V1 | {"memory.limit_in_bytes": 4 * GB}).items()},
        2,
    ),
    "version 1, no limit": (
        "4:memory:/\n",
        {f"memory/{name}": text for name, text in (V1 | {"memory.limit_in_bytes": 2**63 - 4096}).items()},
        8.192,
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_control_groups_limit_free_memory(name, tmp_path):
    groups, files, expected = MACHINES[name]
    assert free_memory(CPU, root=machine(tmp_path, groups, files)) == round(expected * GB)


def test_malformed_control_group_files_are_ignored(tmp_path):
    files = {"memory.max": "much", "memory.current": "", "memory.stat": "none"}
    assert free_memory(CPU, root=machine(tmp_path, "0::/\n", files)) == 8_192_000_000


def test_free_memory_of_a_gpu_comes_from_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB, 16 * GB))
    assert free_memory(torch.device("cuda")) == 5 * GB
    assert free_memory(torch.device("mps")) is None
