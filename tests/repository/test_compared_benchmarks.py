"""What ``python -m benchmarks.compare`` calls a change. Nothing is timed here."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.neutral


@pytest.fixture(scope="module")
def compare():
    path = Path(__file__).parents[2] / "benchmarks" / "compare.py"
    spec = importlib.util.spec_from_file_location("benchmarks_compare", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_change_counts_above_five_percent_and_above_the_spread(compare):
    old = {
        "steady": compare.Figure.of([1.0, 1.0, 1.01]),
        "slower": compare.Figure.of([1.0, 1.02, 0.98]),
        "noisy": compare.Figure.of([0.8, 1.0, 1.2]),
        "faster": compare.Figure.of([2.0]),
        "only before": compare.Figure.of([1.0]),
    }
    new = {
        "steady": compare.Figure.of([1.04, 1.05, 1.03]),
        "slower": compare.Figure.of([1.1, 1.12, 1.08]),
        "noisy": compare.Figure.of([1.3, 1.3, 1.3]),
        "faster": compare.Figure.of([1.0]),
        "only now": compare.Figure.of([1.0]),
    }
    assert old["noisy"] == (1.0, pytest.approx(0.4))
    found = {change.name: change for change in compare.changes(old, new)}
    assert [name for name, change in found.items() if change.counts] == ["slower", "faster"]
    assert found["slower"].relative == pytest.approx(0.1)
    assert found["faster"].relative == pytest.approx(-0.5)
    lines = "\n".join(compare.report({"jax": [*found.values()]}, show_all=False))
    assert lines.startswith("jax: 2 of 4 ratios changed")
    assert "+10.0%" in lines
    assert "noisy" not in lines


def test_a_recorded_baseline_is_read_back(compare, tmp_path):
    ratios = {"torch": {"mlp: update / keras fit": compare.Figure(0.08, 0.03)}}
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(compare.baseline_document(ratios, "nothing else ran", 3)))
    assert compare.read_baseline(path) == ratios


def test_the_recorded_baseline_holds_ratios_of_known_backends(compare):
    baseline = compare.read_baseline()
    assert set(baseline) <= set(compare.BACKENDS)
    assert baseline
    for ratios in baseline.values():
        assert all(figure.median > 0 and figure.spread >= 0 for figure in ratios.values())


def test_benchmarks_become_ratios_to_the_other_contenders(compare):
    steps = {"mlp": {"kbtrain": [1.0, 3.0], "loop": [2.0, 4.0], "keras fit": [10.0, 10.0]}}
    assert compare.train_step_ratios({"seconds_per_step": steps}) == {
        "mlp: update / loop": pytest.approx((0.5 + 0.75) / 2),
        "mlp: update / keras fit": pytest.approx(0.2),
    }
    costs = {
        "mlp: first step, s": 1.0,
        "mlp: first step of keras fit, s": 2.0,
        "mlp, 10^7 shuffled rows: first step, s": 9.0,
    }
    assert compare.first_step_ratios(costs) == {"mlp: first step / keras fit": 0.5}
    rows = {
        "optim.AdamW": {"relative_per_byte": 1.0},
        "optim lion": {"relative_per_byte": 1.5},
        "keras.optimizers.Lion": {"relative_per_byte": 3.0},
    }
    assert compare.optimizer_ratios({"results": {"lion": rows}}) == {
        "optim lion: per byte / optim.AdamW": 1.5
    }
    assert compare.import_ratios({"keras": 4.0, "kbtrain": 1.0, "optim": 2.0}) == {
        "import kbtrain / keras": 0.25,
        "import optim / keras": 0.5,
    }
