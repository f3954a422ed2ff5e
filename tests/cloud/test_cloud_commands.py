"""The operator's commands: one real server process, and every way to use them wrongly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cloud_fleet import make_bundle

from cloud.commands import cloud
from cloud.config import SAMPLE_RATES, load_config
from edge_runtime.wire import Token

ROOT = Path(__file__).parents[2]
SERVE = "from cloud.commands import cloud; cloud(prog_name='emberlora cloud')"


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cloud, [str(arg) for arg in args])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "bundle")
    assert run("init", tmp_path / "site", "--bundle", tmp_path / "bundle", "--task", "docs").exit_code == 0
    return tmp_path / "site"


@pytest.fixture
def server(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVE, "serve", "--config", str(folder), "--port", "0", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        yield process
        if process.poll() is None:
            process.terminate()


def one_line(result: Result) -> str:
    assert result.stderr.startswith("emberlora cloud: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_serve_token_status_stop_adapter(folder: Path, server: subprocess.Popen[str]) -> None:
    started = json.loads(server.stdout.readline())
    assert (started["event"], started["task"], started["round"]) == ("server-started", "docs", 0)
    assert (folder / "data" / "server.url").read_text().strip() == started["url"]

    result = run("token", "--config", folder, "--device", "laptop-1")
    assert len(Token.parse(result.stdout).secret) == 32
    assert result.stdout.count("\n") == 1
    assert "'operator'" in one_line(run("token", "--config", folder, "--device", "operator"))

    assert "round 1 of 12" in run("status", "--config", folder).stdout
    status = json.loads(run("status", "--config", folder, "--json").stdout)
    assert (status["state"], status["received"], status["wanted"]) == ("training", 0, 4)
    assert "no round of this task has been applied" in one_line(
        run("adapter", "--config", folder, "--out", folder / "a")
    )

    assert json.loads(run("stop", "--config", folder, "--json").stdout)["state"] == "finished"
    assert run("status", "--config", folder, "--watch").exit_code == 0
    assert run("adapter", "--config", folder, "--out", folder / "a").exit_code == 0
    assert {p.name for p in (folder / "a").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "labels.json",
    }
    assert "is not empty" in one_line(run("adapter", "--config", folder, "--out", folder / "a"))

    second = run("serve", "--config", folder, "--port", "0")
    assert second.exit_code == 2
    assert "another aggregator is using" in one_line(second)

    server.send_signal(signal.SIGTERM)
    rest, _ = server.communicate(timeout=10)
    assert server.returncode == 0
    assert [json.loads(line)["event"] for line in rest.splitlines()] == ["request-refused", "task-finished"]
    assert not (folder / "data" / "server.url").exists()
    absent = run("status", "--config", folder)
    assert absent.exit_code == 1
    assert "no aggregator runs on this folder" in one_line(absent)


def test_killed_server_leaves_a_stale_url(folder: Path, server: subprocess.Popen[str]) -> None:
    server.stdout.readline()
    server.kill()
    server.wait()
    absent = run("stop", "--config", folder)
    assert absent.exit_code == 1
    assert "no aggregator answers" in one_line(absent)


@pytest.mark.parametrize("task", ["classify", "lm"])
def test_init_writes_the_rates_of_the_models_kind(task: str, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle", task=task)
    assert run("init", tmp_path / "site", "--bundle", tmp_path / "bundle", "--task", "docs").exit_code == 0
    training = load_config(tmp_path / "site" / "emberlora.toml").training
    assert (training.lr_a, training.lr_b) == SAMPLE_RATES[task]


def test_init_refuses_then_starts_over(folder: Path) -> None:
    keys = sorted(path.read_bytes() for path in (folder / "data" / "keys").iterdir())
    (folder / "data" / "mine.txt").write_text("not the aggregator's")
    again = run("init", folder, "--bundle", folder.parent / "bundle")
    assert again.exit_code == 2
    assert "is there already" in one_line(again)
    assert sorted(path.read_bytes() for path in (folder / "data" / "keys").iterdir()) == keys
    assert run("init", folder, "--bundle", folder.parent / "bundle", "--force").exit_code == 0
    assert sorted(path.read_bytes() for path in (folder / "data" / "keys").iterdir()) != keys
    assert (folder / "data" / "mine.txt").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("init", "new", "--bundle", "nowhere"), "not a bundle"),
        (("status", "--config", "nowhere.toml"), "cannot be read"),
        (("token", "--device", "A B", "--config", "x"), "device 'A B'"),
        (("token", "--device", "a", "--ttl", "soon"), "expected a number with s, m, h or d"),
    ],
)
def test_bad_input_is_one_line_and_status_two(args: tuple[str, ...], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert message in one_line(result)


def test_open_address_without_tls_is_refused(folder: Path) -> None:
    result = run("serve", "--config", folder, "--host", "0.0.0.0", "--port", "0")
    assert result.exit_code == 2
    assert "--insecure-http" in one_line(result)


@pytest.mark.parametrize("command", ["init", "serve", "token", "status", "devices", "stop", "adapter"])
def test_help_teaches_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.stdout
