"""The example runs, and its loss goes down."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "distill.py"


def test_distill():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    spec = importlib.util.spec_from_file_location("distill", EXAMPLE)
    distill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(distill)
    threads = torch.get_num_threads()
    try:
        losses, before, after = distill.train()
    finally:
        torch.set_num_threads(threads)
    assert losses[-1] < 0.8 * losses[0], losses
    assert after < 0.6 * before, (before, after)
