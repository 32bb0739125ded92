"""The lesson runs from its folder as plain Python, shows what its text says, and is stored with its figures."""

import json
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import plot

LESSON = Path(__file__).with_name("lesson.ipynb")
CELLS = [cell for cell in json.loads(LESSON.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_the_lesson_shows_what_it_says(monkeypatch):
    camera, lesson = gymnasium.make("HalfCheetah-v5").unwrapped, {}
    monkeypatch.setattr(camera, "render", lambda: np.zeros((160, 240, 3)))  # as there may be no OpenGL
    monkeypatch.setattr(plot, "open_renderer", lambda: camera)
    monkeypatch.setattr(plot.plt, "show", lambda: plot.plt.close())
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(LESSON.parent)
    for cell in CELLS:
        exec(compile("".join(cell["source"]), f"lesson.ipynb, cell {cell['id']}", "exec"), lesson)
    adapted, once, long = (lesson[name][150:, 0].mean() for name in ("with_memory", "empty_once", "empty_long"))
    assert [adapted, once, long] == pytest.approx([lesson["target"]] * 3, abs=0.3)
    drift, blip = (np.abs(lesson[name][100:130, 0] - lesson["target"]).max() for name in ("empty_long", "empty_once"))
    assert drift > 0.5 and drift > blip  # without memory it drifts away
    seeing, blind = (lesson[name][150:].mean(0) for name in ("with_reward", "without_reward"))
    assert seeing == pytest.approx(lesson["targets"], abs=0.3)
    assert (abs(blind - lesson["targets"]) > 0.3).sum() >= 2  # one velocity for all may be right by chance for one
    before, after = np.transpose(lesson["changes"])
    assert lesson["changed"][50:100].mean(0) == pytest.approx(before, abs=0.3)
    assert lesson["changed"][150:].mean(0) == pytest.approx(after, abs=0.3)
    (e0, *refined), late = lesson["scores"].values()
    assert e0 < min(refined) - 0.05 and min(refined) > 0.7 and min(late) > 0.9


@pytest.mark.parametrize("cell", [pytest.param(cell, id=cell["id"]) for cell in CELLS])
def test_its_outputs_are_stored(cell):
    source, outputs = "".join(cell["source"]), cell["outputs"]
    assert cell["execution_count"] and not any(output["output_type"] == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs) == ("plt.show()" in source)
    assert any(output.get("name") == "stdout" for output in outputs) == ("print(" in source)
