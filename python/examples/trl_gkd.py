"""TRL's GKD trainer with atkd's loss: the student learns from the answers of the data, from its own, or from both.

    pip install ./python trl && python python/examples/trl_gkd.py --on-policy 0.5

`ATKDTrainer.compute_loss` is all that changes. Both models are randomly initialised Llamas, and the answers of the data are
the teacher's: nothing is downloaded. Prints the loss as it falls.
"""

import argparse
import tempfile

import atkd
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

VOCAB, PROMPT, ANSWER = 64, 4, 12


class ATKDTrainer(GKDTrainer):
    """A GKDTrainer whose loss is `criterion`, an `atkd.ATKDLoss` with shift_labels=True."""

    def __init__(self, criterion, **arguments):
        super().__init__(**arguments)
        self.criterion = criterion

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        text = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        with torch.no_grad():
            teacher_logits = self.teacher_model.eval()(**text).logits
        outputs = model(**text)
        if num_items_in_batch is not None and (self.lmbda > 0 or self.seq_kd) and model.training:
            # That counts the answers of the data, which generated ones may have replaced: each part takes its own mean.
            loss = self.criterion(outputs.logits, teacher_logits, inputs["labels"])
            loss = loss / self.current_gradient_accumulation_steps
        else:
            loss = self.criterion(outputs.logits, teacher_logits, inputs["labels"], num_items_in_batch)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                # These are the items of all processes, over which the gradients are then averaged.
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def words(tokens):
    return " ".join(f"w{token}" for token in tokens.tolist())


def tokenizer():
    """Of the words w0, w1, ..: w0 pads, and a chat is what was said, word by word."""
    made = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    chat = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", chat_template=chat)


def llama(width, layers, spread):
    torch.manual_seed(width)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=VOCAB, num_attention_heads=4, initializer_range=spread, **sizes, **special)
    return LlamaForCausalLM(config)


def chats(teacher, count):
    """Questions, and the teacher's answers, of uneven lengths."""
    asked = torch.randint(1, VOCAB, (count, PROMPT))
    everywhere = torch.ones_like(asked)
    written = teacher.generate(asked, attention_mask=everywhere, do_sample=True, max_new_tokens=ANSWER)
    ends = torch.randint(PROMPT + 1, PROMPT + ANSWER + 1, (count,)).tolist()
    said = [[words(row[:PROMPT]), words(row[PROMPT:end])] for row, end in zip(written, ends)]
    as_chat = lambda each: [{"role": role, "content": text} for role, text in zip(["user", "assistant"], each)]
    return Dataset.from_list([{"messages": as_chat(each)} for each in said])


def trainer(criterion, folder, on_policy=0.0, steps=100, **arguments):
    """What is ready to train; other arguments go to GKDConfig."""
    teacher = llama(64, 2, 0.1)
    config = {"lmbda": on_policy, "max_new_tokens": ANSWER, "max_steps": steps, "learning_rate": 1e-2}
    config |= {"per_device_train_batch_size": 16, "logging_steps": max(steps // 10, 1), "bf16": False}
    config |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "gradient_checkpointing": False}
    data = {"train_dataset": chats(teacher, 256), "processing_class": tokenizer()}
    models = {"model": llama(48, 1, 0.02), "teacher_model": teacher}
    return ATKDTrainer(criterion, args=GKDConfig(folder, **{**config, **arguments}), **models, **data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--on-policy", type=float, default=0.5, help="share of steps on the student's own answers")
    parser.add_argument("--steps", type=int, default=100, help="of the optimizer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(atkd.ATKDLoss(shift_labels=True), folder, options.on_policy, options.steps)
        made.train()
    print("loss:", *[f"{entry['loss']:.3f}" for entry in made.state.log_history if "loss" in entry])
