"""The page as a file: what it tells, what it holds, and what it may do."""

import base64
import hashlib
import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest

from perception_r1.reporting.document import MARK, make_document
from perception_r1.reporting.folder import read_record
from perception_r1.reporting.html import element
from tests.reporting.runs import AFTER, CONFIG, COUNTING, OCR, make_evaluation, make_run, row, write_rows

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='alert(3)' <!-- & \u2028 \ud800"


def page_of(*folders, num_cards=96):
    return make_document([read_record(folder) for folder in folders], num_cards=num_cards)


def text_of(page):
    """What stands on the page, a space between elements."""
    body = page[page.index("<main>") : page.index("</main>")]
    return " ".join(unescape(re.sub(r"<wbr>", "", body).replace("<", " <")).split())


def words_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text_of(page)))


def island(page, name):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page)[1])


class Tags(HTMLParser):
    """All tags of a page, with their attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_a_run_is_told_in_full(tmp_path):
    page = page_of(make_run(tmp_path / "counting" / "version_0"))
    words = words_of(page)
    assert (
        "counting/version_0 GRPO · counting model tiny 12 steps · 1 min 40 s · 2026-01-02 03:04 UTC finished" in words
    )
    assert "count_accuracy 0.250 0.500 +0.250" in words  # the primary metric first
    assert re.search(r"reward 0\.438 ± 0\.125 0\.625 ± 0\.125 \+0\.188 ± 0\.\d{3}", words)
    assert "decode 50.0 s 50.0%" in words
    assert "elsewhere 25.0 s 25.0%" in words
    assert "perception-r1 fit --task counting --run_name 'a b'" in words
    assert "commit 0123abcd, with changes" in words
    assert "python 3.12.1, torch 2.13.0" in words
    assert "A CPU, 2 cores, 16.0 GiB, A GPU" in words
    assert "train 8,192, test 4; fingerprint f00d" in words
    assert "400 of 1,000 trained" in words
    assert "4 of 4 answered samples of the test split." in words
    assert '"fingerprint": "f00d"' in words


def test_two_runs_are_compared(tmp_path):
    model = {**CONFIG["model"], "init_args": {**CONFIG["model"]["init_args"], "group_size": 8}}
    second = make_run(tmp_path / "b", after=(1.0, 1.0, 1.0, 1.0), config={**CONFIG, "model": model})
    page = page_of(make_run(tmp_path / "a"), second, make_evaluation(tmp_path / "eval-1"))
    words = words_of(page)
    assert "beside A" in words
    assert re.search(r"B 0\.438 ± 0\.125 1\.000 ± 0\.125 \+0\.562 ± 0\.\d{3} \+0\.375 ± 0\.\d{3}", words)
    assert "C \N{EN DASH} 0.625 ± 0.250 \N{EN DASH} +0.000" in words
    assert "settings differ." in words
    assert "model.group_size 4 8 4" in words
    data = island(page, "data")
    assert data["runs"] == ["A", "B", "C"]
    (reward,) = (chart for group in data["curves"] for chart in group["charts"] if chart["tag"] == "val/reward")
    assert [(one["run"], one["values"], one["margins"]) for one in reward["series"]] == [
        (run, [0.5, 0.75], [0.25, 0.125]) for run in (0, 1)
    ]


def test_a_run_that_went_on_has_all_its_commands_and_all_its_seconds(tmp_path):
    commands = [["perception-r1", "fit", "--task", "counting"], ["perception-r1", "fit", "--ckpt_path", "last"]]
    run = make_run(tmp_path / "a", resumed_from="last.ckpt", earlier_commands=commands)
    words = words_of(page_of(run))
    assert "began with perception-r1 fit --task counting" in words
    assert "went on with perception-r1 fit --ckpt_path last" in words
    assert "elsewhere 25.0 s" in words  # of 100, phases have 75


def test_a_page_without_samples_says_so(tmp_path):
    record = read_record(make_run(tmp_path / "a"))
    assert "Samples None were asked for." in words_of(make_document([record], num_cards=0))


def test_runs_of_different_tasks_share_a_page(tmp_path):
    other = make_run(tmp_path / "b", task=OCR, before=(0.5, 0.5), after=(1.0, 0.5), primary_metrics=["reward"])
    mixed = make_run(tmp_path / "c", task=None, tasks={"many": COUNTING, "ocr": OCR}, after=None, status="running")
    words = words_of(page_of(make_run(tmp_path / "a"), other, mixed))
    assert "GRPO · ocr" in words
    assert "GRPO · counting, ocr" in words
    assert re.search(r"ocr reward B 0\.500 ± 0\.125 0\.750 ± 0\.125", words)
    assert re.search(r"counting reward A 0\.438", words)


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [
        ("running", "open", "running, or killed: it has not told its end"),
        ("failed: ValueError: <no>", "bad", "failed: ValueError: <no>"),
        ("stopped by SIGTERM", "open", "stopped by SIGTERM"),
    ],
)
def test_a_run_that_has_not_come_to_its_end_has_a_page(tmp_path, status, kind, told):
    folder = make_run(tmp_path / "run", after=None, before=(0.5,), status=status, seconds=None, phase_seconds={})
    write_rows(folder / "predictions" / "val" / "before.jsonl", [row(0, 0.25)])
    page = page_of(folder)
    assert f'class="status {kind}"' in page
    assert told in text_of(page)
    assert "1 of 1 answered samples of the val split." in words_of(page)
    assert "decode 24.0 s" in words_of(page)  # from what was logged
    assert "validation 3.0 s" in words_of(page)


def test_a_run_that_has_nothing_yet_has_a_page(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "running"}')
    words = words_of(page_of(tmp_path))
    for told in (
        "No metrics on the test split yet",
        "No curves",
        "No answers were kept",
        "Nothing is known of the phases",
    ):
        assert told in words


def test_no_text_of_a_run_is_markup(tmp_path):
    rows = [row(0, 0.5, id=HOSTILE, query=HOSTILE, completion=HOSTILE, target_in_words=HOSTILE, metrics={HOSTILE: 1.0})]
    rows[0] |= {"prediction_in_words": HOSTILE, "target_overlays": [{"shape": [0, 0, 1, 1], "caption": HOSTILE}]}
    folder = make_run(
        tmp_path / "<b>run",
        before=(0.5,),
        after=(0.5,),
        rows=rows,
        status=HOSTILE,
        command=["x", HOSTILE],
        versions={HOSTILE: HOSTILE},
        hardware={"cpu": HOSTILE, "gpus": [{"name": HOSTILE}]},
        data={"fingerprint": HOSTILE, "splits": {HOSTILE: {"num_samples": 1}}},
        phase_seconds={HOSTILE: 3.0},
        primary_metrics=[HOSTILE],
        resumed_from=HOSTILE,
        config={**CONFIG, HOSTILE.encode("utf-8", "replace").decode(): HOSTILE.replace("\ud800", "")},
        scalars={"train/<img src=x onerror=alert(4)>": {0: 1.0}},
    )
    card = json.loads((folder / "run.json").read_text())
    card["after"] |= {HOSTILE: 1.0}
    (folder / "run.json").write_text(json.dumps(card))
    page = page_of(folder)
    page.encode()  # a lone surrogate of a completion is no text
    tags = Tags(page).found
    assert sum(tag == "script" for tag, _ in tags) == 3
    assert not [tag for tag, _ in tags if tag in ("img", "b", "iframe", "object", "link", "base", "form")]
    assert not [key for _, attributes in tags for key in attributes if key.startswith("on") or key in ("style", "src")]
    assert island(page, "data")["cards"][0]["answers"][1]["completion"] == HOSTILE


def test_the_page_loads_nothing_and_runs_its_own_script_alone(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    tags = Tags(page).found
    (policy,) = (each["content"] for tag, each in tags if tag == "meta" and "http-equiv" in each)
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    for name in ("style", "script"):
        text = re.search(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert "url(" not in page
    assert "fetch(" not in page
    assert MARK in page[:4096]


def test_the_size_of_a_page_is_bounded(tmp_path):
    page = page_of(make_run(tmp_path / "run", before=(0.5,) * 300, after=AFTER * 75), num_cards=5)
    assert len(island(page, "images")) == len(island(page, "data")["cards"]) == 5
    assert "5 of 300 answered samples" in words_of(page)


def test_what_is_not_made_as_an_element_is_text():
    assert element("p", "<b>", element("b", "&"), title='"<') == '<p title="&quot;&lt;">&lt;b&gt;<b>&amp;</b></p>'
