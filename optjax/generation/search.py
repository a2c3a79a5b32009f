"""Search strategies other than one token at a time: their options, checked, with Hugging Face's names and meanings."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from optjax.generation.reader import Reader


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["length_penalty", "diversity_penalty"],
    meta_fields=["num_beams", "groups", "early_stopping"],
)
@dataclasses.dataclass(frozen=True)
class Beams:
    """Beam search.

    Attributes:
      length_penalty: float32; a hypothesis' sum of log-probabilities is divided by its length to this power.
      diversity_penalty: float32, None where there is one group.
      num_beams: of a prompt, in all groups together.
      early_stopping: True, False or ``"never"``.
    """

    length_penalty: Any
    diversity_penalty: Any
    num_beams: int
    groups: int
    early_stopping: bool | str

    @property
    def group_size(self) -> int:
        return self.num_beams // self.groups


@partial(jax.tree_util.register_dataclass, data_fields=["penalty_alpha"], meta_fields=["candidates"])
@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Contrastive search.

    Attributes:
      penalty_alpha: float32, the weight of the likeness to what was said; that of the probability is the rest of 1.
      candidates: of each step (top_k).
    """

    penalty_alpha: Any
    candidates: int


def read_search(read: Reader, do_sample: bool, ends: int) -> dict[str, Any]:
    """The settings of a strategy, None where it is off; what is wrong goes to ``read.problems``.

    ``ends`` is the number of end-of-sequence ids.
    """
    beams, contrastive = _beams(read, do_sample, ends), _contrastive(read, do_sample)
    if beams is not None and contrastive is not None:
        read.problems.append("num_beams above 1 and penalty_alpha are two strategies; give one of them")
    guesses = [name for name in ("assistant_model", "prompt_lookup_num_tokens") if read.options.get(name) is not None]
    if guesses and (beams or contrastive):
        read.problems.append(f"{guesses[0]} goes with neither num_beams above 1 nor penalty_alpha")
    return {"beams": beams, "contrastive": contrastive}


def _contrastive(read: Reader, do_sample: bool) -> Contrastive | None:
    alpha = read.number("penalty_alpha", lambda x: 0 <= x <= 1, "from 0 to 1", off=0.0)
    if alpha is None:
        return None
    if do_sample:
        read.problems.append("penalty_alpha is for do_sample=False: contrastive search draws nothing")
    top_k = read.count("top_k", 50, none=0)
    if top_k == 1 or not top_k:
        read.problems.append(f"penalty_alpha needs top_k of at least 2, the number of candidates, not {top_k}")
    return Contrastive(alpha, min(top_k, read.vocab_size))


def _beams(read: Reader, do_sample: bool, ends: int) -> Beams | None:
    num_beams = read.count("num_beams", 1, low=1)
    groups = read.count("num_beam_groups", 1, low=1)
    length = read.number("length_penalty", lambda x: True, "a number")
    diversity = read.number("diversity_penalty", lambda x: x >= 0, "at least 0", off=0.0)
    early = read.options.get("early_stopping")
    if early is None or isinstance(early, bool | np.bool_):
        early = bool(early)
    elif not isinstance(early, str) or early != "never":
        read.problems.append(f"early_stopping should be True, False or 'never', not {early!r}")
    if num_beams == 1:
        used = {"num_beam_groups": groups > 1, "diversity_penalty": diversity is not None}
        used |= {"length_penalty": length not in (None, 1), "early_stopping": early is not False}
        names = " and ".join(name for name, on in used.items() if on)
        if names:
            read.problems.append(f"{names} is for beam search: give num_beams above 1 as well")
        return None
    samples = read.count("num_return_sequences", 1, low=1)
    if samples > num_beams:
        read.problems.append(f"num_return_sequences={samples} is more than there are beams (num_beams={num_beams})")
    if max(2, ends + 1) > read.vocab_size:
        read.problems.append("beam search needs an id that is no eos_token_id, and two ids at least")
    if groups > 1:
        if num_beams % groups:
            read.problems.append(f"num_beams={num_beams} should be a multiple of num_beam_groups={groups}")
        if do_sample:
            read.problems.append("num_beam_groups above 1 is for do_sample=False")
        if read.options.get("stop_strings"):
            read.problems.append("num_beam_groups above 1 knows no stop_strings")
        if diversity is None:
            read.problems.append("num_beam_groups above 1 needs a diversity_penalty above 0, else all groups are one")
    elif diversity is not None:
        read.problems.append("diversity_penalty needs num_beam_groups above 1")
    return Beams(np.float32(1) if length is None else length, diversity, num_beams, groups, early)
