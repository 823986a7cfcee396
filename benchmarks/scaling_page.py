"""The results page of `benchmarks.scaling report`, in Markdown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import markdown_table

MEASURED_COLUMNS = ["nodes", "ranks_per_node", "link_bit_per_s", "strategy", "step_s", "step_s_low", "step_s_high", "simulated_s"]
MEASURED_COLUMNS += ["unseen_s", "unseen_error"]


def page(document: Mapping[str, Any], num_parts: int, cores: int, out: Path) -> str:
    """What `scaling_report.write_report` found, for a reader; tables with every number stand in the JSON beside it."""
    error, host = document["unseen_error"], document["machine"]
    shape, layer, gpu = document["shape"], document["predicted"]["layer"], document["predicted"]["gpu"]
    fitted = ", ".join(f"{name} {value:.3g}" for name, value in document["fit"].items())
    return f"""# Scaling of one MoE layer: measured up to 16 ranks, simulated up to 2,048 devices

    sudo python -m benchmarks.scaling measure --out RAW.json        ({num_parts} runs, over different topologies)
    python -m benchmarks.scaling report RAW.json ... --out {out.name}

Commit {document["commit"]}; points measured at {", ".join(document["measured_at"])}.
Machine: {host["processor"]}, {cores} cores, {host["system"]}, Python {host["python"]}, torch {host["torch"]}.
Raw numbers: [{out.stem}.json]({out.stem}.json).

## Measured, and what the simulator makes of it

One layer, forward and backward: {shape["tokens"]} tokens a rank, width {shape["model_width"]}, fp32, top-{shape["top_k"]}
of {shape["num_experts"]} experts, routing drawn evenly. {cores} cores stand for up to 16 ranks, so experts are tiny and
rows wide: this measures movement. Medians over repeats of the slowest rank, with the lowest and the highest repeat.
`simulated_s` is fitted to all points; `unseen_s` comes from a fit that never saw the point's topology, and
`unseen_error` is how far it is off.

{markdown_table(document["rows"], MEASURED_COLUMNS)}
Fitted (1e-12: nothing that could be told from zero): {fitted}.

**Error on topologies that the fit has not seen: median {error["median"]:.1%}, mean {error["mean"]:.1%}, highest {error["highest"]:.1%}.**

## Simulated: 8 to 2,048 devices

{layer["tokens"]} tokens a device, width {layer["model_width"]}, expert width {layer["expert_width"]}, bf16, max(64, devices)
experts, nothing hidden behind other compute.

![Seconds of one layer over the number of devices]({out.stem}.svg)

Nodes of 8 ranks with a core each and one 10 Gbit/s link a node, with the costs fitted above (movement alone, experts take
no time), top-4:

{markdown_table(document["cores_top4"])}
Nodes of 8 GPUs: for each device {gpu["local_bytes_per_s"]:.3g} bytes/s inside a node and {gpu["nic_bytes_per_s"]:.3g} between
nodes, {gpu["flop_per_s"]:.3g} flop/s in the experts. Nothing of this was measured here, and {gpu["nic_message_s"] * 1e6:g} us
on the sending port for each message is an assumption. Top-4:

{markdown_table(document["gpus_top4"])}
Top-1, where the context-coherent block is possible (tokens stay with their expert; keys and values, {layer["kv_width"]}
elements a token, go to all devices):

{markdown_table(document["gpus_top1"])}
## Beside published figures

**Tutel** (arXiv 2206.03382) reports its two-dimensional hierarchical all-to-all (2DH) up to 20.7 x as fast as the linear one
at 2,048 A100. The model, with 200 Gbit/s for each device, for three assumed costs of a message:

{markdown_table(document["tutel"])}
Where messages are small, 2DH sends 255 over the network in place of 2,040, so a model of ports with a cost for each message
ends at 8 x, whatever that cost is; where the payload is large, both are bound by the cards. What the published figure has
above 8 x is not in the model (thousands of small messages also hinder one another inside the network): what it says for
hierarchical movement at scale is a lower bound.

**HierMoE** (arXiv 2508.09591) reports communication 1.55 to 3.32 x as fast as its baselines' for hierarchical movement with
de-duplicated tokens on 32 GPUs. The model, 4 nodes x 8, top-8, flat against hierarchical, movement alone:

{markdown_table(document["hiermoe"])}
**HetuMoE** (arXiv 2203.14685) reports at least 15 % over other systems and 8.1 x over DeepSpeed-MoE for whole layers, where
all devices of a node share one card. Its hierarchical all-to-all gains what 2DH gains, fewer and larger messages; the
first panel and table are the case of one link a node.
"""
