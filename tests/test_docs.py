"""The documentation is true: every file, option, layer and link that it names is there, and the site can be built."""

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from lightning.pytorch import Trainer

from perception_r1.data.mixed import MixedData
from perception_r1.data.module import TaskDataModule
from perception_r1.engines import ServerEngine, VLLMEngine
from perception_r1.modules import GRPO
from perception_r1.modules.base import LRSchedulerConfig
from perception_r1.modules.strategies import FSDP2Strategy
from perception_r1.policy.families import FAMILIES
from perception_r1.policy.load import PolicyConfig
from perception_r1.tasks import TASKS
from tests.readme import DOCUMENTS, PAGES, ROOT, blocks, names, prose, read, table

PACKAGE = ROOT / "src" / "perception_r1"
MADE_UP = {"NAME.py", "NAME.yaml", "kitchen.yaml", "colour.py", "colour.yaml", "strict_grounding.py"}
MADE_UP |= {"configs/task/colour.yaml", "src/perception_r1/tasks/colour.py"}
"""Paths of examples."""
MADE_UP_OPTION = "data.task.strict"
WRITTEN = re.compile(
    r"(logs|site|data|checkpoints|samples|predictions|train|val|reward)/.*|((training_)?config|hparams)\.yaml|report\.md"
)
"""What runs read, log and leave behind, which resembles a path but is none of the repository."""


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 160


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md", "tests/golden/README.md"])
def test_links_lead_to_files(document: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", read(document))
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    assert [link for link in local if not ((ROOT / document).parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_the_text_exist(document: str) -> None:
    paths = re.findall(r"`([\w./-]+(?:/|\.py|\.yaml|\.md)[\w./-]*)`", prose(document))
    folders = [ROOT, PACKAGE, ROOT / "configs", ROOT / "tests"]
    unknown = {
        path for path in paths if not WRITTEN.fullmatch(path) and not any((at / path).exists() for at in folders)
    }
    assert unknown <= MADE_UP


def test_what_is_to_be_read_is_in_the_file_that_is_named() -> None:
    rows = table("docs/reading.md", "| | file")
    assert len(rows) == 12
    for _, file, read_there, _ in rows:
        (path,) = names(file)
        defined = re.findall(r"^ *(?:def|class) (\w+)", read(path), re.MULTILINE)
        assert set(names(read_there)) <= set(defined)


def test_tree_names_files_that_exist_and_all_of_the_package() -> None:
    (tree,) = (block for block in blocks("docs/architecture.md", "text") if "pyproject.toml" in block)
    paths = tree_paths(tree)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    package = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert {path for path in package if not path.endswith("__init__.py")} <= set(paths)
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs <= set(paths)


def test_every_family_and_every_file_of_configs_model_is_in_the_table_of_models() -> None:
    rows = table("docs/models.md", "| family")
    codecs = {names(family)[0]: names(boxes)[0] for family, _, boxes, *_ in rows}
    assert codecs == {name: family.codec.name for name, family in FAMILIES.items()}
    shares = {names(family)[0]: prompts.startswith("shared") for family, *_, prompts in rows}
    assert shares == {name: family.shares_prompts for name, family in FAMILIES.items()}
    files = [name for _, files, *_ in rows for name in names(files)]
    assert sorted(files) == sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))


def test_rooms_import_only_from_lower_layers() -> None:
    layer_of = {room: layer for layer, rooms in enumerate(layers()) for room in rooms}
    package = {path.name + "/" * path.is_dir() for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert set(layer_of) == package
    arrows = {(room, target) for room in layer_of for target in imports(room) if target in layer_of}
    assert len(arrows) > 40
    assert [arrow for arrow in sorted(arrows) if layer_of[arrow[0]] >= layer_of[arrow[1]]] == []


def test_the_diagram_shows_every_room_in_its_layer_and_no_arrow_upwards() -> None:
    svg = read("docs/architecture.svg")
    heights = {name: float(y) for y, name in re.findall(r'class="name" x="[\d.]+" y="([\d.]+)">([^<]+)<', svg)}
    rows = [{heights[room] for room in rooms} for rooms in layers()]
    assert all(len(row) == 1 for row in rows)
    assert [min(row) for row in rows] == sorted(min(row) for row in rows)
    arrows = [[float(number) for number in re.findall(r"[\d.]+", path)] for path in arrow_paths(svg)]
    assert len(arrows) > 10
    assert [arrow for arrow in arrows if arrow[1] >= arrow[-1]] == []


def test_options_in_the_text_exist() -> None:
    found = {option for document in DOCUMENTS for option in options(document)}
    assert len(found) > 40
    assert [option for option in sorted(found) if not is_option(option)] == [MADE_UP_OPTION]


def test_every_page_is_in_the_navigation() -> None:
    text = read("mkdocs.yml")
    assert [page for page in PAGES if page.removeprefix("docs/") not in text] == []


def test_the_site_is_built_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")]
    assert len(pages) >= len(PAGES)
    loads = re.compile(r'<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)="(?:https?:)?//[^"]*"')
    assert [found for page in pages for found in loads.findall(page)] == []


def layers() -> list[list[str]]:
    """The rooms of each layer, from the top."""
    return [names(cells[1]) for cells in table("docs/architecture.md", "| layer | rooms")]


def imports(room: str) -> set[str]:
    """The rooms that a room imports from."""
    path = PACKAGE / room
    files = path.rglob("*.py") if path.is_dir() else [path]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    parts = [module.split(".")[1] for module in modules if module.startswith("perception_r1.")]
    return {f"{part}/" if (PACKAGE / part).is_dir() else f"{part}.py" for part in parts} - {room}


def arrow_paths(svg: str) -> list[str]:
    """The arrows between layers: those that do not run along the road above them."""
    below = svg.index("The layers")
    return re.findall(r'class="arrow" d="([^"]+)"', svg[below:])


def options(document: str) -> set[str]:
    """Options of model, data and trainer that a document names; of a table's row only those in its first cell."""
    lines = [line.split("|")[1] if line.startswith("|") else line for line in read(document).splitlines()]
    return set(re.findall(r"(?:`|--)((?:model|data|trainer)\.[a-z][\w.]*)(?=[` +]|$)", "\n".join(lines)))


def is_option(option: str) -> bool:
    """Whether the signatures know an option."""
    owner, *path = option.split(".")
    if path == ["help"]:
        return True
    if owner == "data" and path[0] == "task" and len(path) == 2:
        return any(path[1] in {field.name for field in fields(task)} for task in TASKS.values())
    if owner == "data" and path[0] == "weights":
        return path[1:] in ([], *([task] for task in TASKS))
    if owner == "data" and path[0] == "tasks" and len(path) > 1:
        return path[1] in TASKS and is_option(".".join(["data", *path[2:]]))
    if owner == "model" and path[0] == "engine" and len(path) == 2:
        return any(path[1] in inspect.signature(kind).parameters for kind in (VLLMEngine, ServerEngine))
    data = MixedData if path == ["tasks"] else TaskDataModule
    classes: dict[str, Any] = {"model": GRPO, "data": data, "trainer": Trainer}
    found: Any = classes[owner]
    if owner == "trainer" and path[0] == "strategy" and len(path) == 2:
        return path[1] in inspect.signature(FSDP2Strategy).parameters
    for name in path:
        if owner == "trainer" and name != path[0]:
            return path[0] == "callbacks"  # options of a callback of Lightning
        parameters = all_parameters(found)
        if name not in parameters:
            return name in ("lr", "weight_decay", "fused") and path[0] == "optimizer"
        found = next_class(name, parameters[name].annotation)
    return True


def all_parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Those of a class, and those that it hands on to its bases."""
    ours = [parent for parent in reversed(kind.__mro__) if parent.__module__.startswith("perception_r1")]
    return {name: value for one in ours or [kind] for name, value in inspect.signature(one).parameters.items()}


def next_class(name: str, annotation: Any) -> Any:
    """The class whose fields are the options below an option."""
    known = {"policy": PolicyConfig, "lr_scheduler": LRSchedulerConfig}
    if name in known:
        return known[name]
    dataclasses = [kind for kind in get_args(annotation) if is_dataclass(kind)]
    return dataclasses[0] if dataclasses else object


def tree_paths(block: str) -> list[str]:
    """The paths of an indented tree, two spaces a level."""
    folders: list[str] = []
    paths = []
    for line in block.splitlines():
        name = line.split()[0]
        level = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:level], name]
        paths.append("".join(folders))
    return paths
