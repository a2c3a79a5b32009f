"""The programs that `bench.decode_cpu` and `bench.decode_gpu` compare, each behind the same two calls.

A process loads one of them. Every side makes all the tokens asked for, with the settings that its own documentation
gives. On a CPU in float32, or with weights in int8 where its name says so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench import gpu

# Tokens guessed at a time, where they are.
GUESSES = 5


class Side(Protocol):
    def load(self, folder: Path, options: dict[str, Any]) -> None:
        """The model of `bench.prepare`; options as in `limit`, and the dtype on a GPU."""
        ...

    def generate(self, ids: np.ndarray, n: int, *, beams: int = 1, guess: str = "none") -> np.ndarray:
        """``n`` new tokens ``[B, n]`` for prompts ``[B, T]``, greedily or by beam search.

        ``guess`` is ``"lookup"`` or ``"assistant"`` where tokens are to be guessed, `GUESSES` at a time.
        """
        ...

    def version(self) -> str: ...


class Optjax:
    quantization: str | None = None
    options: dict[str, Any] = {}

    def load(self, folder: Path, options: dict[str, Any]) -> None:
        import optjax

        dtype = options.get("dtype")
        self.params = optjax.load_params(folder / "hf", dtype, quantization=self.quantization)
        if (folder / "assistant").is_dir():
            self.assistant = optjax.load_params(folder / "assistant", dtype)

    def generate(self, ids, n, *, beams=1, guess="none"):
        import optjax

        how: dict[str, Any] = dict(num_beams=beams, **self.options)
        if guess == "lookup":
            how["prompt_lookup_num_tokens"] = GUESSES
        elif guess == "assistant":
            how |= dict(assistant_model=self.assistant, num_assistant_tokens=GUESSES)
        return np.asarray(optjax.generate(self.params, ids, max_new_tokens=n, **how))[:, ids.shape[1] :]

    def version(self):
        import jax

        import optjax

        return f"{optjax.__version__} on jax {jax.__version__}"


class OptjaxInt8(Optjax):
    quantization = "int8"


class Torch:
    attention = "sdpa"

    def load(self, folder: Path, options: dict[str, Any]) -> None:
        import torch
        from transformers import OPTForCausalLM

        if options.get("device") == "gpu":
            gpu.check_device("torch")
        torch.set_num_threads(options["threads"])
        self.device = "cpu" if options.get("device", "cpu") == "cpu" else "cuda"
        how: Any = dict(attn_implementation=self.attention, dtype=getattr(torch, options.get("dtype", "float32")))
        model: Any = OPTForCausalLM.from_pretrained(folder / "hf", **how)
        self.model = model.eval().to(self.device)
        if (folder / "assistant").is_dir():
            assistant: Any = OPTForCausalLM.from_pretrained(folder / "assistant", **how)
            self.assistant = assistant.eval().to(self.device)

    def generate(self, ids, n, *, beams=1, guess="none"):
        import torch

        how: dict[str, Any] = dict(max_new_tokens=n, do_sample=False, use_cache=True, num_beams=beams)
        if guess == "lookup":
            # The library wants to know an end of the text, which nothing may be here.
            end = self.model.config.vocab_size
            how |= dict(prompt_lookup_num_tokens=GUESSES, eos_token_id=end, pad_token_id=1)
        elif guess == "assistant":
            # As many guesses in every round, as ours; by default their number changes, and doubtful ones are not made.
            settings = self.assistant.generation_config
            settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = GUESSES, "constant"
            settings.assistant_confidence_threshold = 0.0
            how["assistant_model"] = self.assistant
        with torch.inference_mode():
            prompt = torch.from_numpy(ids).to(self.device)
            out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
        return out[:, ids.shape[1] :].cpu().numpy()

    def version(self):
        import torch
        import transformers

        return f"{transformers.__version__} on torch {torch.__version__}"


class Flax:
    """`FlaxOPTForCausalLM.generate` as it comes: it traces, and compiles, its loop anew at every call."""

    def load(self, folder: Path, options: dict[str, Any]) -> None:
        import jax.numpy as jnp
        from transformers import FlaxOPTForCausalLM

        dtype = jnp.dtype(options.get("dtype", "float32"))
        model: Any = FlaxOPTForCausalLM.from_pretrained(folder / "flax", dtype=dtype)
        if dtype != jnp.float32:
            cast = model.to_bf16 if dtype == jnp.bfloat16 else model.to_fp16
            model.params = cast(model.params)
        self.model = model

    def generate(self, ids, n, *, beams=1, guess="none"):
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

    def load(self, folder: Path, options: dict[str, Any]) -> None:
        import jax

        super().load(folder, options)
        self.jitted = jax.jit(super()._generate, static_argnums=(1, 2))

    def _generate(self, ids, n, beams, params):
        return self.jitted(ids, n, beams, params)


class CTranslate2:
    compute = "float32"

    def load(self, folder: Path, options: dict[str, Any]) -> None:
        import ctranslate2  # pyright: ignore[reportMissingImports]

        how: dict[str, Any] = dict(device="cpu", compute_type=self.compute, intra_threads=options["threads"])
        self.generator = ctranslate2.Generator(str(folder / "ctranslate2"), **how)

    def generate(self, ids, n, *, beams=1, guess="none"):
        prompts = [[str(i) for i in row] for row in ids.tolist()]
        options: dict[str, Any] = dict(min_length=n, max_length=n, include_prompt_in_result=False, end_token="0")
        out = self.generator.generate_batch(prompts, beam_size=beams, **options)
        return np.array([result.sequences_ids[0] for result in out])

    def version(self):
        import ctranslate2  # pyright: ignore[reportMissingImports]

        return ctranslate2.__version__


class CTranslate2Int8(CTranslate2):
    """Weights in int8 per row, made while loading, and activations too."""

    compute = "int8"


class Reader:
    """Reads as many bytes as the model's weights have, once for each token: what memory allows at best."""

    def load(self, folder: Path, options: dict[str, Any]) -> None:
        from concurrent.futures import ThreadPoolExecutor

        threads = options["threads"]
        size = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
        self.parts = [np.ones(size // threads // 4, np.float32) for _ in range(threads)]
        self.pool = ThreadPoolExecutor(threads)

    def generate(self, ids, n, *, beams=1, guess="none"):
        for _ in range(n):
            list(self.pool.map(np.max, self.parts))
        return np.zeros((len(ids), n), np.int64)

    def version(self):
        return f"numpy {np.__version__}"


class OnGpu:
    """First of the bases. Its peak is that of jax on the device, of all calls so far; without one of the process."""

    def load(self, folder: Path, options: dict[str, Any]) -> None:
        if options["device"] == "gpu":
            gpu.check_device("jax")
        super().load(folder, options)  # pyright: ignore[reportAttributeAccessIssue]

    def peak_bytes(self) -> int:
        import jax

        from bench.worker import peak_bytes

        stats = jax.local_devices()[0].memory_stats()
        return peak_bytes() if stats is None else stats["peak_bytes_in_use"]


class OptjaxGpu(OnGpu, Optjax):
    pass


class OptjaxGpuEager(OptjaxGpu):
    options = {"attn_implementation": "eager"}


class FlaxGpu(OnGpu, FlaxJit):
    pass


class TorchSdpa(Torch):
    def reset_peak(self) -> None:
        import torch

        from bench.worker import reset_peak

        reset_peak() if self.device == "cpu" else torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        import torch

        from bench.worker import peak_bytes

        return peak_bytes() if self.device == "cpu" else torch.cuda.max_memory_allocated()


class TorchEager(TorchSdpa):
    attention = "eager"


class TorchFlash(TorchSdpa):
    attention = "flash_attention_2"


# Of `bench.decode_gpu`, in the order of its tables. One more attention of optjax's is one more line here and a class
# with its `options` of `optjax.generate`.
GPU_SIDES: dict[str, type[Side]] = {
    "torch-eager": TorchEager,
    "torch-sdpa": TorchSdpa,
    "torch-flash": TorchFlash,
    "flax-gpu": FlaxGpu,
    "optjax-gpu-eager": OptjaxGpuEager,
    "optjax-gpu": OptjaxGpu,
}
SIDES: dict[str, type[Side]] = GPU_SIDES | {
    "optjax": Optjax,
    "optjax-int8": OptjaxInt8,
    "torch": Torch,
    "flax": Flax,
    "flax-jit": FlaxJit,
    "ctranslate2": CTranslate2,
    "ctranslate2-int8": CTranslate2Int8,
    "reader": Reader,
}


def limit(options: dict[str, Any]) -> None:
    """Devices and threads, ``{"device": "cpu" or "gpu", "threads": on a CPU}``, before any library is imported."""
    if options.get("device", "cpu") == "gpu":
        # Several processes share the device's memory: none may take it beforehand.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        if options.get("dtype") == "float32":
            # As torch multiplies; jax would round to TF32.
            os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
        return
    threads = options["threads"]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
