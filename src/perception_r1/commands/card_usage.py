"""How an exported folder is used, as its model card says it: with transformers and peft, and with vLLM."""

import json
from collections.abc import Mapping
from typing import Any

from perception_r1.commands.card_metadata import Export
from perception_r1.task import THINK_REQUEST, Task, tasks_of

_NOT_COMPARED = ("qwen3_5", "qwen3_5_moe")
"""Families of which nobody has seen that vLLM answers as the training does: on a CPU it computes linear attention in
bfloat16 alone. Of others their processor tells."""
_MODEL = """\
folder = "."  # this folder, or its name on the hub
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")"""
_ADAPTER = """\
folder = {base}
base = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
model = PeftModel.from_pretrained(base, ".")  # this folder, or its name on the hub"""
_TRANSFORMERS = """\
```python
{imports}

{model}
processor = AutoProcessor.from_pretrained(folder)
processor.image_processor = AutoImageProcessor.from_pretrained(  # which makes the pixels of the training
    folder, backend="pil",{image_options}
)
content = [{{"type": "image", "image": Image.open("picture.jpg")}}, {{"type": "text", "text": {prompt}}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",{template_options}
)
answer = model.generate(**inputs, do_sample=False, max_new_tokens={max_new_tokens})
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:]))
```"""
_IMPORTS = [
    "from PIL import Image",
    "from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor",
]
_VLLM = """\
```bash
vllm serve . --mm-processor-kwargs '{processor_options}'{template_options}
```

With `"skip_special_tokens": false` in a request, the tokens around boxes stay in the answer."""


def usage(export: Export) -> list[str]:
    """Paragraphs of Markdown."""
    packages = [*["peft"] * export.is_adapter, "transformers", "torchvision", "pillow"]
    sections = ["## Use", f"In Python, after `pip install {' '.join(packages)}`:", _transformers(export)]
    if export.is_adapter or (options := export.processor.hub_options) is None or export.family in _NOT_COMPARED:
        return sections
    template = dict(export.processor.template_options)
    of_template = f" \\\n    --default-chat-template-kwargs '{json.dumps(template)}'" if template else ""
    vllm = _VLLM.format(processor_options=json.dumps(options), template_options=of_template)
    return [*sections, "With vLLM, pictures at the sizes of the training:", vllm]


def prompt_of(task: Task[Any, Any], query: str) -> str:
    """The text beside a picture."""
    return task.prompt(query) + THINK_REQUEST * task.think


def _transformers(export: Export) -> str:
    task, processor = next(iter(tasks_of(export.run.task).values())), export.processor
    options = processor.hub_options or {}
    bounds = {name: value for name, value in options.items() if name != "use_fast"}  # the backend says it
    return _TRANSFORMERS.format(
        imports="\n".join([*["from peft import PeftModel"] * export.is_adapter, *_IMPORTS]),
        model=_ADAPTER.format(base=json.dumps(export.base_name)) if export.is_adapter else _MODEL,
        image_options=_arguments(bounds),
        prompt=json.dumps(prompt_of(task, "red cup"), ensure_ascii=False),
        template_options=_arguments(processor.template_options),
        max_new_tokens=export.run.max_new_tokens,
    )


def _arguments(options: Mapping[str, Any]) -> str:
    """Arguments of a call, behind others."""
    return "".join(f" {name}={value!r},".replace("'", '"') for name, value in options.items())
