"""Whatever a verb of `crossdock plan` or `crossdock trace` prints fits a terminal of 80 columns, numbers of large models included."""

from pathlib import Path

import numpy as np
import pytest

from crossdock.launch.cli import run
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.trace import Trace


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Traces, plans and maps of 128 experts on 16 devices, found under short names."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("t.npz", "u.npz"):
        Trace(np.argsort(rng.random((2100, 2, 128)), axis=2)[:, :, :2], 128).save(name)
    Plan.contiguous(2, 128, 16).save("p.json")
    Plan.from_devices(rng.permuted(np.tile(np.arange(128) // 8, (2, 1)), axis=1), 16).save("q.json")
    return tmp_path


ASKED = ("--trace", "t.npz", "--topology", "2x8-nvlink-ib")
BRIEFLY = ("--seconds", "0.3", "--bound-seconds", "0.3")
COMMANDS = {
    "solve": ("plan", "solve", *ASKED, *BRIEFLY, "--load-cap", "1.5", "--out", "s.json"),
    "solve held out": ("plan", "solve", *ASKED, *BRIEFLY, "--eval-trace", "u.npz", "--out", "s.json"),
    "compare": ("plan", "compare", *ASKED, *BRIEFLY, "--methods", "contiguous,eplb_global,auto", "--plan", "q.json", "--error-bars"),
    "compare hops": ("plan", "compare", *ASKED, *BRIEFLY, "--methods", "contiguous,auto", "--objective", "hops", "--node-weight", "4"),
    "show": ("plan", "show", "p.json"),
    "diff": ("plan", "diff", "p.json", "q.json"),
    "check": ("plan", "check", "p.json", "--trace", "t.npz", "--topology", "2x8-nvlink-ib", "--load-cap", "3"),
    "report": ("plan", "report", *ASKED, "--plan", "p.json", "--bound-seconds", "0.1", "--out", "r.html"),
    "tokens": ("plan", "tokens", *ASKED, "--seconds", "0.3", "--sizes", "500,1500"),
    "drift": ("plan", "drift", "t.npz", "u.npz", "--repeats", "5"),
    "export": ("plan", "export", "p.json", "m.json"),
    "trace show": ("trace", "show", "t.npz"),
    "trace export": ("trace", "export", "t.npz", "plain.npz"),
    "trace import": ("trace", "import", "t.npz", "again.npz"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_output_fits_80_columns(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    capsys.readouterr()
    assert run(COMMANDS[name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert [line for line in lines if len(line) > 80 and "digest" not in line and "_hash" not in line] == []
