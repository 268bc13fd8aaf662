"""Word metrics of OCR: precision, recall and F1 of the set of words, BLEU and METEOR.

They are those of the evaluation code of Fox and GOT-OCR: both texts are cut at white space or, if one of them holds a
Chinese character, by jieba, whose pieces include the white space; BLEU has up to four words in a row and no smoothing,
so that without four right words in a row it is 0, also for a perfect text of three; METEOR is nltk's. Deviation: two
texts without any word agree in all metrics, where that code fails.

nltk and jieba are an optional extra, imported when first needed. The longest completion that is read takes them 4
seconds at worst (one Chinese character over and over), a page of 2,000 words some hundredths; nltk before 3.10 takes
time in the square of the words, and fails on a long run of the letter y.
"""

import logging
import re
import warnings
from types import SimpleNamespace
from typing import Literal, get_args

from perception_r1.errors import UserError

Equals = Literal["wordnet", "stems"]
"""What METEOR takes as equal besides equal words and stems: the synonyms of WordNet, or nothing."""

NAMES = ("word_precision", "word_recall", "word_f1", "bleu", "meteor")

_CHINESE = re.compile("[\u4e00-\u9fa5]")
_NO_SYNONYMS = SimpleNamespace(synsets=lambda word: [])
"""A WordNet that knows no word."""


def check_available(equals: str) -> None:
    """Refuse what could not be computed here, before anything else takes time.

    Raises:
        UserError: `equals` is unknown, or nltk, jieba or the data of WordNet are missing.
    """
    if equals not in get_args(Equals):
        raise UserError(f"word_metrics must be null or one of {', '.join(get_args(Equals))}, not {equals!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jieba's own, about its age
            import jieba
            from nltk.corpus import wordnet
    except ImportError as error:
        raise UserError(
            "word_metrics needs nltk and jieba; install them with pip install 'perception-r1[ocr]'"
        ) from error
    jieba.setLogLevel(logging.WARNING)
    if equals == "wordnet":
        try:
            wordnet.ensure_loaded()
        except LookupError as error:
            raise UserError(
                "word_metrics: wordnet needs the data of WordNet; fetch it with python -m nltk.downloader wordnet, or "
                "set word_metrics to stems, which knows no synonyms"
            ) from error


def word_metrics(prediction: str | None, target: str, *, equals: Equals) -> dict[str, float]:
    """The five metrics, each 0..1, by `NAMES`; all 0 without a prediction.

    What `check_available` lets pass is there.
    """
    if prediction is None:
        return dict.fromkeys(NAMES, 0.0)
    found, wanted = _cut(prediction, target)
    if not found or not wanted:
        return dict.fromkeys(NAMES, float(found == wanted))
    num_common = len(set(found) & set(wanted))
    precision, recall = num_common / len(set(found)), num_common / len(set(wanted))
    f1 = 2 * precision * recall / (precision + recall) if num_common else 0.0
    return dict(zip(NAMES, (precision, recall, f1, _bleu(found, wanted), _meteor(found, wanted, equals)), strict=True))


def _cut(first: str, second: str) -> tuple[list[str], list[str]]:
    """The words of two texts, found in the same way."""
    if not _CHINESE.search(first) and not _CHINESE.search(second):
        return first.split(), second.split()
    import jieba

    return jieba.lcut(first), jieba.lcut(second)


def _bleu(found: list[str], wanted: list[str]) -> float:
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a metric without smoothing may be 0
        return float(sentence_bleu([wanted], found))


def _meteor(found: list[str], wanted: list[str], equals: Equals) -> float:
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import single_meteor_score

    synonyms = wordnet if equals == "wordnet" else _NO_SYNONYMS
    return float(single_meteor_score(wanted, found, wordnet=synonyms))
