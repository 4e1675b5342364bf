"""The command line: what it says, and with which status it ends."""

from pathlib import Path

import pytest
from click.testing import CliRunner

import wukong
import wukong.cli as cli


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_help_names_every_command(runner: CliRunner) -> None:
    result = runner.invoke(cli.main, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "doctor", "bench"):
        assert command in result.output


def test_the_version_is_shown(runner: CliRunner) -> None:
    result = runner.invoke(cli.main, ["--version"])
    assert result.output.startswith("wukong, version ")


def test_doctor_says_how_to_get_what_is_missing(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_version", lambda name: None if name == "ibverbs" else "1.0")
    with cli.console.capture() as capture:
        result = runner.invoke(cli.main, ["doctor"])
    text = " ".join(capture.get().replace("│", " ").split())
    assert result.exit_code == 0
    assert "ibverbs: pip install" in text
    assert "[rdma]" in text
    assert "rdma-core" in text


def test_doctor_fails_without_a_core_package(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_version", lambda name: None if name == "lmdb" else "1.0")
    with cli.console.capture() as capture:
        result = runner.invoke(cli.main, ["doctor"])
    assert result.exit_code == 1
    assert "lmdb is missing: pip install lmdb" in capture.get()


def test_bench_without_the_source_tree_says_where_it_is(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(wukong, "__file__", str(tmp_path / "wukong" / "__init__.py"))
    result = runner.invoke(cli.main, ["bench", "micro"])
    assert result.exit_code == 1
    assert "part of the source tree" in result.output


def test_demo_rejects_an_unknown_workload(runner: CliRunner) -> None:
    result = runner.invoke(cli.main, ["demo", "--only", "FFT"])
    assert result.exit_code == 2
    assert "TR, GEMM, SVD1, SVD2, TSQR, SVC" in result.output


@pytest.mark.slow
def test_demo_checks_its_result_and_draws_a_timeline(runner: CliRunner, tmp_path: Path) -> None:
    picture = tmp_path / "timeline.png"
    with cli.console.capture() as capture:
        result = runner.invoke(cli.main, ["demo", "--only", "GEMM", "--timeline", str(picture)])
    assert result.exit_code == 0, result.output
    assert "product" in capture.get()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.0 kB"), (2.5e6, "2.5 MB"), (1.7e9, "1.70 GB")],
)
def test_sizes_are_shown_in_decimal_units(n_bytes: float, text: str) -> None:
    assert cli._bytes(n_bytes) == text
