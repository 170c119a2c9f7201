"""Hugging Face folders, read and written: config.json and safetensors.

One table says which stored tensors make which parameter. Reading goes parameter by parameter to its
sharding, and each process reads only what its devices hold. Writing goes file by file. Neither has
the whole model on a host. config.json is written last: a folder that has one is complete.
"""

import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pgrpo_jax import sharding
from pgrpo_jax.config import Architecture, Compute, RopeScaling

Params = dict[str, Any]

FILE_BYTES = 4 * 2**30  # of one written file, which a host holds at one time


def architecture(path: str) -> Architecture:
    """The architecture in the config.json of a folder or hub id."""
    return _architecture(_read_config(path), path)


def load_policy(path: str, compute: Compute, mesh: Mesh) -> tuple[Architecture, Params]:
    """A decoder's parameters from a ...ForCausalLM folder or hub id.

    They are of `compute.param_dtype` and lie as `sharding.RULES` say. A missing, surplus or
    misshapen tensor is a ValueError that names it.
    """
    arch = architecture(path)
    return arch, _load(_folder(path), arch, _policy_rows(arch), compute, mesh)


def load_reward_model(path: str, compute: Compute, mesh: Mesh) -> tuple[Architecture, Params]:
    """The same for a ...ForSequenceClassification with one label: {"trunk", "score"}."""
    arch = architecture(path)
    return arch, _load(_folder(path), arch, _reward_rows(arch), compute, mesh)


def save_policy(path: str, arch: Architecture, params: Params) -> None:
    """Writes a ...ForCausalLM folder in the dtype of `params`. Every process must call it.

    Special tokens and the tokenizer are not written: neither `arch` nor `params` knows them.
    """
    _save(path, arch, params, _policy_rows(arch), _config(arch, "ForCausalLM"))


def save_reward_model(
    path: str, arch: Architecture, params: Params, pad_id: int | None = None
) -> None:
    """Writes a ...ForSequenceClassification folder with one label. Every process must call it.

    `pad_id` is how transformers finds the last real token: it refuses batches without one, and
    stops early at a text that contains it.
    """
    config = _config(arch, "ForSequenceClassification")
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": pad_id}
    _save(path, arch, params, _reward_rows(arch), config | labels)


# --- the table ------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A parameter and the tensors that store it.

    With {} in `name` there is one tensor a layer, and the parameter has a leading L. `stored` are a
    tensor's axes, commas between dimensions ("NH,D" is [N * H, D]); `axes` are ours without L.
    """

    path: str
    name: str
    stored: str
    axes: str

    def names(self, arch: Architecture) -> list[str]:
        return [self.name.format(i) for i in range(arch.layers)] if self.stacked else [self.name]

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        sizes = _sizes(arch)
        own = tuple(sizes[a] for a in self.axes)
        return (arch.layers, *own) if self.stacked else own

    def stored_shape(self, arch: Architecture) -> tuple[int, ...]:
        sizes = _sizes(arch)
        return tuple(math.prod(sizes[a] for a in group) for group in self.stored.split(","))


def _policy_rows(arch: Architecture) -> list[_Row]:
    layer = "model.layers.{}."
    rows = [
        _Row("embedding", "model.embed_tokens.weight", "V,D", "VD"),
        _Row("layers/attention_norm/scale", f"{layer}input_layernorm.weight", "D", "D"),
        _Row("layers/attention/out/kernel", f"{layer}self_attn.o_proj.weight", "D,NH", "NHD"),
        _Row("layers/mlp_norm/scale", f"{layer}post_attention_layernorm.weight", "D", "D"),
        _Row("layers/mlp/gate/kernel", f"{layer}mlp.gate_proj.weight", "F,D", "DF"),
        _Row("layers/mlp/up/kernel", f"{layer}mlp.up_proj.weight", "F,D", "DF"),
        _Row("layers/mlp/down/kernel", f"{layer}mlp.down_proj.weight", "D,F", "FD"),
        _Row("final_norm/scale", "model.norm.weight", "D", "D"),
    ]
    for ours, theirs, heads in (("query", "q", "N"), ("key", "k", "K"), ("value", "v", "K")):
        path, name = f"layers/attention/{ours}", f"{layer}self_attn.{theirs}"
        rows.append(_Row(f"{path}/kernel", f"{name}_proj.weight", f"{heads}H,D", f"D{heads}H"))
        if arch.qkv_bias:
            rows.append(_Row(f"{path}/bias", f"{name}_proj.bias", f"{heads}H", f"{heads}H"))
        if arch.qk_norm and ours != "value":
            rows.append(_Row(f"{path}_norm/scale", f"{name}_norm.weight", "H", "H"))
    if not arch.tied_embeddings:
        rows.append(_Row("unembedding", "lm_head.weight", "V,D", "DV"))
    return rows


def _reward_rows(arch: Architecture) -> list[_Row]:
    trunk = [row for row in _policy_rows(arch) if row.path != "unembedding"]
    rows = [row._replace(path=f"trunk/{row.path}") for row in trunk]
    return [*rows, _Row("score/kernel", "score.weight", "1,D", "D1")]


def _sizes(arch: Architecture) -> dict[str, int]:
    sizes = {"V": arch.vocab_size, "D": arch.width, "N": arch.heads, "K": arch.kv_heads}
    return sizes | {"H": arch.head_dim, "F": arch.mlp, "1": 1}


# --- config.json ----------------------------------------------------------------------------------


def _read_config(path: str) -> dict[str, Any]:
    file = _fetch(path, "config.json") / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path!r} has no config.json; it is not a Hugging Face model folder"
        )
    return json.loads(file.read_text())


def _architecture(config: dict[str, Any], path: str) -> Architecture:
    _refuse_unsupported(config, path)

    def need(key):
        if key not in config:
            raise ValueError(f"config.json of {path!r} lacks {key!r}")
        return config[key]

    # transformers 5 writes rope_parameters; before, rope_theta stood alone beside rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaled = _rope_type(rope) == "llama3"
    width, heads, family = need("hidden_size"), need("num_attention_heads"), need("model_type")
    return Architecture(
        vocab_size=need("vocab_size"),
        width=width,
        layers=need("num_hidden_layers"),
        heads=heads,
        kv_heads=need("num_key_value_heads"),
        head_dim=config.get("head_dim") or width // heads,
        mlp=need("intermediate_size"),
        rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else need("rope_theta")),
        rope_scaling=_rope_scaling(rope) if scaled else None,
        norm_eps=need("rms_norm_eps"),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied_embeddings=need("tie_word_embeddings"),
    )


def _refuse_unsupported(config: dict[str, Any], path: str) -> None:
    """Raises unless the model is one this decoder computes, with the first reason why not."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    sliding = config.get("use_sliding_window") or "sliding_attention" in (
        config.get("layer_types") or ()
    )
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "model_type": (config.get("model_type"), ("qwen2", "qwen3", "llama")),
        "hidden_act": (config.get("hidden_act"), ("silu",)),
        "rope_type": (_rope_type(rope), ("default", "llama3")),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), (1.0,)),
        "use_sliding_window": (bool(sliding), (False,)),
        "attention_bias": (config.get("attention_bias", False), (False,)),
        "mlp_bias": (config.get("mlp_bias", False), (False,)),
        "quantization_config": (config.get("quantization_config"), (None,)),
    }
    for key, (value, supported) in wanted.items():
        if value not in supported:
            raise ValueError(
                f"the model in {path!r} has {key} = {value!r}; this decoder supports "
                f"{' or '.join(map(repr, supported))}"
            )


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling:
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position=rope["original_max_position_embeddings"],
    )


def _config(arch: Architecture, head: str) -> dict[str, Any]:
    """config.json with the keys that transformers 4 and 5 and the inference engines all read."""
    if arch.qk_norm and arch.qkv_bias:
        raise ValueError(
            "no Hugging Face family has both qk_norm and qkv_bias (without a bias on the output); "
            "switch one off to save this architecture"
        )
    family = "Qwen3" if arch.qk_norm else "Qwen2" if arch.qkv_bias else "Llama"
    config = {
        "architectures": [f"{family}{head}"],
        "model_type": family.lower(),
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.width,
        "intermediate_size": arch.mlp,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": arch.tied_embeddings,
        "attention_bias": False,
        "use_sliding_window": False,
        # Written out, because Llama's defaults for them are 1 and 2.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if arch.rope_scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": arch.rope_scaling.factor,
            "low_freq_factor": arch.rope_scaling.low_freq_factor,
            "high_freq_factor": arch.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": arch.rope_scaling.original_max_position,
        }
    return config


# --- reading --------------------------------------------------------------------------------------


def _fetch(path: str, *patterns: str) -> pathlib.Path:
    """The folder `path`, or the local copy of a hub id's files that match `patterns`."""
    if pathlib.Path(path).is_dir():
        return pathlib.Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise FileNotFoundError(f"there is no folder {path!r}, and it is not a hub id (owner/name)")
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(path, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{path!r} is neither a folder nor a model that the Hugging Face hub gave: {error}"
        ) from error


def _folder(path: str) -> pathlib.Path:
    return _fetch(path, "config.json", "model*.safetensors", "model.safetensors.index.json")


def _open(folder: pathlib.Path) -> dict[str, Any]:
    """Every stored tensor by name, as a safetensors slice: nothing is read yet."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    stored: dict[str, Any] = {}
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {name}; only complete safetensors checkpoints are read"
            )
        file = safetensors.safe_open(folder / name, framework="np")
        stored |= {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118
    return stored


def _check(folder: pathlib.Path, stored: dict[str, Any], arch: Architecture, rows: list[_Row]):
    """Raises unless `stored` holds exactly the tensors of `rows`, in their shapes, as floats."""
    wanted = {name: row.stored_shape(arch) for row in rows for name in row.names(arch)}
    for kind, names in (
        ("lacks", sorted(wanted.keys() - stored.keys())),
        ("has the surplus", sorted(stored.keys() - wanted.keys())),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{str(folder)!r} {kind} tensors {', '.join(names[:5])}{more}")
    for name, shape in wanted.items():
        found = tuple(stored[name].get_shape())
        if found != shape:
            raise ValueError(
                f"tensor {name} in {str(folder)!r} has shape {found}; config.json makes it {shape}"
            )
        if stored[name].get_dtype() not in ("F32", "BF16", "F16"):
            raise ValueError(
                f"tensor {name} in {str(folder)!r} is {stored[name].get_dtype()}; "
                "F32, BF16 and F16 are read"
            )


def _load(
    folder: pathlib.Path, arch: Architecture, rows: list[_Row], compute: Compute, mesh: Mesh
) -> Params:
    stored = _open(folder)
    _check(folder, stored, arch, rows)
    dtype = jnp.dtype(compute.param_dtype)
    abstract = {tuple(r.path.split("/")): jax.ShapeDtypeStruct(r.shape(arch), dtype) for r in rows}
    places = sharding.shardings(traverse_util.unflatten_dict(abstract), mesh)
    places = traverse_util.flatten_dict(places, sep="/")
    params = {}
    for row in rows:

        def read(index, row=row):
            return _read(stored, row, arch, index, dtype)

        shape = row.shape(arch)
        params[row.path] = jax.make_array_from_callback(shape, places[row.path], read, dtype=dtype)
    return traverse_util.unflatten_dict(params, sep="/")


def _read(
    stored: dict[str, Any], row: _Row, arch: Architecture, index: tuple[slice, ...], dtype: Any
) -> np.ndarray:
    """The part `index` of a parameter: of each tensor only what the part needs."""
    names = row.names(arch)
    if not row.stacked:
        return _part(stored[names[0]], row, arch, index).astype(dtype)
    layers = names[index[0]]
    first = _part(stored[layers[0]], row, arch, index[1:])
    out = np.empty((len(layers), *first.shape), dtype)
    out[0] = first
    for i, name in enumerate(layers[1:], start=1):
        out[i] = _part(stored[name], row, arch, index[1:])
    return out


def _part(tensor: Any, row: _Row, arch: Architecture, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index`, in our axes, of one stored tensor."""
    sizes, wanted = _sizes(arch), dict(zip(row.axes, index, strict=True))
    cuts, shape = [], []
    for letters in row.stored.split(","):
        outer, inner = letters[0], letters[1:]
        first, last, _ = wanted.pop(outer).indices(sizes[outer])
        block = math.prod(sizes[a] for a in inner)
        cuts.append(slice(first * block, last * block))
        shape += [last - first, *(sizes[a] for a in inner)]
    letters = row.stored.replace(",", "")
    part = tensor[tuple(cuts)].reshape(shape).transpose([letters.index(a) for a in row.axes])
    return part[tuple(wanted.get(a, slice(None)) for a in row.axes)]


# --- writing --------------------------------------------------------------------------------------


def _save(
    path: str, arch: Architecture, params: Params, rows: list[_Row], config: dict[str, Any]
) -> None:
    flat = traverse_util.flatten_dict(params, sep="/")
    odd = flat.keys() ^ {row.path for row in rows}
    if odd:
        raise ValueError(f"these parameters are not in the tree or not in the file: {sorted(odd)}")
    folder = pathlib.Path(path)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        for old in folder.glob("model*.safetensors*"):
            old.unlink()
    files = _files(arch, flat, rows)
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        file = file if len(files) > 1 else "model.safetensors"
        tensors = dict(_stored(arch, flat, entries))
        weight_map |= dict.fromkeys(tensors, file)
        if jax.process_index() == 0:
            safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
    if jax.process_index() == 0:
        if len(files) > 1:
            total = {"total_size": sum(x.nbytes for x in flat.values())}
            index = {"metadata": total, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        config = config | {"dtype": str(flat[rows[0].path].dtype)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    multihost_utils.sync_global_devices(f"saved {path}")


def _files(
    arch: Architecture, flat: dict[str, jax.Array], rows: list[_Row]
) -> list[list[tuple[_Row, int]]]:
    """(row, layer) of each tensor, in files of at most FILE_BYTES (or one tensor)."""
    files: list[list[tuple[_Row, int]]] = [[]]
    size = 0
    for row in rows:
        names = row.names(arch)
        nbytes = flat[row.path].nbytes // len(names)
        for layer in range(len(names)):
            if files[-1] and size + nbytes > FILE_BYTES:
                files.append([])
                size = 0
            files[-1].append((row, layer))
            size += nbytes
    return files


def _stored(
    arch: Architecture, flat: dict[str, jax.Array], entries: list[tuple[_Row, int]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and host arrays of tensors, gathered one by one."""
    for row, layer in entries:
        value = flat[row.path][layer] if row.stacked else flat[row.path]
        if not value.is_fully_addressable:
            value = multihost_utils.process_allgather(value, tiled=True)
        order = [row.axes.index(a) for a in row.stored.replace(",", "")]
        host = np.asarray(value).transpose(order).reshape(row.stored_shape(arch))
        # safetensors writes the memory as it lies, so it must lie in order.
        yield row.names(arch)[layer], np.ascontiguousarray(host)
