"""The report as a page: structure, what it says, and that it loads nothing."""

import doctest
import json
import math
import re

import pytest
from helpers_report import Page, ending, facts, run_record

from kbtrain.report.page import render
from kbtrain.report.record import RunRecord
from kbtrain.report.summary import progress, summarize
from kbtrain.utils import html

pytestmark = pytest.mark.neutral


@pytest.fixture(scope="module")
def page():
    return Page(render(run_record()))


def test_the_first_screen_answers_the_three_questions(page):
    text = page.text[: page.text.index("Curves")]
    assert "Early stopping: no better eval_loss for 3 evaluations. 25 of 40 updates" in text
    assert (
        "eval_loss was best at step 10: 0.5. The 3 evaluations since then were no better." in text
    )
    assert "The model held at the end: the best, of checkpoint-10." in text
    assert "checkpoint-10 is the best checkpoint, checkpoint-25 the newest." in text
    assert "KERAS_BACKEND=jax python train.py" in text
    assert 'With fit(resume_from_checkpoint="auto") in the program.' in text
    assert "kbtrain.load_weights(model, '/runs/a/checkpoint-10')" in text
    assert "kbtrain checkpoint export /runs/a/checkpoint-10 model.keras" in text


@pytest.mark.parametrize(
    "shown",
    [
        "Functional · 1,234 parameters · jax on cpu:0",
        "1,234, 34 not trained",
        "training examples 1,000",
        "32 (2 micro-batches)",
        "learning_rate 0.001",
        "seed 7",
        "AdamW",
        "keras 3.15.1",
        "a-machine",
        "computing 50%",
        "compiling, with the first update 17% 2.0 s",
        "100 samples per second, without compiling, evaluating and saving.",
    ],
)
def test_what_the_run_was_is_there(page, shown):
    assert shown in page.text


def test_nothing_is_loaded_and_nothing_could_be(page):
    assert page.addresses == []
    policy = page.all("meta")[1]["content"]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    text = render(run_record())
    assert not re.search(r"url\(|@import|https?://", text)


def test_it_reads_on_a_phone_in_the_dark_and_on_paper():
    text = render(run_record())
    assert "width=device-width" in text
    for wanted in ("(prefers-color-scheme: dark)", "@media print", "@media (max-width"):
        assert wanted in text


def test_the_best_evaluation_is_set_off(page):
    text = render(run_record())
    (row,) = re.findall(r'<tr class="best"><th scope="row">(\d+)</th>', text)
    assert row == "10"


def test_a_page_of_a_living_run_loads_itself_again_and_no_other():
    record = run_record(end=False)
    record.live = True
    assert 'http-equiv="refresh"' in render(record, refresh=True)
    assert 'http-equiv="refresh"' not in render(record)
    assert "Running: 25 of 40 updates" in Page(render(record)).text
    record.live = False
    assert 'http-equiv="refresh"' not in render(record, refresh=True)


def test_everything_of_a_user_is_escaped():
    evil = "<script>alert('x')</script>\"&"
    record = run_record(evil, model=evil, changed={evil: evil}, host=evil, command=evil)
    record.add_warning("warning", evil, 3)
    record.add_section(evil, [[evil], [evil]])
    record.sessions[0]["ending"] = ending(reason=evil, error=evil, weights=evil)
    record.logs.append({"step": 26, f"eval_{evil}": 1.0})
    record.layers = [[evil, evil, evil, 1]]
    text = render(record)
    assert "<script>alert" not in text
    assert len(Page(text).all("script")) == 2


def test_what_callbacks_add_is_shown_and_replaced_by_title():
    record = run_record()
    record.add_section("Samples", "<p>outdated</p>")
    record.add_section("Samples", "<p>new</p>")
    record.add_section("Confusion", [["", "cat"], ["dog", 0.25]])
    page = Page(render(record))
    assert "Samples new" in page.text
    assert "outdated" not in page.text
    assert "dog 0.25" in page.text


def test_a_section_can_neither_run_nor_load_nor_lead_elsewhere():
    record = run_record()
    record.add_section(
        "Own",
        '<p>ok</p><script>x()</script><META http-equiv="refresh" content="0;url=http://a.b">'
        '< iframe src="http://a.b"></iframe><base href="http://a.b">',
    )
    text = render(record)
    page = Page(text)
    assert "ok" in page.text
    assert len(page.all("script")) == 2
    assert not page.all("iframe")
    assert not page.all("base")
    assert len(page.all("meta")) == 3


def test_a_failed_run_says_what_happened():
    record = run_record()
    record.sessions[0]["ending"] = ending(
        reason="the loss or the gradient of update 26 was not finite",
        completed=False,
        error="NonFiniteError: the loss is nan at step 26",
    )
    page = Page(render(record))
    assert summarize(record).status == "failed"
    assert "The loss or the gradient of update 26 was not finite." in page.text
    assert "NonFiniteError: the loss is nan at step 26" in page.text


def test_a_killed_run_is_no_living_one():
    record = run_record(end=False)
    assert summarize(record).status == "unknown"
    assert "the process was killed" in summarize(record).headline


def test_resumes_are_marked_and_listed():
    record = run_record()
    record.sessions.insert(0, {"facts": facts(), "ending": ending(reason="stopped by SIGTERM")})
    record.sessions[1]["facts"] = facts(start_step=12)
    page = Page(render(record))
    assert "resumed (step 12)" in page.text
    assert "stopped by SIGTERM" in page.text


def losses(*values):
    return [{"step": i + 1, "loss": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ([], "Nothing was logged."),
        (losses(3.0, 2.0, 4.0), "The last training loss is 4. It was not evaluated."),
        (
            losses(3.0, 2.0, 1.0, 0.5, 0.3, 0.1, 4.0),
            "The training loss fell from 2 to 1.467 (means of the first and last 3 logs). It was "
            "not evaluated.",
        ),
        (
            losses(*[2.0] * 20, *[1.0] * 20),
            "The training loss fell from 2 to 1 (means of the first and last 4 logs). It was not "
            "evaluated.",
        ),
        (
            losses(*[2.0] * 6),
            "The training loss stayed at 2 (means of the first and last 3 logs). It was not "
            "evaluated.",
        ),
        (
            [{"step": 5, "eval_a_loss": 1.0}, {"step": 5, "eval_b_loss": 2.0}],
            "It was evaluated at 1 step (eval_a_loss, eval_b_loss); no metric_for_best_model was "
            "chosen, so no evaluation is the best.",
        ),
        (
            [{"step": 5, "eval_loss": math.nan}, {"step": 9, "eval_loss": math.nan}],
            "It was evaluated at 2 steps (eval_loss), but eval_loss was never finite, so no "
            "evaluation is the best.",
        ),
        ([{"step": 1, "loss": 2.0}], "The last training loss is 2. It was not evaluated."),
        (
            [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}],
            "The training loss at step 2 is nan. It was not evaluated.",
        ),
        (
            [{"step": 1, "eval_loss": 2.0}, {"step": 2, "eval_loss": 1.0}],
            "eval_loss was best at step 2: 1. That is the last evaluation of the run: it was still "
            "improving.",
        ),
        (
            [{"step": 1, "eval_loss": 1.0}, {"step": 2, "eval_loss": math.nan}],
            "eval_loss was best at step 1: 1. The evaluation since then was no better.",
        ),
    ],
)
def test_whether_it_converged(logs, expected):
    record = RunRecord(logs=logs)
    assert summarize(record).result == expected
    Page(render(record))


def test_one_update_and_one_epoch_are_no_several():
    record = RunRecord(facts={"updates": 1}, logs=[{"step": 1, "epoch": 1.0, "loss": 1.0}])
    assert progress(record) == "1 of 1 update, 1 epoch"
    record.facts = {}
    assert progress(record) == "1 update, 1 epoch"


def test_skipped_updates_are_counted():
    record = run_record()
    record.sessions[0]["ending"] = ending(skipped=2)
    assert "2 of 25 updates were skipped as not finite." in summarize(record).result


def test_the_direction_of_the_best_metric_is_that_of_the_arguments():
    logs = [{"step": 1, "eval_regret": 5.0}, {"step": 2, "eval_regret": 7.0}]
    record = RunRecord(logs=logs, metric="eval_regret")
    assert summarize(record).best_step == 2
    record.arguments = {"greater_is_better": False}
    assert summarize(record).best_step == 1


def test_an_empty_record_is_a_page_too():
    page = Page(render(RunRecord()))
    assert "How it ended is not recorded." in page.text


def test_the_page_holds_its_data():
    text = render(run_record("</script>"))
    data = re.search(r'id="kbtrain-runs">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(data)[0]["facts"]["run_name"] == "</script>"


def test_examples_in_docstrings():
    assert doctest.testmod(html).failed == 0
