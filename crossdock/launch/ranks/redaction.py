"""What may be written down of the environment of a run: the variables that change how it goes, and no secrets."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"
RECORDED = re.compile(
    r"(NCCL|GLOO|TORCH|TORCHELASTIC|PYTORCH|CUDA|OMP|MKL|KMP|OPENBLAS|MPICH|OMPI_MCA|UCX|FI|SLURM|RAY|CROSSDOCK|HF)_.*|MASTER_ADDR|MASTER_PORT"
)
"""Names of variables that a run depends on; everything else is not recorded."""
_WORDS = r"TOKEN|SECRET|PASSW|PASSPHRASE|(?<![A-Z])PASS(?![A-Z])|PWD|KEY|CREDENTIAL|AUTH(?!_MODE)|COOKIE|JWT|BEARER|SIGNATURE|DSN|WEBHOOK"
_SECRET_NAME = re.compile(_WORDS, re.IGNORECASE)
_SECRET_IN_TEXT = re.compile(
    rf"(?P<name>[\w.-]*(?:{_WORDS})[\w.-]*[\"']?\s*[=:]\s*(?:bearer\s+|basic\s+)?[\"']?|--[\w-]*(?:{_WORDS})[\w-]*\s+|\bbearer\s+)[^\s&,;\"']+",
    re.IGNORECASE,
)
"""Options, assignments, headers and parameters of URLs inside a value."""
_KNOWN_TOKEN = re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abps]-|AKIA|ASIA)[A-Za-z0-9_-]{10,}")
"""Tokens that tell what they are by how they begin, wherever they stand."""
_USER_IN_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)\S*@")
"""Up to the last @ of the word: passwords hold @ and / though they should not. Rather a path too much is hidden than a password shown."""


def recorded(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to write down, by name, with secrets hidden."""
    return {name: hidden(name, environ[name]) for name in sorted(environ) if RECORDED.fullmatch(name)}


def redacted(value: Any, name: str = "") -> Any:
    """A copy of a tree of mappings, lists and scalars with every secret hidden: values of tell-tale names, and users in URLs."""
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, name) for item in value]
    return hidden(name, value) if isinstance(value, str) else value


def hidden(name: str, value: str) -> str:
    """`value` as it may be shown under `name`."""
    if _SECRET_NAME.search(name) and value:
        return HIDDEN
    value = _USER_IN_URL.sub(rf"\g<scheme>{HIDDEN}@", value)
    return _KNOWN_TOKEN.sub(HIDDEN, _SECRET_IN_TEXT.sub(rf"\g<name>{HIDDEN}", value))
