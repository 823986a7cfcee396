"""Routing captured from the real classes of transformers, with tiny random weights, against choices worked out from the router's input."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crossdock.errors import BadData, MissingInput, UsageError
from crossdock.launch.cli import run
from crossdock.models.hugging_face_capture import Router, capture, choices_of, routers_of, sequences
from crossdock.placement.records.trace import Trace

transformers = pytest.importorskip("transformers")

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {  # class of configuration, MoE layers, and what else it needs
    "mixtral": ("MixtralConfig", 3, {"num_hidden_layers": 3, "num_local_experts": 6}),
    "qwen3": (
        "Qwen3MoeConfig",
        2,
        {"num_hidden_layers": 4, "num_experts": 6, "decoder_sparse_step": 2, "norm_topk_prob": True, "head_dim": 12},
    ),
    "qwen3_raw": ("Qwen3MoeConfig", 3, {"num_hidden_layers": 3, "num_experts": 7, "norm_topk_prob": False, "head_dim": 12}),
    "olmoe": ("OlmoeConfig", 3, {"num_hidden_layers": 3, "num_experts": 8}),
    "deepseek": (
        "DeepseekV3Config",
        2,
        {
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": ("GptOssConfig", 3, {"num_hidden_layers": 3, "num_local_experts": 6, "head_dim": 12}),
}


def made(name: str) -> nn.Module:
    """A model with random weights, router biases included."""
    kind, _, fields = MODELS[name]
    torch.manual_seed(3)
    model = transformers.AutoModel.from_config(getattr(transformers, kind)(**COMMON | fields))
    with torch.no_grad():
        biases = [buffer for key, buffer in model.named_buffers() if key.endswith("e_score_correction_bias")]
        for parameter in [*model.parameters(), *biases]:
            if parameter.is_floating_point() and parameter.dim():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def by_hand(name: str, router: nn.Module, x_TD: Tensor) -> tuple[list[set[int]], list[dict[int, float]]]:
    """Each token's experts and their weights, worked out token by token from what goes into the router."""
    x_TD = x_TD.reshape(-1, x_TD.shape[-1]).double()
    logit_TE = x_TD @ router.weight.detach().double().T
    chosen, weights = [], []
    for logit_E in logit_TE:
        if name == "deepseek":
            score_E = 1.0 / (1.0 + torch.exp(-logit_E))
            biased_E = score_E + router.e_score_correction_bias.double()
            best_of_group = [float(biased_E[2 * group : 2 * group + 2].sum()) for group in range(4)]
            open_groups = sorted(range(4), key=lambda group: -best_of_group[group])[:2]
            allowed = [expert for expert in range(8) if expert // 2 in open_groups]
            best = sorted(allowed, key=lambda expert: -float(biased_E[expert]))[:3]
            total = sum(float(score_E[expert]) for expert in best)
            weight = {expert: 2.5 * float(score_E[expert]) / total for expert in best}
        else:
            if name == "gpt_oss":
                logit_E = logit_E + router.bias.detach().double()
            best = sorted(range(len(logit_E)), key=lambda expert: -float(logit_E[expert]))[:3]
            size_E = torch.exp(logit_E)
            raw = name in ("qwen3_raw", "olmoe")  # probabilities of all experts, not of the chosen ones
            total = float(size_E.sum()) if raw else sum(float(size_E[expert]) for expert in best)
            weight = {expert: float(size_E[expert]) / total for expert in best}
        chosen.append(set(best))
        weights.append(weight)
    return chosen, weights


@pytest.mark.parametrize("name", MODELS)
def test_choices_and_weights_are_those_of_the_routers_logits(name):
    model = made(name)
    token_ST = np.random.default_rng(0).integers(1, 61, (4, 10))
    seen: dict[str, Tensor] = {}
    for router in routers_of(model):
        router.module.register_forward_pre_hook(lambda module, args, name=router.name: seen.update({name: args[0].detach()}))
    with torch.no_grad():
        model(torch.from_numpy(token_ST))
    inputs = dict(seen)
    trace = capture(model, token_ST, batch=4, source=name)
    assert trace.experts_TLK.shape == (40, MODELS[name][1], 3)
    assert trace.num_experts == routers_of(model)[0].num_experts
    for layer, router in enumerate(routers_of(model)):
        chosen, weights = by_hand(name, router.module, inputs[router.name])
        assert [set(token.tolist()) for token in trace.experts_TLK[:, layer]] == chosen
        for token, weight in enumerate(weights):
            for choice, expert in enumerate(trace.experts_TLK[token, layer].tolist()):
                assert trace.weights_TLK[token, layer, choice] == pytest.approx(weight[expert], rel=2e-3, abs=1e-4)
    assert np.array_equal(trace.token_T, token_ST.ravel())
    assert np.array_equal(trace.sequence_T, np.repeat(np.arange(4), 10))
    assert len({trace.experts_TLK[:, 0].tobytes(), trace.experts_TLK[:, 1].tobytes()}) == 2


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_how_sequences_are_batched_changes_nothing(name):
    model = made(name)
    token_ST = np.random.default_rng(1).integers(1, 61, (5, 8))
    together, apart = capture(model, token_ST, batch=5), capture(model, token_ST, batch=2)
    assert np.array_equal(np.sort(together.experts_TLK), np.sort(apart.experts_TLK))


def test_capturing_leaves_the_model_as_it_was():
    model = made("mixtral").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    capture(model, np.ones((1, 4), dtype=np.int64))
    assert model.training
    assert all(not router.module._forward_hooks for router in routers_of(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_hooks_are_gone_after_a_failure():
    model = made("mixtral")
    model.layers[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capture(model, np.ones((1, 4), dtype=np.int64))
    assert all(not router.module._forward_hooks for router in routers_of(model))


def older_router(num_experts: int = 6, **fields: Any) -> Router:
    """A router as transformers 4 has it: a linear layer in a block that chooses."""
    block = nn.Module()
    for key, value in fields.items():
        setattr(block, key, value)
    gate = nn.Linear(4, num_experts, bias=False)
    return Router("layers.0.mlp.gate", block, gate, num_experts)


def test_routers_of_transformers_4_are_understood():
    logit_TE = torch.tensor([[0.0, 2.0, 1.0, -1.0, 0.5, 0.2], [3.0, 0.0, 1.0, 2.0, -5.0, 0.0]])
    probability_TE = logit_TE.softmax(dim=-1)
    expert_TK, weight_TK = choices_of(logit_TE, older_router(top_k=2, norm_topk_prob=False))
    assert expert_TK.tolist() == [[1, 2], [0, 3]]
    assert torch.allclose(weight_TK, torch.stack([probability_TE[0, [1, 2]], probability_TE[1, [0, 3]]]))
    normalised_TK = choices_of(logit_TE, older_router(top_k=2))[1]
    assert torch.allclose(normalised_TK.sum(dim=1), torch.ones(2))
    index_TK = torch.tensor([[1, 2], [0, 3]])
    scattered_TE = torch.zeros(2, 6).scatter(1, index_TK, torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
    expert_TK, weight_TK = choices_of((scattered_TE, index_TK), older_router())  # gpt-oss
    assert torch.allclose(weight_TK, torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
    expert_TK, weight_TK = choices_of((index_TK, torch.tensor([[0.7, 0.3], [0.6, 0.4]])), older_router())  # DeepSeek-V3
    assert torch.equal(expert_TK, index_TK)
    assert torch.allclose(weight_TK, torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
    with pytest.raises(BadData, match="no choice of experts"):
        choices_of(torch.zeros(2, 5), older_router(top_k=2))


def test_a_dense_model_and_strange_tokens_are_refused():
    with pytest.raises(BadData, match="no expert layers"):
        routers_of(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(BadData, match="the model knows 61"):
        capture(made("olmoe"), np.full((1, 3), 61))


def test_text_is_cut_into_whole_sequences():
    assert sequences(np.arange(11), 4, 100).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sequences(np.arange(11), 4, 7).tolist() == [[0, 1, 2, 3]]
    assert sequences(np.arange(12).reshape(3, 4), 99, 8).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(BadData, match="less than one sequence of 4"):
        sequences(np.arange(3), 4, 100)
    with pytest.raises(BadData, match="type float64"):
        sequences(np.ones(9), 4, 100)


def refused(capsys, code: int, *arguments: object) -> str:
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("crossdock: error:")
    assert "Traceback" not in error
    return error


def test_the_command_captures_a_saved_model(tmp_path: Path, capsys):
    model = made("qwen3")
    model.save_pretrained(tmp_path / "model")
    token_T = np.random.default_rng(2).integers(1, 61, 70)
    np.save(tmp_path / "tokens.npy", token_T)
    command = ["trace", "capture-hf", tmp_path / "model", "--token-ids", tmp_path / "tokens.npy", "--out", tmp_path / "trace.npz"]
    assert run([str(part) for part in [*command, "--seq-len", 16, "--tokens", 50, "--device", "cpu"]]) == 0
    assert "48 tokens" in capsys.readouterr().out
    trace = Trace.load(tmp_path / "trace.npz")
    expected = capture(model, token_T[:48].reshape(3, 16))
    assert np.array_equal(trace.experts_TLK, expected.experts_TLK)
    assert "qwen3_moe" in trace.source


def test_text_goes_through_the_models_own_tokenizer(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0} | {word: number for number, word in enumerate(["a", "router", "sends", "every", "token", "to", "few"], 1)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made("olmoe").save_pretrained(tmp_path / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    text = "every token sends a token to a router"
    (tmp_path / "text.txt").write_text(f"{text} " * 4)
    command = ["trace", "capture-hf", tmp_path / "model", "--text", tmp_path / "text.txt", "--out", tmp_path / "trace.npz", "--seq-len", 8]
    assert run([str(part) for part in command]) == 0
    trace = Trace.load(tmp_path / "trace.npz")
    assert trace.token_T[:8].tolist() == [words[word] for word in text.split()]
    assert trace.num_tokens == 32


def test_bad_input_of_the_command_ends_in_one_line(tmp_path: Path, capsys):
    made("mixtral").save_pretrained(tmp_path / "model")
    np.save(tmp_path / "tokens.npy", np.arange(1, 20))
    tokens = ("--token-ids", tmp_path / "tokens.npy")
    (tmp_path / "empty").mkdir()
    assert "no such folder" in refused(capsys, 66, "trace", "capture-hf", tmp_path / "absent", *tokens)
    assert "no config.json" in refused(capsys, 66, "trace", "capture-hf", tmp_path / "empty", *tokens)
    assert "--text or --token-ids" in refused(capsys, 2, "trace", "capture-hf", tmp_path / "model")
    assert "no tokenizer" in refused(capsys, 66, "trace", "capture-hf", tmp_path / "model", "--text", Path(__file__))
    assert "less than one sequence" in refused(capsys, 65, "trace", "capture-hf", tmp_path / "model", *tokens, "--seq-len", 64)
    assert "dtype is 'x'" in refused(capsys, 2, "trace", "capture-hf", tmp_path / "model", *tokens, "--dtype", "x")


def test_a_hub_that_is_not_reached_is_told_in_one_line(tmp_path: Path):
    """In a process of its own: where the hub is, is read when its library is loaded."""
    np.save(tmp_path / "tokens.npy", np.arange(1, 20))
    slow = "import huggingface_hub.utils._http as http; http.time.sleep = lambda seconds: None"
    code = f"{slow}; import sys; from crossdock.launch.cli import run; sys.exit(run(sys.argv[1:]))"
    command = ["trace", "capture-hf", "nobody/nothing", "--token-ids", str(tmp_path / "tokens.npy"), "--out", str(tmp_path / "t.npz")]
    nowhere = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    ended = subprocess.run([sys.executable, "-c", code, *command], env=nowhere, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 66
    (line,) = ended.stderr.splitlines()
    assert line.startswith("crossdock: error: nobody/nothing: no such model, or not whole: ")


def test_loading_refuses_what_is_no_model(tmp_path: Path):
    from crossdock.models.hugging_face_capture import load_model

    with pytest.raises(MissingInput):
        load_model(str(tmp_path / "absent"))
    with pytest.raises(UsageError):
        load_model(str(tmp_path), dtype="nothing")
