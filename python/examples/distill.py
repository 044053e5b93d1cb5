"""Distils a tiny causal language model into a tinier one with Hugging Face's Trainer.

    pip install atkd transformers accelerate
    python distill.py [--steps 400] [--fused-head]
    torchrun --nproc-per-node 2 distill.py      # the same on several processes

Both models are randomly initialised Llamas: nothing is downloaded. The text is what the teacher writes. With --fused-head
the training loss starts from what both last layers multiply, and the logits of a batch never exist.
Prints the loss as it falls, and how far the student is from the teacher on text that it has not seen.
"""

import argparse
import tempfile

import atkd
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

VOCAB, LENGTH = 64, 32


class DistillationTrainer(Trainer):
    """A Trainer whose loss is ATKD against a teacher. Hard tokens are those of each sequence, which
    neither accumulation nor the number of processes changes.
    """

    def __init__(self, teacher, fused_head=False, **arguments):
        super().__init__(**arguments)
        self.fused_head = fused_head
        # On the device of the Trainer.
        self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        settings = {
            "num_items_in_batch": num_items_in_batch,
            "selection": "sequence",
            "shift_labels": True,
        }
        if self.fused_head and not return_outputs:
            # The models multiply by their last layers for one position alone.
            hidden = {"output_hidden_states": True, "logits_to_keep": 1}
            with torch.no_grad():
                of_teacher = self.teacher(**inputs, **hidden).hidden_states[-1]
            outputs = model(**inputs, **hidden)
            of_student = outputs.hidden_states[-1]
            weights = [
                self.accelerator.unwrap_model(each).lm_head.weight for each in (model, self.teacher)
            ]
            loss = atkd.linear_atkd_loss(
                of_student, weights[0], of_teacher, weights[1], labels, **settings
            )
        else:
            with torch.no_grad():
                teacher_logits = self.teacher(**inputs).logits
            outputs = model(**inputs)
            # In place the caller would get the gradient as logits.
            settings["inplace"] = not return_outputs
            loss = atkd.atkd_loss(outputs.logits, teacher_logits, labels, **settings)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # These are the items of all processes, over which the gradients are then averaged.
            loss = loss * self.accelerator.num_processes
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


def logged(trainer, name):
    """What the Trainer logged by this name, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def train(steps=400, sequences=8, fused_head=False, **arguments):
    """The Trainer when it is done, and the divergence on held-out text before and after. So many sequences
    at a time on each process; what else is given goes to TrainingArguments.
    """
    torch.manual_seed(0)
    # Models as small as these only wait for each other on more.
    torch.set_num_threads(1)
    # Larger weights than usual, so that the teacher has opinions.
    teacher = llama(64, 2, initializer_range=0.1).eval().requires_grad_(False)
    student = llama(48, 1, initializer_range=0.02)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            teacher=teacher,
            fused_head=fused_head,
            model=student,
            args=TrainingArguments(
                **{
                    "output_dir": folder,
                    "max_steps": steps,
                    "per_device_train_batch_size": sequences,
                    "per_device_eval_batch_size": sequences,
                    "gradient_accumulation_steps": 2,
                    "learning_rate": 1e-2,
                    "lr_scheduler_type": "constant",
                    "logging_steps": max(steps // 10, 1),
                    "save_strategy": "no",
                    "report_to": [],
                    "disable_tqdm": True,
                    # Models as small as these are no quicker on a GPU.
                    "use_cpu": True,
                    **arguments,
                }
            ),
            train_dataset=text(teacher, 2048),
            eval_dataset=text(teacher, 64),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    return trainer, before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--fused-head", action="store_true", help="never make the logits of a batch")
    args = parser.parse_args()
    trainer, before, after = train(args.steps, fused_head=args.fused_head)
    if trainer.is_world_process_zero():
        print("training loss:", " ".join(f"{loss:.3f}" for loss in logged(trainer, "loss")))
        print(f"held-out loss: {before:.3f} before, {after:.3f} after")
