"""Hints for names that scripts import from Transformers and that kbtrain does not have."""

from __future__ import annotations

import re

IMPORTS: dict[str, str] = {
    "Seq2SeqTrainer": "Write Trainer, with TrainingArguments(predict_with_generate=True).",
    "Seq2SeqTrainingArguments": "Write TrainingArguments, which has predict_with_generate.",
    "get_last_checkpoint": "Write trainer.fit(resume_from_checkpoint='auto'), which resumes from "
    "the newest intact checkpoint if there is one.",
    "enable_full_determinism": "Write TrainingArguments(full_determinism=True).",
    "get_scheduler": "Write TrainingArguments(lr_scheduler_type=...), or take one from optim.",
    "IntervalStrategy": "Write the word itself: eval_strategy='steps'.",
    "SaveStrategy": "Write the word itself: save_strategy='steps'.",
    "SchedulerType": "Write the word itself: lr_scheduler_type='cosine'.",
    "AdamW": "It is in the package optim: from optim import AdamW.",
    "Adafactor": "It is in the package optim: from optim import Adafactor.",
    "DefaultFlowCallback": "The training loop decides what is due; a callback can change `control` "
    "afterwards.",
    "WandbCallback": "Write TrainingArguments(report_to='wandb').",
    "TensorBoardCallback": "Write TrainingArguments(report_to='tensorboard').",
    "MLflowCallback": "Write TrainingArguments(report_to='mlflow').",
    "AutoTokenizer": "Import it from transformers, and pass it to the Trainer as processing_class.",
    "pipeline": "Call the model, or Trainer.predict.",
}
"""Name -> what to use instead."""


def import_hint(name: str) -> str:
    """What to use in place of a name of Transformers that kbtrain does not have."""
    if name in IMPORTS:
        return IMPORTS[name]
    if name.startswith("get_") and "schedule" in name:
        return IMPORTS["get_scheduler"]
    if is_model(name):
        task = next((_TASKS[task] for task in _TASKS if name.endswith(task)), "Backbone")
        return (
            f"Models are keras.Model: keras_hub.models.{task}.from_preset('hf://...') loads the "
            "weights of the families that KerasHub converts."
        )
    return ""


def is_model(name: str) -> bool:
    """Whether a name of Transformers is that of a class of models."""
    return bool(re.match(r"(?!DataCollator)\w+(Model|For[A-Z]\w+|Model\w*)$", name))


_TASKS = {
    "ForSequenceClassification": "TextClassifier",
    "CausalLM": "CausalLM",
    "LMHeadModel": "CausalLM",
    "MaskedLM": "MaskedLM",
    "Seq2SeqLM": "Seq2SeqLM",
    "ConditionalGeneration": "Seq2SeqLM",
    "ForImageClassification": "ImageClassifier",
    "SemanticSegmentation": "ImageSegmenter",
    "ObjectDetection": "ObjectDetector",
}
"""End of a class's name in Transformers -> the class of KerasHub for the same task."""
