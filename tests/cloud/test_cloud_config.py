"""The config: what init writes is accepted, everything wrong is one line that names file and key."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cloud.config import SAMPLE_RATES, Config, load_config, parse_config, sample_config
from cloud.errors import ConfigError

BASE = '[task]\nname = "t"\nbundle = "b"\n'
PATH = Path("folder/emberlora.toml")


def test_sample_gives_the_defaults() -> None:
    """But for the rates, which `init` takes by the kind of model."""
    plain = parse_config(BASE.encode(), path=PATH)
    text = sample_config(task="t", bundle="b", max_tokens=64, rank=8, rates=(plain.training.lr_a, plain.training.lr_b))
    sample = parse_config(text.encode(), path=PATH)
    replace = msgspec.structs.replace
    assert replace(sample.task, rank=None) == plain.task
    assert replace(sample.training, max_tokens=None, epochs=None) == plain.training
    assert sample.server == plain.server
    assert sample.bundle_path == Path("folder/b")
    assert all(0 < rate_a < rate_b for rate_a, rate_b in SAMPLE_RATES.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[task", "not TOML"),
        ("\xff\xfe", "not TOML"),
        ("[task]\nname = " + "[" * 2_000, "nested too deep"),
        ('[task]\nname = "t"', "missing required field `bundle`"),
        (BASE + "round = 3", "unknown field `round`"),
        (BASE + "rounds = 'x'", r"\$.task.rounds"),
        (BASE + "rounds = 0", "task.rounds: expected at least 1, got 0"),
        (BASE + "rank = 0", "task.rank"),
        (BASE + "min_devices = 0", "task.min_devices"),
        (BASE + "min_devices = 5", r"task.min_devices \(5\) must not exceed task.devices_per_round \(4\)"),
        (BASE + "round_deadline_s = nan", "task.round_deadline_s"),
        (BASE + "min_examples = 0", "task.min_examples"),
        (BASE + "devices_per_round = 100000", "task.weight_cap .* task.devices_per_round"),
        (BASE + 'policy = "magic"', "task.policy: expected one of fixed"),
        (BASE + 'aggregation = "heap"', "task.aggregation: expected one of alternate"),
        (BASE + 'policy = "lora-a2"\naggregation = "stack"', r"task.policy \(lora-a2\) .* task.aggregation \(stack\)"),
        (
            BASE + 'upload = "int8"\naggregation = "stack"',
            r"task.upload \(int8\) must be float32 with task.aggregation",
        ),
        (
            BASE + "upload_density = 0.5",
            r"task.upload_density \(0.5\) needs task.upload int8, int4 or ternary",
        ),
        (
            BASE + 'upload = "int4"\nupload_density = 0',
            "task.upload_density: expected more than 0 and at most 1, got 0",
        ),
        (BASE + 'upload = "int4"\nupload_density = nan', "task.upload_density: expected more than 0"),
        (BASE + 'upload = "int2"', r"Invalid enum value 'int2' - at `\$.task.upload`"),
        (BASE + 'head_init = "zero"', r"\$.task.head_init"),
        (BASE + 'head = "dead"', r"\$.task.head"),
        (BASE + 'personal = "head"', r"Expected `array`, got `str` - at `\$.task.personal`"),
        (BASE + 'personal = ["A"]', r"Invalid enum value 'A' - at `\$.task.personal"),
        (BASE + 'personal = ["head", "head"]', r"task.personal \(head, head\): a part stands twice"),
        (BASE + 'personal = ["head"]\nhead = "frozen"', r"task.personal has the head, which task.head \(frozen\)"),
        (BASE + 'personal = ["B"]', "task.personal has B, .*: task.aggregation must be a-only, got alternate"),
        (BASE + 'aggregation = "a-only"', r"task.aggregation \(a-only\) .*: task.personal must have B"),
        (
            BASE + 'personal = ["B"]\naggregation = "a-only"\npolicy = "anneal"',
            "task.personal has B, .*: task.policy must be fixed, got anneal",
        ),
        (BASE + "head_init_devices = 4", "task.head_init_devices is for task.head_init class-means, not bundle"),
        (BASE + 'head_init = "class-means"\nhead_init_devices = 1', r"from task.min_devices \(2\) to 16,384"),
        (BASE + 'head_init = "class-means"\nhead_init_devices = 16385', r"head_init_devices \(16385\) must be from"),
        (BASE.replace('"t"', '"T T"'), "task.name 'T T'"),
        (BASE + "[training]\nsteps = 1\nepochs = 1", "training.steps and training.epochs"),
        (BASE + "[training]\nlr_a = -1.0", "training.lr_a"),
        (BASE + "[training]\nmu = inf", "training.mu"),
        (BASE + '[training]\nlr_schedule = "steps"', r"\$.training.lr_schedule"),
        (BASE + "[training]\nbatch_size = 0", "training.batch_size"),
        (BASE + "[training]\nclip_norm = 0.0", "training.clip_norm"),
        (BASE + "[training]\nlocal_kill = 0.0", "training.local_kill: expected more than 0 and at most 1, got 0.0"),
        (BASE + "[training]\nexample_share = 0", "training.example_share: expected more than 0 and at most 1, got 0"),
        (
            BASE + "[training]\nexample_share = 1.5",
            "training.example_share: expected more than 0 and at most 1, got 1.5",
        ),
        (BASE + "[training]\nlocal_kill = 1.5", "training.local_kill: expected more than 0 and at most 1, got 1.5"),
        (BASE + 'policy = "anneal"\n[annealing]\ncurve = "steep"', "annealing.curve: expected one of cubic"),
        (BASE + 'policy = "anneal"\n[annealing]\nbudget_end = 1.1', r"annealing.budget_end \(1.1\) must be"),
        (BASE + 'policy = "anneal"\n[annealing]\nfinal_rounds = 30', r"at most task.rounds \(12\)"),
        (BASE + "[annealing]\nbudget = 1", "unknown field `budget`"),
        (BASE + "[annealing]\ntotal_bytes = 9", r"annealing.total_bytes is for .* task.policy is fixed"),
        (
            BASE + 'policy = "anneal"\n[annealing]\ntotal_bytes = 9\nbytes_per_device_per_round = 9',
            "annealing.bytes_per_device_per_round and annealing.total_bytes: give one of them, not both",
        ),
        (BASE + 'policy = "anneal"\n[annealing]\ntotal_bytes = 0', "annealing.total_bytes: expected at least 1, got 0"),
        (BASE + 'policy = "anneal"\nupload = "auto"', "task.upload is auto, which needs annealing.bytes_per_.*total_b"),
        (BASE + 'policy = "anneal"\ndownload = "auto"', "task.download is auto, which needs annealing.bytes_per"),
        (BASE + "[server]\nport = 70000", "server.port"),
        (BASE + '[server]\nhost = "0.0.0.0"', "server.host .* server.allow_plain_http"),
        (BASE + "[server]\nrequest_timeout_s = 0", "server.request_timeout_s"),
        (BASE + "[server]\nmax_uploads_at_once = 0", "server.max_uploads_at_once"),
        (BASE + "[server]\nmax_connections_per_address = 0", "server.max_connections_per_address"),
        (BASE + "[server]\nmax_connections = 100", "server.max_connections_per_address"),
        ('folder = "x"\n' + BASE, "unknown field `folder`"),
    ],
)
def test_wrong_configs_are_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(text.encode("latin-1"), path=PATH)
    assert str(caught.value).startswith(f"{PATH}: ")
    assert "\n" not in str(caught.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"task.rounds.*training.lr_b.*server.port"):
        parse_config((BASE + "rounds = 0\n[training]\nlr_b = -1\n[server]\nport = -1").encode(), path=PATH)


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read .*cloud init"):
        load_config(tmp_path / "none.toml")


def test_plain_http_elsewhere_must_be_asked_for() -> None:
    server = {"host": "0.0.0.0", "port": None, "allow_plain_http": True}
    config: Config = parse_config(BASE.encode(), path=PATH, server=server)
    assert (config.server.host, config.server.port) == ("0.0.0.0", 8440)
