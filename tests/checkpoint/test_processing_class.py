"""A tokenizer beside the model: saved, in every checkpoint, seen by callbacks."""

import json
import re

import numpy as np
import pytest
from helpers import Recorder, make_data
from helpers_trainer import make

from kbtrain import (
    CheckpointError,
    ConfigurationError,
)
from kbtrain.checkpoint import CheckpointStore


class Tokenizer:
    pad_token_id = 9

    def save_pretrained(self, folder):
        with open(f"{folder}/tokenizer.json", "w", encoding="utf-8") as file:
            json.dump({"pad": self.pad_token_id}, file)


def test_a_processing_class_is_saved_and_seen_by_callbacks(tmp_path):
    recorder, tokenizer = Recorder(), Tokenizer()
    trainer = make(tmp_path, callbacks=[recorder], processing_class=tokenizer)
    trainer.save_model(tmp_path / "final")
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert names == {"model.keras", "training_args.json", "tokenizer.json"}
    assert recorder.kwargs[0]["processing_class"] is tokenizer
    with pytest.raises(ConfigurationError, match="save_pretrained.*Received: dict"):
        make(tmp_path, processing_class={})


def saved_with(tmp_path, processing_class, **changes):
    changes = {"save_strategy": "steps", "save_steps": 2} | changes
    make(tmp_path, processing_class=processing_class, **changes).fit()
    return CheckpointStore(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"save_async": False}, {"save_only_model": True}], ids=str)
def test_a_processing_class_is_in_every_checkpoint(tmp_path, changes):
    store = saved_with(tmp_path, Tokenizer(), **changes)
    assert [step for step, _ in store.list()] == [2, 4]
    for _, path in store.list():
        assert json.loads((path / "tokenizer.json").read_text()) == {"pad": 9}
        assert "tokenizer.json" in store.load(path).manifest.other_files
    others = [p.name for p in tmp_path.iterdir() if not p.name.startswith("checkpoint-")]
    assert others == ["run.json"]


def test_a_resumed_run_needs_no_processing_class(tmp_path):
    saved_with(tmp_path, Tokenizer(), max_steps=2)
    trainer = make(tmp_path)
    trainer.fit(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


class Broken:
    def save_pretrained(self, folder):
        with open(f"{folder}/half", "w", encoding="utf-8"):
            raise KeyError("no vocabulary")


class Meddling:
    def save_pretrained(self, folder):
        with open(f"{folder}/trainer_state.json", "w", encoding="utf-8") as file:
            file.write("{}")


@pytest.mark.parametrize("processing_class", [Broken(), Meddling()])
def test_a_processing_class_that_cannot_be_saved(tmp_path, caplog, processing_class):
    """A run does not lose its checkpoints over it, unless asked to."""
    store = saved_with(tmp_path / "warn", processing_class)
    name = rf"processing_class \({type(processing_class).__name__}\) could not be saved"
    assert len(re.findall(name, caplog.text)) == 2
    for _, path in store.list():
        assert store.verify(path) == []
        assert not store.load(path).manifest.other_files
    with pytest.raises(CheckpointError, match=f"{name}.*checkpoint-2"):
        saved_with(tmp_path / "raise", processing_class, on_save_error="raise")
    assert [path.name for path in (tmp_path / "raise").iterdir()] == ["run.json"]


class Table(list):
    """Like a ``datasets.Dataset``: samples, and yet a shape."""

    shape = (2, 2)


def test_a_table_with_a_shape_is_samples(tmp_path):
    samples = Table({"input_ids": list(range(1, n)), "labels": n % 2} for n in (3, 5))
    trainer = make(tmp_path, data=samples, processing_class=Tokenizer())
    (batch,) = trainer.get_eval_dataloader().epoch(0)
    assert batch["input_ids"].tolist() == [[1, 2, 9, 9], [1, 2, 3, 4]]
    pairs = Table(zip(*make_data(4), strict=True))
    trainer = make(tmp_path, eval_dataset={"near": pairs, "far": pairs})
    assert {"eval_near_loss", "eval_far_loss"} <= trainer.evaluate().keys()


def test_a_processing_class_pads_token_data_that_has_no_collator(tmp_path):
    samples = [{"input_ids": list(range(1, n)), "labels": n % 2} for n in (3, 5)]
    trainer = make(tmp_path, data=samples, processing_class=Tokenizer())
    (batch,) = trainer.get_eval_dataloader().epoch(0)
    assert batch["input_ids"].tolist() == [[1, 2, 9, 9], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    # Other data stays as it is.
    for data in (make_data(4), list(zip(*make_data(4), strict=True))):
        (batch,) = make(tmp_path, data=data, processing_class=Tokenizer()).get_eval_dataloader()
        np.testing.assert_array_equal(batch[0], make_data(4)[0])
