"""Routing of Hugging Face mixture-of-experts models, recorded by forward hooks on their routers.

Works for every architecture whose expert layer has a child `experts` beside a router named `gate` or `router`: Mixtral, Qwen3-MoE, OLMoE,
DeepSeek-V3 and gpt-oss are tested. A router returns the chosen experts (transformers 5; before that DeepSeek and gpt-oss alone), or logits,
of which the block takes the `top_k` largest (Mixtral, Qwen3-MoE and OLMoE in transformers 4).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crossdock.errors import BadData, MissingInput, Unavailable, UsageError
from crossdock.placement.records.trace import NO_EXPERT, Trace

_ROUTER_NAMES = ("gate", "router")


@dataclass(frozen=True)
class Router:
    """The router of one expert layer: `name` in the model, the block that it serves, and how many experts it chooses from."""

    name: str
    block: nn.Module
    module: nn.Module
    num_experts: int


@dataclass
class Recording:
    """Choices and weights of each router, forward pass by forward pass: uint16 and float16 [T, K]."""

    experts: list[list[NDArray[np.uint16]]]
    weights: list[list[NDArray[np.float16]]] = field(default_factory=list)

    def trace(self, num_experts: int, token_T: NDArray[Any], sequence_T: NDArray[Any], source: str) -> Trace:
        """The trace of all passes; every router must have seen every token once."""
        experts = [np.concatenate(parts) for parts in self.experts]
        weights = [np.concatenate(parts) for parts in self.weights]
        top_k = max(chosen_TK.shape[1] for chosen_TK in experts)
        experts_TLK = np.stack([_widened(chosen_TK, top_k, NO_EXPERT) for chosen_TK in experts], axis=1)
        weights_TLK = np.stack([_widened(weight_TK, top_k, 0) for weight_TK in weights], axis=1)
        return Trace(experts_TLK, num_experts, weights_TLK, sequence_T, token_T=token_T, source=source)


def routers_of(model: nn.Module) -> list[Router]:
    """The routers in the order of their layers. Raises `BadData` where there are none, or where they choose from unlike numbers."""
    found = []
    for name, block in model.named_modules():
        child = next((child for child in _ROUTER_NAMES if isinstance(getattr(block, child, None), nn.Module)), None)
        if child is not None and isinstance(getattr(block, "experts", None), nn.Module):
            module = getattr(block, child)
            if not isinstance(weight := getattr(module, "weight", None), Tensor):
                raise BadData(
                    f"router {name}.{child} of {type(model).__name__} has no weight [experts, width], and none other is understood"
                )
            found.append(Router(f"{name}.{child}", block, module, int(weight.shape[0])))
    if not found:
        raise BadData(f"{type(model).__name__} has no expert layers (a router beside experts); capture a mixture-of-experts model")
    counts = {router.num_experts for router in found}
    if len(counts) > 1:
        raise BadData(f"the layers of {type(model).__name__} have {sorted(counts)} experts; a trace is of one number")
    return found


def choices_of(output: Any, router: Router) -> tuple[Tensor, Tensor]:
    """The experts, int64 [T, K], and their weights, float [T, K], of what a router returned."""
    tensors = [tensor for tensor in (output if isinstance(output, tuple | list) else (output,)) if isinstance(tensor, Tensor)]
    chosen = [tensor for tensor in tensors if not tensor.is_floating_point()]
    scores = [tensor for tensor in tensors if tensor.is_floating_point()]
    if chosen:
        expert_TK = chosen[0].reshape(-1, chosen[0].shape[-1])
        alike = [score for score in scores if score.shape == chosen[0].shape]
        if alike:
            return expert_TK, alike[-1].reshape(expert_TK.shape)
        return expert_TK, scores[-1].reshape(-1, router.num_experts).gather(1, expert_TK)
    top_k = getattr(router.block, "top_k", None)
    if len(scores) != 1 or scores[0].shape[-1] != router.num_experts or not isinstance(top_k, int):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise BadData(f"router {router.name} returned tensors of shapes {shapes}, in which no choice of experts is to be seen")
    weight_TK, expert_TK = scores[0].reshape(-1, router.num_experts).float().softmax(dim=-1).topk(top_k, dim=-1)
    if getattr(router.block, "norm_topk_prob", True):
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    return expert_TK, weight_TK


@contextmanager
def recording(routers: Sequence[Router]) -> Iterator[Recording]:
    """Record what the routers choose inside the `with` block; the hooks are gone after it."""
    recorded = Recording([[] for _ in routers], [[] for _ in routers])
    handles = []

    def hook_of(number: int, router: Router) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            expert_TK, weight_TK = choices_of(output, router)
            recorded.experts[number].append(expert_TK.to("cpu").numpy().astype(np.uint16))
            recorded.weights[number].append(weight_TK.detach().to("cpu", torch.float16).numpy())

        return hook

    try:
        for number, router in enumerate(routers):
            handles.append(router.module.register_forward_hook(hook_of(number, router)))
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def capture(model: nn.Module, token_ST: NDArray[np.int64], *, batch: int = 1, source: str = "") -> Trace:
    """Route sequences of equal length, [S, T] token numbers, through `model`, and record every choice.

    The model is only evaluated; `batch` sequences go through it at once. Raises `BadData` where it has no routers or a number is no token.
    """
    routers = routers_of(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if token_ST.ndim != 2 or token_ST.size == 0 or token_ST.dtype.kind not in "iu":
        raise BadData(f"token numbers have shape {token_ST.shape} and type {token_ST.dtype}; give integers [sequences, tokens]")
    if int(token_ST.min()) < 0 or int(token_ST.max()) >= vocabulary:
        raise BadData(
            f"token numbers range over {token_ST.min()}..{token_ST.max()}, and the model knows {vocabulary}; use its own tokenizer"
        )
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), recording(routers) as recorded:
            for first in range(0, len(token_ST), batch):
                model(torch.from_numpy(token_ST[first : first + batch].astype(np.int64)).to(device), use_cache=False)
    finally:
        model.train(was_training)
    sequence_T = np.repeat(np.arange(len(token_ST)), token_ST.shape[1])
    return recorded.trace(routers[0].num_experts, token_ST.ravel(), sequence_T, source)


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> nn.Module:
    """The model of a folder, or of a name in the hub, from safetensors alone and without its head.

    Raises `Unavailable` without transformers or the device, `MissingInput` where there is no such model, `BadData` where it cannot be made.
    """
    transformers = _transformers()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError as failure:
        raise UsageError(f"device is {device!r}; choose auto, cpu or cuda") from failure
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Unavailable("no CUDA device is there; choose --device cpu")
    wanted = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(wanted, str | torch.dtype):
        raise UsageError(f"dtype is {dtype!r}; choose auto, float32, bfloat16 or float16")
    _check_name(name)
    try:
        model = transformers.AutoModel.from_pretrained(name, dtype=wanted, use_safetensors=True, trust_remote_code=False)
    except OSError as failure:
        raise MissingInput(
            f"{name}: no such model, or not whole: {_first_line(failure)}; give a folder of config.json and safetensors"
        ) from failure
    except (ValueError, KeyError, RuntimeError, TypeError) as failure:
        raise BadData(f"{name}: transformers cannot make this model: {_first_line(failure)}") from failure
    return model.to(device)


def tokens_of_text(name: str, text: str) -> NDArray[np.int64]:
    """[T]: the text in the numbers of the model's own tokenizer. Raises `MissingInput` where the model has none."""
    _check_name(name)
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as failure:
        raise MissingInput(
            f"{name}: no tokenizer ({_first_line(failure)}); give --token-ids, an .npy of the model's token numbers"
        ) from failure
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def sequences(token_T: NDArray[Any], seq_len: int, most: int) -> NDArray[np.int64]:
    """[S, seq_len]: at most `most` tokens cut into sequences; what is left over is dropped. Raises `BadData` for less than one sequence."""
    if token_T.ndim == 2 and token_T.size:
        return np.asarray(token_T[: max(1, most // token_T.shape[1])])
    if token_T.ndim != 1 or token_T.dtype.kind not in "iu":
        raise BadData(f"token numbers have shape {token_T.shape} and type {token_T.dtype}; give integers [tokens] or [sequences, tokens]")
    count = min(len(token_T), most) // seq_len
    if not count:
        raise BadData(f"{len(token_T)} tokens, at most {most} of them used, are less than one sequence of {seq_len}; give more text")
    return np.asarray(token_T[: count * seq_len].reshape(count, seq_len))


def _transformers() -> Any:
    try:
        import huggingface_hub
        import transformers
    except ImportError as failure:
        raise Unavailable("transformers is not installed; pip install 'crossdock[hf]'") from failure
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()  # of a hub that is not reached it tells every attempt; our own message says it once
    return transformers


def _check_name(name: str) -> None:
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).is_dir():
        raise MissingInput(f"{name}: no such folder; give a folder of config.json and safetensors, or a name in the hub")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise MissingInput(f"{name}: no config.json in it; give a folder of config.json and safetensors")


def _first_line(failure: BaseException) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200].rstrip(".")


def _widened(array_TK: NDArray[Any], top_k: int, fill: int) -> NDArray[Any]:
    return np.pad(array_TK, ((0, 0), (0, top_k - array_TK.shape[1])), constant_values=fill)
