"""The explorer's page in a browser: it answers as PyTorch does, its panels react, and it needs no other host."""

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava import LlavaForConditionalGeneration, LlavaProcessor

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium: apt-get install chromium", allow_module_level=True)

ROOT = Path(__file__).parent.parent
STAGES = ["picture", "patches", "tower", "features", "sequence", "layers", "distribution", "word"]
SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server():
    """The address of the explorer, served as `python -m http.server` would."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=ROOT)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://localhost:{running.server_port}/explorer/"
        running.shutdown()


@pytest.fixture
def open_page(browser):
    """`open_page(address)` -> a page that has given its first answer. Errors and other hosts fail the test."""
    contexts, problems = [], []

    def open_page(address, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        own = (address, "blob:", "data:")
        page.on("request", lambda request: None if request.url.startswith(own) else problems.append(request.url))
        page.goto(address)
        page.wait_for_selector("#panel-layers:not([hidden])", timeout=60_000)
        contexts.append(context)
        return page

    yield open_page
    for context in contexts:
        assert context.cookies() == []
        assert context.pages[0].evaluate("localStorage.length") == 0
        context.close()
    assert problems == []


@pytest.fixture(scope="module")
def pytorch():
    """The model in PyTorch, with the weights in the precision of model.bin, and its processor."""
    folder = ROOT / "tiny" / "model"
    return LlavaForConditionalGeneration.from_pretrained(folder).half().float(), LlavaProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def judge(pytorch):
    """`judge(picture, question)` -> the answer of PyTorch; `blind`: to a picture in the mean colour."""
    model, processor = pytorch

    def answer(picture, question, blind=False):
        ids, _ = processor.tokenizer.encode_chat([(f"<image>\n{question}", None)])
        inputs = processor.prepare([ids], picture)
        inputs.pixel_values *= not blind
        generated = model.generate(**inputs, max_new_tokens=120)
        return processor.decode(generated[0, inputs.input_ids.shape[1] :].tolist(), skip_special_tokens=True).strip()

    return answer


def answered(page, act):
    """Does something that makes the model answer again, and returns the new answer."""

    def count():
        return int(page.get_attribute("body", "data-answered"))

    before = count()
    act()
    for _ in range(600):
        if count() > before:
            break
        page.wait_for_timeout(50)
    assert count() > before, page.text_content("#status")
    return page.text_content("#answer-text")


def settle(page):
    """Waits until no more answers come, after several changes in a row."""
    last = None
    while last != (last := page.get_attribute("body", "data-answered")):
        page.wait_for_timeout(1500)
    return page.text_content("#answer-text")


def open_stage(page, name):
    if page.get_attribute(f"#stage-{name}", "aria-expanded") != "true":
        page.click(f"#stage-{name}")
    return page.locator(f"#panel-{name}")


def picture_of(page):
    """What the model sees, from the three channels in the panel of the picture."""
    open_stage(page, "picture")
    channels = [
        page.locator(f'#panel-picture canvas[aria-label="{name} channel"]').evaluate(
            "c => [c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.width).data]"
        )
        for name in ("red", "green", "blue")
    ]
    side = channels[0][0]
    pixels = [np.array(channel[1::4], np.uint8).reshape(side, side) for channel in channels]
    return Image.fromarray(np.stack(pixels, -1))


def drag(page, name, dx, dy):
    """Drags the thing with this name by fractions of the scene's width."""
    box = page.locator(f'.handle[aria-label*="{name}"]').bounding_box()
    width = page.locator("#view").bounding_box()["width"]
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx * width, y + dy * width, steps=5)
    page.mouse.up()


@pytest.mark.parametrize("kind", ["server", "file"])
def test_answers_as_pytorch_does(kind, open_page, server, judge, tmp_path):
    address = server
    if kind == "file":
        file = tmp_path / "explorer.html"
        subprocess.run([sys.executable, ROOT / "explorer" / "export.py", "--html", file], check=True)
        address = file.as_uri()
    page = open_page(address)
    assert page.locator('a[href^="../"]').count() == (len(STAGES) + 2 if kind == "server" else 0)
    before = picture_of(page)
    drag(page, "star", 0, 0.3)  # to the cell below
    settle(page)
    question = "Where is the blue star?"
    answer = answered(page, lambda: page.fill("#question", question))
    picture = picture_of(page)
    assert picture.size == (96, 96)
    assert picture != before
    assert answer == judge(picture, question)
    assert page.text_content("#answer").strip() == answer
    short = answered(page, lambda: page.check("#short"))
    assert short == judge(picture, question + SHORT)


def test_a_shape_snaps_to_the_middle_of_its_cell(open_page, server):
    page = open_page(server)
    star, heart = page.locator('.handle[aria-label*="star"]'), page.locator('.handle[aria-label*="heart"]')
    drag(page, "star", 0.05, 0.25)
    assert star.get_attribute("aria-label") == "large blue star, bottom right"
    assert [star.evaluate(f"s => parseFloat(s.style.{side})") for side in ("left", "top")] == pytest.approx(
        [500 / 6] * 2
    )
    drag(page, "star", -0.3, 0.02)  # onto the heart, which gives way
    assert star.get_attribute("aria-label") == "large blue star, bottom centre"
    assert heart.get_attribute("aria-label") == "small yellow heart, bottom right"
    assert page.text_content("#scene-note") == ""
    page.check("#free")
    drag(page, "star", 0, -0.15)
    assert "blue star lies between the cells" in page.text_content("#scene-note")
    settle(page)


def test_the_tokens_that_carry_a_word_are_those_of_pytorch(open_page, server, pytorch):
    model, processor = pytorch
    page = open_page(server)
    page.wait_for_selector(".carriers .patch-grid[data-done]")
    says = page.text_content(".carriers .caption[aria-live]")
    word = page.text_content(".carriers h3").split("“")[1].split("”")[0]
    asked, text = page.input_value("#question"), page.text_content("#answer-text")
    ids, _ = processor.tokenizer.encode_chat([(f"<image>\n{asked}", None)])
    inputs = processor.prepare([ids], picture_of(page))
    with torch.no_grad():
        full = model.generate(**inputs, max_new_tokens=60)[0, inputs.input_ids.shape[1] :].tolist()
        assert processor.decode(full, skip_special_tokens=True) == text
        pieces = processor.tokenizer.convert_ids_to_tokens(full)
        at = [piece.removeprefix("▁") for piece in pieces].index(word)
        own, empty = (model.get_image_features(p) for p in (inputs.pixel_values, 0 * inputs.pixel_values))
        likely = []
        for patch in range(processor.image_seq_length):
            alone = empty.clone()
            alone[..., patch, :] = own[..., patch, :]
            hook = model.multi_modal_projector.register_forward_hook(lambda *_, alone=alone: alone)
            so_far = torch.cat([inputs.input_ids, torch.tensor([full[:at]], dtype=torch.long)], dim=1)
            likely.append(model(so_far, inputs.pixel_values).logits[0, -1].softmax(-1)[full[at]].item())
            hook.remove()
    assert f"{round(100 * max(likely))} % likely" in says
    row, column = divmod(int(np.argmax(likely)), int(processor.image_seq_length**0.5))
    assert says.startswith("None") or f"row {row + 1}, column {column + 1}" in says


def test_image_file(open_page, server, judge):
    page = open_page(server)
    photo = ROOT / "tests" / "picture.jpg"
    answered(page, lambda: page.set_input_files("#photo-file", photo))
    answer = answered(page, lambda: page.fill("#question", "Describe the picture."))
    seen = picture_of(page)
    assert answer == judge(seen, "Describe the picture.")
    with Image.open(photo) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side)).resize((96, 96))
    assert np.abs(np.asarray(square, int) - np.asarray(seen, int)).mean() < 4
    assert "drawn shapes" in page.text_content("#scene-note")


def test_scene_is_drawn_as_the_world_draws_it(open_page, server):
    import world

    page = open_page(server)
    seen = np.asarray(picture_of(page), int)
    things = [("red", "circle", "large", 0), ("blue", "star", "large", 5), ("yellow", "heart", "small", 7)]
    for colour, shape, size, cell in things:
        label = f"{size} {colour} {shape}, {world.CELLS[cell]}"
        assert page.locator(f'.handle[aria-label="{label}"]').count() == 1
        y, x = 32 * (cell // 3) + 16, 32 * (cell % 3) + 16
        assert np.abs(seen[y, x] - world.COLOURS[colour]).max() <= 15  # the tint
    module = "import('./world.js').then(m => [m.COLOURS, m.SHAPES, m.SIZES, m.SHAPES.map(s => m.outline(s, 5, 6, 7))])"
    colours, shapes, sizes, outlines = page.evaluate(module)
    assert colours == {name: list(value) for name, value in world.COLOURS.items()}
    assert shapes == world.SHAPES
    assert sizes == {name: list(value) for name, value in world.SIZES.items()}
    for shape, corners in list(zip(shapes, outlines, strict=True))[1:]:  # a circle has no corners
        assert np.allclose(corners, world.outline(shape, 5, 6, 7, None))


def test_keyboard(open_page, server):
    page = open_page(server)
    page.focus("h1 ~ p, body")
    page.keyboard.press("Tab")  # the first thing is the first stop
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "large red circle, top left"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("c")
    page.keyboard.press("s")
    page.keyboard.press("z")
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label == "small orange square, top centre"
    page.keyboard.press("Delete")
    assert page.locator(".handle").count() == 2
    settle(page)
    page.focus("#stage-tower")
    page.keyboard.press("Enter")
    cell = page.locator("#panel-tower .patches button").first
    cell.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    chosen = page.locator('#panel-tower .patches [aria-current="true"]')
    assert chosen.get_attribute("aria-label") == "patch in row 2, column 1"


def test_vision_panels(open_page, server, judge):
    page = open_page(server)
    first, question = page.text_content("#answer-text"), page.input_value("#question")
    scene = picture_of(page)
    panel = open_stage(page, "picture")
    panel.locator(".pixel-view").click(position={"x": 2, "y": 2})
    assert panel.locator("caption").text_content() == "Pixel 0, 0"

    panel = open_stage(page, "patches")
    blind = answered(page, lambda: panel.get_by_role("button", name="Hide all").click())
    assert blind == judge(scene, question, blind=True)
    assert page.text_content("#change-list") == "Changed: 36 patches hidden."
    assert "all zero: the mean colour" in panel.text_content()
    assert page.text_content("#baseline") == first
    assert panel.locator(".echo").text_content() == f"{question} {blind} Without the changes: {first}"
    assert answered(page, lambda: page.click("#undo")) == first
    assert page.is_disabled("#undo")

    panel = open_stage(page, "tower")
    heads = panel.locator(".mini canvas").first
    before = heads.evaluate("c => c.toDataURL()")
    panel.locator(".patches button").nth(20).click()
    assert heads.evaluate("c => c.toDataURL()") != before
    panel.get_by_role("button", name="layer 2, head 3").click()
    assert panel.locator(".caption").text_content() == "Layer 2, head 3"

    panel = open_stage(page, "features")
    panel.get_by_role("button", name="Keep the tokens").click()
    for radio in ("cross", "green"):
        answered(page, lambda radio=radio: page.click(f'label[title="{radio}"]'))
    asked = "Describe the picture."
    own = answered(page, lambda: page.fill("#question", asked))
    assert own == judge(picture_of(page), asked)
    panel = open_stage(page, "features")
    swapped = answered(page, lambda: panel.get_by_label("Use the kept tokens").check())
    assert swapped == judge(scene, asked)
    assert page.text_content("#baseline") == own


def test_language_panels(open_page, server):
    page = open_page(server)
    first = page.text_content("#answer-text")
    words = page.get_by_role("group", name="The answer, word by word").get_by_role("button")
    words.nth(1).click()

    panel = open_stage(page, "sequence")
    one, two = words.nth(0).text_content(), words.nth(1).text_content()
    assert panel.locator('[aria-current="true"]').text_content() == one
    assert panel.locator(".prediction").text_content() == f"At “{one}”, predicting “{two}”"
    panel.get_by_role("button", name="image token 8").click()
    assert "row 2, column 2" in panel.locator(".facts").text_content()

    panel = open_stage(page, "layers")
    lens = panel.locator(".lens")
    before = lens.last.text_content()
    panel.get_by_role("button", name="ASSISTANT").click()
    assert lens.last.text_content() != before
    panel.get_by_role("button", name="layer 3, head 2").click()
    assert panel.locator(".caption").first.text_content().startswith("Layer 3, head 2: ")
    answered(page, lambda: panel.get_by_label("layer 5, head 2 on").uncheck())
    broken = answered(page, lambda: panel.get_by_label("layer 1 on").uncheck())
    assert panel.get_by_label("layer 1, head 1 on").is_disabled()
    assert panel.locator(".head small").first.text_content() == "\u2013"
    assert page.text_content("#change-list") == "Changed: head 2 of layer 5 off, layer 1 off."
    assert broken in panel.locator(".echo").text_content()
    assert answered(page, lambda: page.click("#undo")) == first

    panel = open_stage(page, "distribution")
    values = panel.locator(".bars")
    assert not any("<" in value for value in panel.locator(".bar-value").all_text_contents())
    before = values.text_content()
    panel.get_by_role("slider", name="Temperature").fill("3")
    assert values.text_content() != before
    panel.get_by_role("slider", name="Top-k").fill("2")
    assert panel.locator("[data-cut]").count() == panel.locator(".bars li").count() - 2 > 0

    panel = open_stage(page, "word")
    result = panel.locator(".line-box + p")
    before = result.text_content()
    panel.get_by_role("button", name="Draw a number").click()
    assert result.text_content() != before
    panel.get_by_role("slider", name="Temperature").fill("0")
    panel.get_by_role("button", name="Sample five answers").click()
    page.wait_for_selector(".answers li:nth-child(5)")
    assert panel.locator(".answers li").all_text_contents() == [first] * 5  # a temperature of 0 is greedy decoding


@pytest.mark.parametrize("width", [390, 900, 1280])
def test_nothing_overflows(width, open_page, server):
    page = open_page(server, viewport={"width": width, "height": 844}, color_scheme="dark")
    answered(page, lambda: page.fill("#question", "Describe the picture."))
    for name in STAGES:
        open_stage(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.locator(f"#panel-{name} .try").is_visible()
        link = page.locator(f"#panel-{name} .code a").get_attribute("href")
        function = page.locator(f"#panel-{name} .code code").text_content()
        source = (ROOT / "explorer" / link).read_text(encoding="utf-8")
        for part in function.split("."):
            assert f"class {part}" in source or f"def {part}(" in source, function
