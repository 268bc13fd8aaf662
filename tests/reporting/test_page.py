"""The page in a real browser, where Chromium and playwright are installed."""

import json

import pytest

from perception_r1.reporting.document import make_document
from perception_r1.reporting.folder import read_record
from tests.reporting.runs import COUNTING, OCR, make_run, row
from tests.reporting.test_document import HOSTILE

NARROW, WIDE = (390, 844), (1440, 900)


def write(path, *folders):
    path.write_text(make_document([read_record(folder) for folder in folders], num_cards=96), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The page of a run."""
    place = tmp_path_factory.mktemp("one")
    return write(place / "report.html", make_run(place / "run"))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The page of runs of one task, of another one, and of all, with names and settings that are long."""
    place = tmp_path_factory.mktemp("several")
    long = place / ("run-with-a-name-of-many-words" * 3)
    folders = [
        make_run(place / "a"),
        make_run(long, before=(0.5,) * 4, after=(1.0, 0.25, 0.5, 0.75), command=["x", "--data.train_file", "a" * 300]),
        make_run(place / "c", task=None, tasks={"many": COUNTING, "ocr": OCR}, status="failed: " + "x" * 200),
    ]
    return write(place / "report.html", *folders)


@pytest.fixture
def open_page(browser):
    """Opens pages; at the end, none has complained or asked for anything but its own file."""
    pages, problems, requests = [], [], []

    def opened(path, size=WIDE, **options):
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else 0)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        pages.append((page, path))
        return page

    yield opened
    for page, _ in pages:
        page.context.close()
    assert problems == []
    files = {path.as_uri() for _, path in pages}
    assert [url for url in requests if url not in files and not url.startswith("data:image/")] == []


def cards(page):
    """The samples, once somebody has come near."""
    page.locator("#cards").scroll_into_view_if_needed()
    page.locator("#cards .card").wait_for()
    return page.locator("#cards")


def brightness(colour):
    """The sum of "rgb(1, 2, 3)"."""
    return sum(map(int, colour[4:-1].split(",")))


def shown(page):
    return page.locator("#cards h3").inner_text()


@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "several"])
def test_everything_fits_the_screen_with_all_parts_open(open_page, request, name, size, scheme):
    page = open_page(request.getfixturevalue(name), size, color_scheme=scheme)
    cards(page)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.wait_for_function("document.querySelectorAll('.chart svg:empty').length === 0")
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    back, front = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    light = [sum(map(int, colour[4:-1].split(","))) for colour in (back, front)]
    assert (light[0] < light[1]) == (scheme == "dark")


def test_a_curve_shows_its_values_under_the_pointer_and_with_the_keyboard(open_page, one):
    page = open_page(one)
    chart = page.locator(".chart", has_text="val/reward").first
    plot = chart.locator("svg")
    assert "0.5 at step 5" in plot.get_attribute("aria-label")
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 40)
    assert chart.locator("output").inner_text().split("\n") == ["step 11", "0.75 ± 0.125"]
    plot.focus()
    page.keyboard.press("Home")
    assert chart.locator("output").inner_text().split("\n") == ["step 5", "0.5 ± 0.25"]
    page.keyboard.press("ArrowRight")
    assert "step 11" in chart.locator("output").inner_text()
    chart.locator("summary").click()
    chart.locator("tbody tr").first.wait_for()
    assert chart.locator("tbody tr").all_inner_texts() == ["5\t0.5", "11\t0.75"]


def test_a_curve_lies_where_its_values_are(open_page, one):
    page = open_page(one)
    chart = page.locator(".chart", has_text="train/reward").first
    page.locator("#smoothing").fill("0")
    words = chart.locator("path.line:not(.raw)").get_attribute("d").replace("M", " ").replace("L", " ").split()
    numbers = [float(word) for word in words]
    xs, ys = numbers[::2], numbers[1::2]
    assert len(xs) == 12  # from 0.0 to 1.1 in equal steps: a straight line upwards
    assert max(abs((xs[i + 1] - xs[i]) - (xs[1] - xs[0])) for i in range(11)) < 0.11
    assert max(abs((ys[i + 1] - ys[i]) - (ys[1] - ys[0])) for i in range(11)) < 0.11
    assert ys[0] > ys[-1]


def test_smoothing_is_a_running_mean_without_a_bias_towards_zero(open_page, one):
    page = open_page(one)
    smoothed = page.evaluate("smooth([1, 1, null, 0], 0.5)")
    assert smoothed[:3] == [1, 1, None]
    assert smoothed[3] == pytest.approx((0.125 * 1 + 0.25 * 1 + 0.5 * 0) / (0.125 + 0.25 + 0.5), abs=1e-12)
    assert page.evaluate("smooth([3, 1, 2], 0)") == [3, 1, 2]
    assert page.evaluate("ticks(0, 1, 4)") == [0, 0.5, 1]
    assert page.evaluate("ticks(-0.03, 0.07, 5)") == pytest.approx([-0.02, 0, 0.02, 0.04, 0.06])


def test_constant_curves_are_one_sentence(open_page, one):
    page = open_page(one)
    page.locator("summary", has_text="Groups").click()
    assert page.locator(".group", has_text="Groups").locator(".note").inner_text() == (
        "The same at every step: train/group_size 4."
    )


def test_filters_and_their_order(open_page, one):
    page = open_page(one)
    cards(page)
    found = {}
    for button in page.locator(".filters button").all():
        name = button.get_attribute("data-filter")
        page.locator(f"[data-filter={name}]").click()
        count = int(page.locator(f"[data-filter={name}] small").inner_text())
        found[name] = [shown(page)]
        for _ in range(count - 1):
            page.locator("[aria-label='Next sample']").click()
            found[name].append(shown(page))
        assert page.locator(".pager output").inner_text() == f"{count} of {count}"
        assert page.locator("[aria-label='Next sample']").is_disabled()
    assert found == {  # rewards 0.5, 0.25, 1, 0 before and 1, 0, 1, 0.5 after
        "all": ["test-0", "test-1", "test-2", "test-3"],
        "worst": ["test-1"],
        "changed": ["test-0", "test-3", "test-1"],
        "gained": ["test-0", "test-3"],
        "lost": ["test-1"],
    }


def test_the_keyboard_turns_over(open_page, one):
    page = open_page(one)
    cards(page).focus()
    for key, expected in (("ArrowRight", "1"), ("ArrowRight", "2"), ("ArrowLeft", "1"), ("End", "3"), ("Home", "0")):
        page.keyboard.press(key)
        assert shown(page) == f"test-{expected}"
    page.keyboard.press("ArrowLeft")
    assert shown(page) == "test-0"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.filter") == "all"
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert shown(page) == "test-0"
    assert page.evaluate("document.activeElement.dataset.filter") == "gained"  # the focus stays


def test_a_swipe_turns_over(open_page, one):
    page = open_page(one, NARROW, has_touch=True, is_mobile=True)
    cards(page)
    box = page.locator(".card").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + 60
    touch = page.context.new_cdp_session(page)

    def swipe(dx, dy):
        touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
        for share in (0.5, 1.0):
            point = {"x": x + share * dx, "y": y + share * dy}
            touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    swipe(-120, 5)
    assert shown(page) == "test-1"
    swipe(120, 5)
    assert shown(page) == "test-0"
    swipe(-20, 5)
    assert shown(page) == "test-0"


def test_boxes_lie_on_the_picture_where_they_belong(open_page, one):
    page = open_page(one)
    cards(page)
    picture = page.locator(".picture").first
    width, height = picture.bounding_box()["width"], picture.bounding_box()["height"]
    assert width / height == pytest.approx(2.0, rel=0.01)
    left, top = picture.bounding_box()["x"], picture.bounding_box()["y"]
    corners = {"targets": (0.5, 0.25, 0.5, 0.5), "predictions": (0.0, 0.25, 0.5, 0.5)}
    for kind, (x, y, w, h) in corners.items():
        box = picture.locator(f".{kind} .box").bounding_box()
        assert box["x"] == pytest.approx(left + x * width, abs=4)
        assert box["y"] == pytest.approx(top + y * height, abs=4)
        assert (box["width"], box["height"]) == pytest.approx((w * width, h * height), abs=8)
    page.locator(".layer.targets input").uncheck()
    assert picture.locator(".targets .box").is_hidden()
    assert picture.locator(".predictions .box").is_visible()


def test_pictures_wait_until_somebody_comes_near(open_page, one):
    page = open_page(one, (1440, 300))
    assert page.locator("#cards .card").count() == 0
    cards(page)
    assert page.locator("#cards image").count() == 2  # those of one sample, before and after
    assert page.locator("#cards image").first.get_attribute("href").startswith("data:image/jpeg")


def test_any_two_can_be_compared(open_page, several):
    page = open_page(several)
    cards(page)
    assert page.locator(".panel figcaption .chip").all_inner_texts() == ["A before", "A after"]
    page.select_option("select[name=from]", label="A after")
    page.select_option("select[name=to]", label="B after")
    assert page.locator(".panel figcaption .chip").all_inner_texts() == ["A after", "B after"]
    page.locator("[data-filter=gained]").click()
    assert shown(page) == "test-1"  # 0 of A, 0.25 of B: as much as test-3, which comes behind it
    assert page.locator(".badge").inner_text() == "+0.250"
    page.select_option("select[name=from]", label="B after")
    assert page.locator(".filters button").count() == 2  # nothing gains over itself


def test_the_command_can_be_copied(open_page, one):
    page = open_page(one, permissions=["clipboard-read", "clipboard-write"])
    page.locator("button", has_text="Copy the command").click()
    page.locator("button", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "perception-r1 fit --task counting --run_name 'a b'"


def test_the_command_is_at_least_chosen_where_a_page_may_not_copy(open_page, one):
    page = open_page(one)
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.locator("button", has_text="Copy the command").click()
    assert page.evaluate("getSelection().toString()") == "perception-r1 fit --task counting --run_name 'a b'"


def test_hostile_text_does_nothing(open_page, tmp_path):
    rows = [row(0, 0.5, id=HOSTILE, query=HOSTILE, completion=HOSTILE, target_in_words=HOSTILE)]
    boxes = [{"shape": [0, 0, 1, 1], "caption": HOSTILE}, {"shape": [0.5, 0.5], "caption": "<b>"}]
    rows[0] |= {"prediction_in_words": HOSTILE, "target_overlays": boxes, "metrics": {HOSTILE: 1.0}}
    scalars = {f"train/<img src=x onerror=alert({step})>": {0: 1.0, 1: 2.0} for step in range(2)}
    folder = make_run(tmp_path / "<i>run", before=(0.5,), after=(0.5,), rows=rows, status=HOSTILE, scalars=scalars)
    page = open_page(write(tmp_path / "report.html", folder))
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    cards(page)
    page.select_option("select[name=from]", index=1)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert HOSTILE.replace("\ud800", "") in page.locator(".panel pre").first.text_content()
    assert page.locator("main img, main b, main script, main i").count() == 0
    assert page.locator("script").count() == 3
    assert dialogs == []
    assert json.loads(page.locator("#data").text_content())["cards"][0]["id"] == HOSTILE


def test_it_can_be_printed(open_page, one):
    page = open_page(one, color_scheme="dark")
    cards(page)
    page.emulate_media(media="print", color_scheme="dark")
    assert brightness(page.evaluate("getComputedStyle(document.body).backgroundColor")) > 600
    assert page.locator(".pager").is_hidden()
    assert page.locator("nav").is_hidden()
    assert page.locator(".chart").first.is_visible()
