"""The model's configuration: what is derived, and what does not go together."""

from typing import Any

import pytest

from crossdock import strict_yaml
from crossdock.errors import BadConfig
from crossdock.models.config import ModelConfig
from crossdock.models.kinds import BLOCKS
from crossdock.placement.costs import workload_file as planned


def read(text: str) -> ModelConfig:
    return strict_yaml.validated(ModelConfig, strict_yaml.parse(text, "model.yaml"))


def test_what_follows_from_little() -> None:
    config = read("model_width: 96\nnum_layers: 6\n")
    assert (config.head_width, config.kv_heads) == (24, 4)
    assert config.dense_width == config.routed_width == config.shared_width == 256
    assert (config.num_moe_layers, config.position, config.coefficient) == (3, 2, "cg1")
    assert config.stages == ("attention", "mlp", "attention", "shared")
    assert config.window == ("mlp", "attention", "shared")
    assert read("moe_every: 1").position == 1
    assert read("block: dense").num_moe_layers == 0
    assert read("moe_every: 1\nshortcut: {coefficient: direct}").position == 1
    assert read("shortcut: {position: 3}").coefficient == "cg1"
    shared = read("block: dgmoe_share\nnum_layers: 8")
    assert (shared.num_blocks, shared.num_moe_layers, shared.turns_per_layer, shared.coefficient) == (4, 2, 4, "direct")
    assert read("block: dgmoe").turns_per_layer == 2


@pytest.mark.parametrize(
    ("options", "stages", "window"),
    [
        ("block: top_k", 3, 0),
        ("block: top_k\nmoe_every: 1", 1, 0),
        ("block: shared_expert", 4, 1),
        ("block: shared_expert\nmoe_every: 1", 2, 1),
        ("moe_every: 1", 2, 2),
        ("shortcut: {position: 1}", 4, 2),
        ("shortcut: {position: 2}", 4, 3),
        ("shortcut: {position: 3}", 4, 4),
        ("block: dgmoe", 4, 3),
        ("block: dgmoe\nmoe_every: 1", 2, 2),
        ("block: dgmoe_share\nshortcut: {position: 1}", 4, 2),
    ],
)
def test_windows(options: str, stages: int, window: int) -> None:
    config = read(options)
    assert (len(config.stages), len(config.window)) == (stages, window)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_width: 10\nnum_heads: 4", r"model_width 10 .* num_heads 4; choose a multiple of 4"),
        ("head_dim: 7", r"head_dim 7 is odd.*choose head_dim: 8"),
        ("model_width: 12\nnum_heads: 4", r"heads of odd width 3.*multiple of 8"),
        ("num_heads: 4\nnum_kv_heads: 3", r"num_heads 4 .* num_kv_heads 3; choose num_kv_heads from 1, 2, 4"),
        ("num_layers: 3", r"num_layers 3 is odd; choose num_layers: 4, or moe_every: 1"),
        ("block: top_k\nshortcut: {position: 1}", r"shortcut belongs to blocks scmoe, dgmoe, dgmoe_share, block is top_k; leave it out"),
        ("moe_every: 1\nshortcut: {position: 2}", r"position 2 .*choose position: 1, or moe_every: 2"),
        ("block: dgmoe\nshortcut: {coefficient: cg2}", r"coefficient cg2 weighs a shared expert, and block dgmoe has none; leave it out"),
        ("block: dgmoe_share\nnum_layers: 6", r"num_layers 6 with moe_every 2 makes 3; choose num_layers as a multiple of 4"),
        ("block: dgmoe_share\nnum_layers: 3\nmoe_every: 1", r"num_layers 3 with moe_every 1 makes 3; choose num_layers as a multiple of 2"),
        ("block: dgmoe\nnum_experts: 3", r"2 experts for each of two representations.*num_experts is 3; choose num_experts of at least 4"),
        (
            "block: dgmoe\ngate: {kind: deepseek_v3, num_groups: 4}",
            r"top_k 2 is more than the 0 experts left of gate.top_groups 1; raise top_groups or lower top_k",
        ),
        ("top_k: 9", r"top_k 9 is more than num_experts 8; choose top_k from 1 to 8"),
        ("top_k: 2\ngate: {kind: switch}", r"gate switch chooses 1 expert per token, top_k is 2; set top_k: 1"),
        ("schedule: {expert_slot: 4}", r"expert_slot 4 .* stages \(mlp, attention, shared\); choose 0 to 3, or auto"),
        ("schedule: {expert_slot: outo}", r"model.yaml:1: `schedule.expert_slot` is \"outo\".*did you mean auto"),
        ("gate: {kind: swich}", r"model.yaml:1: `gate.kind` is \"swich\".*did you mean switch"),
        ("gate: {z_loss: 1.0}", r"key `gate.kind` is missing"),
        ("\ngate:\n  kind: gshard\n  jitter: 0.1", r"model.yaml:4: unknown key `gate.jitter`; .*random_second"),
        ("gate: {kind: noisy_topk, capcity: {policy: dropless}}", r"unknown key `gate.capcity`; did you mean `gate.capacity`"),
        ("gate: {kind: noisy_topk, capacity: {policy: fixt}}", r"`gate.capacity.policy` is \"fixt\".*did you mean fixed"),
        ("gate: {kind: noisy_topk, capacity: {policy: fixed, oder: batch}}", r"did you mean `gate.capacity.order`"),
        ("gate: {kind: noisy_topk, capacity: {policy: batch_max, factor: 1.5}}", r"`gate.capacity.factor` is 1.5"),
        ("gate: {kind: noisy_topk, capacity: {policy: fixed, factor: 0}}", r"`gate.capacity.factor`"),
        ("gate: {kind: noisy_topk, z_loss: .nan}", r"not a number"),
    ],
)
def test_contradictions_name_numbers_and_remedy(text: str, message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        read(text)


def test_planning_knows_how_blocks_use_their_layers() -> None:
    assert set(planned.BLOCKS) == set(BLOCKS)
    for name, routed in planned.BLOCKS.items():
        config = ModelConfig.model_validate({"block": name, "num_layers": 8, "num_experts": 16})
        assert config.num_moe_layers == (config.num_blocks // routed.sharing if routed.sharing else 0)
        assert config.turns_per_layer == routed.turns


def test_a_saved_config_reads_back_equal() -> None:
    options: dict[str, Any] = {
        "gate": {"kind": "deepseek_v3", "num_groups": 2},
        "shortcut": {"position": 3},
        "schedule": {"expert_slot": 4},
    }
    config = ModelConfig.model_validate(options)
    assert read(strict_yaml.dump(config.model_dump(mode="json"))) == config
