import json

import numpy as np
from PIL import Image

from tests.benchmarks.programs import RESULTS, program
from tests.readme import ROOT

host = program("host")


def test_a_photograph_has_the_spectrum_of_a_natural_image():
    values = np.asarray(host.photograph(256, 192, seed=0), dtype=float)[..., 0]
    powers = np.abs(np.fft.rfft2(values - values.mean())) ** 2
    radius = np.hypot(np.fft.fftfreq(192)[:, None] * 192, np.fft.rfftfreq(256)[None] * 256)
    bands = [powers[(radius >= low) & (radius < 2 * low)].mean() for low in (4, 8, 16, 32)]
    slopes = np.log2(np.array(bands[:-1]) / bands[1:])
    assert np.abs(slopes - 2).max() < 0.5, "power falls with the square of the frequency"


def test_blocks_of_steps_take_turns_and_the_result_says_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEPTION_R1_CACHE", "")  # the program sets it; so it is restored
    result = tmp_path / "host.json"
    words = [
        "--workers",
        "1",
        "--width",
        "64",
        "--height",
        "48",
        "--pause",
        "0",
        "--steps",
        "2",
        "--rounds",
        "2",
        "--batch_size",
        "1",
    ]
    assert host.main([*words, "--results", str(result)]) == 0
    found = json.loads(result.read_text())
    assert set(found["versions"]) == {"torch", "transformers", "pillow", "numpy"}
    assert {"0 workers", "1 workers", "wait_ratio", "cpu_ratio"} < set(found)
    assert (found["steps"], found["rounds"], found["width"]) == (2, 2, 64)


def test_the_summary_compares_without_workers_and_with_them():
    costs = {
        0: host.Cost(wait_seconds=[0.2, 0.4, 0.6], cpu_seconds=[0.1] * 3),
        2: host.Cost(wait_seconds=[0.1, 0.1, 0.4], cpu_seconds=[0.02, 0.02, 0.02]),
    }
    found = host.summary(costs)
    assert found["0 workers"]["wait_seconds"] == {"median": 0.4, "mean": 0.4, "most": 0.6}
    assert (found["wait_ratio"], found["cpu_ratio"]) == (2.0, 5.0)


def test_rows_name_jpeg_files_of_the_size_asked_for(tmp_path):
    rows = [json.loads(line) for line in host.write_rows(tmp_path, 2, 80, 60).read_text().splitlines()]
    with Image.open(tmp_path / rows[1]["image"]) as image:
        assert (image.format, image.size) == ("JPEG", (80, 60))


def test_the_documentation_has_the_committed_times():
    found = json.loads((RESULTS / "host.json").read_text(encoding="utf-8"))
    alone, ahead = (
        {name: found[f"{count} workers"][name]["median"] for name in ("wait_seconds", "cpu_seconds")}
        for count in (0, 2)
    )
    page = " ".join((ROOT / "docs" / "engine.md").read_text(encoding="utf-8").split())
    waits = (
        f"a step waits {1000 * alone['wait_seconds']:.0f} ms for prompts that the training process encodes itself, and "
    )
    assert f"{waits}{1000 * ahead['wait_seconds']:.0f} ms with two workers" in page
    assert f"{1000 * alone['cpu_seconds']:.0f} ms and {1000 * ahead['cpu_seconds']:.0f} ms" in page
    assert found["steps"] * found["rounds"] == 60
