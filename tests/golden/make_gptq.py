"""Writes gptq.npz: what the program of GPTQ's authors makes of the cases in tests/gptq_cases.py.

With gptq.py and quant.py of IST-DASLab/gptq (2d65066) on the path, in an environment that needs nothing of ours:

    PYTHONPATH=gptq python tests/golden/make_gptq.py

Only the scales are ours, as they choose theirs by another rule; columns go by use, with groups settled before.
"""

import sys
from pathlib import Path

import gptq  # pyright: ignore[reportMissingImports]
import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import gptq_cases  # noqa: E402


class OurScales(torch.nn.Module):
    """What their ``Quantizer`` is: scale, zero and maxq of a group of columns."""

    def __init__(self, kind: str):
        super().__init__()
        self.scale, half = None, 8 if kind == "int4" else 127
        self.zero, self.maxq = torch.tensor(float(half)), torch.tensor(15.0 if kind == "int4" else 254.0)

    def ready(self) -> bool:
        return self.scale is not None

    def find_params(self, part: torch.Tensor, weight: bool) -> None:
        low, high = part.min(1).values, part.max(1).values
        if self.maxq == 15:
            scale = (torch.where(high > -low, -high, -low) / 8).to(torch.bfloat16).float()
        else:
            scale = part.abs().max(1).values / 127
        self.scale = scale[:, None]


def main() -> None:
    torch.cuda.synchronize = lambda: None  # their program measures the time of a GPU
    made = {}
    for seed, case in enumerate(gptq_cases.CASES):
        weight, inputs = gptq_cases.matrix_and_inputs(seed, case)
        linear = torch.nn.Linear(case.n_in, case.n_out, bias=False)
        linear.weight.data = torch.from_numpy(weight.copy())
        program = gptq.GPTQ(linear)
        program.add_batch(torch.from_numpy(inputs), None)
        program.quantizer = OurScales(case.kind)
        program.fasterquant(groupsize=case.group_size, actorder=True, static_groups=True)
        made[str(seed)] = linear.weight.data.numpy()
    np.savez_compressed(HERE / "gptq.npz", **made)


if __name__ == "__main__":
    main()
