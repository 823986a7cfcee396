"""`data.homing`: refused where it has no meaning, and where the forecast is of another model."""

from pathlib import Path

import numpy as np
import pytest

from crossdock.errors import BadConfig, BadData, MissingInput
from crossdock.launch.config import read_config
from crossdock.launch.request import read_inputs
from crossdock.placement.homing.forecast import Forecast
from crossdock.placement.records.trace import Trace

TINY = Path("configs/tiny.yaml")


@pytest.mark.parametrize("overrides", [["model.block=dense"], ["model.block=top_k", "model.top_k=1", "model.traffic=coherent"]])
def test_homing_is_for_tokens_that_go_home(overrides: list[str]) -> None:
    with pytest.raises(BadConfig, match=r"data\.homing f\.npz gives sequences to the ranks of their experts"):
        read_config(TINY, ["data.homing=f.npz", "capture.steps=0", *overrides])


def test_a_forecast_must_be_of_the_model(tmp_path: Path) -> None:
    def saved(num_layers: int) -> list[str]:
        path = tmp_path / f"{num_layers}.npz"
        experts_TLK = np.zeros((3, num_layers, 1), dtype=np.uint16)
        Forecast.fit(Trace(experts_TLK, 4, token_T=np.arange(3, dtype=np.int32))).save(path)
        return [f"data.homing={path}"]

    layers = read_config(TINY).model.num_moe_layers
    assert read_inputs(read_config(TINY)).forecast is None
    assert read_inputs(read_config(TINY, saved(layers))).forecast is not None
    with pytest.raises(BadData, match=rf"{layers + 1} MoE layers x 4 experts, and the model has {layers} x 4"):
        read_inputs(read_config(TINY, saved(layers + 1)))
    with pytest.raises(MissingInput, match="absent"):
        read_inputs(read_config(TINY, ["data.homing=absent.npz"]))
