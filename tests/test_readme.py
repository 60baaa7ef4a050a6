"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_readme_python_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code) == 3
    names: dict[str, torch.Tensor] = {}
    exec("\n".join(code), names)
    assert names["gamma"].shape == (4096,)
    assert torch.equal(names["rebuilt"] - names["rebuilt"], torch.zeros(1_000_000))  # finite, same shape
    moved = names["delta"] @ names["rebuilt"]
    assert moved > 0.5 * names["delta"] @ names["delta"]
