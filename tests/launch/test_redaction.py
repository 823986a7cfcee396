"""Secrets do not reach env.json."""

import json
from pathlib import Path

import pytest

from crossdock.launch import cli
from crossdock.launch.ranks.redaction import HIDDEN, hidden, recorded, redacted

SECRET = "s3cr3t-0123456789abcdef"


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "CROSSDOCK_SECRET",
        "RAY_AUTH_TOKEN",
        "SLURM_PASSWORD",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "SLURM_DB_PASS",
        "RAY_PWD",
        "SENTRY_DSN",
        "CROSSDOCK_jwt",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "api_key",
        "Cookie",
    ],
)
def test_tell_tale_names(name: str) -> None:
    assert hidden(name, SECRET) == HIDDEN


def test_users_in_urls() -> None:
    assert hidden("RAY_ADDRESS", f"https://me:{SECRET}@host:8265/x?y") == f"https://{HIDDEN}@host:8265/x?y"
    assert hidden("NCCL_NET", f"s3://{SECRET}@bucket and ssh://u@h") == f"s3://{HIDDEN}@bucket and ssh://{HIDDEN}@h"
    assert hidden("X", "https://host/path") == "https://host/path"
    for password in ("p@ss", "p/ss", "a@b/c@d/e", "p://q@r", "@", "/@/"):
        assert hidden("X", f"https://me:{password}@host:1/x and http://h") == f"https://{HIDDEN}@host:1/x and http://h"
    assert hidden("RAY_AUTH_MODE", "token") == "token"


@pytest.mark.parametrize(
    "text",
    [
        "--password={} -x",
        "run --hf-token {} --steps 3",
        "https://host/x?a=1&X-Amz-Signature={}&b=2",
        "Authorization: Bearer {}",
        '{{"api_key": "{}", "n": 1}}',
        "user=me;password={};db=x",
        "-e AWS_SECRET_ACCESS_KEY={}",
    ],
)
def test_secrets_inside_of_values(text: str) -> None:
    assert hidden("NCCL_NOTE", text.format(SECRET)) == text.format(HIDDEN)


def test_tokens_that_tell_what_they_are() -> None:
    for token in ("hf_abcdefghijKLMNOP", "ghp_0123456789abcdef", "AKIA0123456789ABCDEF", "sk-proj-0123456789abcd"):
        assert hidden("OMP_NOTE", f"see {token}.") == f"see {HIDDEN}."


def test_ordinary_values_are_told() -> None:
    for value in ("tokens 5", "compass=north", "NCCL_P2P_LEVEL=SYS", "mlx5_0:1,mlx5_1:1", "a pass through", "bypass=1", "^lo,docker0"):
        assert hidden("NCCL_X", value) == value


def test_only_what_a_run_depends_on_is_recorded() -> None:
    environ = {
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "1",
        "HOME": "/home/me",
        "MY_NOTES": SECRET,
        "HF_TOKEN": SECRET,
        "CROSSDOCK_SECRET": SECRET,
    }
    assert recorded(environ) == {"CROSSDOCK_SECRET": HIDDEN, "HF_TOKEN": HIDDEN, "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"}


def test_trees_are_searched() -> None:
    tree = {"a": [{"password": SECRET, "n": 1}], "tokens": ["x", "y"], "url": f"http://u:{SECRET}@h", "none": None}
    assert SECRET not in json.dumps(redacted(tree))
    assert redacted(tree)["a"][0]["n"] == 1


def test_no_file_of_a_run_and_no_output_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"CROSSDOCK_SECRET": SECRET, "HF_TOKEN": SECRET, "NCCL_X": f"http://u:{SECRET}@h", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.run(["train", "tiny", "train.steps=2", f"run.dir={tmp_path / 'run'}"]) == 0
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    environment = json.loads((tmp_path / "run" / "env.json").read_text())["environment"]
    assert environment["HF_TOKEN"] == HIDDEN
    assert environment["NCCL_X"] == f"http://{HIDDEN}@h"
    assert environment["OMP_NUM_THREADS"] == "1"
