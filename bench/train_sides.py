"""The programs that `bench.train_cpu` compares, each behind the same two calls: one AdamW update after another.

All decay matrices only, clip the gradient to a norm of 1, and compute in float32 with a constant learning rate.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

LR, BETAS, EPS, DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


class Side:
    """One of them: `load` gives ``self.update``, which takes ids and labels ``[B, T]`` and gives the loss."""

    update: Any

    def load(self, folder: Path, options: dict[str, Any]) -> None:
        raise NotImplementedError

    def version(self) -> str:
        raise NotImplementedError

    def train(self, records: np.ndarray, steps: int) -> dict[str, Any]:
        """Updates on records ``[B, T + 1]``, the same each time: seconds and loss of each."""
        ids, labels = records[:, :-1].copy(), records[:, 1:].copy()
        seconds, losses = [], []
        for _ in range(steps):
            start = time.perf_counter()
            losses.append(float(self.update(ids, labels)))
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "losses": losses}


class Optjax(Side):
    def load(self, folder, options):
        import optjax
        from optjax.train.optimizer import Recipe
        from optjax.train.state import compile_step, init_state

        state = init_state(optjax.load_params(folder / "hf", "float32", stacked=options["stacked"]))
        recipe = Recipe(
            peak_lr=LR, total_steps=1 << 30, warmup_steps=0, final_fraction=1.0, beta1=BETAS[0], beta2=BETAS[1],
            eps=EPS, weight_decay=DECAY, clip_norm=CLIP,
        )  # fmt: skip
        self.state, step = state, None

        def update(ids, labels):
            nonlocal step
            batch = {"input_ids": ids, "labels": labels}
            step = step or compile_step(self.state, batch, recipe)
            self.state, metrics = step(self.state, batch)
            return metrics["loss"]

        self.update = update

    def version(self):
        import jax

        import optjax

        return f"{optjax.__version__} on jax {jax.__version__}"


class Torch(Side):
    def load(self, folder, options):
        import torch
        from transformers import OPTForCausalLM

        torch.set_num_threads(options["threads"])
        model: Any = OPTForCausalLM.from_pretrained(folder / "hf", attn_implementation="sdpa", dtype=torch.float32)
        model.train()
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim == 2], "weight_decay": DECAY},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)

        def update(ids, labels):
            ids, labels = (torch.from_numpy(array).long() for array in (ids, labels))
            logits = model(ids).logits
            loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
            adamw.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            adamw.step()
            return loss.item()

        self.update = update

    def version(self):
        import torch
        import transformers

        return f"{transformers.__version__} on torch {torch.__version__}"


class Flax(Side):
    """`FlaxOPTForCausalLM` with optax, in a `jax.jit` that gives up the old weights and moments."""

    def load(self, folder, options):
        import jax
        import optax
        from transformers import FlaxOPTForCausalLM

        model: Any = FlaxOPTForCausalLM.from_pretrained(folder / "flax")
        adamw = optax.chain(
            optax.clip_by_global_norm(CLIP),
            optax.adamw(LR, *BETAS, EPS, weight_decay=DECAY, mask=lambda p: jax.tree.map(lambda x: x.ndim == 2, p)),
        )

        def loss_of(params, ids, labels):
            logits = model(ids, params=params).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(state, ids, labels):
            params, moments = state
            loss, gradients = jax.value_and_grad(loss_of)(params, ids, labels)
            updates, moments = adamw.update(gradients, moments, params)
            return (optax.apply_updates(params, updates), moments), loss

        compiled = jax.jit(step, donate_argnums=0)
        self.state: Any = (model.params, adamw.init(model.params))

        def update(ids, labels):
            self.state, loss = compiled(self.state, ids, labels)
            return loss

        self.update = update

    def version(self):
        import jax
        import transformers

        return f"{transformers.__version__} on jax {jax.__version__}"


SIDES: dict[str, type[Side]] = {"optjax": Optjax, "torch": Torch, "flax": Flax}
