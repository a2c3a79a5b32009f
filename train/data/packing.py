"""Documents to a packed folder: in parallel, shard by shard, so that what was finished stays finished.

A shard is made by one process and put in place whole, its `.json` after it. What a shard holds depends on the inputs
alone; a run that is killed and started again, with any number of workers, ends in the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from .documents import read_documents
from .encode import encode, splits_at_lines
from .inputs import Slice, find_files, plan, shard_size
from .store import ABOUT, BLOCK_LENGTH, Shard, checksum, read_about, shard_name, token_dtype, write_about, write_json
from .store import write_records as write_shard

UNFINISHED = "packing.json"
_NOTHING = "nothing to pack in {}: no document, or all of them are empty"
Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a worker needs to make any shard.

    Attributes:
      tokenizer: a `tokenizers.Tokenizer` as JSON.
      splits: long texts may be cut at their lines.
    """

    folder: Path
    shards: list[list[Slice]]
    text_field: str
    tokenizer: str
    eos_token_id: int
    vocab_size: int
    block_length: int
    splits: bool


def pack(
    inputs: Sequence[str | Path],
    tokenizer: Any,
    folder: str | Path,
    *,
    text_field: str = "text",
    workers: int | None = None,
    block_length: int = BLOCK_LENGTH,
    shard_bytes: int | None = None,
    tokenizer_name: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Packs documents into a folder, or finishes what an earlier call began there; returns its `about.json`.

    Args:
      inputs: as of `inputs.find_files`.
      tokenizer: an `optjax.Tokenizer`.
      workers: processes (default: one for each core).
      shard_bytes: text per shard (default: by the size of the inputs).
      tokenizer_name: for the record.
      progress: is told of bytes read, and of how many in all.

    Raises:
      FileNotFoundError: an input is not there.
      ValueError: an input cannot be read; the folder holds another text; another process is packing into it.
    """
    if block_length < 1 or (shard_bytes is not None and shard_bytes < 1) or (workers is not None and workers < 1):
        raise ValueError("expected at least 1 worker, 1 token per block and 1 byte per shard")
    folder = Path(folder)
    state = json.loads(tokenizer.backend.to_str()) | {"truncation": None, "padding": None}
    written = json.dumps(state)
    files = find_files(inputs)
    shard_bytes = shard_bytes or shard_size(files)
    splits = splits_at_lines(state)
    shards = plan(files, text_field, shard_bytes, splits)
    if not shards:
        raise ValueError(_NOTHING.format(", ".join(map(str, inputs))))
    about = {
        "vocab_size": tokenizer.backend.get_vocab_size(),
        "eos_token_id": tokenizer.eos_token_id,
        "block_length": block_length,
        "text_field": text_field,
        "shard_bytes": shard_bytes,
        "tokenizer_sha256": hashlib.sha256(written.encode()).hexdigest(),
        "files": len(files),
        "files_sha256": _digest([[path.name, path.stat().st_size] for path in files]),
    }
    named = {"tokenizer": tokenizer_name, "inputs": [str(each) for each in inputs]}
    job = Job(folder, shards, text_field, written, tokenizer.eos_token_id, about["vocab_size"], block_length, splits)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _check_folder(folder, about, _digest([path.stat().st_mtime_ns for path in files]))
        for left in folder.glob("*.tmp"):
            left.unlink()
        total = sum(part.size for shard in shards for part in shard)
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found = _make_all(job, min(workers or count, len(shards)), lambda done: progress(done, total))
        if not any(shard.tokens for shard in found):
            raise ValueError(_NOTHING.format(", ".join(map(str, inputs))))
        write_about(folder, found, **named, **about)
        for number in range(len(shards)):
            _info(folder, number).unlink(missing_ok=True)
        (folder / UNFINISHED).unlink(missing_ok=True)
    return read_about(folder)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _check_folder(folder: Path, about: dict[str, Any], modified: str) -> None:
    """Whether the folder is new, or holds this text or its beginning; says there what is being made.

    Raises:
      ValueError: it holds another.
    """
    finished = (folder / ABOUT).is_file()
    unfinished = folder / UNFINISHED
    # A change of an input shows in its time, which does not outlive the packing: inputs may be copied.
    mine = about if finished else about | {"modified": modified}
    if finished or unfinished.is_file():
        theirs = read_about(folder) if finished else _read_json(unfinished)
        differ = [name for name in mine if theirs.get(name) != mine[name]]
        if differ:
            changed = "; ".join(f"{name} was {theirs.get(name)!r}, is {mine[name]!r}" for name in differ)
            raise ValueError(f"{folder} holds another packed text ({changed}); remove it, or take another folder")
        if finished:  # its shards are checked like those of an unfinished one, and made again where they are damaged
            for number, shard in enumerate(theirs["shards"]):
                if not _info(folder, number).is_file():
                    write_json(_info(folder, number), shard)
    elif any(folder.glob("*.array_record")):
        raise ValueError(f"{folder} holds shards that are not of this text; take another folder")
    else:
        write_json(unfinished, mine)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError):
        found = None
    return found if isinstance(found, dict) else {}


def _info(folder: Path, number: int) -> Path:
    return folder / f"{shard_name(number)}.json"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process packs into the folder; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise ValueError(f"another process is packing into {folder}") from None
    try:
        yield
    finally:
        os.close(handle)


def _make_all(job: Job, workers: int, progress: Progress) -> list[Shard]:
    if workers == 1:
        read = 0

        def add(size: int) -> None:
            nonlocal read
            read += size
            progress(read)

        maker = _Maker(job, add)
        return [maker.make(number) for number in range(len(job.shards))]
    context = get_context("spawn")  # a fork would carry over the locks of threads
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, _start, (job, counter))
    try:
        futures = [pool.submit(_make, number) for number in range(len(job.shards))]
        left = set(futures)
        while left:
            done, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
            progress(counter.value)
            for future in done:
                future.result()  # the first error ends it all
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise ValueError("a worker was killed; it may have run out of memory: try fewer --workers") from None
    finally:
        _stop(pool)


def _stop(pool: ProcessPoolExecutor) -> None:
    """Ends the workers at once where they are still busy."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


_maker: _Maker


def _start(job: Job, counter: Any) -> None:
    """In a new worker."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for each core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c goes to all; the program ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def add(size: int) -> None:
        with counter.get_lock():
            counter.value += size

    global _maker
    _maker = _Maker(job, add)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _make(number: int) -> Shard:
    return _maker.make(number)


class _Maker:
    """Makes shards, in one process."""

    def __init__(self, job: Job, progress: Progress):
        from tokenizers import Tokenizer

        self._job, self._progress = job, progress
        self._tokenizer = Tokenizer.from_str(job.tokenizer)

    def make(self, number: int) -> Shard:
        """A shard, unless it is there and whole."""
        job = self._job
        path = job.folder / shard_name(number)
        size = sum(part.size for part in job.shards[number])
        known = _read_json(_info(job.folder, number))
        if known and path.is_file() and (known["size"], known["crc32"]) == checksum(path):
            self._progress(size)
            return Shard(**known)
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        counts = Counter[str]()
        tokens = write_shard(beside, self._ids(number, counts), job.block_length, token_dtype(job.vocab_size))
        self._progress(size - counts["read"])
        length, crc32 = checksum(beside)
        os.replace(beside, path)
        shard = Shard(
            path.name, tokens, counts["bytes"], counts["documents"], counts["empty"], size=length, crc32=crc32
        )
        write_json(_info(job.folder, number), dataclasses.asdict(shard))
        return shard

    def _ids(self, number: int, counts: Counter[str]) -> Iterator[np.ndarray]:
        job = self._job
        parts = (part for each in job.shards[number] for part in read_documents(each, job.text_field))
        for ids, batch in encode(parts, self._tokenizer, job.eos_token_id, job.splits):
            yield ids
            read = sum(part.read for part in batch)
            counts["bytes"] += sum(part.size for part in batch)
            counts["documents"] += sum(part.ends for part in batch)
            counts["empty"] += sum(part.empty for part in batch)
            counts["read"] += read
            self._progress(read)
