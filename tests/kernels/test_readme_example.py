"""The example of docs/kernels.md runs as it stands, and the kernels need torch and triton alone."""

import json
import subprocess
import sys
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
# Reports what a program has imported by its end, and of its variables those that the assertions below want.
REPORT = """
import json, sys
print(json.dumps({"modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""
FOREIGN = {"timm", "torchvision", "pydantic", "PIL", "nvidia", "tensorboard", "matplotlib", "rich", "safetensors"}


def example() -> str:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- example -->\n```python\n") == 1
    return text.partition("<!-- example -->\n```python\n")[2].partition("\n```")[0]


def run(code: str) -> set[str]:
    answer = subprocess.run([sys.executable, "-c", code + REPORT], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return set(json.loads(answer.stdout.splitlines()[-1])["modules"])


def test_example_trains():
    names = {}
    torch.manual_seed(0)
    exec(compile(example(), str(PAGE), "exec"), names)
    assert torch.isfinite(names["loss"])
    assert names["student"].weight.grad.abs().sum() > 0
    assert names["pointer"].item() == 3 * 32
    torch.testing.assert_close(names["memory"][64:96], names["w"][1])  # what entered last
    assert not torch.equal(names["student"].weight, names["teacher"].weight)


def test_example_imports_little():
    modules = run(example())
    assert "massl_fast" in modules
    assert not modules & FOREIGN
