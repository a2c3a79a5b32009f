"""Checkpoints in: from a folder, a file, the hub or the package, to params."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.checkpoints.hub import resolve_source
from optjax.checkpoints.layer_files import layer_files, stays_in_files
from optjax.checkpoints.open import Opened, open_checkpoint
from optjax.checkpoints.place import placer, stack
from optjax.checkpoints.quantized import read_quantized
from optjax.config import OPTConfig
from optjax.declaration import Weight, declare
from optjax.offloading import HostMemory, as_offload
from optjax.params import FLOATS, Params, as_key, as_placement, build_params, init_weight
from optjax.placed import platform
from optjax.progress import progress_bar
from optjax.quantization.quantize import Quantization, as_quantization, check_placement, quantize_weight

if TYPE_CHECKING:
    from optjax.tokenizer import Tokenizer


def load_params(
    source: str | Path,
    dtype: Any = None,
    head: str | None = None,
    mesh: Any = None,
    rules: Any = None,
    *,
    key: jax.Array | None = None,
    new_head: bool = False,
    stacked: bool = False,
    config: OPTConfig | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: bool | None = None,
    quantization: str | Quantization | None = None,
    offload: str | None = None,
) -> Params:
    """The params of a checkpoint.

    Reads Hugging Face safetensors, ``.bin``, Flax ``.msgpack`` and TF ``.h5`` (one file or many), metaseq ``.pt``
    (consolidated, model-parallel parts, FSDP shards) and Alpa's and FlexGen's folders of arrays. Tensors are read and
    cast one at a time, so the host needs room for one tensor beyond what stays. Nothing in a file is ever executed.

    Args:
      source: a folder, a file, a hub id such as ``facebook/opt-125m``, or ``"opt-mini"``, which ships with optjax.
      dtype: a floating dtype of all weights; None keeps the file's (float64 becomes float32 unless jax has x64 on).
      head: ``"causal_lm"``, ``"sequence_classification"``, ``"question_answering"``, or ``"base"`` for none. By
        default what ``architectures`` in config.json says, else the head that is in the files.
      mesh, rules: spread the weights over devices (see ``optjax.sharding``); each process reads what its devices hold.
      key: a jax PRNG key to create the head with where the checkpoint has none; without a key that is an error.
        A classifier's has ``num_labels`` of the config: ``config=config.replace(num_labels=5)``.
      new_head: create it where the checkpoint has one too: a classifier's for other labels, or one for answers.
      stacked: layers stacked ``[L, …]``, for training.
      config: an `OPTConfig` or a preset's name, in place of config.json. Where there is neither, sizes come from the
        weights and the rest from the checkpoint's training arguments or the published model of those sizes.
      revision, token: of the hub: a branch, tag or commit; an access token.
      quantization: ``"int8"``, ``"int4"``, ``"nf4"`` or an `optjax.Quantization`: quantize each matrix as it comes, so
        that the whole is never there in full precision (see `optjax.quantize`). A checkpoint that was saved quantized
        is loaded as it is without it.
      offload: for a model larger than the device's memory: ``"host"`` keeps the layers' matrices in the memory of the
        device's host, ``"disk"`` leaves them in the files, which then must stay as they are. Either way each layer
        comes to the device when its turn is, at every step: a step takes as long as bringing all of them, for one row
        or many (``optjax plan --offload`` says how long). Every function but training takes such params.
      progress: show a progress bar; by default for more than 1 GB on a terminal or in a notebook.

    Raises:
      FileNotFoundError: nothing is at ``source``, or no checkpoint is in it.
      ConnectionError: a download broke off; a second attempt goes on where it stopped.
      ValueError: a dtype, head, key, config, mesh, rules, quantization or offload that make no sense or do not go
        together, or another quantization than the checkpoint's own.
      CheckpointError (a ValueError): a file is broken, or missing, unexpected and mis-shaped tensors, all listed.
    """
    dtype = None if dtype is None else _floating(dtype)
    key = None if key is None else as_key(key)
    if new_head and key is None:
        raise ValueError("new_head=True creates a head, which takes a key: pass key=jax.random.key(0)")
    wanted, offload = as_quantization(quantization), as_offload(offload)
    _check_offload(offload, stacked, wanted, mesh)
    path = resolve_source(source, revision=revision, token=token).absolute()  # of files that are read later, too
    opened = open_checkpoint(path, head, config, create_head=key is not None, new_head=new_head)
    config, head, plan = opened.config, opened.head, opened.plan
    placement = as_placement(mesh, rules, config, head)
    place = placer(placement)
    held = opened.quantization
    if None not in (wanted, held) and wanted != held:
        raise ValueError(f"{source} is quantized as {held}; load it without quantization=, or load the original")
    meant = dtype or _kept(opened.dtype)  # what quantized weights stand for
    check_placement(wanted or held, config, head, placement)

    files = layer_files(config, plan, held, meant) if offload == "disk" else None
    with progress_bar(_nbytes(opened, offload), f"loading {Path(source).name}", progress) as advance:

        def leaf(weight: Weight, layer: int | None) -> Any:
            if weight in plan.created and key is not None:
                own = jax.random.fold_in(key, np.uint32(zlib.crc32(weight.path.encode())))
                created = init_weight(config, weight, own, meant, placement=placement)
                made = wanted or held
                return created if made is None else quantize_weight(made, weight, created, placement, meant)
            if files is not None and stays_in_files(weight):
                return None
            if weight.per_layer and layer is None:
                each = (one(weight, i, plan.dtype_of_layers(weight)) for i in range(config.num_hidden_layers))
                return stack(each, config.num_hidden_layers, on_host=offload == "host")
            return one(weight, layer)

        def one(weight: Weight, layer: int | None, kept: np.dtype | None = None) -> Any:
            tensor = plan.tensors[weight.path, layer]
            scales, columns = (of.get((weight.path, layer)) for of in (plan.scales, plan.column_scales))
            if scales is not None and held is not None:
                refs = tensor, scales, columns
                made = read_quantized(place, platform(placement), held, weight, layer, *refs, meant)
            elif wanted is not None and wanted.kind_of(weight) is not None:
                array = place(weight, layer, tensor, _kept(tensor.dtype))
                made = jax.block_until_ready(quantize_weight(wanted, weight, array, placement, meant))
            else:
                made = place(weight, layer, tensor, dtype or kept or _kept(tensor.dtype))
            advance(tensor.nbytes)
            return made

        params = build_params(config, head, leaf, stacked=stacked or offload == "host", placement=placement)
    if offload is None:
        return params
    return dataclasses.replace(params, offload=files or HostMemory(wanted or held))


def load(source: str | Path, dtype: Any = None, head: str | None = None, **options: Any) -> tuple[Params, Tokenizer]:
    """The params and the tokenizer of a checkpoint; arguments as of `load_params`."""
    from optjax.tokenizer import Tokenizer

    hub = {name: options[name] for name in ("revision", "token") if name in options}
    params = load_params(source, dtype, head, **options)
    return params, Tokenizer.load(resolve_source(source, **hub, weights=False))


def _check_offload(offload: str | None, stacked: bool, wanted: Quantization | None, mesh: Any) -> None:
    """ValueError for what does not go with ``offload``."""
    if offload is None:
        return
    if stacked:
        raise ValueError("stacked=True is for training, which offloaded layers are not; leave one of them out")
    if offload == "disk" and mesh is not None:
        raise ValueError("offload='disk' reads for one device; over a mesh use offload='host'")
    if offload == "disk" and wanted is not None:
        raise ValueError(
            "offload='disk' takes layers from the files as they are: write them quantized first "
            "(optjax convert --quantize), then load those without quantization="
        )


def _nbytes(opened: Opened, offload: str | None) -> int:
    """Of what is read while loading."""
    if offload != "disk":
        return opened.nbytes
    in_files = {weight.path for weight in declare(opened.config, None) if stays_in_files(weight)}
    return sum(tensor.nbytes for (path, _), tensor in opened.plan.tensors.items() if path not in in_files)


def _floating(dtype: Any) -> np.dtype:
    try:
        floating = jnp.dtype(dtype) in FLOATS
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"dtype should be a floating type such as 'bfloat16' or jnp.float32, not {dtype!r}")
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise ValueError(f"dtype {dtype!r} needs jax.config.update('jax_enable_x64', True)")
    return jnp.dtype(dtype)


def _kept(dtype: np.dtype) -> np.dtype:
    return jax.dtypes.canonicalize_dtype(dtype)
