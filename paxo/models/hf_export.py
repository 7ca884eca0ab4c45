"""A model written as a folder that transformers loads: config, safetensors, tokenizer."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError
from safetensors.numpy import save_file

from paxo.models.config import ModelConfig
from paxo.models.hf_config import TOKEN_IDS, config_json, read_json
from paxo.models.hf_layout import Parameter, Source, layout
from paxo.types import Params

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
OWN_FILES = re.compile(
    r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors|"
    r"model\.safetensors\.index\.json|" + "|".join(map(re.escape, TOKENIZER_FILES))
)


def export(
    params: Params,
    config: ModelConfig,
    folder: str | Path,
    *,
    tokenizer_from: Any = None,
    chat_template: str | None = None,
    max_shard_bytes: float = 5e9,
    dtype: Any = None,
) -> Path:
    """Write a model as a Hugging Face folder; an earlier export of that name is replaced.

    The folder appears whole or not at all. Every process calls this; process 0 writes. Tensors are
    fetched one layer at a time, so that host memory holds one file's worth.

    Args:
        params: parameters of the decoder, on any mesh.
        config: shape of the model.
        folder: where to write.
        tokenizer_from: folder whose tokenizer files, `generation_config.json` and ids of special
            tokens are taken over as they are; or a transformers tokenizer; or None for none.
        chat_template: Jinja template written where that tokenizer has none.
        max_shard_bytes: largest weight file; one file without an index if all fits.
        dtype: of the files; that of the embedding if not given.

    Returns:
        The folder.

    Raises:
        ValueError: if params do not fit config, no Hugging Face architecture does, or there is a
            chat template without a tokenizer.
        FileNotFoundError: if `tokenizer_from` holds no tokenizer.
        FileExistsError: if `folder` holds files that no export writes.
        OSError: if the folder cannot be written or the disk is too small.
    """
    if chat_template is not None and tokenizer_from is None:
        raise ValueError("chat_template is written beside a tokenizer: give tokenizer_from too")
    folder = Path(folder).absolute()
    parameters = layout(config)
    _check_params(params, parameters, config)
    dtype = jnp.dtype(dtype or params["embed"]["embedding"].dtype)
    ids = _token_ids(tokenizer_from)
    description = config_json(dataclasses.replace(config, param_dtype=dtype.name), ids)
    shards = _plan(parameters, config.num_layers, dtype.itemsize, max_shard_bytes)
    if jax.process_index() == 0:
        size = dtype.itemsize * sum(entry.size for shard in shards for entry in shard)
        _check_target(folder, tokenizer_from, size)
        with _appearing_whole(folder) as partial:
            _write_weights(_tensors(params, shards, dtype), len(shards), partial)
            _write_description(partial, description, ids, tokenizer_from, chat_template)
    else:
        for _ in _tensors(params, shards, dtype):
            pass
    if jax.process_count() > 1:
        # By a name that all share: each may see the run folder under another path.
        multihost_utils.sync_global_devices("paxo export")
    return folder


def export_config(
    config: ModelConfig,
    folder: str | Path,
    *,
    tokenizer_from: Any,
    chat_template: str | None = None,
) -> None:
    """Write all of an export but the weights: config, ids of special tokens and tokenizer.

    Arguments and errors are those of `export`; one process calls it.
    """
    folder = Path(folder).absolute()
    ids = _token_ids(tokenizer_from)
    description = config_json(config, ids)
    _check_target(folder, tokenizer_from, 0)
    with _appearing_whole(folder) as partial:
        _write_description(partial, description, ids, tokenizer_from, chat_template)


def _write_description(folder, description, ids, tokenizer_from, chat_template) -> None:
    _write_json(folder / "config.json", description)
    _write_json(folder / "generation_config.json", _known(ids))
    _write_tokenizer(folder, tokenizer_from, chat_template)


class _Entry(NamedTuple):
    """A tensor to be written."""

    parameter: Parameter
    layer: int | None
    source: Source

    @property
    def name(self) -> str:
        return self.source.name.format(layer=self.layer)

    @property
    def size(self) -> int:
        return math.prod(self.source.shape)


def _plan(
    parameters: tuple[Parameter, ...], num_layers: int, itemsize: int, max_bytes: float
) -> list[list[_Entry]]:
    """Tensors by file, layer after layer as transformers reads them."""
    first, *rest = (p for p in parameters if not p.stacked)
    entries = [_Entry(first, None, source) for source in first.sources]
    for layer in range(num_layers):
        stacked = (p for p in parameters if p.stacked)
        entries += [_Entry(p, layer, source) for p in stacked for source in p.sources]
    entries += [_Entry(p, None, source) for p in rest for source in p.sources]
    shards: list[list[_Entry]] = [[]]
    used = 0
    for entry in entries:
        size = entry.size * itemsize
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += size
    return shards


def _tensors(
    params: Params, shards: list[list[_Entry]], dtype: np.dtype
) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of each file, in host memory. All processes must iterate together."""
    for shard in shards:
        tensors = {}
        for (path, layer), entries in itertools.groupby(
            shard, lambda e: (e.parameter.path, e.layer)
        ):
            value = _fetch(_at(params, path), layer).astype(dtype, copy=False)
            tensors.update({entry.name: entry.source.from_parameter(value) for entry in entries})
        yield tensors


def _fetch(array: jax.Array, layer: int | None) -> np.ndarray:
    """A parameter, or one layer of it: gathering the whole stack would not fit on a device."""
    part = array if layer is None else array[layer]
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        return multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part)


def _write_weights(files: Iterator[dict[str, np.ndarray]], count: int, folder: Path) -> None:
    weight_map, total = {}, 0
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE
        # transformers takes the file for its own only with this mark.
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)


def _write_tokenizer(folder: Path, tokenizer_from: Any, chat_template: str | None) -> None:
    if tokenizer_from is None:
        return
    if isinstance(tokenizer_from, str | Path):
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (Path(tokenizer_from) / name).exists():
                shutil.copyfile(Path(tokenizer_from) / name, folder / name)
    else:
        tokenizer_from.save_pretrained(folder)
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    has_template = settings.get("chat_template") or (folder / "chat_template.jinja").exists()
    if chat_template is not None and not has_template:
        _write_json(settings_file, settings | {"chat_template": chat_template})


def _token_ids(tokenizer_from: Any) -> dict[str, Any]:
    """Ids of the special tokens: those of the model's config, else those of the tokenizer."""
    if tokenizer_from is None:
        return {}
    tokenizer = tokenizer_from
    if isinstance(tokenizer_from, str | Path):
        folder = Path(tokenizer_from)
        if not any((folder / name).exists() for name in VOCABULARY_FILES):
            raise FileNotFoundError(
                f"tokenizer_from {folder}: no tokenizer there; expected one of "
                f"{', '.join(VOCABULARY_FILES)}"
            )
        if (folder / "config.json").exists():
            raw = read_json(folder / "config.json")
            return {name: raw.get(name) for name in TOKEN_IDS}
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    return {name: getattr(tokenizer, name, None) for name in TOKEN_IDS}


def _known(ids: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in ids.items() if value is not None}


def _check_params(params: Params, parameters: tuple[Parameter, ...], config: ModelConfig) -> None:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    shapes = {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}
    for parameter in parameters:
        layers = (config.num_layers,) if parameter.stacked else ()
        expected, got = (*layers, *parameter.shape), shapes.pop(parameter.path, None)
        if got != expected:
            raise ValueError(
                f"params[{'/'.join(parameter.path)}] has shape {got and list(got)}; "
                f"the config asks for {list(expected)}"
            )
    if shapes:
        raise ValueError(
            f"params hold {', '.join('/'.join(path) for path in shapes)}, which a Hugging Face "
            "decoder has no place for; export the decoder without them"
        )


def _check_target(folder: Path, tokenizer_from: Any, size: int) -> None:
    """Refuse, before anything is fetched or written, what would fail or destroy other files."""
    if folder.exists():
        if not folder.is_dir():
            raise FileExistsError(f"export folder {folder} is a file; choose another name")
        if isinstance(tokenizer_from, str | Path) and folder.samefile(tokenizer_from):
            raise FileExistsError(
                f"export folder {folder} holds the tokenizer that is to be copied; choose another"
            )
        others = sorted(f.name for f in folder.iterdir() if not OWN_FILES.fullmatch(f.name))
        if others:
            raise FileExistsError(
                f"export folder {folder} holds {others[0]!r}, which no export writes; "
                "choose another"
            )
    parent = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise OSError(
            f"cannot export to {folder}: needs {size / 1e9:.2f} GB, the disk has "
            f"{free / 1e9:.2f} GB free; choose a folder on another disk"
        )


@contextlib.contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into; it takes its name at the end or is removed."""
    partial, replaced = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Left by a run that was killed.
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"cannot export to {folder}: {reason}; choose a folder that can be written and has "
            "room (nothing half-written was left)"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _at(params: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        params = params[key]
    return params


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
