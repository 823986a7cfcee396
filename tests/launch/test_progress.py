"""What a run says of itself on a terminal."""

import pytest

from crossdock.launch.ranks.progress import sentence


@pytest.mark.parametrize(("asked", "more"), [(60, ""), (200, "; it ends with step 60, the run's last, and not with 200")])
def test_a_profile_that_ends_before_it_was_asked_to_says_so(asked: int, more: str) -> None:
    details = {"step": 60, "path": "trace-rank0.json", "asked_step": asked}
    assert sentence("profiled", details) == f"-- profile written to trace-rank0.json{more}"
