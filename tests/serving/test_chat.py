import base64
import io
import json
from contextlib import suppress

import hypothesis.strategies as st
import pytest
from hypothesis import given
from PIL import Image

from perception_r1.errors import UserError
from perception_r1.serving.chat import as_chunk, read_picture, read_request, write_answer
from perception_r1.serving.generation import Answer, Completion, CompletionParams, check_sampling


def data_url(image, form="PNG"):
    file = io.BytesIO()
    image.save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def request(**options):
    content = [{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": "How many?"}]
    return {"model": "any", "messages": [{"role": "user", "content": content}], **options}


def test_a_request_is_read_as_openai_writes_it():
    options = {"n": 2, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.1}
    found = read_request(request(**options, logprobs=True, stream=True, user="me"), max_new_tokens=50)
    assert found.chat == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    assert found.pictures == ["data:"]
    expected = {"group_size": 2, "max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1}
    assert found.sampling == CompletionParams(**expected)
    assert found.seed == 4
    assert (found.has_logprobs, found.is_streamed, found.has_tokens, found.has_special_tokens) == (1, 1, 0, 0)


def test_what_is_not_said_has_defaults():
    found = read_request(request(max_completion_tokens=None), max_new_tokens=50)
    assert found.sampling == CompletionParams(max_new_tokens=50)
    assert found.seed is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (3, "must be a JSON object"),
        ({}, "messages must be a list"),
        (request(messages=[]), "messages must be a list"),
        (request(messages=[{"role": "tool", "content": "a"}]), "needs a role"),
        (request(messages=[{"role": "user", "content": "a"}]), "1 to 8 pictures, and this one has 0"),
        (request(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "A part of a message"),
        (request(messages=[{"role": "user", "content": [{"type": "video_url", "url": "a"}]}]), "A part of a message"),
        (request(messages=[{"role": "user", "content": None}]), "content of a message"),
        (request(messages=request()["messages"] * 9), "this one has 9"),
        (request(n=1.5), "n must be a whole number"),
        (request(n=True), "n must be a whole number"),
        (request(temperature="hot"), "temperature must be a number"),
        (request(temperature=float("nan")), "temperature must be a number"),
        (request(seed=-1), "seed must be"),
        (request(max_tokens="9"), "max_tokens must be a whole number"),
    ],
)
def test_what_is_wrong_is_refused_in_a_sentence(body, message):
    with pytest.raises(UserError, match=message):
        read_request(body, max_new_tokens=50)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
KEYS = ("messages", "n", "temperature", "top_p", "seed", "max_tokens", "stream", "logprobs", "repetition_penalty")


@given(st.dictionaries(st.sampled_from(KEYS), JSON))
def test_nothing_but_a_sentence_comes_of_any_json(changes):
    with suppress(UserError):
        found = read_request(request() | changes, max_new_tokens=50)
        check_sampling(found.sampling, max_new_tokens=50, max_group_size=4)
        assert 1 <= found.sampling.group_size * found.sampling.max_new_tokens <= 4 * 50


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("group_size", 0), ("group_size", 5), ("max_new_tokens", 0), ("max_new_tokens", 51)],
        *[("temperature", -0.1), ("temperature", 1e9), ("top_p", 0.0), ("top_p", 1.1), ("repetition_penalty", 0.0)],
    ],
)
def test_sampling_that_cannot_be_is_refused(name, value):
    with pytest.raises(UserError, match="must be"):
        check_sampling(CompletionParams(**{"max_new_tokens": 9, name: value}), max_new_tokens=50, max_group_size=4)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_is_read_from_its_data_url(form):
    image = read_picture(data_url(Image.new("RGB", (30, 20), "red"), form), max_pixels=600)
    assert (image.mode, image.size) == ("RGB", (30, 20))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/a.png", "must be a data URL"),
        ("file:///etc/passwd", "must be a data URL"),
        ("/etc/passwd", "must be a data URL"),
        ("data:text/html;base64,aaaa", "must be a data URL"),
        ("data:image/png;base64,a?", "no base64"),
        ("data:image/png;base64,aaaa", "cannot read the picture"),
        (data_url(Image.new("RGB", (30, 21))), "30 x 21 pixels; 600 are the most"),
        (data_url(Image.new("RGB", (30, 20)))[:-30] + "A" * 30, "cannot read the picture"),
    ],
)
def test_anything_else_is_refused(url, message):
    with pytest.raises(UserError, match=message):
        read_picture(url, max_pixels=600)


def test_an_answer_has_openai_s_form():
    completion = Completion(
        text="<|box|>2", plain_text="2", tokens=[7, 8, 9], token_texts=["<|box|>", "2", "<|end|>"],
        logprobs=[-0.5, float("-inf"), -1.0], is_truncated=False,
    )  # fmt: skip
    answer = Answer(prompt_ids=[1, 2], completions=[completion])
    plain = write_answer(read_request(request(), max_new_tokens=9), answer, model="tiny")
    (choice,) = plain["choices"]
    assert choice["message"] == {"role": "assistant", "content": "2"}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    assert plain["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert "token_ids" not in choice
    options = {"logprobs": True, "return_token_ids": True, "skip_special_tokens": False}
    full = write_answer(read_request(request(**options), max_new_tokens=9), answer, model="tiny")
    (choice,) = full["choices"]
    assert full["prompt_token_ids"] == [1, 2]
    assert choice["token_ids"] == [7, 8, 9]
    assert choice["message"]["content"] == "<|box|>2"
    assert [each["logprob"] for each in choice["logprobs"]["content"]] == [-0.5, -9999.0, -1.0]
    json.dumps(full, allow_nan=False)
    assert as_chunk(full)["choices"][0]["delta"] == choice["message"]
