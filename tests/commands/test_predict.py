"""`perception-r1 predict`: what it asks, what it reads in the answer, what it does with pictures it cannot use."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import ExifTags, Image
from transformers import AutoModelForImageTextToText

from perception_r1.cli import main
from perception_r1.commands import answers, predict
from perception_r1.commands.runs import checkpoint_path, load_checkpoint, open_run
from perception_r1.modules.encoding import encode_prompts
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.policy.processor import Processor
from perception_r1.records import Sample
from perception_r1.tasks.counting import Counting
from perception_r1.tasks.detection import Detection
from tests.commands.test_export import plain_inputs, trained_policy
from tests.policy import oracle

BOX = "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(100,200),(500,1000)<|box_end|><|im_end|>"


@pytest.fixture
def pictures(tmp_path):
    """A folder with pictures of three sizes and kinds, and things that are none."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    oracle.noise(84, 56).save(folder / "b.png")
    oracle.noise(56, 56).save(folder / "c.JPG", format="JPEG")
    oracle.noise(28, 84).convert("RGBA").save(folder / "a.webp")
    oracle.noise(28, 28).save(folder / "deeper" / "d.png")
    oracle.noise(28, 28).save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def run(capsys, *arguments, status=0):
    """Lines on stdout and the text on stderr."""
    assert main(["predict", *map(str, arguments)]) == status
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def fails(capsys, *arguments):
    """The sentence of a command that answers nothing."""
    lines, text = run(capsys, *arguments, status=2)
    assert lines == []
    assert text.startswith("perception-r1 predict: error: ")
    assert text.count("\n") == 1
    return text


@pytest.fixture
def says(monkeypatch):
    """Makes the policy say a text, whatever it wrote."""

    def say(text):
        monkeypatch.setattr(Processor, "decode", lambda self, completions: [text] * len(completions))

    return say


def plain_completion(folder, policy, text, size, num_tokens):
    """The greedy completion of the plain model."""
    model, inputs = AutoModelForImageTextToText.from_pretrained(folder).eval(), plain_inputs(folder, text, size)
    ids = model.generate(
        **inputs, do_sample=False, max_new_tokens=num_tokens, suppress_tokens=policy.suppress_tokens.tolist()
    )
    return policy.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False)


def test_a_model_answers_as_the_plain_classes_do(capsys, folder, pictures):
    options = ["--task", "grounding", "--query", "red cup", "--max_new_tokens", "9"]
    (line,), _ = run(capsys, folder, pictures / "b.png", *options)
    text = "Output the bounding box of the red cup in the image."
    policy = Policy.load(PolicyConfig(name=str(folder)))
    assert line["completion"] == plain_completion(folder, policy, text, (84, 56), 9) != ""
    assert line == {
        "image": str(pictures / "b.png"),
        "query": "red cup",
        "completion": line["completion"],
        "prediction": None,
    }


@pytest.mark.parametrize("ckpt", [[], ["--ckpt", "last"]])
def test_a_run_knows_its_task_and_its_checkpoint(capsys, runs, pictures, tmp_path, ckpt):
    (line,), _ = run(capsys, runs["full"], pictures / "b.png", "--query", "cup", *ckpt)
    exported = tmp_path / "exported"
    assert main(["export", str(runs["full"]), "--to", str(exported), *ckpt]) == 0
    policy = trained_policy(runs["full"])
    text = "Output the bounding box of the cup in the image."
    assert line["completion"] == plain_completion(exported, policy, text, (84, 56), 6)


def test_an_adapter_answers_as_its_policy(capsys, runs, pictures):
    opened = open_run(runs["lora"])
    policy, _ = load_checkpoint(opened.policy, checkpoint_path(opened, "last"))
    image = Image.open(pictures / "b.png").convert("RGB")
    sample = Sample(id="1", image=image, width=84, height=56, query="cup", target=None)
    prompts = encode_prompts(policy, opened.task, [sample])
    options = {"group_size": 1, "params": policy.sampling_params(max_new_tokens=6, is_greedy=True), "seeds": [0]}
    rollout = policy.generate(policy.prefill(prompts), **options)
    (line,), _ = run(capsys, runs["lora"], pictures / "b.png", "--query", "cup", "--ckpt", "last")
    assert line["completion"] == policy.processor.decode(rollout.completions)[0]
    with policy.without_adapter():
        base = policy.generate(policy.prefill(prompts), **options)
    assert not torch.equal(base.completions[0], rollout.completions[0])


def test_boxes_are_in_pixels_of_the_upright_picture(capsys, folder, tmp_path, says):
    picture = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # stored lying down, 400 wide and 300 high; upright it is 300 x 400
    Image.new("RGB", (400, 300), (9, 99, 199)).save(picture, exif=exif)
    says(BOX)
    (line,), _ = run(capsys, folder, picture, "--task", "grounding", "--query", "cup", "--max_new_tokens", 1)
    assert line["prediction"] == {"boxes": [[30.0, 80.0, 150.0, 400.0]]}
    assert line["completion"] == BOX


def test_boxes_in_pixels_of_the_shrunk_picture_are_scaled_back(capsys, model_folders, tmp_path, says):
    picture = tmp_path / "wide.png"
    Image.new("RGB", (280, 140)).save(picture)  # at most 10,000 pixels in tiles of 28: the model sees 140 x 56
    says('[{"bbox_2d": [14, 28, 70, 56], "label": "cup"}, {"bbox_2d": [0, 0, 9, 9], "label": "moon"}]<|im_end|>')
    options = ["--task", "detection", "--categories", '["cup", "spoon"]', "--max_pixels", 10000, "--max_new_tokens", 1]
    (line,), _ = run(capsys, model_folders["qwen2_5_vl"], picture, *options)
    assert line["prediction"] == {"objects": [{"box": [28.0, 70.0, 140.0, 140.0], "label": "cup"}]}
    assert line["query"] == ""


def test_bounds_on_pixels_hold_for_a_run_too(capsys, runs, tmp_path, monkeypatch):
    picture, seen = tmp_path / "wide.png", []
    Image.new("RGB", (280, 140)).save(picture)
    encode = Processor.encode_bytes

    def listen(self, chats, images, **options):
        prompts = encode(self, chats, images, **options)
        seen.extend((image_size.resized_width, image_size.resized_height) for image_size in prompts.image_sizes)
        return prompts

    monkeypatch.setattr(Processor, "encode_bytes", listen)
    for bounds in ([], ["--max_pixels", 10000], ["--min_pixels", 100000]):
        run(capsys, runs["full"], picture, "--query", "cup", "--max_new_tokens", 1, *bounds)
    assert seen == [(280, 140), (140, 56), (448, 224)]  # sides times sqrt(10000 / 39200), and sqrt(100000 / 39200)


def test_options_of_the_task_shape_prompt_and_reading(capsys, folder, pictures, monkeypatch, says):
    asked = []
    encode = Processor.encode_bytes

    def listen(self, chats, images, **options):
        asked.extend(chat[0]["content"][1]["text"] for chat in chats)
        return encode(self, chats, images, **options)

    monkeypatch.setattr(Processor, "encode_bytes", listen)
    says("<think>hm</think><answer>Page one</answer><|im_end|>")
    options = ["--task", "ocr", "--max_new_tokens", 1]
    (line,), _ = run(capsys, "--think", "true", *options, folder, pictures / "b.png")
    assert line["prediction"] == {"text": "Page one"}
    assert "between <think> and </think>" in asked[-1]
    (line,), _ = run(capsys, folder, pictures / "b.png", *options)
    assert line["prediction"] == {"text": "<think>hm</think><answer>Page one</answer>"}
    assert asked[-1] == "OCR this image."


def test_a_run_s_own_options_hold_unless_others_are_given(capsys, runs, tmp_path, pictures, monkeypatch):
    run_folder = tmp_path / "version_0"
    run_folder.mkdir()
    (run_folder / "checkpoints").symlink_to(runs["full"] / "checkpoints")
    (run_folder / "config.yaml").symlink_to(runs["full"] / "config.yaml")
    card = json.loads((runs["full"] / "run.json").read_text())
    init_args = {"categories": ["cup", "spoon"], "think": True}
    card["task"] = {"class_path": "perception_r1.tasks.detection.Detection", "init_args": init_args}
    (run_folder / "run.json").write_text(json.dumps(card))
    seen = []
    monkeypatch.setattr(predict, "open_policy", lambda *args, **options: None)
    monkeypatch.setattr(predict, "answer_images", lambda module, *_, **options: seen.append(module.task))
    run(capsys, run_folder, pictures)
    run(capsys, run_folder, pictures, "--categories", '["dog"]', "--think=false")
    run(capsys, run_folder, pictures, "--task", "counting", "--query", "cup")
    assert seen == [Detection(categories=("cup", "spoon"), think=True), Detection(categories=("dog",)), Counting()]


def test_folders_give_their_pictures_by_name_and_no_deeper(pictures):
    names = ["a.webp", "b.png", "c.JPG"]
    assert answers.find_images([pictures]) == [pictures / name for name in names]
    assert answers.find_images([pictures / "deeper" / "d.png", pictures])[0] == pictures / "deeper" / "d.png"


def test_pictures_that_cannot_be_used_are_named_and_the_others_answered(capsys, folder, pictures, tmp_path):
    (pictures / "aa.png").write_bytes(b"no picture")
    Image.new("RGB", (2000, 2)).save(pictures / "bb.png")  # far too narrow for the model
    out = tmp_path / "out"
    options = ["--task", "counting", "--query", "cup", "--max_new_tokens", 3, "--out", out]
    lines, text = run(capsys, folder, pictures, tmp_path / "none.png", *options, status=1)
    assert [line["image"] for line in lines] == [str(pictures / name) for name in ("a.webp", "b.png", "c.JPG")]
    assert f"cannot read {pictures / 'aa.png'} as an image" in text
    assert f"{pictures / 'bb.png'}: A picture has 2000 x 2 pixels" in text
    assert f"no such file: {tmp_path / 'none.png'}" in text
    assert "3 of 6 pictures could not be answered.\n" in text
    assert [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()] == lines
    assert {path.name for path in out.iterdir()} == {"predictions.jsonl", "a.png", "b.png", "c.png"}


def test_batches_answer_as_single_pictures_do(capsys, folder, pictures, monkeypatch):
    options = ["--task", "counting", "--query", "cup", "--max_new_tokens", 8]
    whole, _ = run(capsys, folder, pictures, *options)
    monkeypatch.setattr(answers, "BATCH_SIZE", 2)
    parts, _ = run(capsys, folder, pictures, *options)
    monkeypatch.setattr(answers, "BATCH_SIZE", 1)
    single, _ = run(capsys, folder, pictures, *options)
    assert whole == parts == single
    assert len(whole) == 3


def test_a_kill_stops_after_the_pictures_that_are_answered(capsys, folder, pictures, monkeypatch):
    generate = Policy.generate

    def kill(self, prompts, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, prompts, **options)

    monkeypatch.setattr(Policy, "generate", kill)
    monkeypatch.setattr(answers, "BATCH_SIZE", 1)
    handler = signal.getsignal(signal.SIGTERM)
    lines, _ = run(capsys, folder, pictures, "--task", "ocr", "--max_new_tokens", 1, status=143)
    assert len(lines) == 1
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_prompt_that_is_too_long_is_named_before_it_is_encoded(capsys, runs, pictures, tmp_path):
    shutil.copytree(runs["full"], tmp_path / "version_0")
    text = "Output the bounding box of the cup in the image."
    longest = plain_inputs(open_run(runs["full"]).policy.name, text, (84, 56))["input_ids"].shape[1]
    config = yaml.safe_load((tmp_path / "version_0" / "config.yaml").read_text())
    config["model"]["init_args"]["policy"]["max_prompt_length"] = longest - 1
    (tmp_path / "version_0" / "config.yaml").write_text(yaml.safe_dump(config))
    lines, text = run(capsys, tmp_path / "version_0", pictures, "--query", "cup", "--max_new_tokens", 1, status=1)
    assert [line["image"] for line in lines] == [str(pictures / name) for name in ("a.webp", "c.JPG")]
    assert f"{pictures / 'b.png'}: A prompt has {longest} tokens but max_prompt_length is {longest - 1}; " in text


def test_boxes_are_drawn_where_they_are(capsys, folder, tmp_path, says):
    picture, out = tmp_path / "grey.png", tmp_path / "out"
    Image.new("RGB", (400, 300), (128, 128, 128)).save(picture)
    says(BOX)
    run(capsys, folder, picture, "--task", "grounding", "--query", "cup", "--max_new_tokens", 1, "--out", out)
    drawn = np.asarray(Image.open(out / "grey.png"))
    assert drawn.shape == (300, 400, 3)
    ys, xs = np.nonzero((drawn != 128).any(2))
    left, top, right, bottom = 40, 60, 200, 299  # 100, 200, 500 and 1000 thousandths
    assert (abs(xs.min() - left), abs(xs.max() - right)) <= (3, 3)
    assert abs(ys.max() - bottom) <= 3
    assert (drawn[100:200, left : left + 4] != 128).any()
    assert (drawn[80:250, 220:] == 128).all()
    assert (drawn[: top - 30] == 128).all()


def test_words_are_drawn_on_a_card_and_names_do_not_clash(capsys, folder, tmp_path, says):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        oracle.noise(56, 56).save(tmp_path / name / "page.png")
    says("Page one<|im_end|>")
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    options = ["--task", "ocr", "--max_new_tokens", 1, "--out", out]
    run(capsys, folder, tmp_path / "one", tmp_path / "two", *options)
    assert {path.name for path in out.iterdir()} == {"page.png", "page-2.png", "predictions.jsonl"}
    assert Image.open(out / "page.png").width > 2 * 448


def test_progress_leaves_stdout_alone(capsys, folder, pictures, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # stderr counts as a terminal: bars
    monkeypatch.setenv("TERM", "xterm")
    lines, _ = run(capsys, folder, pictures, "--task", "ocr", "--max_new_tokens", 1)
    assert [line["query"] for line in lines] == ["", "", ""]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--query", "cup"], "--task is needed where no run tells it: one of counting"),
        (["--task", "cooking"], "--task must be one of counting"),
        (["--task", "grounding"], "--query is needed: grounding asks 'Output the bounding box of the {query} in"),
        (["--task", "counting", "--query", ""], "--query is needed"),
        (["--task", "ocr", "--query", "cup"], "--query has no place in the prompt of ocr, 'OCR this image.'"),
        (["--task", "detection", "--query", "cup"], "--query has no place in the prompt of detection"),
        (["--task", "detection", "--categories", "[]"], "options of detection: categories must hold"),
        (["--task", "ocr", "--think", "maybe"], "--think"),
        (["--task", "ocr", "--max_new_tokens", "0"], "--max_new_tokens is 0; it must be 1 or more"),
        (["--task", "ocr", "--max_new_tokens", "-2"], "--max_new_tokens is -2; it must be 1 or more"),
        (["--task", "ocr", "--min_pixels", "0"], "min_pixels is 0"),
        (["--task", "ocr", "--nonsense", "1"], "nonsense"),
        (["--task", "ocr", "--ckpt", "last"], "--ckpt is for a run"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_sentence(capsys, folder, pictures, arguments, words):
    assert words in fails(capsys, folder, pictures, *arguments)


def test_places_that_hold_nothing_are_named(capsys, folder, runs, pictures, tmp_path):
    ocr = ["--task", "ocr"]
    (tmp_path / "empty").mkdir()
    assert "no picture in the folder" in fails(capsys, folder, tmp_path / "empty", *ocr)
    assert "There is no model folder" in fails(capsys, tmp_path / "nowhere", pictures, *ocr)
    assert "No model configuration" in fails(capsys, tmp_path / "empty", pictures, *ocr)
    assert "there is no checkpoint x.ckpt" in fails(capsys, runs["full"], pictures, "--query", "a", "--ckpt", "x.ckpt")
    assert "pictures" in fails(capsys, folder, *ocr)
    assert "exists and is not an empty folder" in fails(capsys, folder, pictures, *ocr, "--out", pictures)


def test_help_shows_the_options_of_the_task(capsys, runs):
    for arguments, words in (
        (["--help"], "--max_pixels"),
        (["--task", "detection", "--help"], "--categories"),
        ([str(runs["full"]), "--help"], "--iou_weight"),
    ):
        assert main(["predict", *arguments]) == 0
        assert words in capsys.readouterr().out


def test_names_of_pictures_that_are_written_fit_on_a_disk(tmp_path):
    for stem in ("a" * 251, "é" * 125):
        first = predict._free_name(tmp_path, stem)
        first.touch()
        predict._free_name(tmp_path, stem).touch()
    assert len(list(tmp_path.iterdir())) == 4
