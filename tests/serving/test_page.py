"""The page in a real browser, where Chromium and playwright are installed."""

import threading

import pytest
from PIL import Image

from tests.serving.serving import running, serve

TWO_BOXES = (
    "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(100,200),(500,1000)<|box_end|>"
    "<|box_start|>(600,0),(700,250)<|box_end|>"
)


@pytest.fixture(scope="module")
def served(folder):
    return serve(folder, max_new_tokens=30, max_pixels=100_000)


@pytest.fixture(scope="module")
def url(served):
    with running(served.app()) as url:
        yield url


@pytest.fixture(params=[(1440, 900), (390, 844)], ids=["desk", "phone"])
def page(browser, url, request):
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    page.locator("#tasks input").first.wait_for(state="attached")
    yield page
    page.close()
    assert [each for each in problems if "400" not in each] == []


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (80, 40), "red").save(tmp_path / "cup.png")
    return tmp_path / "cup.png"


def says(served, monkeypatch, text):
    """Let the model write a text."""
    monkeypatch.setattr(served.generator.policy.processor, "decode", lambda rows, **options: [text for _ in rows])


def answered(page):
    page.locator('#status:has-text("Answered"), #error:not(:empty)').first.wait_for()


def test_boxes_stand_where_the_model_says(page, served, picture, monkeypatch):
    says(served, monkeypatch, TWO_BOXES)
    assert page.locator("#send").is_disabled()
    page.set_input_files("#file", picture)
    page.fill("#query", "cup")
    page.click("#send")
    answered(page)
    assert page.inner_text("#error") == ""
    shown, boxes = page.locator("#picture").bounding_box(), page.locator("#overlays .box")
    assert shown["width"] / shown["height"] == pytest.approx(2.0, rel=0.01)
    assert shown["x"] + shown["width"] <= page.viewport_size["width"]
    found = [boxes.nth(index).bounding_box() for index in range(boxes.count())]
    for box, (x1, y1, x2, y2) in zip(found, [(0.1, 0.2, 0.5, 1.0), (0.6, 0.0, 0.7, 0.25)], strict=True):
        assert box["x"] == pytest.approx(shown["x"] + x1 * shown["width"], abs=4)
        assert box["y"] == pytest.approx(shown["y"] + y1 * shown["height"], abs=4)
        assert box["width"] == pytest.approx((x2 - x1) * shown["width"], abs=8)
        assert box["height"] == pytest.approx((y2 - y1) * shown["height"], abs=8)
    assert page.locator("#objects button").all_inner_texts() == ["1 cup", "2 cup"]
    page.locator("#objects button").nth(1).click()
    assert page.locator("#overlays g.chosen").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_everything_can_be_done_with_the_keyboard(page, served, picture, monkeypatch):
    says(served, monkeypatch, TWO_BOXES)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    page.set_input_files("#file", picture)
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.value") == "counting"
    page.keyboard.press("Tab")
    page.keyboard.type("cup")
    page.locator("#send:enabled").wait_for()  # the picture is read
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator("#overlays .box").count() == 2
    page.locator("#objects button").first.focus()
    page.keyboard.press("Space")
    assert page.locator("#objects button").first.get_attribute("aria-pressed") == "true"


def test_a_task_that_asks_nothing_has_no_field(page):
    page.locator("#tasks label", has_text="ocr").click()
    assert page.locator("#asks").is_hidden()
    page.locator("#tasks label", has_text="grounding").click()
    assert page.locator("#asks").is_visible()


def test_text_of_the_model_is_never_markup(page, served, picture, monkeypatch):
    says(served, monkeypatch, "<img src=x onerror=\"document.title='hacked'\"><b>bold</b>")
    page.locator("#tasks label", has_text="ocr").click()
    page.set_input_files("#file", picture)
    page.click("#send")
    answered(page)
    assert "<b>bold</b>" in page.inner_text("#description")
    assert page.locator("#result b").count() == 0
    assert page.title() == "perception-r1"


def test_a_refusal_is_shown(page, tmp_path):
    Image.new("RGB", (400, 300)).save(tmp_path / "large.png")
    page.set_input_files("#file", tmp_path / "large.png")
    page.locator("#tasks label", has_text="ocr").click()
    page.click("#send")
    answered(page)
    assert page.inner_text("#error") == "The picture has 400 x 300 pixels; 100000 are the most."
    (tmp_path / "notes.txt").write_text("no picture")
    page.set_input_files("#file", tmp_path / "notes.txt")
    page.locator("#error", has_text="notes.txt is no picture.").wait_for()


def test_a_dropped_picture_is_taken(page, picture):
    data = page.evaluate_handle(
        """async (bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            return data;
        }""",
        list(picture.read_bytes()),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})
    page.locator("#hint", has_text="dropped.png").wait_for()
    page.locator("#send:enabled").wait_for(state="attached") if page.locator("#asks").is_hidden() else None
    assert page.locator("#picture").get_attribute("src").startswith("data:image/png")


@pytest.fixture
def held(served, monkeypatch):
    """Lets the model wait with its answers until the event is set."""
    release = threading.Event()
    plain = served.generator.engine.generate

    def generate(*args, **options):
        release.wait(60)
        return plain(*args, **options)

    monkeypatch.setattr(served.generator.engine, "generate", generate)
    yield release
    release.set()


def choose_other_picture(page, other):
    page.set_input_files("#file", other)
    page.locator("#hint", has_text="other.png").wait_for()


def choose_other_task(page, other):
    page.locator("#tasks label", has_text="grounding").click()


@pytest.mark.parametrize("choose", [choose_other_picture, choose_other_task])
def test_an_answer_is_dropped_if_another_picture_or_task_is_chosen_meanwhile(
    page, served, held, picture, monkeypatch, choose
):
    says(served, monkeypatch, TWO_BOXES)
    Image.new("RGB", (40, 80), "blue").save(picture.with_name("other.png"))
    page.set_input_files("#file", picture)
    page.fill("#query", "cup")
    page.click("#send")
    page.locator("#status", has_text="The model writes").wait_for()
    choose(page, picture.with_name("other.png"))
    page.locator("#send:enabled").wait_for()  # the next question can be asked at once
    assert page.inner_text("#status") == page.inner_text("#error") == ""
    held.set()
    page.wait_for_timeout(500)
    assert page.inner_text("#status") == page.inner_text("#error") == ""
    assert page.locator("#overlays .box").count() == page.locator("#objects button").count() == 0
    assert page.locator("#raw").is_hidden()
    page.click("#send")
    answered(page)
    assert page.locator("#overlays .box").count() == 2


def test_an_answer_tells_what_was_asked(page, served, held, picture, monkeypatch):
    says(served, monkeypatch, TWO_BOXES)
    page.set_input_files("#file", picture)
    page.fill("#query", "cup")
    page.click("#send")
    page.locator("#status", has_text="The model writes").wait_for()
    page.fill("#query", "plate")
    held.set()
    answered(page)
    assert page.inner_text("#status").startswith("Answered counting “cup” in ")
    page.locator("#tasks label", has_text="grounding").click()  # nothing is left that the new task has not found
    assert page.inner_text("#status") == ""
    assert page.locator("#overlays .box").count() == 0


def test_the_picture_that_was_chosen_last_is_shown_whichever_is_read_first(page, picture):
    Image.new("RGB", (40, 80), "blue").save(picture.with_name("other.png"))
    page.evaluate(
        """() => {
            const plain = FileReader.prototype.readAsDataURL;
            FileReader.prototype.readAsDataURL = function (file) {
                setTimeout(() => plain.call(this, file), file.name === "cup.png" ? 400 : 0);
            };
        }"""
    )
    page.set_input_files("#file", picture)
    assert page.locator("#send").is_disabled()  # no picture is read
    page.set_input_files("#file", picture.with_name("other.png"))
    page.locator("#send:enabled").wait_for()
    page.wait_for_timeout(700)
    assert page.inner_text("#hint") == "other.png"
    assert page.evaluate("document.getElementById('picture').naturalWidth") == 40
