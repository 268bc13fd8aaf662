import base64
import io
import json
from contextlib import suppress

import hypothesis.strategies as st
import pytest
from hypothesis import given
from PIL import Image

from perception_r1.errors import UserError
from perception_r1.serving import chat
from perception_r1.serving.chat import as_chunks, read_pictures, read_request, write_answer
from perception_r1.serving.fields import NO_OPS
from perception_r1.serving.generation import Answer, Completion, CompletionParams, check_sampling

SETTINGS = {"stop_token_ids": [7], "logit_bias": {"5": -100.0}, "chat_template_kwargs": {}}


def data_url(image, form="PNG"):
    file = io.BytesIO()
    image.save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def request(**options):
    content = [{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": "How many?"}]
    return {"model": "any", "messages": [{"role": "user", "content": content}], **options}


def read(body, max_new_tokens=50):
    return read_request(body, max_new_tokens=max_new_tokens, model="any", settings=SETTINGS)


def test_a_request_is_read_as_openai_writes_it():
    options = {"n": 2, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.1}
    found = read(request(**options, logprobs=True, stream=True, user="me"))
    assert found.chat == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    assert found.pictures == ["data:"]
    expected = {"group_size": 2, "max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1}
    assert found.sampling == CompletionParams(**expected)
    assert found.seed == 4
    assert (found.has_logprobs, found.is_streamed, found.has_tokens, found.has_special_tokens) == (1, 1, 0, 0)


def test_what_is_not_said_has_defaults():
    found = read(request(max_completion_tokens=None, seed=None, stop=[], tools=[], unheard_of=None))
    assert found.sampling == CompletionParams(max_new_tokens=50)
    assert found.seed is None


@pytest.mark.parametrize("names", [("max_tokens", "max_completion_tokens"), ("max_completion_tokens", "max_tokens")])
def test_the_longest_completion_has_two_names(names):
    one, other = names
    assert read(request(**{one: 3, other: None})).sampling.max_new_tokens == 3
    assert read(request(**{one: 3, other: 3})).sampling.max_new_tokens == 3
    with pytest.raises(UserError, match="two names of one setting"):
        read(request(**{one: 3, other: 4}))


@pytest.mark.parametrize("name", [*NO_OPS, *SETTINGS])
def test_what_changes_nothing_may_be_said(name):
    expected = read({"messages": request()["messages"]})
    for value in NO_OPS.get(name, (SETTINGS.get(name),)):
        assert read(request(**{name: value})) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("stop", ["a"]), ("stop", "a"), ("top_k", 5), ("min_p", 0.1), ("min_tokens", 3), ("top_logprobs", 5)],
        *[("presence_penalty", 0.5), ("frequency_penalty", -1), ("response_format", {"type": "json_object"})],
        *[("tools", [{}]), ("tool_choice", "required"), ("logit_bias", {"5": 1}), ("stop_token_ids", [7, 8])],
        *[("model", 3), ("chat_template_kwargs", {"enable_thinking": True}), ("foo", 1), ("a\nb" * 99, 1)],
        *[("stream", "yes"), ("logprobs", 1), ("skip_special_tokens", 0), ("return_token_ids", "true")],
        *[("stream_options", {"include_usage": True}), ("stream_options", 3)],  # without a stream
    ],
)
def test_no_setting_is_ignored(name, value):
    with pytest.raises(UserError) as refusal:
        read(request(**{name: value}))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    "change",
    [
        lambda message: message.update(name="me"),
        lambda message: message.update(tool_calls=[{}]),
        lambda message: message["content"][0].update(uuid="a"),
        lambda message: message["content"][0]["image_url"].update(detail="low"),
        lambda message: message["content"][1].update(cache_control={"type": "ephemeral"}),
    ],
)
def test_nothing_of_a_message_is_ignored(change):
    body = request()
    change(body["messages"][0])
    with pytest.raises(UserError, match=r"leave it out\.$"):
        read(body)


def test_a_message_may_say_what_openai_s_own_client_says_of_every_message():
    body = request()
    body["messages"][0] |= {"refusal": None, "annotations": [], "tool_calls": None}
    body["messages"][0]["content"][0]["image_url"]["detail"] = "auto"
    assert read(body) == read(request())


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
        (request(model="other"), r"model must be any, the only one here, or left out\."),
        (request(n=1.5), "n must be a whole number"),
        (request(n=True), "n must be a whole number"),
        (request(temperature="hot"), "temperature must be a number"),
        (request(temperature=float("nan")), "temperature must be a number"),
        (request(seed=-1), "seed must be"),
        (request(max_tokens="9"), "max_tokens must be a whole number"),
        (request(temperature=10**400), "temperature must be a number"),
        (request(n=10**4000), r"n must be a whole number\.$"),
        (request(seed=2**63), r"seed must be a whole number\.$"),
        (request(messages=[{"role": "user", "content": "\ud800"}]), "half of a character"),
        (request(messages=[{"role": "user", "content": "a" * 100_001}]), "at most 100,000 characters"),
    ],
)
def test_what_is_wrong_is_refused_in_a_sentence(body, message):
    with pytest.raises(UserError, match=message):
        read(body)


NUMBERS = st.integers() | st.integers(10**300, 10**400)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
KEYS = (
    "messages",
    "model",
    "stop",
    "stream_options",
    "top_k",
    "n",
    "temperature",
    "top_p",
    "seed",
    "max_tokens",
    "stream",
    "logprobs",
    "repetition_penalty",
)


@given(st.dictionaries(st.sampled_from(KEYS), JSON))
def test_nothing_but_a_sentence_comes_of_any_json(changes):
    with suppress(UserError):
        found = read(request() | changes)
        check_sampling(found.sampling, max_new_tokens=50, max_group_size=4)
        assert 1 <= found.sampling.group_size * found.sampling.max_new_tokens <= 4 * 50


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("group_size", 0), ("group_size", 5), ("max_new_tokens", 0), ("max_new_tokens", 51)],
        *[("temperature", -0.1), ("temperature", 2.1), ("top_p", 0.0), ("top_p", 1.1), ("repetition_penalty", 0.0)],
    ],
)
def test_sampling_that_cannot_be_is_refused(name, value):
    with pytest.raises(UserError, match="must be"):
        check_sampling(CompletionParams(**{"max_new_tokens": 9, name: value}), max_new_tokens=50, max_group_size=4)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_is_read_from_its_data_url(form):
    (image,) = read_pictures([data_url(Image.new("RGB", (30, 20), "red"), form)], max_pixels=600)
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
        read_pictures([url], max_pixels=600)


def test_the_pictures_of_a_request_are_counted_together_and_before_one_is_unpacked(monkeypatch):
    urls = [data_url(Image.new("RGB", (30, 20))), data_url(Image.new("RGB", (9, 5)))]
    assert [image.size for image in read_pictures(urls, max_pixels=645)] == [(30, 20), (9, 5)]
    monkeypatch.setattr(chat, "load_image", None)
    with pytest.raises(
        UserError, match=r"The pictures have 30 x 20 and 9 x 5 pixels; 644 are the most of all together\."
    ):
        read_pictures(urls, max_pixels=644)


def test_an_answer_has_openai_s_form():
    completion = Completion(
        text="<|box|>2", plain_text="2", tokens=[7, 8, 9], token_texts=["<|box|>", "2", "<|end|>"],
        logprobs=[-0.5, float("-inf"), -1.0], is_truncated=False,
    )  # fmt: skip
    answer = Answer(prompt_ids=[1, 2], completions=[completion])
    plain = write_answer(read(request()), answer, model="tiny")
    (choice,) = plain["choices"]
    assert choice["message"] == {"role": "assistant", "content": "2"}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    assert plain["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert "token_ids" not in choice
    options = {"logprobs": True, "return_token_ids": True, "skip_special_tokens": False}
    full = write_answer(read(request(**options)), answer, model="tiny")
    (choice,) = full["choices"]
    assert full["prompt_token_ids"] == [1, 2]
    assert choice["token_ids"] == [7, 8, 9]
    assert choice["message"]["content"] == "<|box|>2"
    assert [each["logprob"] for each in choice["logprobs"]["content"]] == [-0.5, -9999.0, -1.0]
    json.dumps(full, allow_nan=False)


def test_a_stream_has_the_usage_at_its_end_where_it_is_wanted():
    answer = Answer(prompt_ids=[1, 2], completions=[])
    plain, counted = (
        read(request(stream=True, stream_options={"include_usage": is_wanted})) for is_wanted in (False, True)
    )
    body = write_answer(counted, answer, model="tiny")
    (only,) = as_chunks(plain, body)
    first, last = as_chunks(counted, body)
    assert only == first
    assert "usage" not in first
    assert (last["choices"], last["usage"]["prompt_tokens"]) == ([], 2)
    assert first["object"] == last["object"] == "chat.completion.chunk"
