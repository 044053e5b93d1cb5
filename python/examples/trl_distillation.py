"""TRL's DistillationTrainer with atkd's loss: the student learns from what it generates, and logits never exist at once.

    pip install ./python trl && python python/examples/trl_distillation.py

`ATKDTrainer._compute_loss` is all that changes. Both models are randomly initialised Llamas: nothing is downloaded. Prints
the loss as it falls.
"""

import argparse
import tempfile

import atkd
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer

VOCAB, PROMPT, ANSWER = 64, 4, 12


class ATKDTrainer(DistillationTrainer):
    """A DistillationTrainer whose loss is `criterion`, an `atkd.LinearATKDLoss`. For models whose logits are hidden states
    times the head's weight, plus a bias: no scale, no soft cap.
    """

    def __init__(self, criterion, **arguments):
        super().__init__(**arguments)
        self.criterion = criterion

    def _compute_loss(self, student, inputs, num_items_in_batch):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        given = ids, mask, inputs["completion_ids"].shape[1]
        # Of the positions before each token of the answer, so that labels are not shifted.
        of_student = self._get_last_hidden_state(student, *given)
        teacher = self.accelerator.unwrap_model(self.teacher_model.eval())
        with torch.no_grad():
            # By way of the wrapper, which brings the weights together that FSDP has split.
            forward = self._forward_redirection
            of_teacher = forward(self.teacher_model, teacher, self._get_last_hidden_state, teacher, *given)
        valid = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0
        labels = inputs["completion_ids"].masked_fill(~valid, -100)
        heads = [each.get_output_embeddings() for each in (student, teacher)]
        biases = dict(zip(["student_bias", "teacher_bias"], [head.bias for head in heads]))
        hidden = of_student, heads[0].weight, of_teacher, heads[1].weight
        loss = self.criterion(*hidden, labels, num_items_in_batch, **biases)
        # The trainer logs the student's entropy, from the second of these, and leaves out what is NaN.
        return loss, torch.full_like(loss.detach(), float("nan")), valid.sum()


def tokenizer():
    """Of the words w0, w1, ..: w0 pads, and w1 ends an answer."""
    made = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w1", padding_side="left")


def llama(width, layers, spread):
    torch.manual_seed(width)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=VOCAB, num_attention_heads=4, initializer_range=spread, **sizes, **special)
    return LlamaForCausalLM(config)


def trainer(criterion, folder, steps=100, **arguments):
    """What is ready to train; other arguments go to DistillationConfig."""
    config = {"max_completion_length": ANSWER, "max_steps": steps, "learning_rate": 1e-2, "bf16": False}
    config |= {"per_device_train_batch_size": 16, "logging_steps": max(steps // 10, 1)}
    config |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "gradient_checkpointing": False}
    models = {"model": llama(48, 1, 0.02), "teacher_model": llama(64, 2, 0.1)}
    prompts = torch.randint(2, VOCAB, (256, PROMPT)).tolist()
    data = Dataset.from_list([{"prompt": " ".join(f"w{token}" for token in prompt)} for prompt in prompts])
    config = DistillationConfig(folder, **{**config, **arguments})
    return ATKDTrainer(criterion, args=config, train_dataset=data, processing_class=tokenizer(), **models)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of the optimizer")
    parser.add_argument("--divergence", default="reverse-kl", help="forward-kl, reverse-kl (the default), jsd, ..")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(atkd.LinearATKDLoss(divergence=options.divergence), folder, options.steps)
        made.train()
    print("loss:", *[f"{entry['loss']:.3f}" for entry in made.state.log_history if "loss" in entry])
