import math
import random
import sys
from collections import Counter
from pathlib import Path

import jieba
import nltk
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.corpus import LazyCorpusLoader
from nltk.corpus.reader import WordNetCorpusReader
from nltk.stem.porter import PorterStemmer

from perception_r1.errors import UserError
from perception_r1.metrics import make_metrics, update_metrics
from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize, Sample
from perception_r1.scoring import parse_completions, score_completions
from perception_r1.tasks._word_metrics import NAMES, word_metrics
from perception_r1.tasks.ocr import Ocr, OcrTarget
from tests.hostile import WORST, filled, texts
from tests.tasks.test_ocr import naive_distance

FRAME = ImageSize(width=100, height=50, resized_width=84, resized_height=56)
CODEC = CODECS["qwen2_vl"]
WORDS = ["The", "the", "cat", "cats", "sat", "sitting", "on", "a", "mat", "car", "auto", "page", "pages", "7"]
SYNONYMS = {"car": {"car", "auto"}, "auto": {"car", "auto"}}


def exactly(values: dict[str, float]) -> object:
    return pytest.approx(values, abs=1e-9, rel=0)


def naive_bleu(found: list[str], wanted: list[str]) -> float:
    """Papineni's formula: geometric mean of the clipped precisions of 1 to 4 words in a row, times brevity penalty."""
    product = 1.0
    for n in range(1, 5):
        grams, right = (
            Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1)) for words in (found, wanted)
        )
        if not grams & right:
            return 0.0
        product *= (grams & right).total() / grams.total()
    return product**0.25 * math.exp(min(0, 1 - len(wanted) / len(found)))


def naive_meteor(found: list[str], wanted: list[str], synonyms: dict[str, set[str]]) -> float:
    """Lavie and Agarwal's formula on nltk's alignment: equal words, then stems, then synonyms, from the last on."""
    found, wanted, stem = [word.lower() for word in found], [word.lower() for word in wanted], PorterStemmer().stem
    pairs: dict[int, int] = {}
    kinds = [
        lambda a, b: a == b,
        lambda a, b: stem(a) == stem(b),
        lambda a, b: b in synonyms.get(a, {a}),
    ]
    for is_equal in kinds:
        for i in reversed(range(len(found))):
            for j in reversed(range(len(wanted))):
                if i not in pairs and j not in pairs.values() and is_equal(found[i], wanted[j]):
                    pairs[i] = j
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / len(found), len(pairs) / len(wanted)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    num_chunks = sum(pairs.get(i - 1) != j - 1 for i, j in pairs.items())
    return mean * (1 - 0.5 * (num_chunks / len(pairs)) ** 3)


def naive_metrics(prediction: str, target: str, synonyms: dict[str, set[str]]) -> dict[str, float]:
    """The protocol's six metrics."""
    is_chinese = any("\u4e00" <= char <= "\u9fa5" for char in prediction + target)
    found, wanted = (list(jieba.cut(text)) if is_chinese else text.split() for text in (prediction, target))
    common = [word for word in set(found) if word in wanted]
    precision, recall = len(common) / len(set(found)), len(common) / len(set(wanted))
    return {
        "edit_distance": naive_distance(prediction, target) / max(len(prediction), len(target)),
        "word_precision": precision,
        "word_recall": recall,
        "word_f1": 2 / (1 / precision + 1 / recall) if common else 0.0,
        "bleu": naive_bleu(found, wanted),
        "meteor": naive_meteor(found, wanted, synonyms),
    }


def make_pages(seed: int, count: int) -> list[tuple[str, str]]:
    """Predictions and targets: some words replaced, left out, doubled or moved."""
    rng = random.Random(seed)
    pages = []
    for _ in range(count):
        wanted = rng.choices(WORDS, k=rng.randrange(1, 25))
        found = [word for word in wanted for _ in range(rng.choice([0, *[1] * 8, 2]))]
        found = [rng.choice(WORDS) if rng.random() < 0.1 else word for word in found] or ["none"]
        if rng.random() < 0.3:
            found = found[len(found) // 2 :] + found[: len(found) // 2]
        pages.append((" ".join(found), rng.choice([" ", "\n", "  "]).join(wanted)))
    return pages


CHINESE = [
    ("我来到北京清华大学", "我来到了北京 清华大学"),
    ("hello world", "你好 world"),
    ("一二三四五六七", "一二三四五六七"),
]


@pytest.fixture
def wordnet(tmp_path, monkeypatch) -> None:
    """WordNet's files with a single synset, read by nltk as the real ones."""
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for name in ("adj", "adv", "noun", "verb"):
        for file in (f"{name}.exc", f"index.{name}", f"data.{name}"):
            (folder / file).write_text("")
    (folder / "data.adj").write_text("  1 WordNet 3.0 Copyright\n")
    for file in ("cntlist.rev", "index.sense"):
        (folder / file).write_text("")
    (folder / "lexnames").write_text("0\tnoun.artifact\t1\n")
    (folder / "data.noun").write_text("00000000 00 n 02 car 0 auto 0 000 | a vehicle  \n")
    (folder / "index.noun").write_text("auto n 1 0 1 0 00000000  \ncar n 1 0 1 0 00000000  \n")
    _use_wordnet_of(tmp_path, monkeypatch)


def _use_wordnet_of(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(folder)])
    monkeypatch.setattr(nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, object()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("equals", "synonyms"), [("stems", {}), ("wordnet", SYNONYMS)])
def test_all_figures_are_those_of_the_protocol(wordnet, seed, equals, synonyms):
    task = Ocr(word_metrics=equals)
    pages = make_pages(seed, 40) + CHINESE
    samples = [
        Sample(id=str(k), image=Path(), width=100, height=50, query="", target=OcrTarget(text=wanted))
        for k, (_, wanted) in enumerate(pages)
    ]
    parsed = parse_completions(
        task, CODEC, samples=samples, image_sizes=[FRAME] * 43, completions=[text for text, _ in pages]
    )
    scored_completions = score_completions(task, parsed, is_evaluation=True)
    wanted = [naive_metrics(*page, synonyms) for page in pages]
    for scored, metrics in zip(scored_completions, wanted, strict=True):
        assert {name: scored.score.metrics[name] for name in metrics} == exactly(metrics)
    metrics = make_metrics(task)
    random.Random(seed).shuffle(scored_completions)
    for start in range(0, 43, 5):
        update_metrics(metrics, scored_completions[start : start + 5])
    means = {name: math.fsum(metrics[name] for metrics in wanted) / 43 for name in wanted[0]}
    values = metrics.compute()
    assert {name: values[name].item() for name in means} == exactly(means)
    assert 0 < means["bleu"] < means["meteor"] < 1


def test_figures_worked_by_hand():
    target = "the cat sat on the mat"
    found = word_metrics("the the cat on the mats", target, equals="stems")
    # sets {the, cat, on, mats} and {the, cat, sat, on, mat}
    assert [found[name] for name in NAMES[:3]] == pytest.approx([3 / 4, 3 / 5, 2 / 3])
    assert found["bleu"] == pytest.approx(0, abs=1e-9)  # no four words are right
    # the | the | cat | on the mat: 5 of 6 matched on each side, with one "the" too many
    assert found["meteor"] == pytest.approx(5 / 6 * (1 - 0.5 * (2 / 5) ** 3))
    longer = word_metrics("the cat sat on the mat again", target, equals="stems")
    assert longer["bleu"] == pytest.approx((6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)
    shorter = word_metrics("the cat sat on", target, equals="stems")
    assert shorter["bleu"] == pytest.approx(math.exp(1 - 6 / 4))
    assert word_metrics("on the mat", "on the mat", equals="stems")["bleu"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "target", "value"),
    [("", "", 1), (" \n", "", 1), ("", "a", 0), ("a", "", 0), ("", "中", 0), (None, "", 0), (None, "a", 0)],
)
def test_texts_without_words(prediction, target, value):
    assert word_metrics(prediction, target, equals="stems") == dict.fromkeys(NAMES, value)


def test_word_figures_are_for_evaluation_only():
    sample = Sample(id="1", image=Path(), width=100, height=50, query="", target=OcrTarget(text="a b c d"))
    arguments = {"samples": [sample], "image_sizes": [FRAME], "completions": ["a b c d"]}
    task = Ocr(word_metrics="stems")
    parsed = parse_completions(task, CODEC, **arguments)
    assert set(score_completions(task, parsed)[0].score.metrics) == set(Ocr.metric_names)
    (scored,) = score_completions(task, parsed, is_evaluation=True)
    assert tuple(scored.score.metrics) == (*Ocr.metric_names, *NAMES)
    assert scored.score.metrics["bleu"] == 1
    assert set(score_completions(Ocr(), parsed, is_evaluation=True)[0].score.metrics) == set(Ocr.metric_names)


@pytest.mark.parametrize("package", ["nltk.corpus", "jieba"])
def test_without_the_packages_only_who_asks_is_refused(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    Ocr()
    with pytest.raises(UserError, match=r"pip install 'perception-r1\[ocr\]'"):
        Ocr(word_metrics="stems")


def test_without_wordnet_there_is_a_sentence(tmp_path, monkeypatch):
    _use_wordnet_of(tmp_path, monkeypatch)
    Ocr(word_metrics="stems")
    with pytest.raises(UserError, match=r"python -m nltk\.downloader wordnet") as caught:
        Ocr(word_metrics="wordnet")
    assert "\n" not in str(caught.value)


def test_unknown_word_figures_are_refused():
    with pytest.raises(UserError, match="word_metrics must be null or one of wordnet, stems, not 'all'"):
        Ocr(word_metrics="all")


def check_bounds(found: dict[str, float]) -> None:
    assert tuple(found) == NAMES
    assert all(0 <= value <= 1 + 1e-9 for value in found.values())


@given(first=texts | st.text("中文a ", max_size=9), second=texts | st.text("中文a ", max_size=9))
def test_hostile_texts_are_scored_without_a_complaint(first, second):
    check_bounds(word_metrics(first, second, equals="stems"))


REPEATED = {"one word": "a ", "one letter": "y", "endings": "ing", "words": "to be or ", "Chinese": "中a"}


@pytest.mark.parametrize("text", [*WORST.values(), *map(filled, REPEATED.values())], ids=[*WORST, *REPEATED])
def test_worst_cases_are_scored_without_a_complaint(text):
    check_bounds(word_metrics(text, text[:-1], equals="stems"))
    check_bounds(word_metrics(text, "some other words", equals="stems"))
