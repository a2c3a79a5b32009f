"""The programs that `bench.decode_cpu` compares, each behind the same two calls. A process loads one of them.

Every side makes all the tokens asked for, in float32, with the settings that its own documentation gives.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Side(Protocol):
    def load(self, folder: Path, threads: int) -> None:
        """The model of `bench.prepare`."""
        ...

    def generate(self, ids: np.ndarray, n: int, beams: int) -> np.ndarray:
        """``n`` new tokens ``[B, n]`` for prompts ``[B, T]``, greedily or by beam search."""
        ...

    def version(self) -> str: ...


class Optjax:
    def load(self, folder: Path, threads: int) -> None:
        import optjax

        self.params = optjax.load_params(folder / "hf")

    def generate(self, ids, n, beams):
        import optjax

        return np.asarray(optjax.generate(self.params, ids, max_new_tokens=n, num_beams=beams))[:, ids.shape[1] :]

    def version(self):
        import jax

        import optjax

        return f"{optjax.__version__} on jax {jax.__version__}"


class Torch:
    def load(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import OPTForCausalLM

        torch.set_num_threads(threads)
        self.model = OPTForCausalLM.from_pretrained(folder / "hf", attn_implementation="sdpa").eval()

    def generate(self, ids, n, beams):
        import torch

        with torch.inference_mode():
            prompt = torch.from_numpy(ids)
            mask = torch.ones_like(prompt)
            options: Any = dict(max_new_tokens=n, do_sample=False, use_cache=True, num_beams=beams)
            out = self.model.generate(prompt, attention_mask=mask, **options)
        return out[:, ids.shape[1] :].numpy()  # pyright: ignore

    def version(self):
        import torch
        import transformers

        return f"{transformers.__version__} on torch {torch.__version__}"


class Flax:
    """`FlaxOPTForCausalLM.generate` as it comes: it traces, and compiles, its loop anew at every call."""

    def load(self, folder: Path, threads: int) -> None:
        from transformers import FlaxOPTForCausalLM

        self.model: Any = FlaxOPTForCausalLM.from_pretrained(folder / "flax")

    def generate(self, ids, n, beams):
        return np.asarray(self._generate(ids, n, beams, self.model.params))[:, ids.shape[1] :]

    def _generate(self, ids, n, beams, params):
        options = dict(max_new_tokens=n, do_sample=False, num_beams=beams, eos_token_id=self.model.config.vocab_size)
        return self.model.generate(ids, params=params, **options).sequences

    def version(self):
        import jax
        import transformers

        return f"{transformers.__version__} on jax {jax.__version__}"


class FlaxJit(Flax):
    """The same inside a `jax.jit` of the caller's: compiled once for each shape and number of tokens."""

    def load(self, folder: Path, threads: int) -> None:
        import jax

        super().load(folder, threads)
        self.jitted = jax.jit(super()._generate, static_argnums=(1, 2))

    def _generate(self, ids, n, beams, params):
        return self.jitted(ids, n, beams, params)


class CTranslate2:
    def load(self, folder: Path, threads: int) -> None:
        import ctranslate2  # pyright: ignore[reportMissingImports]

        where = str(folder / "ctranslate2")
        self.generator = ctranslate2.Generator(where, device="cpu", compute_type="float32", intra_threads=threads)

    def generate(self, ids, n, beams):
        prompts = [[str(i) for i in row] for row in ids.tolist()]
        options = dict(min_length=n, max_length=n, include_prompt_in_result=False, end_token="0")
        out = self.generator.generate_batch(prompts, beam_size=beams, **options)
        return np.array([result.sequences_ids[0] for result in out])

    def version(self):
        import ctranslate2  # pyright: ignore[reportMissingImports]

        return ctranslate2.__version__


class Reader:
    """Reads as many bytes as the model's weights have, once for each token: what memory allows at best."""

    def load(self, folder: Path, threads: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        size = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
        self.parts = [np.ones(size // threads // 4, np.float32) for _ in range(threads)]
        self.pool = ThreadPoolExecutor(threads)

    def generate(self, ids, n, beams):
        for _ in range(n):
            list(self.pool.map(np.max, self.parts))
        return np.zeros((len(ids), n), np.int64)

    def version(self):
        return f"numpy {np.__version__}"


SIDES: dict[str, type[Side]] = {
    "optjax": Optjax,
    "torch": Torch,
    "flax": Flax,
    "flax-jit": FlaxJit,
    "ctranslate2": CTranslate2,
    "reader": Reader,
}


def limit_threads(threads: int) -> None:
    """For libraries that look at the environment or at the cores they may run on; before any is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
