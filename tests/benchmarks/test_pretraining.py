from tests.benchmarks.programs import program

curve = program("pretraining")


def test_a_curve_is_summed_up_by_the_hundred_steps():
    steps = [{"step": step, "seconds": 2.0, "scene/name": float(step <= 100)} for step in range(1, 151)]
    steps[-1]["ocr"] = 0.5
    assert curve.summarise(steps) == [
        {"step": 100, "seconds": 200.0, "scene/name": 1.0},
        {"step": 150, "seconds": 100.0, "scene/name": 0.0, "ocr": 0.5},
    ]
