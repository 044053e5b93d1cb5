"""Gradient accumulation, and ranks that share a batch, with the gradient of the whole batch.

    pip install atkd
    python accumulate.py

Hard tokens are selected among those of one call. If a batch is cut into parts, micro-batches of one process or the
parts of several ranks, that is within each part, and the gradients of the parts do not add up to the whole batch's.
Here the teacher's margins of all parts come first; one selection goes over all of them; and each part is told which
of its tokens are hard. Prints how far the gradient is from that of the whole batch, with and without.
"""

import argparse

import atkd
import torch
import torch.distributed as dist

VOCAB, SEQUENCES, LENGTH = 500, 32, 24


def model(width, spread):
    """From tokens `[B, T]` to logits `[B, T, VOCAB]`."""
    head = torch.nn.Linear(width, VOCAB, bias=False)
    torch.nn.init.normal_(head.weight, std=spread)
    return torch.nn.Sequential(torch.nn.Embedding(VOCAB, width), torch.nn.Linear(width, width), torch.nn.Tanh(), head)


def batch():
    """A student, a teacher, tokens and labels: -100 for padding, after sequences of uneven lengths."""
    torch.manual_seed(0)
    student, teacher = model(32, 0.1), model(64, 0.5)
    tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH))
    # Tokens of low numbers are likelier in some sequences than in others, and the teacher knows.
    teacher[-1].weight.data[: VOCAB // 4] *= 2
    labels = teacher(tokens).softmax(-1).flatten(0, 1).multinomial(1).view(SEQUENCES, LENGTH)
    ends = torch.randint(1, LENGTH + 1, (SEQUENCES, 1))
    labels[torch.arange(LENGTH) >= ends] = -100
    return student, teacher, tokens, labels


def gradient(student, losses):
    """What the losses of all parts add up to in the student's parameters."""
    student.zero_grad()
    for loss in losses:
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


@torch.no_grad()
def margins_of(teacher, tokens, labels):
    """The margins of one part, one per token, and which tokens count. Both are small: keep them, not the logits."""
    return atkd.teacher_margins(teacher(tokens), labels), labels != -100


def within_parts(student, teacher, parts, num_items):
    """The usual loop: hard tokens are those of each part."""
    for tokens, labels in parts:
        with torch.no_grad():
            teacher_logits = teacher(tokens)
        yield atkd.atkd_loss(student(tokens), teacher_logits, labels, num_items_in_batch=num_items)


def over_all_parts(student, teacher, parts, num_items, hard_ratio=0.5):
    """Hard tokens are those of all parts, and of all ranks."""
    margins, valid = (torch.cat(each) for each in zip(*[margins_of(teacher, *part) for part in parts]))
    # Among the tokens of all ranks, however many each has.
    group = dist.group.WORLD if dist.is_initialized() else None
    hard = atkd.select_hard(margins, hard_ratio, valid=valid, group=group)
    for (tokens, labels), of_part in zip(parts, hard.split([len(tokens) for tokens, _ in parts])):
        with torch.no_grad():
            teacher_logits = teacher(tokens)
        yield atkd.atkd_loss(
            student(tokens), teacher_logits, labels, num_items_in_batch=num_items, hard=of_part
        )


def distances(micro_batches):
    """How far the gradient of so many parts is from the whole batch's: selected within each, over all."""
    student, teacher, tokens, labels = batch()
    num_items = (labels != -100).sum()
    parts = list(zip(tokens.chunk(micro_batches), labels.chunk(micro_batches)))
    whole = gradient(student, within_parts(student, teacher, [(tokens, labels)], num_items))
    return [
        float((gradient(student, way(student, teacher, parts, num_items)) - whole).norm() / whole.norm())
        for way in (within_parts, over_all_parts)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8, 16])
    print("micro-batches, distance from the whole batch's gradient: selected within each, over all")
    for count in parser.parse_args().micro_batches:
        within, over_all = distances(count)
        print(f"{count:5} {within:8.1%} {over_all:10.1e}")


if __name__ == "__main__":
    main()
