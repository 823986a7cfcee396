"""Mixtral and Qwen3-MoE in and out: every bit comes back, and the logits are those of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crossdock.errors import BadCheckpoint, BadConfig, BadData, MissingInput, UsageError
from crossdock.models.config import ModelConfig
from crossdock.models.hugging_face import from_hugging_face, targets, tensors, to_hugging_face
from crossdock.models.hugging_face_files import CONFIG, INDEX, HuggingFaceFolder, export
from crossdock.models.transformer import Transformer
from crossdock.placement.records.plan import Plan
from crossdock.runtime.checkpoints import checkpoint
from crossdock.runtime.checkpoints.checkpoint import CheckpointConfig, RunState
from crossdock.runtime.checkpoints.manifest import Manifest
from crossdock.runtime.checkpoints.saver import Saver
from crossdock.runtime.checkpoints.shards import Reader
from crossdock.runtime.data import DataState
from crossdock.runtime.optimization.engine import Engine
from crossdock.runtime.optimization.optimizer import OptimizerConfig
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.mesh import Mesh

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "num_layers": 2,
    "model_width": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "block": "top_k",
    "moe_every": 1,
    "num_experts": 4,
    "expert_width": 12,
    "gate": {"kind": "softmax_topk"},
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "mixtral_top1_tied": {"top_k": 1, "tied_head": True, "rope_base": 500.0, "norm_eps": 1e-3},
    "mixtral_wide_heads": {"head_dim": 6, "num_experts": 6, "top_k": 3},
    "qwen": {"qk_norm": True, "head_dim": 8},
    "qwen_probabilities": {"qk_norm": True, "gate": {"kind": "softmax_topk", "normalise": False}, "tied_head": True},
    "qwen_every_second": {"qk_norm": True, "moe_every": 2, "num_layers": 4, "mlp_width": 20},
    "noisy": {"gate": {"kind": "noisy_topk"}},
    "gshard": {"gate": {"kind": "gshard"}, "num_kv_heads": 4},
    "switch": {"gate": {"kind": "switch"}, "top_k": 1, "qk_norm": True},
}


def config_of(name: str) -> ModelConfig:
    return ModelConfig.model_validate(TINY | MODELS[name])


def trained(config: ModelConfig, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Path, Manifest]:
    """A model with no parameter at its initial value, and a checkpoint of it."""
    plan = Plan.contiguous(config.num_moe_layers, config.num_experts, 1)
    model = Transformer(config, Mesh.single(), plan, dtype, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    engine = Engine(model, model.mesh, plan, OptimizerConfig())
    saved = Saver(folder, engine, model.mesh, CheckpointConfig()).save(RunState(7, DataState(0, 0), 0, "d"))
    assert saved is not None
    return model, saved.folder, Manifest.read(saved.folder)


def logits_of(model: Transformer, token_QP: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(token_QP, StepContext(0, 0, False, token_QP.flatten(), 0)).logits_QPV


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by key."""
    manifest = Manifest.read(folder)
    reader = Reader(folder, manifest.tensors)
    return {key: reader.read(key) for key in manifest.tensors if key.endswith("/weight")}


def tokens(config: ModelConfig) -> Tensor:
    return torch.randint(0, config.vocab_size, (3, 10), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, folder, manifest = trained(config_of(name), tmp_path / "checkpoints")
    export(folder, manifest, model.config, 32, tmp_path / "hf")
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert {kind: set(found) for kind, found in loading.items() if found} == {}
    token_QP = tokens(model.config)
    with torch.no_grad():
        wanted = theirs.eval()(token_QP).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(logits_of(model, token_QP), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen", "qwen_every_second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_transformers_saved_come_back_bit_by_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    described = to_hugging_face(config_of(name), 32)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**described)
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="8KB")
    folder = HuggingFaceFolder(tmp_path / "hf")
    assert folder.is_bf16 == (dtype == torch.bfloat16)
    assert (tmp_path / "hf" / INDEX).exists()
    (tmp_path / "step-00000000").mkdir()
    manifest = folder.write_checkpoint(tmp_path / "step-00000000")
    assert checkpoint.verify(tmp_path / "step-00000000") is None
    export(tmp_path / "step-00000000", manifest, folder.config, 32, tmp_path / "back", dtype)
    wanted: dict[str, Tensor] = {}
    for path in (tmp_path / "hf").glob("*.safetensors"):
        wanted |= load_file(path)
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(found[key].dtype == values.dtype and torch.equal(found[key], values) for key, values in wanted.items())
    if dtype == torch.float32:
        plan = Plan.contiguous(folder.config.num_moe_layers, 4, 1)
        model = Transformer(folder.config, Mesh.single(), plan)
        checkpoint.restore(tmp_path / "step-00000000", manifest, Engine(model, model.mesh, plan, OptimizerConfig()))
        with torch.no_grad():
            expected = theirs(tokens(folder.config)).logits
        torch.testing.assert_close(logits_of(model, tokens(folder.config)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "mixtral_top1_tied", "qwen", "qwen_probabilities", "qwen_every_second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ours_come_back_bit_by_bit(name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossdock.models.hugging_face_files.MAX_SHARD_BYTES", 9_000)  # several files, and an index
    model, folder, manifest = trained(config_of(name), tmp_path / "checkpoints", dtype)
    export(folder, manifest, model.config, 32, tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    read = HuggingFaceFolder(tmp_path / "hf")
    (tmp_path / "back").mkdir()
    read.write_checkpoint(tmp_path / "back")
    wanted, found = weights(folder), weights(tmp_path / "back")
    assert found.keys() == wanted.keys()
    assert all(found[key].dtype == values.dtype and torch.equal(found[key], values) for key, values in wanted.items())
    ours = model.config.model_dump()
    theirs = read.config.model_dump()
    given = {"head_dim": model.config.head_width, "mlp_width": theirs["mlp_width"], "expert_width": model.config.routed_width}
    assert theirs == {**ours, **given}


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "scmoe", "shortcut": {"position": 1}}, "block scmoe"),
        ({"activation": "gelu"}, "activation gelu"),
        ({"gate": {"kind": "deepseek_v3"}}, "gate deepseek_v3"),
        ({"gate": {"kind": "softmax_topk", "capacity": {"policy": "fixed", "factor": 1.0}}}, "capacity fixed"),
        ({"gate": {"kind": "softmax_topk", "normalise": False}}, "do not sum to 1, without qk_norm"),
        ({"moe_every": 2}, "every second layer, without qk_norm"),
        ({"gate": {"kind": "noisy_topk"}, "top_k": 1}, "do not sum to 1"),
    ],
)
def test_other_models_are_not_exported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfig, match=f"the model has .*{message}.*neither Mixtral nor Qwen3-MoE; export models with"):
        to_hugging_face(ModelConfig.model_validate(TINY | changes), 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'; models of type mixtral and qwen3_moe"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"use_sliding_window": True}, "sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
        ({"decoder_sparse_step": 3}, "decoder_sparse_step 3"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"num_experts": 4.5}, "num_experts.*whole number|num_experts.*integer"),
        ({"num_attention_heads": 0}, "`num_heads` is 0"),
        ({"num_experts_per_tok": 9}, "top_k 9 is more than num_experts 4"),
    ],
)
def test_other_models_are_not_imported(changes: dict[str, Any], message: str) -> None:
    described = to_hugging_face(config_of("qwen"), 32) | changes
    with pytest.raises(BadData, match=message):
        from_hugging_face(described, CONFIG)
    with pytest.raises(BadData, match="has no 'hidden_size'"):
        from_hugging_face({"model_type": "mixtral"} | {"num_attention_heads": 4, "vocab_size": 9, "num_hidden_layers": 1}, CONFIG)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    model, folder, manifest = trained(config_of("mixtral"), tmp_path / "checkpoints")
    out = tmp_path / "hf"
    with pytest.raises(MissingInput, match=r"config\.json"):
        HuggingFaceFolder(tmp_path)
    export(folder, manifest, model.config, 32, out)
    with pytest.raises(UsageError, match="exists already"):
        export(folder, manifest, model.config, 32, out)
    with pytest.raises(BadCheckpoint, match=r"of another model: dense/embedding\.weight"):
        export(folder, manifest, model.config.model_copy(update={"vocab_size": 41}), 32, tmp_path / "other")
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "other").exists()
    whole = load_file(out / "model.safetensors")
    for change, message in [
        (lambda held: held.pop("model.norm.weight"), "has no model.norm.weight"),
        (lambda held: held.update({"model.norm.weight": torch.zeros(3)}), r"is F32 \[3\] where floats \[16\]"),
        (lambda held: held.update({"model.norm.weight": torch.zeros(16, dtype=torch.int8)}), r"is I8 \[16\]"),
        (lambda held: held.update({"model.extra": torch.zeros(3)}), "holds model.extra"),
    ]:
        held = dict(whole)
        change(held)
        save_file(held, out / "model.safetensors")
        with pytest.raises(BadData, match=message):
            HuggingFaceFolder(out)
    (out / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(BadData, match="cannot be read as safetensors"):
        HuggingFaceFolder(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match="pickled weights are not read"):
        HuggingFaceFolder(out)
    (out / INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(BadData, match="does not name files of this folder"):
        HuggingFaceFolder(out)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_its_place_and_shape(name: str) -> None:
    config = config_of(name)
    model = Transformer(config)
    experts = {f"expert/{bank}/{expert}/{part}": tensor[expert].shape for bank, moe in enumerate(model.moe_layers)
               for part, tensor in moe.bank.expert_tensors().items() for expert in range(config.num_experts)}  # fmt: skip
    dense = {f"dense/{key}": tensor.shape for key, tensor in model.named_parameters() if ".bank." not in key and "noise_weight" not in key}
    assert {target.ours: torch.Size(target.shape) for target in targets(config)} == experts | dense
    names = [source.theirs for source in tensors(config)]
    assert len(set(names)) == len(names)
