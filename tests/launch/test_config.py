"""The run's configuration: precedence, overrides with their origin, cross-checks, and what is saved reads back equal."""

from pathlib import Path

import pytest

from crossdock.errors import BadConfig, MissingInput, UsageError
from crossdock.launch.config import read_config, save_resolved, schema
from crossdock.launch.run_file import shipped_configs


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  steps: 7\n  optimizer: {lr: 1e-4}\nmodel: {num_experts: 4}\n")
    return path


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(written: Path) -> None:
    config = read_config(
        written, ["train.steps=9", "model.shortcut.position=1", "data.kind=text", "data.path=no", "train.optimizer.beta1=0.5"]
    )
    assert (config.train.steps, config.train.optimizer.lr, config.train.optimizer.beta1) == (9, 1e-4, 0.5)
    assert config.model.position == 1
    assert config.data.path == "no"
    assert config.train.seed == 0


def test_the_run_directory_follows_the_file_unless_it_is_given(written: Path) -> None:
    assert read_config(written).run.dir == "runs/mine"
    assert read_config(written, ["run.dir=/tmp/x", "run.resume=never"]).run.dir == "/tmp/x"
    assert read_config(written, ["run.resume=never"]).run.resume == "never"


def test_overrides_follow_yaml_rules(written: Path) -> None:
    config = read_config(
        written, ["train.optimizer={lr: 2e-3, warmup_steps: 3}", "plan=null", "topology=2x1-local", "train.optimizer.lr=.5"]
    )
    assert (config.train.optimizer.lr, config.train.optimizer.warmup_steps) == (0.5, 3)
    assert config.plan is None
    assert config.topology == "2x1-local"


@pytest.mark.parametrize(
    ("override", "kind", "pieces"),
    [
        ("train.stepz=3", BadConfig, ["override train.stepz=3", "did you mean `train.steps`?"]),
        ("train.steps=1e3", BadConfig, ["override train.steps=1e3", "write 1000"]),
        ("train.steps.more=1", BadConfig, ["`train.steps` is no mapping"]),
        ("train.steps=[1", BadConfig, ["override train.steps=[1"]),
        ("model.num_heads=3", BadConfig, ["model_width 128", "num_heads 3"]),
        ("train.steps", UsageError, ["'train.steps'", "a.b=c"]),
        ("=3", UsageError, ["a.b=c"]),
        ("train..steps=3", UsageError, ["a.b=c"]),
        ("parallel.expert=3", BadConfig, ["4 experts", "3 ranks", "1, 2, 4"]),
        ("parallel={expert: 2, ranks: 3}", BadConfig, ["3 ranks", "groups of 2", "1, 3"]),
        ("precision={compute: fp64, wire: bf16}", BadConfig, ["wire bf16", "fp64"]),
        ("model={block: top_k, top_k: 1, num_experts: 4, traffic: coherent}", BadConfig, ["capture.steps 8", "set capture.steps: 0"]),
        ("model={block: top_k, num_experts: 4, gathered_experts: [4]}", BadConfig, ["gathered experts are [4]", "0 to 3"]),
    ],
)
def test_errors_name_the_override(written: Path, override: str, kind: type[Exception], pieces: list[str]) -> None:
    with pytest.raises(kind) as refused:
        read_config(written, [override])
    for piece in pieces:
        assert piece in str(refused.value)


def test_errors_in_the_file_keep_their_line_when_other_keys_are_overridden(written: Path) -> None:
    written.write_text("train:\n  steps: 7\n  sed: 3\n")
    with pytest.raises(BadConfig, match=r"mine\.yaml:3: unknown key `train\.sed`; did you mean `train\.seed`"):
        read_config(written, ["train.steps=9"])


@pytest.mark.parametrize("name", sorted(path.stem for path in shipped_configs().glob("*.yaml")))
def test_a_shipped_config_is_found_by_name_and_reads_back_equal_once_resolved(name: str, tmp_path: Path) -> None:
    config = read_config(Path(name))
    assert (shipped_configs() / f"{name}.yaml").read_text().startswith("# ")
    save_resolved(config, tmp_path / "config.resolved.yaml")
    assert read_config(tmp_path / "config.resolved.yaml") == config


def test_a_name_that_is_not_shipped_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingInput, match=r"tinny\.yaml does not exist, .*did you mean tiny\?"):
        read_config(Path("tinny.yaml"))


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_config(tmp_path / "empty.yaml").train.steps == 200


def test_the_schema_knows_every_section() -> None:
    assert {"train", "model", "data", "parallel", "replan", "checkpoint"} <= set(schema()["properties"])
