"""Distillation in a LightningModule: `training_step` returns atkd's loss, and the terms of its tokens go to the log.

    pip install ./python lightning && python python/examples/lightning_distill.py

Both models are small random networks, and the text is what the teacher writes: nothing is downloaded. Prints the loss on
held-out text before and after.
"""

import argparse
import logging

import atkd
import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

VOCAB, LENGTH = 64, 24


class Model(torch.nn.Module):
    """From tokens `[B, T]` to logits `[B, T, VOCAB]`."""

    def __init__(self, width, spread):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, width)
        self.body = torch.nn.GRU(width, width, batch_first=True)
        self.head = torch.nn.Linear(width, VOCAB, bias=False)
        torch.nn.init.normal_(self.head.weight, std=spread)

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens))[0])


class Distillation(lightning.LightningModule):
    """The student, and a teacher that neither learns, nor is saved in checkpoints."""

    def __init__(self, student, teacher, criterion, learning_rate=1e-2):
        super().__init__()
        self.student, self.criterion, self.learning_rate = student, criterion, learning_rate
        # In a list, so that it is no submodule.
        self.teacher = [teacher.eval().requires_grad_(False)]

    def on_fit_start(self):
        self.teacher[0].to(self.device)

    on_validation_start = on_fit_start

    def loss(self, tokens):
        with torch.no_grad():
            teacher_logits = self.teacher[0](tokens)
        return self.criterion(self.student(tokens), teacher_logits, tokens)

    def training_step(self, batch):
        loss, stats = self.loss(batch[0])
        # On a GPU this waits, so log every so many steps there.
        terms = stats.summary(self.criterion.settings)
        self.log_dict({f"train/{name}": value for name, value in terms.items()})
        return loss

    def validation_step(self, batch):
        self.log("held_out", self.loss(batch[0])[0], batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), self.learning_rate)


@torch.no_grad()
def written(teacher, count):
    """Sequences that the teacher writes."""
    tokens = torch.randint(VOCAB, (count, 1))
    while tokens.shape[1] < LENGTH:
        following = teacher(tokens)[:, -1].softmax(-1).multinomial(1)
        tokens = torch.cat([tokens, following], dim=1)
    return DataLoader(TensorDataset(tokens), batch_size=32)


def train(criterion, epochs=5, **arguments):
    """The module, the Trainer, and the loss on held-out text before and after; other arguments go to Trainer."""
    torch.manual_seed(0)
    teacher, student = Model(64, 0.5), Model(32, 0.02)
    module = Distillation(student, teacher, criterion)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **{**quiet, **arguments})
    held_out = written(teacher, 64)
    before = trainer.validate(module, held_out, verbose=False)[0]["held_out"]
    trainer.fit(module, written(teacher, 1024))
    after = trainer.validate(module, held_out, verbose=False)[0]["held_out"]
    return module, trainer, before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="passes over the text")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    criterion = atkd.ATKDLoss(shift_labels=True, selection="sequence", return_stats=True)
    _, trainer, before, after = train(criterion, options.epochs)
    print(f"held-out loss: {before:.3f} before, {after:.3f} after")
