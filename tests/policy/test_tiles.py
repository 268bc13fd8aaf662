"""Processors of the families outside Qwen-VL, beside transformers' own classes."""

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from perception_r1.errors import UserError
from perception_r1.policy.families import FAMILIES
from perception_r1.policy.families.tiles import TileProcessor
from perception_r1.policy.load import load_processor
from perception_r1.records import ImageSize, LabelledBox
from tests.policy.oracle import CHATS, chat, encode, noise
from tests.tiny_models import TILE, TOKENS

families = pytest.mark.parametrize(
    "family", [name for name, family in FAMILIES.items() if issubclass(family.processor, TileProcessor)]
)
SIZES = [(56, 84), (640, 480), (333, 1000), (5000, 200), (28, 28), (5, 9)]


def hub_processor(folder, family, monkeypatch):
    """Transformers' own, of the same tokenizer and image processor; that for videos wants torchvision."""
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *args, **kwargs: None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return getattr(transformers, PROCESSOR_MAPPING_NAMES[family])(
        image_processor=load_processor(folder).image_processor,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=TOKENS,
    )


@families
@pytest.mark.parametrize("index", range(len(CHATS)))
def test_prompts_are_those_of_transformers(model_folders, family, index, monkeypatch):
    processor = load_processor(model_folders[family])
    batch = encode(processor, [index])
    text, sizes = CHATS[index]
    pictures = [noise(*size, seed=index) for size in sizes]
    messages = [chat(text, len(sizes))]
    expected = hub_processor(model_folders[family], family, monkeypatch)(
        images=[pictures],
        text=[processor.tokenizer.apply_chat_template(messages[0], tokenize=False, add_generation_prompt=True)],
        return_tensors="pt",
        add_special_tokens=False,
    )
    assert torch.equal(batch.input_ids[0], expected["input_ids"][0])
    assert torch.equal(torch.cat(batch.pixel_values), expected["pixel_values"])
    is_image = batch.input_ids[0] == processor.image_token_id
    for name, value in FAMILIES[family].mask_inputs(is_image).items():
        assert torch.equal(value, expected[name][0])
    assert torch.equal(batch.position_ids[0], torch.arange(batch.lengths[0]).expand(3, -1))
    assert batch.next_positions == tuple(batch.lengths)


@families
@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_known_without_the_picture(model_folders, family, size):
    processor = load_processor(model_folders[family])
    batch = processor.encode([chat("Where?")], [[noise(*size)]], max_tokens=None)
    found = processor.image_processor(images=[noise(*size)], return_tensors="pt", **processor.call_options)
    assert batch.image_sizes == (processor.image_size(*size),)
    assert batch.pixel_values[0].shape == found["pixel_values"].shape == processor.pixel_shape(batch.image_grids[0])
    num_features = int((batch.input_ids[0] == processor.image_token_id).sum())
    assert num_features == processor.num_image_tokens(batch.image_sizes[0]) == TOKENS * len(batch.pixel_values[0])
    assert processor.num_prompt_tokens(chat("Where?"), batch.image_sizes[0]) == batch.lengths[0]
    assert num_features <= processor.num_image_tokens(processor.largest_image_size)


@families
def test_pixels_are_those_of_the_image_processor_bit_by_bit(model_folders, family):
    processor = load_processor(model_folders[family])
    pictures = [noise(200, 120), noise(56, 84, seed=1), Image.linear_gradient("L").convert("RGB")]
    expected = processor.image_processor(images=pictures, return_tensors="pt", **processor.call_options)
    as_bytes = processor.encode_bytes([chat("")] * 3, [[picture] for picture in pictures], max_tokens=None)
    assert {pixels.dtype for pixels in as_bytes.pixel_values} == {torch.uint8}
    assert torch.equal(torch.cat(processor.normalize(as_bytes).pixel_values), expected["pixel_values"])


def test_bounds_of_internvl_are_whole_tiles(model_folders):
    folder, tile = model_folders["internvl"], TILE**2
    assert load_processor(folder).pixel_bounds == (tile, 4 * tile)
    assert load_processor(folder, min_pixels=tile + 1, max_pixels=9 * tile - 1).pixel_bounds == (2 * tile, 8 * tile)
    assert load_processor(folder, max_pixels=8 * tile).image_size(2000, 1000).resized_width == 4 * TILE
    assert load_processor(folder, max_pixels=tile).image_size(2000, 10) == ImageSize(
        width=2000, height=10, resized_width=TILE, resized_height=TILE
    )
    with pytest.raises(UserError, match=f"max_pixels is {tile - 1}; a picture is at least a tile of {tile} pixels"):
        load_processor(folder, max_pixels=tile - 1)
    with pytest.raises(UserError, match=r"min_pixels \(5 tiles of 784 pixels\) must not exceed max_pixels \(4 tiles\)"):
        load_processor(folder, min_pixels=5 * tile)
    with pytest.raises(UserError, match="min_pixels is 0"):
        load_processor(folder, min_pixels=0)


@pytest.mark.parametrize("bound", ["min_pixels", "max_pixels"])
def test_gemma3_has_no_bounds(model_folders, bound):
    with pytest.raises(UserError, match=f"sees pictures at {TILE} x {TILE} pixels; leave out min"):
        load_processor(model_folders["gemma3"], **{bound: 100_000})


def test_internvl_cuts_pictures_up_whatever_its_files_say(model_folders, tmp_path):
    processor = load_processor(model_folders["internvl"])
    options = {"size": {"height": TILE, "width": TILE}, "max_patches": 4, "crop_to_patches": False}
    other = type(processor)(
        processor.tokenizer, GotOcr2ImageProcessorPil(**options), num_patches=4, tokens_per_tile=TOKENS
    )
    one, two = encode(processor), encode(other)
    assert all(map(torch.equal, one.pixel_values, two.pixel_values))


def test_a_picture_as_gemma3_sees_it_is_seen_as_the_same_again(model_folders):
    processor = load_processor(model_folders["gemma3"])
    batch = encode(processor)
    pictures = processor.pictures(batch)
    assert [[picture.size for picture in group] for group in pictures] == [[(TILE, TILE)] * n for n in (1, 2, 1)]
    again = processor.encode(list(batch.chats), pictures, max_tokens=None)
    assert all(map(torch.equal, again.pixel_values, batch.pixel_values))


@families
def test_a_placeholder_in_the_text_is_an_error(model_folders, family):
    processor = load_processor(model_folders[family])
    for token in {processor.image_token, processor.feature_token}:
        with pytest.raises(UserError, match="does its text contain"):
            processor.encode([chat(f"a {token}")], [[noise(28, 28)]], max_tokens=None)


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
