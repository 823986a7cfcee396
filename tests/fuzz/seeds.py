"""Valid content of every kind of file, from which the mutants are made."""

from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "run": {"dir": "runs/x", "resume": "auto"},
    "train": {"steps": 4, "seed": 1, "batch_sequences": 8, "accumulate": 1, "eval_every": 2, "optimizer": {"lr": 0.001}},
    "parallel": {"expert": 2, "ranks": 2, "timeout_s": 30.0},
    "model": {
        "num_layers": 4,
        "model_width": 32,
        "num_heads": 2,
        "num_kv_heads": 1,
        "mlp_width": 64,
        "vocab_size": 256,
        "block": "scmoe",
        "moe_every": 2,
        "num_experts": 4,
        "top_k": 1,
        "expert_width": 32,
        "activation": "swiglu",
        "shortcut": {"position": 2},
        "gate": {"kind": "noisy_topk"},
    },
    "data": {"seq_len": 16, "kind": "stdlib"},
    "topology": "good.yaml",
    "plan": "good.json",
    "device": "cpu",
    "precision": {"compute": "fp32", "wire": "bf16"},
    "dispatch": "deduplicated",
    "capture": {"steps": 2},
    "replan": {"at_step": 2},
    "adapt": {"mode": "off"},
    "checkpoint": {"every": 2, "keep": 1, "at_end": True},
}
TOPOLOGY_SHORT: dict[str, Any] = {
    "name": "x",
    "nodes": 2,
    "devices_per_node": 1,
    "device": {"flop_per_s": 1e12, "memory_bytes": 1e9},
    "links": {
        "same_node": {"bytes_per_s": 1e9, "latency_s": 1e-5},
        "other_node": {"bytes_per_s": 1e9, "latency_s": 1e-5, "shared_by_node": True},
    },
}
TOPOLOGY_LONG: dict[str, Any] = {
    "name": "y",
    "devices": [{"node": 0, "flop_per_s": 1e12, "memory_bytes": 1e9}, {"node": 1, "flop_per_s": 2e12, "memory_bytes": 1e9}],
    "bytes_per_s": [[None, 1e9], [2e9, None]],
    "latency_s": [[0.0, 1e-5], [1e-5, 0.0]],
    "node_bytes_per_s": 1e9,
}
WORKLOAD: dict[str, Any] = {
    "tokens_per_rank": 512,
    "model_width": 64,
    "expert_width": 128,
    "wire": "bf16",
    "expert_matrices": 3,
    "dispatch": "flat",
    "micro_batches": 1,
    "window_s": 0.001,
    "other_s": 0.01,
}
PLAN: dict[str, Any] = {
    "format_version": 1,
    "num_layers": 2,
    "num_experts": 4,
    "topology_hash": "",
    "trace_hash": "",
    "mode": "home",
    "objective": "seconds",
    "method": "hand",
    "seed": 0,
    "cost": 0.5,
    "bound": 0.25,
    "slots": [[[0, 1], [2, 3]], [[3, 1], [0, 2]]],
}
SHARD = "shard-00000.safetensors"
HUGGING_FACE: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "vocab_size": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "float32",
}
RESULT: dict[str, Any] = {
    "status": "done",
    "exit_code": 0,
    "reached_step": 3,
    "target_step": 3,
    "loss": 2.5,
    "eval_loss": 2.6,
    "tokens_per_s": 100.0,
    "step_s": 0.1,
    "exposed_s": 0.01,
    "bytes": {"steps": 2, "counted": {"same_device": 1, "same_node": 2, "other_node": 3}, "predicted": None},
    "step_time": {"measured_s": 0.1, "predicted_s": 0.2},
    "load_max_over_mean": 1.2,
    "plan": {"hash": "x", "method": "hand"},
    "world_size": 2,
}
CHECKPOINT_TENSORS = {
    "dense/norm.weight/weight": np.ones(8, np.float32),
    "expert/0/0/up/weight": np.ones((4, 8), np.float32),
    "expert/0/1/up/weight": np.zeros((4, 8), np.float32),
    "buffer/steps": np.zeros((), np.float32),
}
HOSTFILE = b"# hosts\nnode1 slots=1\nnode2 slots=1\n"
