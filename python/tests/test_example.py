"""The example runs, its loss goes down, and two processes do what one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def distill(monkeypatch):
    for needed in ["transformers", "accelerate"]:
        pytest.importorskip(needed, reason=f"the example needs {needed}: it was not tested")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import distill

    threads = torch.get_num_threads()
    yield distill
    torch.set_num_threads(threads)


def test_distill(distill):
    trainer, before, after = distill.train()
    losses = distill.logged(trainer, "loss")
    assert losses[-1] < 0.8 * losses[0], losses
    assert after < 0.6 * before, (before, after)


# Two steps of gradient descent, which unlike Adam shows the size of a gradient.
PROCESS = """
import json, os, torch, distill

trainer, before, after = distill.train(
    2, 8 // int(os.environ.get("WORLD_SIZE", 1)), "FUSED_HEAD" in os.environ,
    optim="sgd", learning_rate=0.1, max_grad_norm=1e9,
    **({"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}),
)
if trainer.is_world_process_zero():
    print("RESULT", json.dumps({
        "losses": distill.logged(trainer, "loss"),
        "norms": distill.logged(trainer, "grad_norm"),
        "held out": [before, after],
        "weights": [weight.tolist() for weight in trainer.model.parameters()],
    }))
"""


def start(processes, **own):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]), "OMP_NUM_THREADS": "1", **own}
        if processes > 1:
            environment.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", PROCESS], env=environment, stdout=subprocess.PIPE, text=True
            )
        )
    return children


def result(children):
    outputs = [child.communicate(timeout=300)[0] for child in children]
    assert all(child.returncode == 0 for child in children), outputs
    (line,) = [line for line in outputs[0].splitlines() if line.startswith("RESULT")]
    return json.loads(line[len("RESULT") :])


@pytest.mark.skipif(
    not torch.distributed.is_available(),
    reason="this torch has no torch.distributed: the example on two processes was not tested",
)
def test_two_processes_and_fused_heads_do_what_one_does(distill):
    one, *others = map(result, [start(1), start(2), start(1, FUSED_HEAD="1"), start(2, FUSED_HEAD="1")])
    assert one["norms"][0] > 1e-2
    for other in others:
        # The Trainer logs rounded numbers.
        for name in ["losses", "norms", "held out"]:
            assert other[name] == pytest.approx(one[name], rel=2e-4), (name, one[name], other[name])
        for weights in zip(one["weights"], other["weights"]):
            assert torch.allclose(*map(torch.tensor, weights), rtol=1e-5, atol=1e-6)


def test_outputs_hold_logits(distill):
    teacher, student = (distill.llama(width, 1, 0.1) for width in (8, 4))
    trainer = distill.DistillationTrainer(
        teacher=teacher, model=student, args=distill.TrainingArguments(use_cpu=True, report_to=[])
    )
    ids = torch.arange(2 * 6).view(2, 6)
    _, outputs = trainer.compute_loss(student, {"input_ids": ids, "labels": ids}, return_outputs=True)
    assert torch.equal(outputs.logits, student(ids).logits)
