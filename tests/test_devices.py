"""Tests see no GPU unless they ask for one; code that queries the machine is tested with and without one."""

import os
import subprocess
import sys

import pytest
import torch

from qlora_rm.backbone.precision import best_dtype
from qlora_rm.planning.fit_check import card_at_hand
from tests import pretended_gpu
from tests.devices import VISIBLE, asks_for_gpu

MIXES = """
import tests.pretended_gpu as gpu
gpu.pretend()
import torch
layer = torch.nn.Linear(3, 2).cuda()
layer(torch.ones(1, 3, device="cuda")).sum().backward()
assert layer.weight.grad.device.type == "cuda" and layer.weight.grad.tolist() == [[1.0] * 3] * 2
for mixed in (lambda: layer(torch.ones(1, 3)), lambda: layer.weight + torch.ones(2, 3)):
    try:
        mixed()
    except RuntimeError as error:
        assert "on the same device" in str(error)
    else:
        raise AssertionError("a tensor of the CPU met one of the GPU")
"""


@pytest.mark.parametrize("expression", ["gpu", "gpu and slow", "slow or gpu"])
def test_a_run_that_asks_for_the_gpu(expression):
    assert asks_for_gpu(expression)


@pytest.mark.parametrize("expression", ["", None, "not gpu", "not slow and not gpu", "slow"])
def test_a_run_that_does_not(expression):
    assert not asks_for_gpu(expression)


def test_no_test_sees_a_gpu_and_neither_does_what_it_starts():
    assert os.environ[VISIBLE] == "" and not torch.cuda.is_available()


def test_without_a_gpu():
    assert best_dtype()[0] is torch.float32
    assert not card_at_hand(1).is_cuda


def test_with_a_gpu(pretend_cuda):
    dtype, reason = best_dtype()
    assert dtype is torch.bfloat16 and pretended_gpu.NAME in reason
    card = card_at_hand(1)
    assert card.is_cuda and card.memory == 20e9 and card.name == pretended_gpu.NAME


def test_with_a_gpu_that_lacks_bf16_units(pretend_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert best_dtype()[0] is torch.float16


@pytest.mark.long
@pytest.mark.slow
def test_a_pretended_gpu_computes_and_refuses_tensors_of_the_cpu():
    if reason := pretended_gpu.why_not():
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", MIXES], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stderr
