"""train.py --lora: only the adapter is trained, neither a stop nor several processes change it, and it can be used."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tiny_training import COLOUR_QUESTIONS, COLOURS, MIXED, Workbench, losses

import evaluate
import llava
import train
from evaluate import answer_questions
from extras.adapters import CONFIG_FILE, IMAGES_FILE, WEIGHTS_FILE, image_processor_of
from extras.lora import FullLinear, LoraLinear, adapted_layers
from extras.lora_training import TARGETS, add_lora, load_frozen
from llava import LlavaForConditionalGeneration, LlavaProcessor

TRAIN = str(Path(train.__file__).resolve())
LONG = ("--lora", 4, "--batch", 4, "--micro-batch", 2, "--epochs", 5, "--save-every", 3, "--learning-rate", 1e-2)  # 20


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    torch.set_num_threads(1)  # as in the processes that are started, so that sums are added in the same order
    return Workbench(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def uninterrupted(bench):
    return bench.train("uninterrupted", MIXED, *LONG)


@pytest.fixture(scope="module")
def learned(bench):
    """An adapter that has learned the colours of eight pictures."""
    options = ("--lora", 16, "--batch", 8, "--epochs", 300, "--learning-rate", 1e-2, "--projector-learning-rate", 5e-3)
    return bench.train("learned", COLOUR_QUESTIONS, *options, "--system", "", "--lora-dropout", 0)


def options(bench, monkeypatch, *more):
    """What train.py makes of a command line."""
    monkeypatch.setattr(sys, "argv", ["train.py", *bench.arguments("o", MIXED, *more)])
    return train.parse_arguments()


def same_files(one: Path, other: Path, *names: str) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


# What is trained


def test_the_defaults_are_those_of_the_paper(bench, monkeypatch):
    args = options(bench, monkeypatch, "--lora", 128)
    assert (args.lora_alpha, args.lora_dropout, args.lora_targets) == (256, 0.05, TARGETS)
    assert (args.learning_rate, args.projector_learning_rate, args.batch) == (2e-4, 2e-5, 128)


def test_a_lora_is_in_every_linear_layer_of_the_decoder_and_the_projector_is_trained_in_full(bench, monkeypatch):
    args = options(bench, monkeypatch, "--lora", 4)
    model = load_frozen(LlavaForConditionalGeneration, args, torch.device("cpu"))
    add_lora(model, args)
    layers = adapted_layers(model)
    loras = {name for name, layer in layers.items() if isinstance(layer, LoraLinear)}
    assert len(loras) == 2 * 7 and all(name.startswith("language_model.model.layers.") for name in loras)
    full = {name for name, layer in layers.items() if isinstance(layer, FullLinear)}
    assert full == {"multi_modal_projector.linear_1", "multi_modal_projector.linear_2"}


def test_lora_targets_choose_the_layers_and_a_rate_of_0_freezes_the_projector(bench, monkeypatch):
    args = options(
        bench, monkeypatch, "--lora", 4, "--lora-targets", "q_proj", "v_proj", "--projector-learning-rate", 0
    )
    model = load_frozen(LlavaForConditionalGeneration, args, torch.device("cpu"))
    config = add_lora(model, args)
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"q_proj", "v_proj"}
    assert config.modules_to_save is None


def test_in_a_head_that_is_one_with_the_word_embeddings_a_lora_is_refused(bench, monkeypatch):
    args = options(bench, monkeypatch, "--lora", 4, "--lora-targets", "q_proj", "lm_head")
    model = load_frozen(LlavaForConditionalGeneration, args, torch.device("cpu"))
    model.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="one with the word embeddings"):
        add_lora(model, args)


@pytest.mark.parametrize(
    ("stored", "more", "matrices", "embeddings", "norms"),
    [
        ("float32", (), "float32", "float32", "float32"),
        ("bfloat16", (), "bfloat16", "bfloat16", "bfloat16"),
        ("float16", (), "float16", "float16", "float32"),
        ("float16", ("--dtype", "bfloat16"), "bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", ("--quantize", "int8"), "uint8", "bfloat16", "bfloat16"),
        ("bfloat16", ("--quantize", "int4"), "uint8", "bfloat16", "bfloat16"),
        ("float16", ("--quantize", "int4"), "uint8", "float16", "float32"),
    ],
)
def test_the_base_stays_in_its_16_bits_or_is_quantised(
    stored, more, matrices, embeddings, norms, bench, tmp_path, monkeypatch
):
    """What is trained is float32 in any case, and the projector starts with the exact weights."""
    source = LlavaForConditionalGeneration.from_pretrained(bench.folder / "base", stored)
    source.save_pretrained(tmp_path)
    args = options(bench, monkeypatch, "--lora", 4, *more, "--model", tmp_path)
    model = load_frozen(LlavaForConditionalGeneration, args, torch.device("cpu"))
    add_lora(model, args)
    decoder = model.language_model.model
    assert decoder.layers[0].mlp.up_proj.base_layer.weight.dtype == getattr(torch, matrices)
    assert decoder.embed_tokens.weight.dtype == getattr(torch, embeddings)
    assert decoder.layers[0].input_layernorm.weight.dtype == getattr(torch, norms)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    assert torch.equal(
        model.multi_modal_projector.linear_1.weight, source.multi_modal_projector.linear_1.weight.float()
    )


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--quantize", "int8"),
        ("--quantize", "int4"),
        ("--quantize", "int4", "--dtype", "bfloat16"),
        ("--dtype", "bfloat16"),
        ("--dtype", "float16"),
    ],
    ids=str,
)
def test_on_every_base_it_learns_about_the_same(more, bench, uninterrupted):
    folder = bench.train(f"on{''.join(more)}", MIXED, *LONG, *more)
    assert losses(folder) == pytest.approx(losses(uninterrupted), rel=0.05)
    assert sum(losses(folder)[-4:]) < 0.9 * sum(losses(folder)[:4])  # the last epoch and the first


def test_only_the_adapter_is_written_and_the_base_stays_as_it_is(bench):
    base = {path.name: path.read_bytes() for path in (bench.folder / "base").iterdir()}
    folder = bench.train("written", COLOUR_QUESTIONS, "--lora", 4, "--batch", 4)
    files = {path.name for path in folder.iterdir()}
    assert files == {CONFIG_FILE, WEIGHTS_FILE, IMAGES_FILE, "loss.csv", "loss.png"}
    assert base == {path.name: path.read_bytes() for path in (bench.folder / "base").iterdir()}


def test_projector_and_lora_have_their_own_learning_rates(bench, monkeypatch):
    seen, real = [], train.train_step

    def watched(model, optimizer, *rest):
        numbers = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
        seen.append(([group["lr"] for group in optimizer.param_groups], numbers))
        return real(model, optimizer, *rest)

    monkeypatch.setattr(train, "train_step", watched)
    rates = ("--learning-rate", 1e-2, "--projector-learning-rate", 1e-3, "--warmup-ratio", 0)
    bench.train("rates", COLOUR_QUESTIONS, "--lora", 4, "--batch", 4, *rates)
    assert seen[0][0] == [1e-2, 1e-3]
    assert seen[1][0] == pytest.approx([0.5e-2, 0.5e-3])
    assert seen[0][1][1] == 32 * 64 + 64 + 64 * 64 + 64  # the projector


def test_gradients_and_averages_stay_where_they_were_allocated(bench, monkeypatch):
    """Allocated anew between activations, they would fragment the memory."""
    seen, real = [], train.train_step

    def watched(model, optimizer, *rest):
        seen.append(addresses(optimizer))
        result = real(model, optimizer, *rest)
        seen.append(addresses(optimizer))
        return result

    def addresses(optimizer):
        return [
            tensor.data_ptr()
            for parameter, state in optimizer.state.items()
            for tensor in (parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        ]

    monkeypatch.setattr(train, "train_step", watched)
    bench.train("memory", MIXED, "--lora", 4, "--batch", 4)
    assert len(seen) > 2 and seen[0] and all(one == seen[0] for one in seen)


def test_gradient_checkpointing_does_not_change_the_losses(bench, uninterrupted):
    """The recomputed layers drop the same inputs."""
    folder = bench.train("recomputed", MIXED, *LONG, "--gradient-checkpointing")
    assert same_files(folder, uninterrupted, "loss.csv", WEIGHTS_FILE)


def test_micro_batches_do_not_change_the_losses_without_dropout(bench):
    runs = [bench.train(f"m{size}", MIXED, *LONG, "--lora-dropout", 0, "--micro-batch", size) for size in (4, 1)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ((), {"layers": 2 * 7}),
        (("--lora-vision",), {"layers": 2 * 7, "vision_tower": 2 * 6}),  # features are of the last but one of 3 layers
        (("--lora-targets", "v_proj", "lm_head"), {"layers": 2, "lm_head": 1}),
    ],
    ids=str,
)
def test_the_adapter_gives_the_same_logits_in_peft(more, parts, bench, learned, check):
    base, adapter = bench.folder / "base", bench.train(f"peft{more}", MIXED, *LONG, *more) if more else learned
    changed = [name for name, tensor in load_file(adapter / WEIGHTS_FILE).items() if "lora_B" in name and tensor.any()]
    found = [re.search(r"vision_tower|lm_head|layers", name)[0] for name in changed]
    assert Counter(found) == parts
    reference = transformers.LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(reference, adapter)
    ours = LlavaForConditionalGeneration.from_pretrained(base, adapter=adapter)
    inputs = LlavaProcessor.from_pretrained(base)(Image.new("RGB", (40, 50), "red"), "USER: <image>\nWhich? ASSISTANT:")
    with torch.no_grad():
        check("LoRA made here, logits", ours(**inputs).logits, theirs(**inputs).logits)


# Stopping, resuming, several processes


@pytest.mark.parametrize("more", [(), ("--quantize", "int8"), ("--gradient-checkpointing",)], ids=str)
def test_a_stopped_run_resumes_to_the_same_adapter_to_the_last_bit(more, bench, uninterrupted):
    whole = bench.train(f"whole{more}", MIXED, *LONG, *more) if more else uninterrupted
    folder = bench.stop(f"stopped{more}", 11, *LONG, *more)
    bench.train(f"stopped{more}", MIXED, *LONG, *more)
    assert same_files(folder, whole, "loss.csv", WEIGHTS_FILE, CONFIG_FILE)


def test_a_killed_run_resumes_to_the_same_adapter(bench, uninterrupted):
    folder = bench.folder / "killed"
    command = [sys.executable, TRAIN, *bench.arguments("killed", MIXED, *LONG)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (folder / train.STATE_FILE).exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    bench.train("killed", MIXED, *LONG)
    assert same_files(folder, uninterrupted, "loss.csv", WEIGHTS_FILE)


def test_the_state_saved_on_the_way_can_be_used_as_an_adapter(bench):
    folder = bench.stop("on_the_way", 8, *LONG)
    assert (folder / train.STATE_FILE).exists()
    LlavaForConditionalGeneration.from_pretrained(bench.folder / "base", adapter=folder)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(bench.folder / "base")
    peft.PeftModel.from_pretrained(theirs, folder)


def test_a_stopped_run_does_not_resume_with_another_lora(bench):
    bench.stop("changed", 5, *LONG)
    with pytest.raises(SystemExit, match=r"other settings \(lora_alpha was 8\.0, now 3\.0\)"):
        bench.train("changed", MIXED, *LONG, "--lora-alpha", 3)


def test_a_state_from_before_lora_existed_still_resumes(bench):
    run = ("--batch", 4, "--epochs", 2, "--save-every", 1)
    folder = bench.stop("older", 3, *run)
    state = load_file(folder / train.STATE_FILE)
    with train.safe_open(folder / train.STATE_FILE, "pt") as opened:
        settings = json.loads(opened.metadata()["settings"])
    kept = {name: value for name, value in settings.items() if not name.startswith("lora") and value is not None}
    train.save_file(state, folder / train.STATE_FILE, {"settings": json.dumps(kept)})
    bench.train("older", MIXED, *run)


def test_a_finished_adapter_is_not_overwritten(bench, uninterrupted):
    with pytest.raises(SystemExit, match="already contains a checkpoint"):
        bench.train("uninterrupted", MIXED, *LONG)


@pytest.mark.parametrize("more", [(), ("--quantize", "int8")], ids=str)
def test_two_processes_train_the_same_adapter_as_one(more, bench):
    """Without dropout, which is different in each process."""
    run = (*LONG, "--lora-dropout", 0, "--gradient-checkpointing", *more)
    one, output = bench.train(f"one{more}", MIXED, *run), f"two{more}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, TRAIN, *bench.arguments(output, MIXED, *run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert losses(bench.folder / output) == pytest.approx(losses(one), rel=1e-4)
    first, second = (load_file(folder / WEIGHTS_FILE) for folder in (one, bench.folder / output))
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-2, atol=1e-4)


# Using it


def test_answers_are_learned_and_end_where_they_should(bench, learned):
    model = LlavaForConditionalGeneration.from_pretrained(bench.folder / "base", adapter=learned)
    processor = LlavaProcessor.from_pretrained(bench.folder / "base")
    processor.image_processor = image_processor_of(learned)
    questions = [{"image": f"{colour}.png", "prompt": "Which color?"} for colour in COLOURS]
    answers = answer_questions(model, processor, questions, bench.folder / "pictures")
    assert answers == [f"It is {colour}." for colour in COLOURS]


def ask(bench, monkeypatch, capsys, *more: object, model: object = None) -> str:
    """The answer of llava.py about a red disc, or about the picture that is given."""
    arguments = ["--model", model or bench.folder / "base", "--image", bench.folder / "pictures" / "red.png", *more]
    monkeypatch.setattr(sys, "argv", ["llava.py", *map(str, arguments)])
    llava.main()
    captured = capsys.readouterr()
    assert "cut off" not in captured.err
    return captured.out


@pytest.mark.parametrize("more", [(), ("--quantize", "int8"), ("--dtype", "bfloat16")], ids=str)
def test_the_command_line_answers_with_an_adapter(more, bench, learned, monkeypatch, capsys):
    assert ask(bench, monkeypatch, capsys, "--adapter", learned, *more, "Which color?") == "It is red.\n"


def test_the_images_are_padded_as_in_training(bench, learned):
    assert not LlavaProcessor.from_pretrained(bench.folder / "base").image_processor.do_pad
    assert image_processor_of(learned).do_pad


def test_save_merges_the_adapter_into_a_checkpoint_of_its_own(bench, learned, tmp_path, monkeypatch, capsys):
    merged = tmp_path / "merged"
    arguments = ["llava.py", "--model", bench.folder / "base", "--adapter", learned, "--save", merged]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    llava.main()
    assert ask(bench, monkeypatch, capsys, "Which color?", model=merged) == "It is red.\n"
    transformers.LlavaForConditionalGeneration.from_pretrained(merged)
    assert LlavaProcessor.from_pretrained(merged).image_processor.do_pad
    assert not (merged / CONFIG_FILE).exists()


def test_save_refuses_the_folder_of_the_base(bench, learned, tmp_path, monkeypatch, capsys):
    base = shutil.copytree(bench.folder / "base", tmp_path / "base")
    arguments = ["llava.py", "--model", base, "--adapter", learned, "--save", base]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    with pytest.raises(SystemExit):
        llava.main()
    assert "exists already; choose a new folder" in capsys.readouterr().err


def test_evaluate_scores_with_an_adapter(bench, learned, tmp_path, monkeypatch, capsys):
    questions = [
        {"question_id": i, "image": f"{colour}.png", "text": "Which color?", "answer": f"It is {colour}."}
        for i, colour in enumerate(COLOURS)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    options = {
        "--model": bench.folder / "base",
        "--adapter": learned,
        "--questions": tmp_path / "q.jsonl",
        "--images": bench.folder / "pictures",
        "--out": tmp_path / "a.jsonl",
        "--metric": "exact",
        "--system": "",
    }
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *(str(word) for pair in options.items() for word in pair)])
    evaluate.main()
    assert "100.0" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["model_id"] == "base + learned"


# Invalid options


@pytest.mark.parametrize(
    "wrong",
    [
        ["--lora", 0],
        ["--lora", 4, "--lora-dropout", 1],
        ["--lora", 4, "--lora-alpha", 0],
        ["--lora", 4, "--projector-learning-rate", -1],
        ["--lora", 4, "--lora-targets", "embed_tokens"],
        ["--lora", 4, "--stage", "align"],
        ["--lora-alpha", 8],
        ["--quantize", "int8"],
        ["--dtype", "bfloat16"],
    ],
    ids=str,
)
def test_invalid_options_end_with_exit_code_2(wrong, bench, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        options(bench, monkeypatch, *wrong)
    assert exit.value.code == 2
    assert "--" in capsys.readouterr().err.splitlines()[-1]


def test_merging_and_quantising_at_once_is_refused(bench, learned, tmp_path, monkeypatch, capsys):
    arguments = ["llava.py", "--adapter", learned, "--save", tmp_path / "x", "--quantize", "int8"]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    with pytest.raises(SystemExit):
        llava.main()
    assert "merge the adapter first" in capsys.readouterr().err
