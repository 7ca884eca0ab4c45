"""Reading and writing Hugging Face folders, without torch."""

import dataclasses
import gzip
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paxo.models import hf_export, policy, pretrained
from paxo.models.config import ModelConfig, RopeScaling

# 6 query heads in 2 groups of 3: no two sizes are equal, so a wrong axis order cannot pass.
CONFIG = ModelConfig(
    vocab_size=11,
    hidden_size=12,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=10,
    max_positions=32,
    tie_embeddings=False,
)
LLAMA_JSON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 10,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
SCALING_JSON = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SCALING = RopeScaling(8.0, 1.0, 4.0, 16)
VARIANTS = {
    "untied": {},
    "tied": {"tie_embeddings": True},
    "llama_biases": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "qwen2": {"attention_bias": True, "tie_embeddings": True},
    "bfloat16": {"param_dtype": "bfloat16"},
    "one_head_a_group": {"num_kv_heads": 6},
    "mistral": {"num_heads": 10},  # 12 is no multiple of 10, which Llama refuses
    "rope": {"rope_scaling": SCALING, "rope_theta": 5e5, "norm_eps": 1e-6},
}


def random_params(config, seed=0):
    """Parameters of which no two are equal; zeros and ones would hide a swap."""
    rng = np.random.default_rng(seed)
    shapes = policy.param_shapes(config)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def llama_tensors(config=CONFIG, seed=0):
    """Tensors as Hugging Face names and shapes them, written out by hand."""
    rng = np.random.default_rng(seed)
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * h, config.num_kv_heads * h
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (config.vocab_size, d),
    }
    for n in range(config.num_layers):
        layer = f"model.layers.{n}."
        shapes |= {
            layer + "input_layernorm.weight": (d,),
            layer + "post_attention_layernorm.weight": (d,),
            layer + "self_attn.q_proj.weight": (queries, d),
            layer + "self_attn.k_proj.weight": (keys, d),
            layer + "self_attn.v_proj.weight": (keys, d),
            layer + "self_attn.o_proj.weight": (d, queries),
            layer + "mlp.gate_proj.weight": (f, d),
            layer + "mlp.up_proj.weight": (f, d),
            layer + "mlp.down_proj.weight": (d, f),
        }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def model_folder(tmp_path):
    """A Hugging Face folder of `CONFIG`, not written by paxo."""
    return write_folder(tmp_path / "model", llama_tensors())


def write_folder(folder, tensors, **fields):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LLAMA_JSON | fields))
    return folder


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def files_beside(folder):
    return sorted(path.name for path in folder.parent.iterdir())


# --- the layout


def test_fused_projections_compute_what_the_separate_ones_do(model_folder):
    tensors = load_file(model_folder / "model.safetensors")
    layers = pretrained.load_params(model_folder)["layers"]
    x = np.random.default_rng(1).normal(size=CONFIG.hidden_size).astype(np.float32)
    for n in range(2):
        weight = lambda name: tensors[f"model.layers.{n}.{name}.weight"]  # noqa: B023, E731
        qkv = np.einsum("d,dkqh->kqh", x, layers["attention"]["qkv"]["kernel"][n])
        q = (weight("self_attn.q_proj") @ x).reshape(6, 4)
        k, v = ((weight(f"self_attn.{name}_proj") @ x).reshape(2, 4) for name in "kv")
        for head in range(6):  # transformers repeats keys: query head h reads key head h // 3
            np.testing.assert_allclose(qkv[head // 3, head % 3], q[head], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(qkv[:, 3], k, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(qkv[:, 4], v, rtol=1e-5, atol=1e-6)
        out = np.einsum("kqh,kqhd->d", qkv[:, :3], layers["attention"]["out"]["kernel"][n])
        np.testing.assert_allclose(
            out, weight("self_attn.o_proj") @ q.reshape(-1), rtol=1e-4, atol=1e-5
        )
        gate, up = np.einsum("d,dcf->cf", x, layers["mlp"]["gate_up"]["kernel"][n])
        np.testing.assert_allclose(gate, weight("mlp.gate_proj") @ x, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(up, weight("mlp.up_proj") @ x, rtol=1e-5, atol=1e-6)
        down = gate @ np.asarray(layers["mlp"]["down"]["kernel"][n])
        np.testing.assert_allclose(down, weight("mlp.down_proj") @ gate, rtol=1e-4, atol=1e-5)


def test_biases_and_norms_lie_where_their_projections_do(tmp_path):
    tensors, d, f = llama_tensors(), 12, 10
    biases = {"q": 24, "k": 8, "v": 8, "o": d}
    names = {f"self_attn.{name}_proj.bias": size for name, size in biases.items()}
    names |= {"mlp.gate_proj.bias": f, "mlp.up_proj.bias": f, "mlp.down_proj.bias": d}
    for n in range(2):
        for number, (name, size) in enumerate(names.items()):
            values = np.arange(size, dtype=np.float32) + 100 * number + 1000 * n
            tensors[f"model.layers.{n}.{name}"] = values
    folder = write_folder(tmp_path / "model", tensors, attention_bias=True, mlp_bias=True)
    layers = pretrained.load_params(folder)["layers"]
    qkv = np.asarray(layers["attention"]["qkv"]["bias"])
    # Head 4 is query 1 of group 1; its element 2 is entry 4 * 4 + 2 of q_proj.bias.
    assert qkv[1, 1, 1, 2] == 1000 + 18
    assert qkv[0, 1, 3, 2] == 100 + 4 + 2  # key of group 1
    assert qkv[0, 1, 4, 2] == 200 + 4 + 2  # value of group 1
    assert layers["attention"]["out"]["bias"][0, 5] == 300 + 5
    assert layers["mlp"]["gate_up"]["bias"][1, 0, 7] == 1000 + 400 + 7
    assert layers["mlp"]["gate_up"]["bias"][1, 1, 7] == 1000 + 500 + 7
    assert layers["mlp"]["down"]["bias"][0, 7] == 600 + 7
    for name, key in (("input", "attention_norm"), ("post_attention", "mlp_norm")):
        norm = tensors[f"model.layers.1.{name}_layernorm.weight"]
        np.testing.assert_array_equal(layers[key]["scale"][1], norm)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_params_have_the_shapes_of_the_policy(variant, tmp_path):
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    pretrained.export(random_params(config), config, tmp_path / "export")
    loaded = pretrained.load_params(tmp_path / "export", config)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), loaded)
    assert shapes == jax.tree.map(lambda s: (s.shape, s.dtype), policy.param_shapes(config))


# --- round trips


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_shard_bytes", [5e9, 700])
def test_export_and_load_give_the_same_bits_and_config(variant, max_shard_bytes, tmp_path):
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    params = random_params(config)
    folder = pretrained.export(params, config, tmp_path / "export", max_shard_bytes=max_shard_bytes)
    assert pretrained.read_config(folder) == config
    assert_same(pretrained.load_params(folder), params)


def test_sharded_export_keeps_to_the_limit_and_its_index_names_every_tensor(tmp_path):
    folder = pretrained.export(
        random_params(CONFIG), CONFIG, tmp_path / "export", max_shard_bytes=3000
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    held = {file.name: load_file(file) for file in files}
    assert {name: file for file, tensors in held.items() for name in tensors} == index["weight_map"]
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in held.values()]
    assert len(files) > 1
    assert max(sizes) <= 3000
    # Files are filled: the first tensor of the next would not have fitted (the largest has 1152).
    assert min(sizes[:-1]) > 3000 - 1152
    assert sum(sizes) == index["metadata"]["total_size"]


def test_export_writes_what_another_program_wrote(model_folder, tmp_path):
    params = pretrained.load_params(model_folder)
    folder = pretrained.export(params, CONFIG, tmp_path / "export")
    written = load_file(folder / "model.safetensors")
    original = load_file(model_folder / "model.safetensors")
    assert written.keys() == original.keys()
    assert all((written[name] == original[name]).all() for name in original)


def test_dtype_is_converted_on_the_way_in_and_out(model_folder, tmp_path):
    exact = pretrained.load_params(model_folder)
    rounded = pretrained.load_params(model_folder, dtype="bfloat16")
    assert_same(rounded, jax.tree.map(lambda a: a.astype(jnp.bfloat16), exact))
    folder = pretrained.export(exact, CONFIG, tmp_path / "export", dtype=jnp.bfloat16)
    assert pretrained.read_config(folder).param_dtype == "bfloat16"
    assert_same(pretrained.load_params(folder), rounded)


def test_float16_files_are_read_exactly_as_float32(tmp_path):
    tensors = {name: t.astype(np.float16) for name, t in llama_tensors().items()}
    folder = write_folder(tmp_path / "model", tensors, torch_dtype="float16")
    embedding = pretrained.load_params(folder)["embed"]["embedding"]
    assert embedding.dtype == jnp.float32
    np.testing.assert_array_equal(embedding, tensors["model.embed_tokens.weight"])


def test_params_are_loaded_onto_a_mesh_and_exported_from_it(model_folder, tmp_path):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.P(*axes))  # noqa: E731
    shardings = jax.tree.map(lambda _: place(), policy.param_shapes(CONFIG))
    shardings["layers"]["attention"]["qkv"]["kernel"] = place(None, "fsdp", "tensor")
    shardings["layers"]["mlp"]["gate_up"]["kernel"] = place(None, "fsdp", None, "tensor")
    params = pretrained.load_params(model_folder, shardings=shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    qkv = params["layers"]["attention"]["qkv"]["kernel"]
    assert qkv.addressable_shards[0].data.shape == (2, 6, 1, 5, 4)
    assert_same(params, pretrained.load_params(model_folder))
    folder = pretrained.export(params, CONFIG, tmp_path / "export")
    assert_same(pretrained.load_params(folder), pretrained.load_params(model_folder))


# --- tokenizer and special tokens


def test_export_takes_over_tokenizer_files_and_token_ids(model_folder, tmp_path):
    config = json.loads((model_folder / "config.json").read_text())
    ids = {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": None}
    (model_folder / "config.json").write_text(json.dumps(config | ids))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (model_folder / name).write_text(json.dumps({"from": name}))
    (model_folder / "README.md").write_text("not copied")
    params = pretrained.load_params(model_folder)
    folder = pretrained.export(params, CONFIG, tmp_path / "a", tokenizer_from=model_folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (model_folder / name).read_bytes()
    assert not (folder / "README.md").exists()
    written = json.loads((folder / "config.json").read_text())
    assert {name: written[name] for name in ids} == ids
    # Without a generation_config.json the stop tokens come from config.json.
    (model_folder / "generation_config.json").unlink()
    folder = pretrained.export(params, CONFIG, tmp_path / "b", tokenizer_from=model_folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 3, "eos_token_id": [4, 5]}


def test_without_a_tokenizer_the_token_ids_are_null(tmp_path):
    folder = pretrained.export(random_params(CONFIG), CONFIG, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    # Left out, transformers would take 1 and 2, the ids of the first Llama.
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
    assert json.loads((folder / "generation_config.json").read_text()) == {}
    with pytest.raises(ValueError, match="chat_template is written beside a tokenizer"):
        pretrained.export(random_params(CONFIG), CONFIG, tmp_path / "export", chat_template="x")


def test_chat_template_is_written_only_where_the_tokenizer_has_none(model_folder, tmp_path):
    (model_folder / "tokenizer.json").write_text("{}")
    settings = model_folder / "tokenizer_config.json"
    params = random_params(CONFIG)

    def exported(chat_template):
        pretrained.export(
            params,
            CONFIG,
            tmp_path / "export",
            tokenizer_from=model_folder,
            chat_template=chat_template,
        )
        return json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())

    settings.write_text(json.dumps({"bos_token": "<s>"}))
    assert exported("given") == {"bos_token": "<s>", "chat_template": "given"}
    assert exported(None) == {"bos_token": "<s>"}
    settings.write_text(json.dumps({"chat_template": "own"}))
    assert exported("given") == {"chat_template": "own"}
    settings.write_text("{}")
    (model_folder / "chat_template.jinja").write_text("own")
    assert exported("given") == {}
    assert (tmp_path / "export" / "chat_template.jinja").read_text() == "own"


def test_a_tokenizer_object_is_saved_and_gives_the_token_ids(tmp_path):
    tokenizer = pytest.importorskip("transformers").PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), eos_token="</s>"
    )
    folder = pretrained.export(
        random_params(CONFIG),
        CONFIG,
        tmp_path / "a",
        tokenizer_from=tokenizer,
        chat_template="{{ messages[0].content }}",
    )
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 2)
    # A folder that holds only a tokenizer, with no config.json, serves as well.
    (folder / "config.json").unlink()
    again = pretrained.export(random_params(CONFIG), CONFIG, tmp_path / "b", tokenizer_from=folder)
    assert json.loads((again / "config.json").read_text())["eos_token_id"] == 2
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(again)
    assert loaded("a b")["input_ids"] == [0, 1]
    assert loaded.chat_template == "{{ messages[0].content }}"


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


# --- config.json


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": SCALING_JSON | {"rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": SCALING_JSON | {"type": "llama3"}},
        {"rope_parameters": SCALING_JSON | {"rope_type": "llama3", "rope_theta": 5e5}},
    ],
)
def test_rope_is_read_in_the_spellings_of_transformers_4_and_5(fields, tmp_path):
    config = read(tmp_path, fields)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == SCALING


def test_rope_theta_in_rope_parameters_needs_no_scaling(tmp_path):
    fields = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    config = read(tmp_path, fields)
    assert (config.rope_theta, config.rope_scaling) == (5e5, None)


def test_absent_fields_mean_what_transformers_takes_for_them(tmp_path):
    absent = {"head_dim": None, "num_key_value_heads": None, "rms_norm_eps": None}
    config = read(tmp_path, absent)
    assert (config.head_dim, config.num_kv_heads, config.norm_eps) == (2, 6, 1e-6)
    assert (config.rope_theta, config.tie_embeddings, config.attention_bias) == (1e4, False, False)


def test_qwen2_has_biases_on_query_key_and_value_alone(tmp_path):
    fields = {
        "architectures": ["Qwen2ForCausalLM"],
        "sliding_window": 4,
        "tie_word_embeddings": True,
    }
    config = read(tmp_path, fields)
    biases = (config.attention_bias, config.attention_out_bias, config.mlp_bias)
    assert biases == (True, False, False)
    assert config.tie_embeddings


def test_a_window_over_all_positions_is_no_window(tmp_path):
    mistral = {"architectures": ["MistralForCausalLM"]}
    for fields in ({"sliding_window": None}, {"sliding_window": 32}, {}):
        assert read(tmp_path, mistral | fields) == read(tmp_path, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "field 'architectures' is 'GPT2LMHeadModel'; supported: LlamaForCausalLM, "
            "MistralForCausalLM, Qwen2ForCausalLM",
        ),
        (
            {"architectures": None, "model_type": "gemma"},
            "field 'model_type' is 'gemma'; supported: llama, mistral, qwen2",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "field 'rope_scaling.rope_type' is 'yarn'; supported: default, llama3",
        ),
        (
            {"rope_parameters": {"type": "linear"}},
            "field 'rope_parameters.rope_type' is 'linear'; supported: default, llama3",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            "field 'rope_scaling.low_freq_factor' is missing",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "field 'rope_parameters.partial_rotary_factor' is 0.5; supported: 1.0",
        ),
        ({"hidden_act": "gelu"}, "field 'hidden_act' is 'gelu'; supported: silu"),
        (
            {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192},
            "field 'sliding_window' is 4096; supported: null, or at least max_position_embeddings",
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 16,
            },
            "field 'sliding_window' is 16; supported",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "field 'quantization_config' is 'quantized weights'",
        ),
        ({"torch_dtype": "int8"}, "field 'torch_dtype' is 'int8'; supported: float32, float16"),
        ({"vocab_size": None}, "field 'vocab_size' is missing"),
        ({"hidden_size": "12"}, "field 'hidden_size' must be int; got '12'"),
        ({"num_hidden_layers": True}, "field 'num_hidden_layers' must be int; got True"),
        ({"head_dim": None, "num_attention_heads": 5}, "field 'head_dim' is missing and"),
        ({"num_key_value_heads": 4}, "num_kv_heads must divide num_heads; got 4 and 6"),
    ],
)
def test_a_config_that_is_not_computed_is_refused(fields, message, tmp_path):
    error = one_line(ValueError, lambda: read(tmp_path, fields))
    assert error.startswith(f"{tmp_path / 'config.json'}: ")
    assert message in error


def test_a_config_that_is_not_json_names_file_and_line(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 11,\n "hidden_size" 12}')
    error = one_line(ValueError, lambda: pretrained.read_config(tmp_path))
    assert error.startswith(f"{tmp_path / 'config.json'}, line 2: malformed JSON")
    (tmp_path / "config.json").write_text("[]")
    error = one_line(ValueError, lambda: pretrained.read_config(tmp_path))
    assert error.endswith("expected a JSON object; got list")
    error = one_line(FileNotFoundError, lambda: pretrained.read_config(tmp_path / "nowhere"))
    assert f"{tmp_path / 'nowhere' / 'config.json'}: no such file" in error


def read(folder, fields):
    raw = {name: value for name, value in (LLAMA_JSON | fields).items() if value is not None}
    null = {
        name: None for name, value in fields.items() if value is None and name not in LLAMA_JSON
    }
    (folder / "config.json").write_text(json.dumps(raw | null))
    return pretrained.read_config(folder)


def one_line(kind, call):
    """The message of the error that `call` raises, which must be one line."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- weights that cannot be loaded


def test_missing_weights_are_named(model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    error = one_line(FileNotFoundError, lambda: pretrained.load_params(model_folder))
    assert error == (
        f"{model_folder}: neither model.safetensors nor model.safetensors.index.json is there; "
        "found pytorch_model.bin: convert to safetensors"
    )


def test_a_file_that_the_index_names_but_is_not_there_is_named(tmp_path):
    folder = pretrained.export(
        random_params(CONFIG), CONFIG, tmp_path / "export", max_shard_bytes=3000
    )
    second = sorted(folder.glob("*.safetensors"))[1]
    second.unlink()
    error = one_line(FileNotFoundError, lambda: pretrained.load_params(folder))
    assert f"model.safetensors.index.json names {second.name}, which is not in {folder}" in error
    (folder / "model.safetensors.index.json").write_text("{}")
    error = one_line(ValueError, lambda: pretrained.load_params(folder))
    assert "field 'weight_map' must map tensor names to files" in error


@pytest.mark.parametrize("keep", [0, 100, -4])
def test_a_truncated_file_is_named(model_folder, keep):
    file = model_folder / "model.safetensors"
    content = file.read_bytes()[:keep]
    file.write_bytes(content)
    error = one_line(ValueError, lambda: pretrained.load_params(model_folder))
    assert error.startswith(f"{file}: truncated or not a safetensors file ({len(content)} bytes")


def test_a_missing_tensor_is_named(tmp_path):
    tensors = llama_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    folder = write_folder(tmp_path / "model", tensors)
    error = one_line(ValueError, lambda: pretrained.load_params(folder))
    assert error.startswith(
        f"{folder}: tensor 'model.layers.1.mlp.up_proj.weight' is missing (1 of 21 are)"
    )


def test_a_wrong_shape_names_tensor_expected_and_got(tmp_path):
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors = llama_tensors() | {name: np.zeros((24, 12), np.float32)}
    folder = write_folder(tmp_path / "model", tensors)
    error = one_line(ValueError, lambda: pretrained.load_params(folder))
    assert error == (
        f"{folder / 'model.safetensors'}: tensor '{name}' has shape [24, 12]; the model's config "
        "asks for [8, 12]"
    )


def test_a_tensor_without_a_place_is_refused_but_rotary_frequencies_are_not(tmp_path):
    tensors = llama_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    folder = write_folder(tmp_path / "model", tensors)
    pretrained.load_params(folder)
    shutil.rmtree(folder)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    folder = write_folder(tmp_path / "model", tensors)
    error = one_line(ValueError, lambda: pretrained.load_params(folder))
    assert "tensor 'model.layers.0.self_attn.q_proj.bias' is not part of the model" in error


def test_integer_weights_are_refused(tmp_path):
    name = "model.norm.weight"
    folder = write_folder(tmp_path / "model", llama_tensors() | {name: np.zeros(12, np.int8)})
    error = one_line(ValueError, lambda: pretrained.load_params(folder))
    assert f"tensor '{name}' has dtype I8; supported: F64, F32, F16, BF16" in error


def test_a_tied_model_may_repeat_its_embedding_as_head_but_not_another(tmp_path):
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    folder = write_folder(tmp_path / "equal", tensors, tie_word_embeddings=True)
    assert "head" not in pretrained.load_params(folder)
    folder = write_folder(tmp_path / "differs", llama_tensors(), tie_word_embeddings=True)
    error = one_line(ValueError, lambda: pretrained.load_params(folder))
    assert "'lm_head.weight' differs from 'model.embed_tokens.weight'" in error
    assert "set tie_word_embeddings to false" in error
    del tensors["lm_head.weight"]
    folder = write_folder(tmp_path / "untied", tensors)
    error = one_line(ValueError, lambda: pretrained.load_params(folder))
    assert "'lm_head.weight' is missing" in error
    assert "or are embeddings tied?" in error


# --- exports that cannot be written


def test_params_that_do_not_fit_the_config_are_refused_before_writing(tmp_path):
    params = random_params(CONFIG)
    export = lambda p, config=CONFIG: pretrained.export(p, config, tmp_path / "export")  # noqa: E731
    wider = dataclasses.replace(CONFIG, hidden_size=18)
    error = one_line(ValueError, lambda: export(params, wider))
    assert error == ("params[embed/embedding] has shape [11, 12]; the config asks for [11, 18]")
    error = one_line(ValueError, lambda: export(params | {"heads": {"reward": jnp.zeros(12)}}))
    assert error.startswith("params hold heads/reward, which a Hugging Face decoder has no place")
    odd = dataclasses.replace(CONFIG, attention_out_bias=True)
    error = one_line(ValueError, lambda: export(random_params(odd), odd))
    assert error.startswith("no Hugging Face architecture has model.attention_bias=False")
    error = one_line(
        FileNotFoundError,
        lambda: pretrained.export(params, CONFIG, tmp_path / "export", tokenizer_from=tmp_path),
    )
    assert error.startswith(f"tokenizer_from {tmp_path}: no tokenizer there")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced_but_other_files_are_not_lost(model_folder, tmp_path):
    folder = tmp_path / "export"
    pretrained.export(random_params(CONFIG, 0), CONFIG, folder, max_shard_bytes=1000)
    second = random_params(CONFIG, 1)
    pretrained.export(second, CONFIG, folder)
    assert_same(pretrained.load_params(folder), second)
    assert sorted(f.name for f in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    (folder / "notes.txt").write_text("mine")
    error = one_line(FileExistsError, lambda: pretrained.export(second, CONFIG, folder))
    assert error.startswith(f"export folder {folder} holds 'notes.txt', which no export writes")
    (model_folder / "tokenizer.json").write_text("{}")
    error = one_line(
        FileExistsError,
        lambda: pretrained.export(second, CONFIG, model_folder, tokenizer_from=model_folder),
    )
    assert error.startswith(f"export folder {model_folder} holds the tokenizer")
    assert files_beside(folder) == ["export", "model"]


def test_an_unwritable_folder_gives_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "export"
    error = one_line(OSError, lambda: pretrained.export(random_params(CONFIG), CONFIG, folder))
    assert error.startswith(f"cannot export to {folder}: ")
    with pytest.raises(FileExistsError, match="is a file"):
        pretrained.export(random_params(CONFIG), CONFIG, tmp_path / "file")
    assert files_beside(tmp_path / "file") == ["file"]


def test_a_disk_that_fills_up_gives_one_line_and_leaves_the_earlier_export(tmp_path):
    folder = tmp_path / "export"
    first = random_params(CONFIG, 0)
    pretrained.export(first, CONFIG, folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # as a full disk: writes fail midway
    try:
        error = one_line(
            OSError, lambda: pretrained.export(random_params(CONFIG, 1), CONFIG, folder)
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.startswith(f"cannot export to {folder}: ")
    assert "File too large" in error
    assert files_beside(folder) == ["export"]
    assert_same(pretrained.load_params(folder), first)


def test_a_disk_too_small_is_seen_before_anything_is_fetched(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(hf_export.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(hf_export, "_fetch", lambda *_: pytest.fail("fetched"))
    folder = tmp_path / "export"
    error = one_line(OSError, lambda: pretrained.export(random_params(CONFIG), CONFIG, folder))
    assert error.startswith(f"cannot export to {folder}: needs 0.00 GB, the disk has 0.00 GB free")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_cleared(tmp_path):
    (tmp_path / ".export.partial").mkdir()
    (tmp_path / ".export.partial" / "model.safetensors").write_text("half")
    pretrained.export(random_params(CONFIG), CONFIG, tmp_path / "export")
    assert files_beside(tmp_path / "export") == ["export"]


# --- finding a model


def test_a_local_folder_is_taken_as_it_is(model_folder):
    assert pretrained.resolve_model(str(model_folder)) == model_folder


def test_a_model_that_is_nowhere_names_both_readings_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = one_line(FileNotFoundError, lambda: pretrained.resolve_model("nobody/nothing"))
    assert f"model 'nobody/nothing': no such folder ({tmp_path / 'nobody/nothing'})" in error
    assert "the Hugging Face hub does not give it (" in error
    error = one_line(FileNotFoundError, lambda: pretrained.resolve_model("./nothing"))
    assert "not a hub name of the form owner/name" in error
    (tmp_path / "file").write_text("")
    error = one_line(NotADirectoryError, lambda: pretrained.resolve_model("file"))
    assert error == "model file: expected a folder; got a file"


def test_a_hub_name_fetches_weights_config_and_tokenizer_and_nothing_else(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    monkeypatch.chdir(tmp_path)
    asked = {}
    fetch = lambda name, **patterns: asked.update(patterns, name=name) or "/cached"  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert str(pretrained.resolve_model("owner/some-model_1.5B")) == "/cached"
    assert asked.pop("name") == "owner/some-model_1.5B"
    wanted = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    ]
    # Mistral and Llama repositories hold the weights a second time.
    others = ["consolidated.safetensors", "original/consolidated.00.pth", "original/params.json"]
    others += ["pytorch_model.bin", "README.md", "onnx/model.safetensors"]
    assert list(filter_repo_objects(wanted + others, **asked)) == wanted


# --- a trained model


def test_stories260k_loads_and_exports_to_the_same_bits(shared_data, tmp_path):
    source = shared_data / "model_stories260k"
    config = pretrained.read_config(source)
    params = pretrained.load_params(source)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 260_032  # from its README
    assert params["layers"]["attention"]["qkv"]["kernel"].shape == (5, 64, 4, 4, 8)
    assert params["layers"]["mlp"]["gate_up"]["kernel"].shape == (5, 64, 2, 172)
    folder = pretrained.export(params, config, tmp_path / "export", tokenizer_from=source)
    assert_same(pretrained.load_params(folder), params)
    assert pretrained.read_config(folder) == config
    written, original = (load_file(f / "model.safetensors") for f in (folder, source))
    assert written.keys() == original.keys()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_stories260k_gives_the_published_loss_of_stories(shared_data):
    from tokenizers import Tokenizer

    source = shared_data / "model_stories260k"
    model = policy.make_policy(pretrained.read_config(source))
    params = pretrained.load_params(source)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    with gzip.open(shared_data / "text_tinystories" / "train.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(4))]
    expected = json.loads((source / "expected.json").read_text())["rows"][:4]
    stories = [[1, *tokenizer.encode(t, add_special_tokens=False).ids][:512] for t in texts]
    tokens = jnp.array([np.pad(ids, (0, 512 - len(ids))) for ids in stories])
    positions = jnp.broadcast_to(jnp.arange(512), tokens.shape)
    ones = jnp.ones_like(tokens)  # one group without candidates: plain causal attention

    @jax.jit
    def token_logps(params):
        hidden = model.trunk(params, tokens, positions, ones, ones - 1)
        logps = jax.nn.log_softmax(model.head(params, hidden[:, :-1]))
        return jnp.take_along_axis(logps, tokens[:, 1:, None], -1)[..., 0]

    for ids, logps, row in zip(stories, token_logps(params), expected):
        count = len(ids) - 1
        assert count == row["predicted_tokens"]
        # The file rounds to four digits; the loss a token agrees to 1e-4, in fact to 2e-6.
        assert abs(-float(logps[:count].sum()) - row["nll"]) / count < 2e-6
