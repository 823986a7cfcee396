"""The comparison of carriers: its rows are those of the runtime's own choice, and its page says what they say."""

import pytest

from benchmarks.transport import COLUMNS, page, row_of, shown
from crossdock.runtime.transport.carrier_choice import CarrierSamples

SAMPLES = CarrierSamples(
    message_bytes=4096,
    compute_s=0.004,
    alone_s={"torch": [0.003, 0.002, 0.004], "mpi": [0.001, 0.002, 0.002]},
    beside_compute_s={"torch": [0.005, 0.005, 0.006], "mpi": [0.007, 0.008, 0.009]},
)


def test_a_row() -> None:
    row = row_of(SAMPLES, [0.0001, 0.0002, 0.0003], ranks=4)
    assert (row["alone_torch_s"], row["alone_torch_s_low"], row["alone_torch_s_high"]) == (0.003, 0.002, 0.004)
    assert row["alone_ratio"] == pytest.approx(0.5)  # the median of 1/3, 1 and 1/2
    assert row["copy_bound_s"] == 0.0002
    # medians sum to 3 + 5 ms over torch and to 2 + 8 over MPI
    assert row["chosen"] == SAMPLES.choice().name == "torch"
    assert SAMPLES.choice().times["mpi"].score_s == pytest.approx(0.010)
    assert tuple(shown(row)) == COLUMNS
    assert shown(row)["alone_torch_s"] == "0.003 (0.002-0.004)"


def test_the_page() -> None:
    machine = {"processor": "P", "cores": 4, "system": "S", "python": "3.11", "torch": "2.13"}
    document = {"machine": machine, "commit": "c", "mpi_library": "mpich 5", "load_at_start": 0.1, "repeats": 3}
    text = page({**document, "rows": [row_of(SAMPLES, [0.0002], ranks=4)]}, "2026-transport")
    assert "MPI wins 0 of 1 sizes" in text
    assert "Of\n4,096 bytes torch takes 15.0 times as long, and MPI 10.0 times" in text
    assert "| 4096 | 0.003 (0.002-0.004) |" in text
