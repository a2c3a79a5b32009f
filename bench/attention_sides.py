"""The sides of `bench.attention_gpu`, each in a process of its own (`bench.worker`)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from bench import gpu
from bench.attentions import JAX, TORCH

# Elements of the output or the gradients that are compared.
SAMPLE = 4096


def inputs(shape: list[int]) -> list[np.ndarray]:
    """Queries, scaled, keys, values, and the output's cotangent: ``[B, T, H, K]``, the same in every process."""
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (rng.standard_normal(shape, np.float32) for _ in range(4))
    return [q * shape[-1] ** -0.5, k, v, cotangent]


def sample(arrays: list[np.ndarray]) -> list[float]:
    """Some elements of arrays ``[B, T, H, K]``, evenly over each."""
    flat = [np.asarray(x, np.float32).ravel() for x in arrays]
    return [float(x) for each in flat for x in each[np.linspace(0, each.size - 1, SAMPLE).astype(int)]]


class AttentionOfTorch:
    def __init__(self, name: str):
        self.name = name

    def load(self, folder: Path, options: dict[str, Any]) -> None:
        import torch

        if options["device"] == "gpu":
            gpu.check_device("torch")
        torch.set_num_threads(options["threads"])
        self.device = "cpu" if options["device"] == "cpu" else "cuda"
        self.dtype = getattr(torch, options["dtype"])

    def version(self) -> str:
        import torch
        import transformers

        return f"{transformers.__version__} on torch {torch.__version__}"

    def attend(self, shape: list[int], backward: bool, calls: int, first: bool) -> dict[str, Any]:
        import torch

        if first:
            self.arrays: list[Any] = []
            if self.device == "cuda":
                torch.cuda.empty_cache()
            for x in inputs(shape):
                self.arrays.append(torch.from_numpy(x).transpose(1, 2).contiguous().to(self.device, self.dtype))
            for x in self.arrays[:3]:
                x.requires_grad_(backward)
            self.function = TORCH[self.name](shape[1])
        *given, cotangent = self.arrays

        def call() -> Any:
            if not backward:
                with torch.inference_mode():
                    return [self.function(*given)]
            out = self.function(*given)
            return torch.autograd.grad(out, given, cotangent.transpose(1, 2))

        def wait() -> None:
            if self.device == "cuda":
                torch.cuda.synchronize()

        if first:
            before = self._peak(reset=True)
            found = [x.float().cpu().numpy() for x in call()]
            # The output is by tokens already, gradients are as what they are of: by heads.
            found = [x if not backward else x.swapaxes(1, 2) for x in found]
            answer = {"peak": max(self._peak() - before, 0), "sample": sample(found), "seconds": 0.0}
            call()
            return answer
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return {"seconds": (time.perf_counter() - start) / calls}

    def _peak(self, reset: bool = False) -> int:
        import torch

        if self.device == "cpu":
            return 0
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()


class AttentionOfJax:
    def __init__(self, name: str):
        self.name = name

    def load(self, folder: Path, options: dict[str, Any]) -> None:
        if options["device"] == "gpu":
            gpu.check_device("jax")
        self.dtype = options["dtype"]

    def version(self) -> str:
        import jax

        return f"jax {jax.__version__}"

    def attend(self, shape: list[int], backward: bool, calls: int, first: bool) -> dict[str, Any]:
        import jax

        if first:
            self.arrays: list[Any] = []
            self.arrays = [jax.device_put(x.astype(self.dtype)) for x in inputs(shape)]
            attend = JAX[self.name](shape[1])

            def run(q, k, v, cotangent):
                if not backward:
                    return [attend(q, k, v)]
                out, pull = jax.vjp(attend, q, k, v)
                return pull(cotangent.reshape(out.shape))

            self.program = jax.jit(run).lower(*self.arrays).compile()
            found = [np.asarray(x.astype("float32")) for x in self.program(*self.arrays)]
            memory = self.program.memory_analysis()
            peak = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory is not None else 0
            return {"peak": peak, "sample": sample(found), "seconds": 0.0}
        start = time.perf_counter()
        outs = [self.program(*self.arrays) for _ in range(calls)]
        jax.block_until_ready(outs)
        return {"seconds": (time.perf_counter() - start) / calls}


def side(name: str) -> AttentionOfTorch | AttentionOfJax:
    return AttentionOfTorch(name) if name in TORCH else AttentionOfJax(name)
