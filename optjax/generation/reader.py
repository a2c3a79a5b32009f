"""Reads options one by one, and collects what is wrong with them, so that one message can say it all."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from optjax.validate import is_concrete


class Reader:
    """Reads options of one kind or another, of which ``known`` are the names; ``problems`` collects what is wrong."""

    def __init__(self, options: Mapping[str, Any], known: Collection[str], vocab_size: int):
        self.options, self.vocab_size = options, vocab_size
        self.problems = [_unknown(name, known) for name in options if name not in known]

    def flag(self, name: str) -> bool:
        value = scalar(self.options.get(name, False))
        if not isinstance(value, bool):
            self.problems.append(f"{name} should be True or False, not {value!r}")
        return value is True

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        """One of the texts allowed; the first by default."""
        value = self.options.get(name, allowed[0])
        if not isinstance(value, str) or value not in allowed:
            self.problems.append(f"{name} should be one of {', '.join(allowed)}, not {value!r}")
            return allowed[0]
        return value

    def count(self, name: str, default: int, *, low: int = 0, none: int | None = None) -> int:
        """An integer of at least ``low``; ``none`` (or else the default) where None is given."""
        value = scalar(self.options.get(name, default))
        if value is None:
            return default if none is None else none
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.problems.append(f"{name} should be an integer of at least {low}, not {value!r}")
            return default
        return value

    def number(self, name: str, ok: Callable[[Any], bool], wanted: str, off: float | None = None) -> np.float32 | None:
        """A float32, or None where it is not given or is ``off``."""
        value = scalar(self.options.get(name))
        if value is None:
            return None
        real = isinstance(value, int | float) and not isinstance(value, bool)
        # Looked at as the float32 it becomes, where 1e-50 is 0.
        if not real or not abs(value) < 1e30 or not ok(np.float32(value)):
            self.problems.append(f"{name} should be {wanted}, not {value!r}")
            return None
        return None if value == off else np.float32(value)

    def ids(self, name: str) -> list[int]:
        """One id or several; none where None is given."""
        value = self.options.get(name)
        return [] if value is None else self.ids_in(name, value)

    def one_id(self, name: str) -> int | None:
        value = self.options.get(name)
        if value is None:
            return None
        found = self.ids_in(name, value)
        if np.ndim(value) != 0:
            self.problems.append(f"{name} should be one id, not {value!r}")
        return found[0] if found else None

    def lists_of_ids(self, name: str) -> list[list[int]]:
        value = plain(self.options.get(name))
        if value is None:
            return []
        lists = [plain(each) for each in value] if isinstance(value, _LISTS) else [None]
        if not all(isinstance(each, _LISTS) and each for each in lists):
            self.problems.append(f"{name} should be a list of lists of at least one id, not {value!r}")
            return []
        return [self.ids_in(name, each) for each in lists]

    def biases(self, name: str) -> dict[tuple[int, ...], float]:
        """``{(id, …): bias}``, or the same as pairs; of equal sequences the last counts, as in a dict."""
        value = plain(self.options.get(name))
        if value is None:
            return {}
        pairs = list(value.items()) if isinstance(value, Mapping) else value
        found: dict[tuple[int, ...], float] = {}
        for pair in pairs if isinstance(pairs, _LISTS) and pairs else [None]:
            ids, bias = plain(pair) if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
            bias = plain(bias)
            # -inf forbids; what is not a number, or forces, would leave nothing to choose by.
            real = isinstance(bias, int | float) and not isinstance(bias, bool) and (bias < 1e30)
            if not isinstance(plain(ids), _LISTS) or not plain(ids) or not real:
                wanted = "a dict from tuples of ids to numbers, or a list of [[id, …], bias]"
                self.problems.append(f"{name} should be {wanted}, not {value!r}")
                return {}
            # As the float32 it becomes; what that cannot hold would be a warning of numpy's, or an overflow.
            found[tuple(self.ids_in(name, ids))] = float(bias) if bias >= _LOWEST else -np.inf
        return {ids: bias for ids, bias in found.items() if ids}

    def pair(self, name: str) -> tuple[int, float] | None:
        """A count and a number above 0."""
        value = plain(self.options.get(name))
        if value is None:
            return None
        start: Any = None
        factor: Any = None
        if isinstance(value, list | tuple) and len(value) == 2:
            start, factor = map(plain, value)
        counted = isinstance(start, int) and not isinstance(start, bool) and start >= 0
        if not counted or not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < 1e30:
            self.problems.append(f"{name} should be (tokens, factor above 0) such as (20, 1.05), not {value!r}")
            return None
        return int(start), float(factor)

    def functions(self, name: str) -> tuple[Callable[..., Any], ...]:
        """One function or several."""
        value = self.options.get(name)
        if value is None:
            return ()
        listed = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(callable(each) and _hashable(each) for each in listed):
            self.problems.append(
                f"{name} should be a function (ids, scores) -> scores that can be hashed, not {value!r}"
            )
            return ()
        return listed

    def texts(self, name: str) -> tuple[str, ...]:
        """One text or several, each of one character at least."""
        value = self.options.get(name)
        if value is None:
            return ()
        listed = tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)
        for text in listed:
            if not isinstance(text, str) or not text:
                self.problems.append(f"{name} should be texts of at least one character, not {text!r}")
                return ()
            try:
                text.encode()
            except UnicodeEncodeError:
                self.problems.append(f"{name} holds {text!r}, which UTF-8 cannot write")
                return ()
        return tuple(sorted(listed))

    def ids_in(self, name: str, value: Any) -> list[int]:
        value = plain(value)
        listed = value if isinstance(value, _LISTS) else (value,)
        wrong = [i for i in listed if isinstance(i, bool) or not isinstance(i, int | np.integer)]
        wrong = wrong or [i for i in listed if not 0 <= i < self.vocab_size]
        if wrong:
            self.problems.append(f"{name} holds {wrong[0]!r}, which is no id of the vocabulary of {self.vocab_size}")
            return []
        return [int(i) for i in listed]


# What one divides by: hardware takes the smallest numbers for 0, and quotients by somewhat larger ones are none.
LEAST = 1e-30

_LOWEST = float(np.finfo(np.float32).min)

_LISTS = (list, tuple, set, frozenset, range)


def plain(value: Any) -> Any:
    """Arrays and numpy's numbers as Python's."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | jax.Array) else value


def scalar(value: Any) -> Any:
    """`plain` of a single number; whatever else it is comes back as it is."""
    single = isinstance(value, np.ndarray | np.generic | jax.Array) and value.ndim == 0
    return plain(value) if single and is_concrete(value) else value


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


# What transformers' `generate` takes besides, and what stands for it here.
_ELSEWHERE = {
    "max_length": "say max_new_tokens, which does not count the prompt",
    "prng_key": "say key",
    "seed": "say key=jax.random.key(seed)",
    "generation_config": "give its fields as options",
    "streamer": "see optjax.stream",
    "stopping_criteria": "see stop_strings, or optjax.stream, whose loop is yours to leave",
    "past_key_values": "see prefix",
    "use_cache": "it always is",
}


def _unknown(name: str, known: Collection[str]) -> str:
    if name in _ELSEWHERE:
        return f"unknown option {name!r} ({_ELSEWHERE[name]})"
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown option {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
