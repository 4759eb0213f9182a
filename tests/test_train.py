"""train.py: loss and gradients match the reference, each stage trains only its own parameters, and neither a stop, nor
micro-batches, nor several processes change the result."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tiny_training import CAPTIONS, COLOUR_QUESTIONS, COLOURS, MIXED, Workbench, losses
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import train
from evaluate import answer_questions
from extras.data import Row, collate, encode_entry
from llava import LlavaForConditionalGeneration, LlavaProcessor
from load import our_name

TRAIN = str(Path(train.__file__).resolve())


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    torch.set_num_threads(1)  # as in the processes that are started, so that sums are added in the same order
    return Workbench(tmp_path_factory.mktemp("training"))


@pytest.fixture
def model(bench):
    return LlavaForConditionalGeneration.from_pretrained(bench.folder / "base")


@pytest.fixture(scope="module")
def processor(bench):
    processor = LlavaProcessor.from_pretrained(bench.folder / "base")
    processor.image_processor.do_pad = True
    return processor


@pytest.fixture(scope="module")
def batch(bench, processor):
    """Makes the inputs for some entries."""

    def batch(data, stage="instruct"):
        samples = [
            encode_entry(i, e, stage, processor, bench.folder / "pictures", "", 2048) for i, e in enumerate(data)
        ]
        return collate([Row(sample, True) for sample in samples], processor)

    return batch


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def train_steps(model, inputs, count=1, cut=None, rate=1e-2):
    """Trains `count` steps on one batch, in pieces of `cut` rows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    answers = int(inputs.is_answer.sum())
    pieces = (
        [inputs] if cut is None else [rows_of(inputs, slice(i, i + cut)) for i in range(0, len(inputs.input_ids), cut)]
    )
    return [train.train_step(model, optimizer, pieces, answers, 1.0) for _ in range(count)]


def rows_of(inputs, rows):
    """Some rows of a batch in which every row has an image."""
    return type(inputs)({name: tensor[rows] for name, tensor in inputs.items()})


# What is learned


def test_loss_and_gradients_match_transformers(bench, model, batch):
    inputs = batch([MIXED[0], MIXED[6], MIXED[12]])  # one turn, two turns, text only: three lengths
    train.freeze(model, "instruct")
    loss = train.answer_loss(model, inputs) / inputs.is_answer.sum()
    loss.backward()

    reference = transformers.LlavaForConditionalGeneration.from_pretrained(bench.folder / "base", dtype=torch.float32)
    expected = reference(
        input_ids=inputs.input_ids,
        pixel_values=inputs.pixel_values,
        attention_mask=inputs.input_ids != 421,
        labels=inputs.input_ids.where(inputs.is_answer, -100),
    ).loss
    expected.backward()
    gradients = {our_name(name): parameter.grad for name, parameter in reference.named_parameters()}
    errors = {n: relative_error(p.grad, gradients[n]) for n, p in model.named_parameters() if p.requires_grad}
    print(f"relative errors: loss {relative_error(loss, expected):.1e}, worst gradient {max(errors.values()):.1e}")
    assert relative_error(loss, expected) <= 1e-5
    assert max(errors.values()) <= 1e-5


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_a_stage_changes_only_its_own_parameters(model, batch, stage):
    trained = {n for n, _ in model.named_parameters() if n.startswith("multi_modal_projector.")}
    if stage == "instruct":
        trained |= {n for n, _ in model.named_parameters() if n.startswith("language_model.")}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    inputs = batch(CAPTIONS if stage == "align" else MIXED, stage)

    train.freeze(model, stage)
    train.answer_loss(model, inputs).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    train_steps(model, inputs)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert with_gradient == changed == trained
    assert not any(name.startswith("vision_tower.") for name in trained)


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_gradient_checkpointing_does_not_change_gradients(bench, model, batch, stage):
    inputs = batch(CAPTIONS if stage == "align" else MIXED, stage)
    train.freeze(model, stage)
    train.answer_loss(model, inputs).backward()
    recomputed = LlavaForConditionalGeneration.from_pretrained(bench.folder / "base")
    train.freeze(recomputed, stage)
    train.checkpoint_layers(recomputed)
    calls = []
    recomputed.language_model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    train.answer_loss(recomputed, inputs).backward()
    assert len(calls) == 2  # the backward pass computes each layer a second time
    for ours, theirs in zip(model.parameters(), recomputed.parameters(), strict=True):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)


def test_micro_batches_give_the_same_steps_as_the_whole_batch(bench, batch):
    inputs = batch(MIXED[:8])  # answers of very different lengths, so averaging the means of the pieces would be wrong
    models = [LlavaForConditionalGeneration.from_pretrained(bench.folder / "base") for _ in range(2)]
    for model in models:
        train.freeze(model, "instruct")
    whole, pieces = train_steps(models[0], inputs, 3), train_steps(models[1], inputs, 3, cut=3)
    loss_error = max(abs(a[0] / b[0] - 1) for a, b in zip(whole, pieces, strict=True))
    norm_error = max(abs(a[1] / b[1] - 1) for a, b in zip(whole, pieces, strict=True))
    print(f"relative errors over 3 steps in 3 pieces: loss {loss_error:.1e}, gradient norm {norm_error:.1e}")
    assert loss_error <= 1e-5
    assert norm_error <= 1e-4


def test_bfloat16_autocast_runs_through_the_whole_model(bench, model, batch):
    """As on a GPU, as far as a CPU can show it."""
    train.freeze(model, "instruct")
    inputs = batch(MIXED)
    exact = train.answer_loss(model, inputs)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        rounded = train.answer_loss(model, inputs)
    rounded.backward()
    print(f"relative error of the loss in bfloat16: {relative_error(rounded, exact):.1e}")
    assert rounded.dtype == torch.float32
    assert 0 < relative_error(rounded, exact) < 2e-2
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_the_learning_rate_schedule_matches_transformers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=101)
    for step in range(101):  # 3 % of 101 steps, rounded up, are 4
        assert train.learning_rate(step, 101, 2e-5, 0.03) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()


# From the command line to a folder


def test_eight_images_are_learned_and_answered_word_for_word(bench):
    options = ("--batch", 8, "--epochs", 200, "--learning-rate", 5e-3, "--system", "")
    folder = bench.train("learned", COLOUR_QUESTIONS, *options)
    print(f"loss {losses(folder)[0]:.2f} -> {losses(folder)[-1]:.5f}")
    assert losses(folder)[-1] < 0.01

    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), LlavaProcessor.from_pretrained(folder)
    questions = [{"image": f"{colour}.png", "prompt": "Which color?"} for colour in COLOURS]
    answers = answer_questions(model, processor, questions, bench.folder / "pictures")
    assert answers == [f"It is {colour}." for colour in COLOURS]


def test_the_trained_checkpoint_gives_the_same_logits_in_transformers(bench):
    folder = bench.train("aligned", CAPTIONS, "--batch", 4, stage="align")
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), LlavaProcessor.from_pretrained(folder)
    reference = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    picture = Image.open(bench.folder / "pictures" / "red.png")
    pixels = LlavaImageProcessorPil.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    inputs = processor(picture, "USER: <image>\nWhich color? ASSISTANT:")
    assert processor.image_processor.do_pad
    assert (inputs.pixel_values - pixels).abs().max() <= 1e-6  # transformers pads to a square as well
    with torch.no_grad():
        ours = model(**inputs).logits
        theirs = reference(input_ids=inputs.input_ids, pixel_values=pixels).logits
    print(f"largest difference between logits: {(ours - theirs).abs().max():.1e} of {theirs.abs().max():.1f}")
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_finished_run_leaves_loss_table_and_plot_but_no_state(bench):
    folder = bench.train("outputs", CAPTIONS, "--batch", 4, "--epochs", 2, stage="align")
    header, *rows = (folder / "loss.csv").read_text().splitlines()
    assert header == "step,loss,learning_rate,gradient_norm"
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3", "4"]
    assert Image.open(folder / "loss.png").size == (800, 450)
    assert not (folder / train.STATE_FILE).exists()


def test_training_does_not_change_the_base_checkpoint(bench):
    base = bench.folder / "base" / "model.safetensors"
    before = base.read_bytes()
    bench.train("base_kept", COLOUR_QUESTIONS, "--batch", 4, "--learning-rate", 0.1)
    assert base.read_bytes() == before


def test_the_seed_makes_a_run_reproducible(bench):
    runs = [bench.train(f"seed{i}", MIXED, "--batch", 4, "--seed", seed) for i, seed in enumerate([5, 5, 6])]
    first, second, other = ((run / "loss.csv").read_bytes() for run in runs)
    assert first == second
    assert first != other


def test_a_broken_entry_ends_the_run_unless_it_may_be_skipped(bench, capsys):
    data = [*CAPTIONS, {**CAPTIONS[0], "image": "nowhere.png"}]
    with pytest.raises(SystemExit, match=r"1 of 9 entries .* are broken(?s:.*)entry 8: its image is missing"):
        bench.train("broken", data, stage="align")
    bench.train("broken", data, "--skip-broken", stage="align")
    captured = capsys.readouterr()
    assert "train.py: 1 of 9 entries" in captured.err
    assert captured.out == ""


def test_the_traceback_is_shown_on_request(bench, monkeypatch):
    monkeypatch.setenv("LLAVA_DEBUG", "1")
    with pytest.raises(ValueError, match="are broken"):
        bench.train("debug", [{**CAPTIONS[0], "image": "nowhere.png"}], stage="align")


@pytest.mark.parametrize(
    "wrong", [["--batch", 0], ["--warmup-ratio", 2], ["--learning-rate", "nan"], ["--stage", "three"]]
)
def test_an_invalid_option_ends_with_exit_code_2(bench, wrong):
    with pytest.raises(SystemExit) as exit:
        bench.train("wrong", CAPTIONS, *wrong, stage="align")
    assert exit.value.code == 2


def test_a_loss_that_is_not_finite_ends_the_run(bench):
    with pytest.raises(SystemExit, match="lower --learning-rate"):
        bench.train("diverged", COLOUR_QUESTIONS, "--batch", 4, "--epochs", 4, "--learning-rate", 1e30)


# Stopping, resuming, several processes

LONG = ("--batch", 4, "--micro-batch", 2, "--epochs", 10, "--save-every", 3, "--learning-rate", 1e-3)  # 40 steps


@pytest.fixture(scope="module")
def uninterrupted(bench):
    return bench.train("uninterrupted", MIXED, *LONG)


def test_a_killed_run_resumes_to_the_same_losses_and_weights(bench, uninterrupted):
    folder = bench.folder / "killed"
    command = [sys.executable, TRAIN, *bench.arguments("killed", MIXED, *LONG)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    while not (folder / train.STATE_FILE).exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    steps = len((folder / "loss.csv").read_text().splitlines()) - 1
    print(f"killed after step {steps} of 40")
    assert steps < 40

    bench.train("killed", MIXED, *LONG)
    assert (folder / "loss.csv").read_bytes() == (uninterrupted / "loss.csv").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


def test_an_interrupted_save_leaves_the_previous_one(bench, model, batch, tmp_path, monkeypatch):
    train.freeze(model, "instruct")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    file = tmp_path / train.STATE_FILE
    train.save_state(file, model, optimizer, [(1.0, 2.0)], {"seed": 1})

    def cut_off(tensors, path, metadata):
        Path(path).write_bytes(b"half of a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(train, "save_file", cut_off)
    with pytest.raises(OSError, match="no space"):
        train.save_state(file, model, optimizer, [(1.0, 2.0), (0.5, 1.0)], {"seed": 1})
    assert train.load_state(file, model, optimizer, {"seed": 1}) == [(1.0, 2.0)]


def test_a_stopped_run_does_not_resume_with_other_settings(bench):
    bench.stop("changed", 5, *LONG)
    with pytest.raises(SystemExit, match=r"other settings \(seed was 0, now 1\)"):
        bench.train("changed", MIXED, *LONG, "--seed", 1)


def test_a_finished_checkpoint_is_not_overwritten(bench, uninterrupted):
    with pytest.raises(SystemExit, match="already contains a checkpoint"):
        bench.train("uninterrupted", MIXED, *LONG)


@pytest.mark.parametrize("started_by_one", [False, True])
def test_two_processes_give_the_same_losses_as_one(bench, uninterrupted, started_by_one):
    """With gradient checkpointing. The second run is started by one process and resumed by two."""
    output = f"two{started_by_one}"
    if started_by_one:
        bench.stop(output, 20, *LONG)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = bench.arguments(output, MIXED, *LONG, "--gradient-checkpointing")
    command = [*torchrun, TRAIN, *arguments]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    ours, theirs = losses(bench.folder / output), losses(uninterrupted)
    error = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    print(f"largest relative error of 40 losses, {theirs[0]:.2f} -> {theirs[-1]:.2f}: {error:.1e}")
    assert error <= 1e-5
    one, two = (LlavaForConditionalGeneration.from_pretrained(f) for f in (uninterrupted, bench.folder / output))
    worst = max(relative_error(b, a) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    print(f"largest relative error of a trained weight: {worst:.1e}")
    assert worst <= 1e-4


def test_the_options_reach_every_step(bench, monkeypatch):
    steps, systems, checkpointed = [], [], []
    train_step, read_data = train.train_step, train.read_data

    def watched_step(model, optimizer, pieces, answers, clip, *rest):
        group = optimizer.param_groups[0]
        steps.append((group["lr"], group["weight_decay"], clip))
        return train_step(model, optimizer, pieces, answers, clip, *rest)

    def watched_read(file, stage, processor, images, system, *rest):
        systems.append(system)
        return read_data(file, stage, processor, images, system, *rest)

    monkeypatch.setattr(train, "train_step", watched_step)
    monkeypatch.setattr(train, "read_data", watched_read)
    monkeypatch.setattr(train, "checkpoint_layers", checkpointed.append)
    options = ["--batch", 2, "--learning-rate", 0.01, "--clip", 0.5, "--system", "Be nice.", "--gradient-checkpointing"]
    bench.train("options", COLOUR_QUESTIONS, *options)
    assert steps == [(train.learning_rate(i, 4, 0.01, 0.03), 0.0, 0.5) for i in range(4)]
    assert systems == ["Be nice."]
    assert len(checkpointed) == 1


def test_the_gradient_is_clipped(model, batch):
    """With plain gradient descent, the step is as long as the gradient."""
    train.freeze(model, "instruct")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    inputs = batch(MIXED)
    sgd = torch.optim.SGD(trained, lr=1.0)
    _, norm = train.train_step(model, sgd, [inputs], int(inputs.is_answer.sum()), clip=0.01)
    moved = sum((now - then).square().sum() for now, then in zip(trained, before, strict=True)).sqrt().item()
    assert norm > 0.01
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("stage", "rate", "size"), [("align", 1e-3, 256), ("instruct", 2e-5, 128)])
def test_the_defaults_are_those_of_the_paper(stage, rate, size, monkeypatch):
    paths = ["--model", "m", "--data", "d", "--images", "i", "--output", "o"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--stage", stage, *paths])
    args = train.parse_arguments()
    found = [args.learning_rate, args.batch, args.weight_decay, args.warmup_ratio, args.clip, args.max_length]
    assert found == [rate, size, 0, 0.03, 1, 2048]
