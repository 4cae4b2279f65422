"""Fine-tune a Vision Transformer on images in a folder for each class."""

import numpy as np
import torch
import transformers
from datasets import load_dataset
from torchvision.transforms import Compose, Normalize, RandomResizedCrop, ToTensor
from transformers import AutoImageProcessor, IntervalStrategy, Seq2SeqTrainingArguments


def collate_fn(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    labels = torch.tensor([example["label"] for example in examples])
    return {"pixel_values": pixel_values, "labels": labels}


class WeightedTrainer(transformers.Trainer):
    """Rare classes count more."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=self.class_weight)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *arguments):
        loss = super().training_step(*arguments)
        self.accelerator.wait_for_everyone()
        return loss


def main(folder, **settings):
    data = load_dataset("imagefolder", data_dir=folder)
    processor = AutoImageProcessor.from_pretrained("google/vit-base-patch16-224-in21k")
    transform = Compose(
        [
            RandomResizedCrop(224),
            ToTensor(),
            Normalize(mean=processor.image_mean, std=processor.image_std),
        ]
    )
    data = data.with_transform(
        lambda rows: {"pixel_values": [transform(i) for i in rows["image"]], "label": rows["label"]}
    )
    model = transformers.ViTForImageClassification.from_pretrained(
        "google/vit-base-patch16-224-in21k", num_labels=len(data["train"].features["label"].names)
    )
    args = Seq2SeqTrainingArguments(
        output_dir="runs/vit",
        evaluation_strategy=IntervalStrategy.EPOCH,
        optim="paged_adamw_8bit",
        dataloader_num_workers=4,
        use_mps_device=True,
        push_to_hub_model_id="vit",
        ddp_find_unused_parameters=False,
        **settings,
    )
    trainer = WeightedTrainer(
        model=model,
        args=args,
        data_collator=collate_fn,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        optimizers=(torch.optim.AdamW(model.parameters(), lr=5e-5), None),
        compute_metrics=lambda p: {"accuracy": np.mean(p.predictions.argmax(-1) == p.label_ids)},
    )
    trainer.train()
    model.save_pretrained("runs/vit/final")


if __name__ == "__main__":
    main("images", learning_rate=5e-5)
