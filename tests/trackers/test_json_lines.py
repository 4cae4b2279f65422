"""The JSON Lines file of a run: what was logged, begun anew or cut back on resume."""

import json

import pytest
from helpers import without_timings
from helpers_callbacks import make_trainer

pytestmark = pytest.mark.core


def json_lines(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def test_json_lines_hold_what_was_logged(tmp_path):
    trainer = make_trainer(tmp_path, report_to="json", eval_strategy="epoch")
    trainer.fit()
    lines = json_lines(tmp_path)
    assert lines == trainer.state.log_history
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 4]


def test_json_lines_of_a_fresh_run_begin_anew(tmp_path):
    make_trainer(tmp_path, report_to="json").fit()
    make_trainer(tmp_path, report_to="json", max_steps=2).fit()
    assert [line["step"] for line in json_lines(tmp_path)] == [1, 2, 2]


def test_json_lines_are_cut_back_on_resume(tmp_path):
    def run(resume=None, callbacks=()):
        trainer = make_trainer(
            tmp_path,
            callbacks,
            report_to="json",
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer.fit(resume)
        return without_timings(json_lines(tmp_path))

    whole = run()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"loss": 1.0, "ste')  # torn by a crash
    assert run(str(tmp_path / "checkpoint-2")) == whole
    assert [line["step"] for line in whole] == [1, 2, 2, 3, 4, 4, 4]
