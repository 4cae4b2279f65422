"""Records of made-up runs, and a reader of HTML that is strict about its structure."""

import html.parser
import math

from kbtrain.report.record import RunRecord

SAVING_RUN = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "metric_for_best_model": "loss",
}
"""Arguments of four updates, evaluated and saved after the second and the last one."""

VOID = {"meta", "link", "br", "img", "hr", "input"}
LOADING = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}


class Page(html.parser.HTMLParser):
    """Reads a page; an element that is closed in the wrong place is an error."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.addresses, self._open, self._text = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.addresses += [v for k, v in attributes if k in LOADING and not v.startswith("data:")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self._text.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self._text).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def facts(**changes):
    return {
        "started": "2026-01-02T03:04:05+00:00",
        "command": "python train.py",
        "output_dir": "/runs/a",
        "run_name": "a",
        "model": "digits",
        "model_class": "Functional",
        "parameters": 1234,
        "trainable": 1200,
        "model_bytes": 4936,
        "examples": 1000,
        "eval_examples": {"eval": 100},
        "batch_size": 32,
        "accumulation": 2,
        "updates": 40,
        "epochs": 4.0,
        "optimizer": "AdamW",
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "precision": "float32",
        "backend": "jax",
        "device": "cpu:0",
        "processes": 1,
        "start_step": 0,
        "resumed_from": None,
        "changed": {"learning_rate": 1e-3, "seed": 7},
        "versions": {"python": "3.11.7", "keras": "3.15.1"},
        "host": "a-machine",
    } | changes


def ending(**changes):
    return {
        "reason": "early stopping: no better eval_loss for 3 evaluations",
        "completed": True,
        "step": 25,
        "updates": 40,
        "epoch": 2.5,
        "weights": "the best, of checkpoint-10",
        "seconds": 12.0,
        "compile_seconds": 2.0,
        "samples_per_second": 100.0,
        "tokens_per_second": None,
        "shares": {"compute": 0.6, "data": 0.1, "host": 0.1, "other": 0.2},
        "checkpoint": "/runs/a/checkpoint-25",
        "resume_command": "KERAS_BACKEND=jax python train.py",
        "resume_change": 'fit(resume_from_checkpoint="auto")',
        "error": None,
    } | changes


def run_record(name="a", decay=0.1, end=True, **changes):
    """25 updates of 40 with the best evaluation at step 10."""
    found = facts(run_name=name, **changes)
    record = RunRecord(facts=found, arguments=dict(found["changed"]), metric="eval_loss")
    for step in range(1, 26):
        loss = 2 * math.exp(-decay * step)
        record.add_log({"step": step, "epoch": step / 10, "loss": loss, "learning_rate": 1e-3})
        record.add_throughput(step, 100.0 + step)
        if step % 5 == 0:
            value = 0.5 + abs(step - 10) / 100
            record.add_log({"step": step, "epoch": step / 10, "eval_loss": value, "eval_f1": 0.5})
    record.best = {"step": 10, "value": 0.5}
    record.checkpoints = [
        {"step": 10, "name": "checkpoint-10", "best": True},
        {"step": 25, "name": "checkpoint-25", "best": False},
    ]
    record.sessions = [{"facts": found, "ending": ending() if end else None}]
    return record
