"""Hugging Face folders: what transformers writes we compute alike, and what we write it reads."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from pgrpo_jax import sharding, types
from pgrpo_jax.config import Architecture, Compute, MeshConfig, RolloutConfig, RopeScaling
from pgrpo_jax.data import Prompt
from pgrpo_jax.models import decoder, load
from pgrpo_jax.rollout import Engine

COMPUTE = Compute()
SMALL = dict(vocab_size=56, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=48)
QWEN2 = Architecture(**SMALL)
QWEN2_UNTIED = Architecture(**SMALL, tied_embeddings=False)
QWEN3 = Architecture(**SMALL | dict(head_dim=16), qkv_bias=False, qk_norm=True)
LLAMA = Architecture(
    **SMALL | dict(head_dim=16),
    rope_theta=1e4,
    rope_scaling=RopeScaling(original_max_position=64),  # 16 < wavelengths < 64 are blended
    norm_eps=1e-5,
    qkv_bias=False,
    tied_embeddings=False,
)
FAMILIES = {"qwen2": QWEN2, "qwen2_untied": QWEN2_UNTIED, "qwen3": QWEN3, "llama": LLAMA}
families = pytest.mark.parametrize("family", FAMILIES)


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def random_params(arch, seed=0):
    """Parameters in which nothing is zero or one, so that nothing can be lost unseen."""
    shapes = jax.eval_shape(lambda key: decoder.init(arch, COMPUTE, key), jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def hf_model(arch, folder, **save):
    """A random transformers model of this architecture, saved to `folder` by transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    common = dict(
        vocab_size=arch.vocab_size,
        hidden_size=arch.width,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_heads,
        intermediate_size=arch.mlp,
        rms_norm_eps=arch.norm_eps,
        tie_word_embeddings=arch.tied_embeddings,
    )
    if arch.qkv_bias:
        config = transformers.Qwen2Config(**common)
    elif arch.qk_norm:
        config = transformers.Qwen3Config(**common, head_dim=arch.head_dim)
    else:
        config = transformers.LlamaConfig(**common, head_dim=arch.head_dim)
    config.rope_parameters = {"rope_type": "default", "rope_theta": arch.rope_theta}
    if arch.rope_scaling:
        config.rope_parameters |= {
            "rope_type": "llama3",
            "factor": arch.rope_scaling.factor,
            "low_freq_factor": arch.rope_scaling.low_freq_factor,
            "high_freq_factor": arch.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": arch.rope_scaling.original_max_position,
        }
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.2 * torch.randn(value.shape, generator=generator)
    model.save_pretrained(folder, **save)
    return model


def padded_rows(vocab_size):
    """ids, positions, segments [4, 90]: left padding 0 and 7, right padding 0 and 9."""
    ids_BT = np.random.default_rng(1).integers(0, vocab_size, (4, 90))
    columns = np.arange(90)
    left, right = np.array([0, 7, 0, 0]), np.array([0, 0, 9, 83])
    real_BT = (columns >= left[:, None]) & (columns < 90 - right[:, None])
    positions_BT = np.where(real_BT, columns - left[:, None], 0)
    return ids_BT, positions_BT.astype(np.int32), real_BT.astype(np.int32)


def hf_logits(model, ids_BT, positions_BT, segments_BT):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(ids_BT),
            attention_mask=torch.tensor(segments_BT),
            position_ids=torch.tensor(positions_BT).long(),
        ).logits.numpy()


def our_logits(params, arch, ids_BT, positions_BT, segments_BT):
    forward = jax.jit(lambda *rows: decoder.forward(params, arch, COMPUTE, *rows))
    x_BTD = forward(*(jnp.asarray(a) for a in (ids_BT, positions_BT, segments_BT)))
    return np.asarray(x_BTD @ decoder.unembedding(params, arch))


@families
def test_logits_are_those_of_transformers_with_either_padding(family, tmp_path):
    arch = FAMILIES[family]
    model = hf_model(arch, tmp_path)
    rows = padded_rows(arch.vocab_size)
    real = rows[2] > 0
    wanted = hf_logits(model, *rows)
    loaded, params = load.load_policy(str(tmp_path), COMPUTE, one_device())
    assert loaded == arch
    np.testing.assert_allclose(our_logits(params, arch, *rows)[real], wanted[real], atol=1e-4)


@families
def test_samples_have_the_log_probabilities_that_transformers_gives_them(family, tmp_path):
    arch = FAMILIES[family]
    model = hf_model(arch, tmp_path)
    arch, params = load.load_policy(str(tmp_path), COMPUTE, one_device())
    settings = RolloutConfig(
        max_completion_length=6, prompt_buckets=(12,), batch_size=2, page_size=4, prefill_tokens=8
    )
    engine = Engine(settings, arch, COMPUTE, one_device(), stop_ids=())
    tests = types.Tests(kind="assert", code=("assert True",))
    ids_T = np.random.default_rng(0).integers(0, arch.vocab_size, 12, dtype=np.int32)
    prompt = Prompt(types.Problem("a", "", tests), ids_T)
    for completion in engine.generate(params, [prompt], 2, 0, 0):
        ids_1T = np.concatenate([prompt.ids, completion.ids])[None]
        segments_1T = np.ones_like(ids_1T)
        logits_TV = hf_logits(model, ids_1T, np.arange(ids_1T.shape[1])[None], segments_1T)[0]
        logp_TV = np.asarray(jax.nn.log_softmax(logits_TV[11:-1]))
        wanted_T = np.take_along_axis(logp_TV, completion.ids[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(completion.logps, wanted_T, atol=1e-4)


@families
def test_transformers_reads_what_we_save_bit_for_bit(family, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    arch = FAMILIES[family]
    model = hf_model(arch, tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    arch, params = load.load_policy(str(tmp_path / "theirs"), COMPUTE, one_device())
    monkeypatch.setattr(load, "FILE_BYTES", 20_000)
    load.save_policy(str(tmp_path / "ours"), arch, params)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(again) is type(model)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, a), (_, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    rows = padded_rows(arch.vocab_size)
    np.testing.assert_array_equal(hf_logits(again, *rows), hf_logits(model, *rows))


@families
def test_what_is_saved_is_loaded_again_on_any_mesh_and_in_any_dtype(family, tmp_path):
    arch = FAMILIES[family]
    params = random_params(arch)
    load.save_policy(str(tmp_path), arch, params)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    loaded_arch, loaded = load.load_policy(str(tmp_path), COMPUTE, mesh)
    assert loaded_arch == arch
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    shards = loaded["layers"]["mlp"]["up"]["kernel"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(3, 16, 24)}
    _, half = load.load_policy(str(tmp_path), Compute(param_dtype="bfloat16"), mesh)
    halved = jax.tree.map(lambda a: np.asarray(a).astype(jnp.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, halved, half)


def test_a_device_reads_only_its_own_part(tmp_path, monkeypatch):
    load.save_policy(str(tmp_path), QWEN2, random_params(QWEN2))
    read = {}

    class Counted:
        def __init__(self, name, tensor):
            self.name, self.tensor = name, tensor
            self.get_shape, self.get_dtype = tensor.get_shape, tensor.get_dtype

        def __getitem__(self, index):
            part = self.tensor[index]
            read.setdefault(self.name, []).append(part.size)
            return part

    opened = load._open
    monkeypatch.setattr(
        load, "_open", lambda folder: {k: Counted(k, v) for k, v in opened(folder).items()}
    )
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    load.load_policy(str(tmp_path), COMPUTE, mesh)
    # 8 parts, one a device: [N, H, D] = [4, 8, 32] and [F, D] = [48, 32]
    assert read["model.layers.1.self_attn.q_proj.weight"] == [4 * 8 * 32 // 8] * 8
    assert read["model.layers.2.mlp.down_proj.weight"] == [48 * 32 // 8] * 8


def saved(tmp_path, edit=None, arch=QWEN2, **config):
    """A folder of ours, its tensors changed by `edit` and its config.json by `config`."""
    load.save_policy(str(tmp_path), arch, random_params(arch))
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    if edit is not None:
        edit(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return str(tmp_path)


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda t: t.pop(NAME), f"lacks tensors {NAME}"),
        (
            lambda t: t.update({"model.layers.3.odd": t[NAME]}),
            "surplus tensors model.layers.3.odd",
        ),
        (lambda t: t.update({NAME: t[NAME].T.copy()}), rf"{NAME} .* shape \(32, 48\)"),
        (lambda t: t.update({NAME: t[NAME].astype(np.int8)}), f"{NAME} .* is I8"),
        (lambda t: t.update({"lm_head.weight": t[NAME]}), "surplus tensors lm_head.weight"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(edit, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        load.load_policy(saved(tmp_path, edit), COMPUTE, one_device())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "gemma2"}, "model_type = 'gemma2'.*'qwen2' or 'qwen3' or 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["sliding_attention"] * 3}, "use_sliding_window = True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_a_model_that_would_be_computed_wrongly_is_refused(config, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        load.load_policy(saved(tmp_path, **config), COMPUTE, one_device())


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder '/nowhere/at/all'"):
        load.architecture("/nowhere/at/all")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load.architecture(str(tmp_path))
    folder = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        load.load_policy(folder, COMPUTE, one_device())
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="lacks 'hidden_size'"):
        load.architecture(folder)


def test_a_folder_that_was_not_finished_has_no_config(tmp_path, monkeypatch):
    folder = saved(tmp_path)

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        load.save_policy(folder, QWEN2, random_params(QWEN2))
    assert list(pathlib.Path(folder).iterdir()) == []


def test_parameters_that_the_architecture_does_not_have_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="unembedding"):
        load.save_policy(str(tmp_path), QWEN2, random_params(QWEN2_UNTIED))
    both = Architecture(**SMALL, qk_norm=True)
    with pytest.raises(ValueError, match="qk_norm and qkv_bias"):
        load.save_policy(str(tmp_path), both, random_params(both))
