"""The page at `/` in headless Chromium, over a real server and a model that has learned one answer by heart."""

import os
import shutil
import time
from dataclasses import replace

import httpx
import pytest
import torch
from conftest import fused_over, randomise_gate, tiny_model
from test_serving import Server

from ultrafuser.analysis.palette import specialist_colours
from ultrafuser.modeling.assembly import FusedModel
from ultrafuser.modeling.specialists import WholeSpecialists

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None and "CI" not in os.environ:
    pytest.skip("Chromium is not installed: apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
NAMES = ("a", "b")
ANSWER = """# Title
<img src=x onerror="window.ran=1"><script>window.ran=2</script>
[link](javascript:window.ran=3) and [good](http://127.0.0.1/x) **bold** `code`
- é one
```python
print("<b>")
```"""


def learned(model, ids, start):
    """A tiny model that has learned ids by heart, from their position `start` on."""
    ids = torch.tensor([ids])
    labels = ids.clone()
    labels[:, :start] = -100
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(1000):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if loss.item() < 0.02:
            return model.eval()
    raise AssertionError(f"the model has not learned its answer: loss {loss.item():.3f}")


@pytest.fixture(scope="module")
def fused(tokenizer):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=False
    )
    ids = [*prompt, *tokenizer(ANSWER, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    shape = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    torch.manual_seed(0)
    models = {name: learned(tiny_model(seed=n, **shape), ids, len(prompt)) for n, name in enumerate(NAMES)}
    fused = fused_over(WholeSpecialists(models))
    randomise_gate(fused.gate)
    members = [replace(member, template=tokenizer.chat_template) for member in fused.config.members]
    fused.config.specialists = [vars(member) for member in members]
    return FusedModel(fused, tokenizer)


@pytest.fixture(scope="module")
def server(fused):
    server = Server(fused, colours=tuple(specialist_colours(len(NAMES))))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, server):
    """Opens the page; afterwards, nothing may have been asked of anybody else, and no script have failed."""
    wrong = []
    pages = []

    def open_page(url=server.url, settings=True, **context):
        page = browser.new_context(**context).new_page()
        pages.append(page)
        page.set_default_timeout(10_000)
        page.on("request", lambda request: request.url.startswith(url) or wrong.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        if settings:
            page.click("summary")
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert [item for item in wrong if not item.startswith("data:")] == []


def ask(page, question="Hello", limit=400):
    page.fill("#limit", str(limit))
    page.fill("#question", question)
    page.press("#question", "Enter")


def finished(page):
    # Not by a condition in JavaScript, which the page's policy does not let anybody evaluate.
    sync_api.expect(page.locator(".token").last).to_be_visible(timeout=20_000)
    sync_api.expect(page.locator(".busy")).to_have_count(0, timeout=20_000)
    page.wait_for_timeout(100)  # one more frame


def tip_weights(page):
    return [float(cell) for cell in page.locator("#tip .weight").all_inner_texts()]


def test_tokens_stream_tinted_and_tell_their_weights(opened, server):
    page = opened()
    step = server.decoder.step
    server.decoder.step = lambda: (time.sleep(0.02), step())[1]
    try:
        ask(page)
        page.wait_for_selector(".busy .token")
        assert page.locator(".token").count() < 100  # it is not there at once
    finally:
        del server.decoder.step
    finished(page)
    colours = page.eval_on_selector_all(".token", "all => all.map(e => getComputedStyle(e).backgroundColor)")
    shown = {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in specialist_colours(len(NAMES))}
    assert {tuple(map(int, c[5:].split(", ")[:3])) for c in colours} <= shown
    assert page.locator("#tip").is_hidden()
    page.locator(".token").nth(3).hover()
    weights = tip_weights(page)
    assert len(weights) == len(NAMES)
    assert sum(weights) == pytest.approx(1, abs=2e-4)
    assert page.locator("#tip td").first.inner_text() == "a"
    strip = page.locator(".strip")
    pixels = strip.evaluate("c => [...c.getContext('2d').getImageData(c.width / 2, 2, 1, 1).data]")
    assert tuple(pixels[:3]) == (0x00, 0x72, 0xB2)  # the first specialist's share is on top
    box = strip.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 5)
    assert page.locator("#tip code").inner_text() == "<|im_end|>"


def test_nothing_in_an_answer_runs_and_markdown_is_shown(opened):
    page = opened()
    ask(page)
    finished(page)
    body = page.locator(".body")
    text = body.inner_text()
    assert '<img src=x onerror="window.ran=1"><script>window.ran=2</script>' in text
    assert "[link](javascript:window.ran=3)" in text
    assert page.evaluate("window.ran") is None
    assert body.locator("img, script").count() == 0
    assert [link.get_attribute("href") for link in body.locator("a").all()] == ["http://127.0.0.1/x"]
    assert body.locator("h4").inner_text() == "Title"
    assert body.locator("strong").inner_text() == "bold"
    assert body.locator("li").inner_text() == "é one"
    assert body.locator("pre code").inner_text() == 'print("<b>")'
    assert "```" not in text
    # Even markup that got into the page could not run its script.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran=4\">')")
    page.wait_for_timeout(200)
    assert page.evaluate("window.ran") is None


def test_code_is_selected_where_there_is_no_clipboard(opened):
    page = opened()
    page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.reload()
    page.click("summary")
    ask(page)
    finished(page)
    page.click("text=Copy")
    sync_api.expect(page.locator(".fence button")).to_have_text("Selected")
    assert page.evaluate("getSelection().toString()") == 'print("<b>")'


def test_the_limit_is_sent_where_it_is_set_and_the_end_token_is_no_text(opened):
    page = opened()
    sent = []
    page.on(
        "request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None
    )
    ask(page, limit=3)
    finished(page)
    assert sent[-1]["max_tokens"] == 3
    page.click("#new")
    ask(page, limit="")
    finished(page)
    assert "max_tokens" not in sent[-1]
    assert "im_end" not in page.locator(".body").inner_text()
    last = page.locator(".strip").bounding_box()
    page.mouse.move(last["x"] + last["width"] - 1, last["y"] + 5)
    assert page.locator("#tip code").inner_text() == "<|im_end|>"
    assert sum(tip_weights(page)) == pytest.approx(1, abs=2e-4)


def test_one_specialist_answers_alone_beside_the_fused_answer(opened):
    page = opened(viewport={"width": 1000, "height": 700})
    page.select_option("#alone", "b")
    ask(page)
    finished(page)
    fused, alone = (item.bounding_box() for item in page.locator(".answer").all())
    assert alone["x"] > fused["x"] + fused["width"] - 1
    assert alone["y"] == fused["y"]
    page.locator(".answer").nth(1).locator(".token").first.hover()
    assert tip_weights(page) == [0, 1]


def test_stop_ends_an_answer_and_frees_the_server(opened, server):
    page = opened()
    step = server.decoder.step
    server.decoder.step = lambda: (time.sleep(0.05), step())[1]
    try:
        ask(page)
        page.wait_for_selector(".busy .token")
        page.press("body", "Escape")
        assert page.locator(".error").inner_text() == "Stopped."
        end = time.monotonic() + 5
        while server.decoder.num_active and time.monotonic() < end:
            time.sleep(0.05)
        assert server.decoder.num_active == 0
    finally:
        del server.decoder.step
    assert page.locator("#send").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways(opened, scheme):
    page = opened(viewport={"width": 375, "height": 700}, color_scheme=scheme)
    ask(page)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    assert (sum(map(int, before[4:-1].split(", "))) < 200) == (scheme == "dark")
    page.click("#theme")
    assert page.evaluate(ground) != before


def test_the_keyboard_suffices(opened):
    page = opened()
    page.reload()
    page.wait_for_function(
        "document.activeElement.id === 'question'"
    )  # from the first frame on, without a click
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#question") == "Hello\n"
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    finished(page)
    page.keyboard.press("Shift+Tab")  # from the question back to the last answer (or its Copy button)
    for _ in range(8):
        if page.evaluate("document.activeElement.className") == "body":
            break
        page.keyboard.press("Shift+Tab")
    for _ in range(5):  # the first ones are the heading's mark, which is not shown
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".token.active").get_attribute("data-index") == "3"
    assert sum(tip_weights(page)) == pytest.approx(1, abs=2e-4)


def test_refusals_are_said_in_words_and_the_next_question_works(opened):
    page = opened()
    page.fill("#temperature", "-1")
    page.evaluate("document.getElementById('form').noValidate = true")
    page.fill("#question", "Hello")
    page.press("#question", "Enter")
    assert "temperature" in page.locator(".error").inner_text()
    page.fill("#temperature", "0")
    ask(page)
    finished(page)


def test_the_page_asks_for_the_api_key(opened, fused):
    server = Server(fused, colours=("#000000", "#ffffff"), api_key="secret")
    try:
        page = opened(server.url, settings=False)
        page.fill("#key", "schlüssel")  # no header can hold it
        page.press("#key", "Enter")
        assert page.locator("#key").evaluate("field => field.validity.patternMismatch")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        sync_api.expect(page.locator("#ask[open]")).to_be_visible()
        sync_api.expect(page.locator("#key")).to_have_value("")  # asked anew
        assert page.evaluate("sessionStorage.length") == 0  # a wrong key is not kept
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        sync_api.expect(page.locator("#model")).to_have_text("tiny")
        assert page.evaluate("sessionStorage.getItem('ultrafuser-key')") == "secret"
        page.click("summary")
        ask(page)
        finished(page)
    finally:
        server.stop()


def test_the_page_is_strict_about_where_things_come_from(server):
    policy = httpx.get(server.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
