"""Distils a tiny causal language model into a tinier one with Hugging Face's Trainer.

    pip install atkd transformers accelerate
    python distill.py [--steps 400]

Both models are randomly initialised Llamas: nothing is downloaded. The text is what the teacher writes.
Prints the loss as it falls, and how far the student is from the teacher on text that it has not seen.
"""

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import atkd

VOCAB, LENGTH = 64, 32


class DistillationTrainer(Trainer):
    """A Trainer whose loss is ATKD against a teacher."""

    def __init__(self, teacher, **arguments):
        super().__init__(**arguments)
        self.teacher = teacher
        self.loss = atkd.ATKDLoss(shift_labels=True, inplace=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        outputs = model(**inputs)
        loss = self.loss(outputs.logits, teacher_logits, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def llama(width, layers, initializer_range):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            initializer_range=initializer_range,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def text(teacher, count):
    """Sequences that the teacher writes, as a Trainer's data set."""
    starts = torch.arange(count)[:, None] % VOCAB
    written = teacher.generate(
        starts, attention_mask=torch.ones_like(starts), do_sample=True, max_length=LENGTH
    )
    return [{"input_ids": row, "labels": row} for row in written]


def train(steps=400):
    """The losses that the Trainer logs, and the divergence on held-out text before and after."""
    torch.manual_seed(0)
    # Models as small as these only wait for each other on more.
    torch.set_num_threads(1)
    # Larger weights than usual, so that the teacher has opinions.
    teacher = llama(64, 2, initializer_range=0.1).eval().requires_grad_(False)
    student = llama(48, 1, initializer_range=0.02)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            teacher=teacher,
            model=student,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                logging_steps=max(steps // 10, 1),
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=text(teacher, 2048),
            eval_dataset=text(teacher, 64),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    losses, before, after = train(parser.parse_args().steps)
    print("training loss:", " ".join(f"{loss:.3f}" for loss in losses))
    print(f"held-out loss: {before:.3f} before, {after:.3f} after")
