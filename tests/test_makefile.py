"""What `make` hands to the tools that it installs with, which stand-ins write down."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("environment", "settings", "expected"),
    [
        ({}, "", ""),
        ({}, "https://a/x?y \n  /b  ", "https://a/x?y /b"),
        ({"PIP_FIND_LINKS": " /p  /q "}, "/ignored", "/p /q"),
        ({"UV_FIND_LINKS": "/u "}, "/ignored", "/u"),
        ({"UV_FIND_LINKS": "/*"}, "", "/*"),
    ],
)
def test_places_of_packages_reach_uv_without_blanks(environment: dict[str, str], settings: str, expected: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "env" / "bin"
    tools.mkdir(parents=True)
    (tmp_path / "settings").write_text(settings)
    stand_ins = {
        "pip": f"case $1 in config) cat '{tmp_path}/settings';; esac",
        "uv": f"printf %s \"${{UV_FIND_LINKS-}}\" > '{tmp_path}/given'",
    }
    for name, script in stand_ins.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    command = ["make", "--silent", f"PYTHON={sys.executable}", "VENV=env", "env/.installed"]
    subprocess.run(command, cwd=tmp_path, check=True, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True)
    assert (tmp_path / "given").read_text() == expected
