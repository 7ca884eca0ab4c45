"""Weights in Hugging Face's form: found, checked and read without torch.

`hf_layout` says which tensors make up which parameter, `hf_config` reads `config.json`,
`hf_export` writes a folder back.
"""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from paxo.models.config import ModelConfig
from paxo.models.hf_config import read_config, read_json
from paxo.models.hf_export import INDEX, SINGLE, export
from paxo.models.hf_layout import LM_HEAD, Parameter, Source, layout
from paxo.types import Params

__all__ = ["export", "load_params", "read_config", "resolve_model"]

READ_DTYPES = ("F64", "F32", "F16", "BF16")
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")
# Copies of the same weights in other layouts.
HUB_IGNORED = ("*/*", "consolidated*")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_model(path_or_name: str | Path) -> Path:
    """The local folder of a model: the one named, or a hub model's downloaded (or cached) copy.

    Raises:
        FileNotFoundError: if it is neither a folder nor to be had from the hub.
        NotADirectoryError: if it is a file.
    """
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"model {path_or_name}: expected a folder; got a file")
    name = str(path_or_name)
    tried = f"model {name!r}: no such folder ({folder.absolute()})"
    if not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"{tried}, and not a hub name of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_IGNORED)
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{tried}, and the Hugging Face hub does not give it ({type(error).__name__}: {reason})"
            "; check the path, or the name, the network, HF_HUB_OFFLINE and `hf auth login`"
        ) from error


def load_params(
    folder: str | Path,
    config: ModelConfig | None = None,
    *,
    dtype: Any = None,
    shardings: Any = None,
) -> Params:
    """Parameters from the safetensors of a Hugging Face folder, in one file or in many.

    Names and shapes of all tensors are checked before any is read. Then one parameter at a time is
    put together in host memory and handed to the devices.

    Args:
        folder: with `model.safetensors`, or `model.safetensors.index.json` and its files.
        config: shape of the model; read from the folder if not given.
        dtype: of the parameters; `config.param_dtype` if not given.
        shardings: pytree like params of `jax.sharding.Sharding`; the default device if not given.

    Returns:
        params, as described in `hf_layout`.

    Raises:
        FileNotFoundError: if a weight file is not there.
        ValueError: if a file is truncated or a tensor missing, unknown or of the wrong shape.
    """
    folder = Path(folder)
    config = config or read_config(folder)
    parameters = layout(config)
    dtype = jnp.dtype(dtype or config.param_dtype)
    params: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        _check(tensors, _expected(parameters, config), folder, config)
        for parameter in parameters:
            *parents, leaf = parameter.path
            node, placement = params, shardings
            for key in parents:
                node = node.setdefault(key, {})
            for key in parameter.path if shardings is not None else ():
                placement = placement[key]
            # Waited for and not named: else the host would hold more than one parameter's copy.
            node[leaf] = jax.block_until_ready(
                _put(_assemble(parameter, config.num_layers, dtype, tensors), placement)
            )
    return params


class _Tensor:
    """A tensor in an open file; nothing is read before `read`."""

    def __init__(self, file: Path, handle: Any, name: str):
        header = handle.get_slice(name)
        self.file, self.shape, self.dtype = file, tuple(header.get_shape()), header.get_dtype()
        self.read: Callable[[], np.ndarray] = lambda: handle.get_tensor(name)


def _open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    tensors = {}
    for file in _weight_files(folder):
        try:
            handle = stack.enter_context(safe_open(file, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(
                f"{file}: truncated or not a safetensors file ({file.stat().st_size} bytes; "
                f"{error}); fetch it again (a file of some 130 bytes is a git LFS pointer: "
                "`git lfs pull`)"
            ) from None
        tensors.update({name: _Tensor(file, handle, name) for name in handle.keys()})  # noqa: SIM118
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / INDEX, folder / SINGLE
    if not index.exists():
        if single.exists():
            return [single]
        others = sorted(f.name for f in folder.glob("*") if f.suffix in (".bin", ".pt", ".pth"))
        found = f"; found {', '.join(others)}: convert to safetensors" if others else ""
        raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX} is there{found}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: field 'weight_map' must map tensor names to files")
    files = [folder / name for name in sorted(set(map(str, weight_map.values())))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {missing[0]}, which is not in {folder} ({len(missing)} of {len(files)} "
            "weight files are missing); fetch the folder again"
        )
    return files


def _expected(parameters: tuple[Parameter, ...], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name."""
    shapes = {}
    for parameter in parameters:
        for layer in range(config.num_layers if parameter.stacked else 1):
            shapes.update({s.name.format(layer=layer): s.shape for s in parameter.sources})
    return shapes


def _check(
    tensors: dict[str, _Tensor],
    expected: dict[str, tuple[int, ...]],
    folder: Path,
    config: ModelConfig,
) -> None:
    missing = [name for name in expected if name not in tensors]
    if missing:
        hint = "; or are embeddings tied?" if missing == [LM_HEAD] else ""
        raise ValueError(
            f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} of {len(expected)} are); "
            f"the model's config asks for it{hint}"
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.file}: tensor {name!r} has shape {list(tensor.shape)}; the model's "
                f"config asks for {list(shape)}"
            )
        if tensor.dtype not in READ_DTYPES:
            raise ValueError(
                f"{tensor.file}: tensor {name!r} has dtype {tensor.dtype}; supported: "
                f"{', '.join(READ_DTYPES)}"
            )
    # Old files carry the rotary frequencies, which follow from the config.
    extra = [n for n in tensors if n not in expected and not n.endswith("rotary_emb.inv_freq")]
    if config.tie_embeddings and LM_HEAD in extra:
        _check_tied(tensors, folder)
        extra.remove(LM_HEAD)
    if extra:
        raise ValueError(
            f"{tensors[extra[0]].file}: tensor {extra[0]!r} is not part of the model that config "
            f"describes ({len(extra)} such tensors); is config.json the one of these weights?"
        )


def _check_tied(tensors: dict[str, _Tensor], folder: Path) -> None:
    embedding = tensors["model.embed_tokens.weight"].read()
    if not np.array_equal(tensors[LM_HEAD].read(), embedding):
        raise ValueError(
            f"{folder}: config.json ties the embeddings, but {LM_HEAD!r} differs from "
            "'model.embed_tokens.weight'; set tie_word_embeddings to false"
        )


def _assemble(
    parameter: Parameter, num_layers: int, dtype: Any, tensors: dict[str, _Tensor]
) -> np.ndarray:
    """One parameter in host memory, all layers of it."""

    def fill(array: np.ndarray, source: Source, name: str) -> None:
        array[source.index] = source.to_parameter(tensors[name].read()).astype(dtype, copy=False)

    if not parameter.stacked:
        array = np.empty(parameter.shape, dtype)
        for source in parameter.sources:
            fill(array, source, source.name)
        return array
    array = np.empty((num_layers, *parameter.shape), dtype)
    for layer in range(num_layers):
        for source in parameter.sources:
            fill(array[layer], source, source.name.format(layer=layer))
    return array


def _put(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    # Each process cuts out what its own devices hold, so meshes over several hosts work too.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
