"""What the installed PyTorch must have for the GPU that it finds."""

import pytest
import torch

from massl_fast import hardware

CUDA126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "built_for", "fits"),
    [
        ((7, 0), CUDA126, True),
        ((7, 0), CUDA130, False),
        ((8, 9), CUDA130, True),  # code of 8.6
        ((9, 0), CUDA126, True),
        ((10, 0), CUDA126, False),
        ((10, 3), CUDA130, True),
        ((12, 1), CUDA130, True),
        ((13, 0), CUDA130, True),  # by PTX of 12.0
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((7, 0), [], True),  # nothing is known
    ],
)
def test_a_gpu_without_code_is_a_sentence(monkeypatch, capability, built_for, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla X")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    if fits:
        hardware.demand_code(torch.device("cuda", 0))
    else:
        words = rf"no code for Tesla X, compute capability {capability[0]}.{capability[1]}.*docs/cluster.md"
        with pytest.raises(ValueError, match=words):
            hardware.demand_code(torch.device("cuda", 0))
    hardware.demand_code(torch.device("cpu"))
