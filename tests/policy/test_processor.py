import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.processing_utils import ProcessorMixin

from perception_r1.errors import UserError
from perception_r1.policy.families import FAMILIES, QWEN_FAMILIES
from perception_r1.policy.families.qwen_vl import QwenVLProcessor
from perception_r1.policy.load import PolicyConfig, load_processor
from perception_r1.policy.policy import Policy
from perception_r1.records import ImageSize, LabelledBox, Sample
from perception_r1.rows import Row
from perception_r1.tasks.detection import Detection
from tests.policy.oracle import CHATS, PATCH_FAMILIES, chat, encode, inputs, noise

families = pytest.mark.parametrize("family", PATCH_FAMILIES)


@pytest.mark.parametrize("family", QWEN_FAMILIES)
@pytest.mark.parametrize("size", [(640, 480), (333, 1000), (28, 28), (5, 9), (1000, 6)])
def test_the_image_size_is_that_of_smart_resize(model_folders, family, size):
    processor = load_processor(model_folders[family], max_pixels=100_000)
    width, height = size
    batch = processor.encode([chat("Where?")], [[noise(width, height)]], max_tokens=None)
    factor = 2 * QWEN_FAMILIES[family].patch_size
    rows, columns = smart_resize(height, width, factor=factor, min_pixels=factor**2, max_pixels=100_000)
    assert batch.image_sizes == (ImageSize(width=width, height=height, resized_width=columns, resized_height=rows),)
    assert int((batch.input_ids[0] == processor.image_token_id).sum()) == rows * columns // factor**2
    assert [len(pixels) for pixels in batch.pixel_values] == [math.prod(grid) for grid in batch.image_grids]
    patch = processor.image_processor.patch_size
    assert batch.image_grids == ((1, rows // patch, columns // patch),)


def test_pixel_bounds_change_what_the_model_sees(folder):
    def seen(**bounds):
        image_size = (
            load_processor(folder, **bounds).encode([chat("")], [[noise(300, 300)]], max_tokens=None).image_sizes[0]
        )
        return image_size.resized_width * image_size.resized_height

    assert seen(max_pixels=28 * 28 * 9) <= 28 * 28 * 9 < seen() < 500_000 <= seen(min_pixels=500_000)


def test_bounds_that_exclude_each_other_are_refused(folder):
    with pytest.raises(UserError, match=r"min_pixels \(50000\) must not exceed max_pixels \(1000\)"):
        load_processor(folder, min_pixels=50_000, max_pixels=1000)


def test_prompts_are_neither_padded_nor_cut(folder):
    processor = load_processor(folder)
    processor.tokenizer.model_max_length = 10
    batch = encode(processor)
    for row, length in zip(batch.input_ids, batch.lengths, strict=True):
        assert row.shape == (length,)
        assert processor.tokenizer.decode(row).endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert processor.tokenizer.decode(row).startswith("<|im_start|>user\n<|vision_start|><|image_pad|>")


TEXT, IMAGE = {"type": "text", "text": "a, b"}, {"type": "image"}


@pytest.mark.parametrize("family", PATCH_FAMILIES, indirect=True)
@pytest.mark.parametrize("parts", [[IMAGE, TEXT], [TEXT, IMAGE], [IMAGE, TEXT, IMAGE, IMAGE], [IMAGE] * 2], ids=str)
def test_positions_are_those_of_transformers(policy, parts):
    sizes = [(84, 112), (28, 112), (56, 56)][: parts.count(IMAGE)]
    chat = [{"role": "user", "content": parts}]
    batch = policy.processor.encode([chat], [[noise(*size) for size in sizes]], max_tokens=None)
    plain = inputs(policy.model, batch)
    positions, _ = policy.model.model.get_rope_index(
        plain["input_ids"], plain["mm_token_type_ids"], image_grid_thw=plain["image_grid_thw"]
    )
    assert torch.equal(batch.position_ids[0], positions[:, 0])
    assert batch.next_positions == (int(positions.max()) + 1,)
    assert batch.next_positions[0] < batch.lengths[0]


@families
@pytest.mark.parametrize("index", range(len(CHATS)))
def test_prompts_are_those_of_transformers(model_folders, family, index, monkeypatch):
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *args, **kwargs: None)  # no videos
    processor = load_processor(model_folders[family])
    batch = encode(processor, [index])
    text, sizes = CHATS[index]
    own = getattr(transformers, PROCESSOR_MAPPING_NAMES[family])(
        image_processor=processor.image_processor,
        tokenizer=AutoTokenizer.from_pretrained(model_folders[family]),
        chat_template=processor.tokenizer.chat_template,
    )
    expected = own(
        images=[noise(*size, seed=index) for size in sizes],
        text=[
            processor.tokenizer.apply_chat_template(
                chat(text, len(sizes)), tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        ],
        return_tensors="pt",
        add_special_tokens=False,
    )
    assert torch.equal(batch.input_ids[0], expected["input_ids"][0])
    assert torch.equal(torch.cat(batch.pixel_values), expected["pixel_values"])
    assert batch.image_grids == tuple(map(tuple, expected["image_grid_thw"].tolist()))


def test_glm4v_is_asked_not_to_think_and_closes_its_answer_as_a_turn(model_folders):
    policy = Policy.load(PolicyConfig(name=str(model_folders["glm4v"])))
    (row,) = policy.processor.encode([chat("Where?")], [[noise(28, 28)]], max_tokens=None).input_ids
    assert policy.processor.decode([row]) == [
        "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>Where?/nothink"
        "<|assistant|>\n<think></think>\n"
    ]
    token = policy.processor.tokenizer.convert_tokens_to_ids
    assert policy.encode_targets(["[]"])[0][-1] == token("<|user|>") == policy.eos_token_ids[0]
    ends = {token("<|endoftext|>"), token("<|observation|>")}
    assert ends <= set(policy.eos_token_ids.tolist())
    pictures = [f"<|{side}_of_{name}|>" for name in ("image", "video") for side in ("begin", "end")]
    assert {token(name) for name in (*pictures, "<|image|>", "<|video|>")} == set(policy.suppress_tokens.tolist())


@families
def test_the_form_survives_the_tokenizer(model_folders, family):
    processor, codec = load_processor(model_folders[family]), FAMILIES[family].codec
    image_size = processor.image_size(640, 480)
    objects = [LabelledBox(label="red cup", box=(0.1, 0.2, 0.3, side)) for side in (0.4, 0.9)]
    text = codec.format_boxes(objects, image_size)
    (row,) = processor.encode_targets([text], processor.tokenizer.eos_token_id)
    found = codec.parse_boxes(processor.decode([row[:-1]])[0], image_size)
    assert found == codec.parse_boxes(text, image_size)
    assert found.is_exact


def test_a_prompt_that_is_too_long_is_an_error(folder):
    processor = load_processor(folder)
    length = max(encode(processor).lengths)
    for limit, is_accepted in ((length, True), (length - 1, False)):
        args = [chat("Compare the first picture with the second one, please.", 2)], [[noise(84, 28), noise(56, 56)]]
        if is_accepted:
            processor.encode(*args, max_tokens=limit)
            continue
        with pytest.raises(UserError, match=f"{length} tokens but max_prompt_length is {limit}"):
            processor.encode(*args, max_tokens=limit)


@pytest.mark.parametrize(("num_named", "num_given"), [(1, 2), (2, 1), (0, 1)])
def test_another_number_of_pictures_than_named_is_an_error(folder, num_named, num_given):
    with pytest.raises(UserError, match=f"names {num_named} pictures but has {num_given}"):
        load_processor(folder).encode([chat("", num_named)], [[noise(28, 28)] * num_given], max_tokens=None)


def test_a_placeholder_in_the_text_is_an_error(folder):
    with pytest.raises(UserError, match="does its text contain"):
        load_processor(folder).encode([chat(QwenVLProcessor.image_token)], [[noise(28, 28)]], max_tokens=None)


def test_a_picture_that_is_too_narrow_is_an_error(folder):
    with pytest.raises(UserError, match=r"1 x 300 pixels.*200"):
        load_processor(folder).encode([chat("")], [[noise(1, 300)]], max_tokens=None)


def test_a_tokenizer_without_chat_template_is_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        QwenVLProcessor(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder))


THINKING = (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}"
)
"""What a model that thinks, as Qwen3.5, is given to go on from."""


def test_a_model_that_can_think_is_asked_for_its_answer_alone(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template += THINKING
    processor = QwenVLProcessor(tokenizer, load_processor(folder).image_processor)
    prompt = encode(processor, [0])
    text = tokenizer.decode(prompt.input_ids[0])
    assert text == tokenizer.decode(encode(load_processor(folder), [0]).input_ids[0]) + "<think>\n\n</think>\n\n"
    assert processor.num_prompt_tokens(prompt.chats[0], prompt.image_sizes[0]) == prompt.lengths[0]
    assert (processor.template_options, load_processor(folder).template_options) == ({"enable_thinking": False}, {})


def test_special_tokens_survive_encoding_and_decoding(folder):
    processor = load_processor(folder)
    text = "<|object_ref_start|>a cup , ok<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    row = processor.encode_targets([text], processor.tokenizer.eos_token_id)[0]
    assert row[0] == processor.tokenizer.convert_tokens_to_ids("<|object_ref_start|>")
    assert processor.decode([row]) == [text + "<|im_end|>"]
    assert processor.decode([row[:0]]) == [""]


def test_any_bytes_can_be_decoded(folder):
    processor = load_processor(folder)
    assert all(isinstance(text, str) for text in processor.decode([torch.arange(288), torch.tensor([255, 200])]))


@families
def test_what_is_saved_encodes_the_same(model_folders, family, tmp_path):
    processor = load_processor(model_folders[family], max_pixels=28 * 28 * 8)
    processor.save(tmp_path)
    shutil.copy(model_folders[family] / "config.json", tmp_path)
    one, other = encode(processor), encode(load_processor(tmp_path))
    assert all(map(torch.equal, one.input_ids, other.input_ids))
    assert all(map(torch.equal, one.pixel_values, other.pixel_values))


SIZES = [(640, 480), (333, 1000), (5000, 200), (28, 28)]
BOUNDS = [{}, {"max_pixels": 200_000}, {"min_pixels": 500_000}, {"min_pixels": 150_000, "max_pixels": 160_000}]
ROUNDING = 0.006
"""Pixels are described with two decimals."""


@families
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_box_at_known_pixels_survives_the_way_through_text(model_folders, family, bounds, size):
    """Row in pixels, fractions, the family's units in text, and back to pixels: off by one unit at most."""
    processor, (width, height) = load_processor(model_folders[family], **bounds), size
    image_size = processor.image_size(width, height)
    # what the image processor itself makes of such a picture
    shape = processor.image_processor(images=Image.new("RGB", size), return_tensors="pt")["image_grid_thw"][0].tolist()
    patch = processor.image_processor.patch_size
    assert (image_size.resized_height, image_size.resized_width) == (shape[1] * patch, shape[2] * patch)
    codec, task = FAMILIES[family].codec, Detection(categories=("dog",))
    boxes = [
        (0, 0, width, height),
        (width // 3, height // 4, width // 3 + width // 7, height // 2),
        (width - 7, height - 5, width, height),
        (3, 2, 13, 11),
    ]
    row = Row({"objects": [{"box": list(box), "label": "dog"} for box in boxes]}, width=width, height=height)
    query, target = task.read_row(row)
    sample = Sample(id="", image=Path("a.png"), width=width, height=height, query=query, target=target)
    text = task.target_text(sample, codec, image_size)
    found = task.serialize_prediction(task.parse_completion(text + "<|im_end|>", codec, image_size), image_size)[
        "objects"
    ]
    columns, rows = (image_size.resized_width, image_size.resized_height) if family == "qwen2_5_vl" else (1000, 1000)
    assert len(found) == len(boxes)
    for item, box in zip(found, boxes, strict=True):
        assert item["box"][0::2] == pytest.approx(box[0::2], abs=width / columns + ROUNDING)
        assert item["box"][1::2] == pytest.approx(box[1::2], abs=height / rows + ROUNDING)
    assert found[0]["box"] == [0, 0, width, height]


@families
def test_pixels_are_those_of_the_image_processor_bit_by_bit(model_folders, family):
    processor = load_processor(model_folders[family], max_pixels=100_000)
    pictures = [noise(200, 120), noise(56, 84, seed=1), Image.linear_gradient("L").convert("RGB")]
    expected = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    as_bytes = processor.encode_bytes([chat("")] * 3, [[picture] for picture in pictures], max_tokens=None)
    assert torch.equal(torch.cat(processor.normalize(as_bytes).pixel_values), expected)
    num_bytes = sum(pixels.nbytes for pixels in as_bytes.pixel_values)
    assert num_bytes * 8 == expected.nbytes


@pytest.mark.parametrize("without", [{}, {"do_normalize": False}, {"do_rescale": False}], ids=str)
def test_every_byte_has_the_value_of_the_image_processor(folder, without):
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(
        folder, image_mean=[0.1, 0.5, 0.9], image_std=[0.3, 0.5, 0.7], **without
    )
    processor = QwenVLProcessor(AutoTokenizer.from_pretrained(folder), image_processor)
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16)
    picture = Image.fromarray(torch.stack([levels, levels.T, levels.flip(0)], 2).numpy()).resize((448, 448), 0)
    expected = image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    batch = processor.encode([chat("")], [[picture]], max_tokens=None)
    assert [len(channel.unique()) for channel in expected.view(len(expected), 3, -1).unbind(1)] == [256] * 3
    assert torch.equal(batch.pixel_values[0], expected)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 200), (200, 1), (2, 399), (27, 28), (29, 5800), (4000, 20), (3001, 2999), (20000, 100)]
)
def test_a_picture_that_passes_the_check_is_encoded_at_the_size_that_was_checked(folder, size):
    """From one pixel to the narrowest that is accepted."""
    processor = load_processor(folder)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    expected = processor.image_size(*size)
    num_tokens = processor.num_prompt_tokens(chat, expected)
    processor.check_prompt(chat, width=size[0], height=size[1], max_tokens=num_tokens)
    prompts = processor.encode_bytes([chat], [[Image.new("RGB", size)]], max_tokens=num_tokens)
    side = processor.image_processor.patch_size
    ((_, rows, columns),) = prompts.image_grids
    assert (columns * side, rows * side) == (expected.resized_width, expected.resized_height)
    assert prompts.lengths == [num_tokens]
    with pytest.raises(UserError, match=f"has {num_tokens} tokens but"):
        processor.check_prompt(chat, width=size[0], height=size[1], max_tokens=num_tokens - 1)


@pytest.mark.parametrize("size", [(1, 201), (4020, 20)])
def test_a_picture_that_is_too_narrow_is_refused_before_it_is_read(folder, size):
    processor = load_processor(folder)
    with pytest.raises(UserError, match="one side may be at most 200 times the other"):
        processor.check_prompt([], width=size[0], height=size[1], max_tokens=None)
