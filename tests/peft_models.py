"""PEFT's LoRA beside ours: a torch model, its params, and an adapter of random numbers in PEFT's files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from hf_models import params_from, state_of, torch_model

from optjax import OPTConfig, Params

TASKS = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "question_answering": "QUESTION_ANS",
    None: "FEATURE_EXTRACTION",
}


def random_adapter(config: OPTConfig, head: str | None, folder: Path, *, stacked: bool = False, **options: Any):
    """A torch model that PEFT adapted with random numbers and saved to ``folder``; and our params of the plain one.

    Returns:
      PEFT's model in eval mode, the plain one, and params.
    """
    model = torch_model(config, head)
    params: Params = params_from(state_of(model), config, head, stacked=stacked)
    adapted = adapt(copy.deepcopy(model), peft.LoraConfig(task_type=TASKS[head], **options))
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.from_numpy(0.3 * rng.standard_normal(weight.shape)).float())
    quietly(adapted.save_pretrained, folder)
    return adapted.eval(), model, params


def adapt(model: Any, config: peft.LoraConfig) -> Any:
    return quietly(peft.get_peft_model, model, config)


def load(model: Any, folder: Path) -> Any:
    """A plain model with the adapter of a folder, as PEFT reads it."""
    return quietly(peft.PeftModel.from_pretrained, copy.deepcopy(model), folder).eval()


def quietly(function: Any, *arguments: Any) -> Any:
    """Without PEFT's warnings: of what it finds no config of, and of tensors of the base model that a file lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def outputs(model: Any, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Logits of a torch model: one array, two of question answering, the hidden states without a head."""
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    names = ("start_logits", "end_logits") if hasattr(out, "start_logits") else ("logits",)
    return [getattr(out, name).numpy() for name in (names if hasattr(out, names[0]) else ("last_hidden_state",))]
