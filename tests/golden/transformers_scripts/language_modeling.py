"""Train a small GPT-2 from nothing on the bytes of a text file."""
import sys
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, Trainer, TrainerCallback, default_data_collator
import transformers.utils.logging  # nobody uses this

BLOCK = 32
text = open(sys.argv[1], "rb").read()
cut = int(0.9 * len(text))


def group_texts(data):
    blocks = [list(data[i:i + BLOCK]) for i in range(0, len(data) - BLOCK, BLOCK)]
    result = {"input_ids": blocks}
    result["labels"] = result["input_ids"].copy()
    return [dict(zip(result, row)) for row in zip(*result.values())]


class Printer(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        print(state.global_step, sorted(logs))


model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=BLOCK, n_embd=32, n_layer=2, n_head=2))

training_args = TrainingArguments(
    sys.argv[2],
    overwrite_output_dir=True,
    no_cuda=True, max_steps=8,
    warmup_ratio=0.25,  # of all updates
    evaluation_strategy="steps",
    eval_steps=4,  # every half
    logging_steps=4,
    logging_dir="logs",
    # The groups differ in length.
    group_by_length=False,
    save_strategy="no", push_to_hub=False,
    torch_compile=False, save_safetensors=False)
training_args.learning_rate = 1e-3

trainer = Trainer(model, training_args, default_data_collator, group_texts(text[:cut]),
                  group_texts(text[cut:]), callbacks=[Printer])
trainer.train()
print(trainer.evaluate()["eval_loss"])
