"""``bench.federation``: how data is divided, what is counted, and a whole small task with real devices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import RequestError
from bench.federation import __main__ as command
from bench.federation import experiment, running
from bench.federation.compute import Texts, full_flop, training_flop
from bench.federation.data import Corpus, divide, read_corpus
from bench.federation.drift import drift
from bench.federation.equal_bytes import rivals_of
from bench.federation.experiment import run
from bench.federation.lines import Key, Line, read_lines
from bench.federation.links import Link, seconds_to
from bench.federation.methods import METHODS, config_text
from bench.federation.shares import Sizes
from bench.federation.site import Setup
from bench.federation.summary import Split, rows_of
from bench.federation.variants import OURS, VARIANTS, VARIED, one_seed, variant_run
from bench.federation.workloads import WORKLOADS
from bench.jsonl import append_line
from cloud.config import parse_config
from edge_runtime.bundle import Manifest, open_bundle
from edge_runtime.engine.runtime import start_runtime
from edge_runtime.training.job import IMPORTANCE_NAME
from edge_runtime.wire import ModulePlan
from tests.bench.banking import LABELS, write_banking
from tests.bench.federation_lines import KEY, a_line
from tests.bench.lora_model import with_factors


def corpus_of(count: int) -> Corpus:
    """Texts that name themselves, labels in turn, two domains."""
    texts = tuple((f"text {number}", LABELS[number % 4]) for number in range(count))
    return Corpus(texts, texts[:4], dict(zip(LABELS, ("work", "work", "play", "play"), strict=True)))


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([0.5, 5.0, 100.0]))
def test_a_split_gives_every_example_to_one_device(seed: int, alpha: float) -> None:
    parts = divide(corpus_of(400), devices=4, examples=300, alpha=alpha, seed=seed)
    texts = [text for part in parts for text, _ in part]
    assert len(texts) == len(set(texts)) == 300
    assert min(map(len, parts)) >= 16
    assert parts == divide(corpus_of(400), devices=4, examples=300, alpha=alpha, seed=seed)


def test_a_smaller_alpha_leaves_a_device_fewer_labels() -> None:
    def largest_share(alpha: float) -> float:
        parts = divide(corpus_of(2000), devices=4, examples=2000, alpha=alpha, seed=3)
        shares = [max(sum(label == one for _, label in part) for one in LABELS) / len(part) for part in parts]
        return float(np.mean(shares))

    assert largest_share(100.0) < 0.35 < 0.5 < largest_share(0.1)


def test_the_natural_split_keeps_domains_apart() -> None:
    parts = divide(corpus_of(400), devices=4, examples=400, alpha=None, seed=0)
    assert [len(part) for part in parts] == [100] * 4
    domains = [{corpus_of(4).domains[label] for _, label in part} for part in parts]
    assert domains == [{"play"}, {"play"}, {"work"}, {"work"}]
    with pytest.raises(RequestError, match="as many devices as domains"):
        divide(corpus_of(400), devices=3, examples=400, alpha=None, seed=0)


def test_a_split_that_cannot_be_is_said() -> None:
    with pytest.raises(RequestError, match="expected 16 examples a device"):
        divide(corpus_of(40), devices=4, examples=40, alpha=0.5, seed=0)


def test_drift_of_equal_and_opposite_devices() -> None:
    same = np.ones(5, np.float32)
    assert drift([same, same], [1, 7]) == 0.0
    assert drift([same, -same], [1, 1]) == 0.0  # nothing moved
    assert drift([3 * same, -same], [1, 1]) == pytest.approx(2.0)  # the mean is 1, both are 2 away


@pytest.mark.parametrize("alive", ["all AB", "all B", "top A", "one value", "query of the middle", "mixed"])
@pytest.mark.needs_torch("counts what PyTorch computes")
def test_operations_are_those_that_pytorch_counts(alive: str, bert_bundle: Path, bert_folder: Path) -> None:
    """The oracle is PyTorch's own counter over the encoder of the same model with the same factors trained."""
    manifest = open_bundle(bert_bundle, verify=False).manifest
    factors = {
        "all AB": dict.fromkeys(manifest.module_names, "AB"),
        "all B": dict.fromkeys(manifest.module_names, "B"),
        "top A": {module.name: "A" * (module.block == 2) for module in manifest.modules},
        "one value": {name: "B" * (name == manifest.module_names[2]) for name in manifest.module_names},
        "query of the middle": {name: "A" * ("1.attention.self.query" in name) for name in manifest.module_names},
        "mixed": {name: ("", "A", "B", "AB")[number % 4] for number, name in enumerate(manifest.module_names)},
    }[alive]
    plans = [ModulePlan(name, 4, factor) for name, factor in factors.items()]  # type: ignore[arg-type]
    counted = training_flop(manifest, plans, Texts(tokens=24, squares=3 * 64, rows=3))
    assert counted == _pytorch_flop(bert_folder, factors, batch=3, tokens=8)


def _pytorch_flop(folder: Path, factors: dict[str, str], *, batch: int, tokens: int) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    slots = {name.split(".", 4)[-1] for name in factors}
    model = with_factors(base, factors, slots=slots, task_type="SEQ_CLS")
    hidden = torch.randn(batch, tokens, 32)
    encoder = model.base_model.model.bert.encoder
    with FlopCounterMode(display=False) as counter:
        encoder(hidden).last_hidden_state.sum().backward()
    return int(counter.get_total_flops())


def a_setup(tmp_path: Path, bundle: Path, name: str = "run", **extra: dict[str, object]) -> Setup:
    data = tmp_path / "data"
    if not data.exists():
        write_banking(data)
    (tmp_path / name).mkdir()
    return Setup(
        key=Key("banking77", 5.0, 0, "rolora-r8", "", "", True),
        data=str(data),
        bundle=str(bundle),
        folder=str(tmp_path / name),
        sizes=Sizes(devices=4, cohort=2, rounds=4, examples=160, glimpse=400, every=2),
        threads=start_runtime(),
        products="exact",
        extra={"task": {"rank": 4, **extra.pop("task", {})}, "training": {"lr_a": 1e-2, "lr_b": 1e-2}, **extra},
    )


def test_a_task_is_learned_counted_and_can_be_replayed(tmp_path: Path, bert_bundle: Path) -> None:
    said: list[str] = []
    line = asyncio.run(run(a_setup(tmp_path, bert_bundle), said.append))
    assert line.accuracy > line.accuracy_start
    assert len(line.curve) == len(said) == 4
    assert [made.alive for made in line.curve] == [0.5] * 4
    manifest = open_bundle(bert_bundle, verify=False).manifest
    outs, ins = (sum(features[side] for features in manifest.features.values()) for side in (1, 0))
    # 2 devices, rank 4, B then A
    assert [made.params_up for made in line.curve] == [2 * 4 * outs, 2 * 4 * ins] * 2
    assert line.params_up == sum(made.params_up for made in line.curve)
    assert line.bytes_up == 4 * line.params_up + 8 * (148 + 48)  # frame and envelope of docs/wire.md
    assert line.device_gflop > 0
    assert line.drift is not None
    assert line.drift > 0
    head, measured = 4 * 32 + 4, 4 * 32 + 4 + 32 * 33 // 2  # a head; class sums, counts, second moments
    bundle_bytes = sum(entry.bytes for entry in manifest.files.values())
    heads = line.bytes_first_download // bundle_bytes * 4 * head
    assert 4 * (4 * measured + 148 + 48) + heads < line.bytes_head < 4 * (4 * measured + 148 + 48 + 4_000) + heads
    again = asyncio.run(run(a_setup(tmp_path, bert_bundle, "again"), said.append))
    assert again.accuracy == line.accuracy
    assert [made.accuracy for made in again.curve] == [made.accuracy for made in line.curve]


def test_a_share_of_the_examples_is_a_share_of_the_compute(
    tmp_path: Path, bert_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through devices and aggregator: half of the examples, and what they taught is known in the home from then on."""
    tokens: list[int] = []

    def counted(manifest: Manifest, plans: Sequence[ModulePlan], texts: Texts, spared: Mapping[int, int]) -> int:
        tokens.append(texts.tokens)
        return training_flop(manifest, plans, texts, spared)

    monkeypatch.setattr(experiment, "training_flop", counted)
    whole = asyncio.run(run(a_setup(tmp_path, bert_bundle), lambda _: None))
    everything = sum(tokens)
    tokens.clear()
    setup = a_setup(tmp_path, bert_bundle, "half", training={"example_share": 0.5})
    half = asyncio.run(run(setup, lambda _: None))
    assert sum(tokens) == pytest.approx(everything / 2, rel=0.15)  # texts have unlike lengths
    assert (half.bytes_up, half.params_both) == (whole.bytes_up, whole.params_both)
    homes = [folder for folder in (tmp_path / "half" / "devices").iterdir() if (folder / "state.json").exists()]
    kept = [(home / IMPORTANCE_NAME).exists() for home in homes]
    assert any(kept)
    trained = [json.loads((home / "state.json").read_text())["counted"] > 1 for home in homes]  # the first one measures
    assert kept == trained


def test_texts_of_a_share_of_the_tokens() -> None:
    assert Texts(tokens=40, squares=300, rows=8).part(10) == Texts(tokens=10, squares=75, rows=2)


def test_a_run_is_one_line_with_the_names_of_the_issue(tmp_path: Path) -> None:
    append_line(tmp_path / "r.jsonl", a_line(KEY))
    names = set(json.loads((tmp_path / "r.jsonl").read_text()))
    assert names >= {
        *("dataset", "alpha", "seed", "method", "budget", "accuracy", "bytes_up", "bytes_down", "params_up"),
        *("params_down", "bytes_head", "bytes_first_download", "device_gflop", "rounds", "rounds_to_95", "drift"),
        *("devices", "seconds", "quick", "commit"),
    }
    assert read_lines(tmp_path / "r.jsonl") == {KEY: a_line(KEY)}


def test_a_broken_file_of_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("{}\n")
    with pytest.raises(RequestError, match="line 1: not a result"):
        read_lines(tmp_path / "r.jsonl")


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_line(tmp_path / "r.jsonl", a_line(KEY))
    other = msgspec.structs.replace(KEY, seed=1)
    ran: list[Key] = []

    def pretend(_bench: running.Bench, run: running.Run) -> Line | str:
        ran.append(run.key)
        return a_line(run.key) if run.key.seed == 1 else "broke"

    monkeypatch.setattr(running.Bench, "make", pretend)
    monkeypatch.setattr(running, "ensure_bundle", lambda *_: None)
    arguments = ["--data", str(tmp_path), "--results", str(tmp_path / "r.jsonl"), "--dataset", "banking77"]
    arguments += ["--alpha", "0.5", "--method", "lora-r8"]
    done = CliRunner().invoke(command.main, [*arguments, "--seed", "0", "--seed", "1"])
    assert done.exit_code == 0, done.output
    assert ran == [other]
    assert set(read_lines(tmp_path / "r.jsonl")) == {KEY, other}
    done = CliRunner().invoke(command.main, [*arguments, "--seed", "2"])
    assert done.exit_code == 1
    assert "1 of 1 runs failed" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "few"], "few"),
        (["--without", "luck"], "expected --set or --tier with a new name, or alone one of annealing, depth"),
        (["--without", "depth", "--set", "task.rank=1"], "--without depth: expected --set or --tier with a new name"),
        (["--one-seed", "--seed", "1"], "--one-seed: expected no other choice"),
        (["--set", "rank"], "expected table.key=value"),
        (["--set", "task.rank=1"], "--without and a name"),
        (["--tier", "1"], "--without and a name"),
        (["--dataset", "x"], "x"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(command.main, ["--data", str(tmp_path), *arguments])
    assert done.exit_code == 2
    assert message in done.output.splitlines()[-1]


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not the data of clinc150"):
        read_corpus("clinc150", tmp_path)


def test_a_mixed_fleet_carries_less_where_it_is_weak(tmp_path: Path, bert_bundle: Path) -> None:
    """Real devices of two tiers: the weak ones send one block of three, at rank 2, and compute less."""
    tiers = {"enabled": True, "blocks": [0.3], "max_rank": [2], "memory_mib": [], "step_s": []}
    four = msgspec.structs.replace(a_setup(tmp_path, bert_bundle).sizes, cohort=4)
    setup = msgspec.structs.replace(a_setup(tmp_path, bert_bundle, "mixed", tiers=tiers), sizes=four, tiers=(0, 1))
    line = asyncio.run(run(setup, lambda text: None))
    manifest = open_bundle(bert_bundle, verify=False).manifest
    # In the first round two devices carry all of B at rank 4, and two the last block's at rank 2.
    outs = {name: features[1] for name, features in manifest.features.items()}
    last = sum(size for name, size in outs.items() if manifest.places[name] == len(manifest.blocks) - 1)
    assert line.curve[0].params_up == 2 * (4 * sum(outs.values()) + 2 * last)
    assert line.bytes_up == 4 * line.params_up + 16 * (148 + 48)
    everyone = msgspec.structs.replace(a_setup(tmp_path, bert_bundle, "strong"), sizes=four)
    whole = asyncio.run(run(everyone, lambda text: None))
    # No backward pass through two blocks of three, nor a forward one where they are remembered.
    assert line.device_gflop < 0.9 * whole.device_gflop
    assert all(made.drift for made in line.curve)
    assert line.settings == setup.extra


def test_rows_compare_with_the_reference_of_the_same_seed() -> None:
    def lines(method: str, accuracies: list[float], size: int) -> list[Line]:
        return [
            msgspec.structs.replace(
                a_line(msgspec.structs.replace(KEY, method=method, seed=seed)), accuracy=accuracy, bytes_up=size
            )
            for seed, accuracy in enumerate(accuracies)
        ]

    first, second = rows_of(
        [*lines("rolora-r8", [0.5, 0.7], 43), *lines("lora-r8", [0.4, 0.5], 93)], Split("banking77", 0.5)
    )
    assert first.name == ("lora-r8", "", "")
    assert (first.apart, first.bytes_ratio) == (0.0, 1.0)
    assert second.apart == pytest.approx(0.15)
    assert second.apart_95 == pytest.approx(12.706 * 0.05)  # differences 0.1 and 0.2: deviation 0.0707, over √2
    assert second.bytes_ratio == pytest.approx(2.0)


def test_all_splits_together_compare_run_with_run() -> None:
    """The same seed on another split is another run."""
    lines = [
        msgspec.structs.replace(a_line(msgspec.structs.replace(KEY, method=method, alpha=alpha)), accuracy=accuracy)
        for method, alpha, accuracy in (
            ("lora-r8", 0.5, 0.4),
            ("lora-r8", 0.1, 0.2),
            ("lora-r1", 0.5, 0.5),
            ("lora-r1", 0.1, 0.5),
        )
    ]
    reference, other = rows_of(lines, None)
    assert (reference.apart, other.apart) == (0.0, pytest.approx(0.2))
    assert other.seeds == (0, 0)


def test_rivals_are_asked_when_they_have_spent_the_same() -> None:
    """The best they had by then, on the same texts; before the first round where no round fits."""

    def line(method: str, *rounds: tuple[int, float | None]) -> Line:
        one = a_line(msgspec.structs.replace(KEY, method=method)).curve[0]
        curve = tuple(
            msgspec.structs.replace(one, bytes_up=size, bytes_down=0, accuracy=found) for size, found in rounds
        )
        made = msgspec.structs.replace(a_line(msgspec.structs.replace(KEY, method=method)), curve=curve)
        return msgspec.structs.replace(made, accuracy_start=0.1, bytes_up=sum(size for size, _ in rounds), bytes_down=0)

    ours = line("ffa-r8", (50, None), (50, 0.6))
    lines = [ours, line("lora-r8", (60, 0.5), (40, None), (1, 0.9)), line("lora-r1", (101, 0.8), (1, 0.9))]
    first, second = rivals_of(lines, ("ffa-r8", "", ""))
    assert (first.name[0], first.rounds, first.runs, first.apart_95) == ("lora-r8", 2.0, 1, None)
    assert first.apart == pytest.approx(0.5 - 0.6)
    assert (second.rounds, second.apart) == (0.0, pytest.approx(0.1 - 0.6))


def test_a_link_is_bounded_by_its_losses() -> None:
    assert Link(1.0, loss=0.0).bytes_s == 125_000
    assert Link(10.0).bytes_s == Link(1000.0).bytes_s == pytest.approx(1460 / 0.2 * (1.5 / 0.02) ** 0.5)


def test_time_to_an_accuracy_counts_whole_rounds() -> None:
    line = a_line(KEY)
    made = msgspec.structs.replace(line.curve[0], bytes_up=5 * 125_000, bytes_down=0, gflop=0.0, accuracy=0.3)
    line = msgspec.structs.replace(line, curve=(made, msgspec.structs.replace(made, accuracy=0.6)))
    link = Link(1.0, round_trip_s=0.5, loss=0.0)
    assert seconds_to(line, 0.6, link, cohort=5) == pytest.approx(2 * (1.0 + 6 * 0.5))
    assert seconds_to(line, 0.7, link, cohort=5) is None


@pytest.mark.parametrize(("method", "budget"), [(name, budget) for name in METHODS for budget in METHODS[name].budgets])
def test_every_method_is_a_config_that_the_aggregator_takes(method: str, budget: str, tmp_path: Path) -> None:
    workload = WORKLOADS["banking77"]
    tables = workload.tables(workload.sizes)
    shared = {**tables, "task": {**tables["task"], "rounds": 30, "devices_per_round": 5}}
    extra = {"task": {"rounds": 20}}
    reference = workload.reference_bytes
    text = config_text(
        METHODS[method], budget, bundle="b", seed=3, shared=shared, reference_bytes=reference, extra=extra
    )
    config = parse_config(text.encode(), path=tmp_path / "emberlora.toml")
    assert (config.task.head, config.task.head_init, config.task.seed) == ("frozen", "class-means", 3)
    assert config.task.rounds == 20  # what is tried out replaces what follows from the fleet


@pytest.mark.parametrize("without", list(VARIANTS))
def test_every_variant_is_a_config_that_the_aggregator_takes(without: str, tmp_path: Path) -> None:
    """And, but for what devices choose, another one than that of the method."""
    workload = WORKLOADS["banking77"]
    tables = workload.tables(workload.sizes)
    shared = {**tables, "task": {**tables["task"], "rounds": 30}}
    texts = [
        config_text(METHODS[OURS], VARIED, bundle="b", seed=3, shared=shared, reference_bytes=10**6, extra=extra)
        for extra in ({}, variant_run(msgspec.structs.replace(KEY, method=OURS, without=without)).extra)
    ]
    whole, variant = (parse_config(text.encode(), path=tmp_path / "emberlora.toml") for text in texts)
    assert (whole == variant) == (without == "remembering")


def test_what_has_one_seed_is_everything_the_core_table_has_not() -> None:
    runs = one_seed()
    keys = [run.key for run in runs]
    assert len(set(keys)) == len(keys)
    assert {(key.dataset, key.seed) for key in keys} == {("clinc150", 0)}
    assert {key.without for key in keys if key.method == OURS and key.alpha == 0.1} == set(VARIANTS)
    assert {key.method for key in keys} == {"ffa-r8", "fedavg-full", "lora-r8", "lora-r1", OURS}
    for alpha in (0.01, None):
        assert {(key.method, key.budget) for key in keys if key.alpha == alpha and not key.without} == {
            ("lora-r8", ""),
            ("lora-r1", ""),
            (OURS, "small"),
            (OURS, "large"),
            (OURS, "half"),
        }
    mixed = [run for run in runs if run.tiers != (0,)]
    assert [(run.key.method, run.tiers) for run in mixed] == [(OURS, (0, 1, 2)), ("lora-r8", (0, 1, 2))]
    assert [run.key.without for run in runs if not run.remember] == ["remembering"]


def test_a_variant_by_name_is_the_run_of_the_one_seed_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[running.Run] = []

    def pretend(_bench: running.Bench, run: running.Run) -> Line | str:
        ran.append(run)
        return a_line(run.key)

    monkeypatch.setattr(running.Bench, "make", pretend)
    monkeypatch.setattr(running, "ensure_bundle", lambda *_: None)
    arguments = ["--data", str(tmp_path), "--results", str(tmp_path / "r.jsonl"), "--dataset", "clinc150"]
    arguments += ["--alpha", "0.1", "--seed", "0"]
    for without in ("depth", "strong-devices"):
        done = CliRunner().invoke(command.main, [*arguments, "--without", without])
        assert done.exit_code == 0, done.output
    done = CliRunner().invoke(command.main, [*arguments, "--without", "thirds", "--method", "lora-r8", "--tier", "1"])
    assert done.exit_code == 0, done.output
    depth, mixed, thirds = ran
    assert [depth, mixed] == [run for run in one_seed() if run.key in (depth.key, mixed.key)]
    assert thirds == running.Run(
        msgspec.structs.replace(depth.key, method="lora-r8", budget="", without="thirds"), {}, (1,)
    )


@pytest.mark.needs_torch("trains the whole model by PyTorch")
def test_the_whole_model_is_the_yardstick(tmp_path: Path, bert_bundle: Path, bert_folder: Path) -> None:
    setup = a_setup(tmp_path, bert_bundle, training={"lr_b": 3e-3})
    setup = msgspec.structs.replace(
        setup, key=msgspec.structs.replace(setup.key, method="fedavg-full"), model=str(bert_folder)
    )
    line = asyncio.run(run(setup, lambda _: None))
    assert line.accuracy > line.accuracy_start
    manifest = open_bundle(bert_bundle, verify=False).manifest
    trained = manifest.parameters - (4 * 32 + 4)
    assert [made.params_up for made in line.curve] == [2 * trained] * 4
    assert line.bytes_up == line.bytes_down == 4 * line.params_up
    assert line.bytes_head > 0


@pytest.mark.needs_torch("counts what PyTorch computes")
def test_operations_of_the_whole_model(bert_bundle: Path, bert_folder: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(bert_folder, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model.bert.encoder(torch.randn(3, 8, 32, requires_grad=True)).last_hidden_state.sum().backward()
    manifest = open_bundle(bert_bundle, verify=False).manifest
    assert full_flop(manifest, Texts(tokens=24, squares=3 * 64, rows=3)) == counter.get_total_flops()
