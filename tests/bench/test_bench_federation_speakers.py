"""``bench.federation`` with a language model: how speakers are divided, what is counted, and how runs are judged."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from bench import report
from bench.errors import RequestError
from bench.federation import __main__ as command
from bench.federation.compute import Texts, training_flop
from bench.federation.equal_bytes import rivals_of
from bench.federation.experiment import run
from bench.federation.lines import Key, Line, read_lines
from bench.federation.links import Link, seconds_to
from bench.federation.methods import METHODS, config_text, merged
from bench.federation.metric import ACCURACY, LOSS
from bench.federation.shares import Sizes
from bench.federation.site import Setup, open_site
from bench.federation.speakers import read_speakers, share_speeches
from bench.federation.summary import Split, rows_of
from bench.federation.workloads import WORKLOADS
from bench.jsonl import append_line
from cloud.config import parse_config
from edge_runtime.bundle import open_bundle
from edge_runtime.data import dataset_of_texts
from edge_runtime.engine.runtime import start_runtime
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import ModulePlan
from tests.bench.federation_lines import KEY, a_line
from tests.bench.lora_model import with_factors

SPEAKERS = 5
SPEECHES = 40
SIZES = Sizes(devices=4, cohort=2, rounds=4, examples=64, glimpse=12, every=2)
RANK_4: dict[str, dict[str, object]] = {"task": {"rank": 4}}  # of the bundle
SPOKEN = Key("shakespeare", None, 0, "rolora-r8", "", "", True)


def write_speakers(folder: Path) -> Path:
    """Speaker 4 says most, speaker 0 least; each has eight words of its own and now and then says next to nothing."""
    rng = np.random.default_rng(0)
    (folder / "lm_shakespeare").mkdir(parents=True)
    with (folder / "lm_shakespeare" / "speakers.jsonl").open("w") as file:
        for speaker in range(SPEAKERS):
            speeches = [
                " ".join(f"word{speaker * 8 + int(word)}" for word in rng.integers(0, 8, size=8 + speaker))
                for _ in range(SPEECHES)
            ]
            speeches[3] = speeches[-2] = "word1"
            file.write(json.dumps({"speaker": f"SPEAKER {speaker}", "lines": speeches}) + "\n")
    return folder


def test_a_device_is_one_of_the_speakers_with_the_most_text(tmp_path: Path) -> None:
    data = write_speakers(tmp_path)
    speakers = read_speakers(data)
    assert [speaker.speaker for speaker in speakers] == [f"SPEAKER {number}" for number in (4, 3, 2, 1, 0)]
    shares = share_speeches(data, SIZES, None, 0)
    assert [len(part) for part in shares.devices] == [16] * 4
    for part, speaker in zip(shares.devices, speakers, strict=False):
        texts = [record["text"] for record in part]
        assert len(set(texts)) == 16
        assert set(texts) <= set(speaker.lines)
    assert shares == share_speeches(data, SIZES, None, 0)
    other = share_speeches(data, SIZES, None, 1)
    assert shares.devices != other.devices
    assert shares.held_out == other.held_out


def test_the_last_tenth_of_the_speeches_is_held_out(tmp_path: Path) -> None:
    """The first of each that say something are measured; none of the last tenth is ever in the draw."""
    data = write_speakers(tmp_path)
    speakers = read_speakers(data)[:4]
    everything = msgspec.structs.replace(SIZES, examples=4 * 35)  # 36 are not held out, one of them says nothing
    shares = share_speeches(data, everything, None, 0)
    trained = {record["text"] for part in shares.devices for record in part}
    assert trained == {speech for speaker in speakers for speech in speaker.lines[:36] if speech != "word1"}
    held_out = [record["text"] for record in shares.held_out]
    assert held_out == [speaker.lines[at] for speaker in speakers for at in (36, 37, 39)]
    assert not trained & set(held_out)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (msgspec.structs.replace(SIZES, devices=6), "too few speakers: expected 6, got 5"),
        (msgspec.structs.replace(SIZES, examples=4 * 36), "SPEAKER 4: too few speeches .* expected 36, got 35"),
    ],
)
def test_too_little_text_is_said(sizes: Sizes, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        share_speeches(write_speakers(tmp_path), sizes, None, 0)


@pytest.mark.parametrize("text", [None, "{}\n", "not JSON\n"])
def test_data_that_is_not_of_speakers_is_named(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "lm_shakespeare").mkdir()
        (tmp_path / "lm_shakespeare" / "speakers.jsonl").write_text(text)
    with pytest.raises(RequestError, match="not the data of shakespeare"):
        read_speakers(tmp_path)


ALIVE = ("all AB", "all B", "top A", "one value", "query of the middle", "an inner one below", "mixed", "none")


@pytest.mark.parametrize("alive", ALIVE)
@pytest.mark.needs_torch("counts what PyTorch computes")
def test_operations_of_a_decoder_are_those_that_pytorch_counts(
    alive: str, llama_bundle: Path, llama_folder: Path
) -> None:
    """The oracle is PyTorch's own counter over blocks and output projection, with the same factors trained."""
    manifest = open_bundle(llama_bundle, verify=False).manifest
    factors = {
        "all AB": dict.fromkeys(manifest.module_names, "AB"),
        "all B": dict.fromkeys(manifest.module_names, "B"),
        "top A": {module.name: "A" * (module.block == 2) for module in manifest.modules},
        "one value": {name: "B" * ("0.self_attn.v_proj" in name) for name in manifest.module_names},
        "query of the middle": {name: "A" * ("1.self_attn.q_proj" in name) for name in manifest.module_names},
        "an inner one below": {name: "AB" * ("0.mlp.up_proj" in name) for name in manifest.module_names},
        "mixed": {name: ("", "A", "B", "AB")[number % 4] for number, name in enumerate(manifest.module_names)},
        "none": dict.fromkeys(manifest.module_names, ""),
    }[alive]
    plans = [ModulePlan(name, 4, factor) for name, factor in factors.items()]  # type: ignore[arg-type]
    counted = training_flop(manifest, plans, Texts(tokens=24, squares=3 * 64, rows=21))
    assert counted == _pytorch_flop(llama_folder, factors, batch=3, tokens=8)


def _pytorch_flop(folder: Path, factors: dict[str, str], *, batch: int, tokens: int) -> int:
    """Block by block, because what makes the rotary tables is counted too and no device computes it with products."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    slots = {name.split(".", 3)[-1] for name in factors}
    model = with_factors(base, factors, slots=slots, task_type="CAUSAL_LM")
    decoder = model.base_model.model.model
    hidden = torch.randn(batch, tokens, 32)
    rotary = decoder.rotary_emb(hidden, torch.arange(tokens)[None])
    with FlopCounterMode(display=False) as counter:
        for layer in decoder.layers:
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
        logits = model.base_model.model.lm_head(decoder.norm(hidden)[:, :-1])  # the last token predicts nothing
        if logits.requires_grad:
            logits.sum().backward()
    return int(counter.get_total_flops())


def a_setup(tmp_path: Path, bundle: Path, **key: str) -> Setup:
    (tmp_path / "run").mkdir()
    return Setup(
        key=msgspec.structs.replace(SPOKEN, **key),
        data=str(write_speakers(tmp_path / "data")),
        bundle=str(bundle),
        folder=str(tmp_path / "run"),
        sizes=SIZES,
        threads=start_runtime(),
        products="exact",
        extra={"task": {"rank": 4}, "training": {"lr_a": 1e-2, "lr_b": 1e-2}},
    )


def test_speakers_are_learned_and_judged_by_their_loss(tmp_path: Path, llama_bundle: Path) -> None:
    said: list[str] = []
    line = asyncio.run(run(a_setup(tmp_path, llama_bundle), said.append))
    assert (line.accuracy, line.accuracy_start, line.metric) == (None, None, LOSS)
    assert line.end < line.start
    assert [made.loss is None for made in line.curve] == [True, False, True, False]
    assert {made.accuracy for made in line.curve} == {None}
    assert line.loss == line.curve[-1].loss  # all that is held out is measured on the way
    assert line.bytes_head == 0
    assert line.params_up == sum(made.params_up for made in line.curve) > 0
    assert "loss" in said[1]


def test_the_head_sees_every_token_but_the_first(llama_bundle: Path) -> None:
    encoder = WorkingBundle(open_bundle(llama_bundle, verify=False)).encoder()
    one, two = dataset_of_texts(["word1 word2 word3", "word1 " * 7], encoder).examples
    fixed = len(one.ids) - 3  # what the tokenizer puts before and after a text
    sizes = Texts.of([one, two])
    assert (sizes.tokens, sizes.squares) == (10 + 2 * fixed, (3 + fixed) ** 2 + (7 + fixed) ** 2)
    assert sizes.rows == sizes.tokens - 2


@pytest.mark.parametrize("budget", ["small", "large", "half"])
def test_our_own_method_runs_with_a_decoder(budget: str, tmp_path: Path, llama_bundle: Path) -> None:
    setup = a_setup(tmp_path, llama_bundle, method="annealed-kill-revive", budget=budget)
    extra = {
        "training": {"lr_a": 1e-2, "lr_b": 1e-2},
        "task": {"rank": {"small": 2, "large": 4, "half": 4}[budget]},
    }  # the bundle has 4
    line = asyncio.run(run(msgspec.structs.replace(setup, extra=extra), lambda _: None))
    assert line.end < line.start
    assert 0 < line.curve[-1].alive < line.curve[0].alive + 1e-9


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(("method", "budget"), [(name, budget) for name in METHODS for budget in METHODS[name].budgets])
def test_every_method_is_a_config_for_a_decoder(method: str, budget: str, quick: bool, tmp_path: Path) -> None:
    workload = WORKLOADS["shakespeare"]
    sizes = workload.quick if quick else workload.sizes
    shared = {**workload.tables(sizes), "task": {"rounds": sizes.rounds}}
    text = config_text(METHODS[method], budget, bundle="b", seed=3, shared=shared, reference_bytes=8_000)
    config = parse_config(text.encode(), path=tmp_path / "emberlora.toml")
    shares = {"small": 133, "large": 364, "half": 800}  # a 60th, a 22nd, a tenth
    assert config.annealing.bytes_per_device_per_round == shares.get(budget)
    assert (config.task.head_init, config.task.head) == ("bundle", "trained")  # neither is asked of a decoder
    assert (config.training.batch_size, config.training.max_tokens) == (8 if budget == "half" else 4, 64)


def test_rates_of_a_data_set_are_over_the_methods_own_and_under_a_variants(tmp_path: Path, llama_bundle: Path) -> None:
    """A decoder of few steps wants other rates than a classifier; what is tried out replaces both."""
    workload = WORKLOADS["shakespeare"]
    for method, budget in workload.rates:
        assert budget in METHODS[method].budgets
    setup = msgspec.structs.replace(a_setup(tmp_path, llama_bundle, method="lora-a2", budget=""), extra=RANK_4)
    rates = asyncio.run(the_rates(setup))
    assert rates == tuple(workload.rates["lora-a2", ""][name] for name in ("lr_a", "lr_b"))
    assert rates != tuple(METHODS["lora-a2"].training[name] for name in ("lr_a", "lr_b"))
    (tmp_path / "other").mkdir()
    other = msgspec.structs.replace(setup, folder=str(tmp_path / "other"), extra={**RANK_4, "training": {"lr_a": 0.5}})
    assert asyncio.run(the_rates(other)) == (0.5, rates[1])


def test_a_line_names_the_commit_that_ran(tmp_path: Path, llama_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may be checked out before the run ends: rates may differ between them."""
    seen = iter(["began", "another"])
    monkeypatch.setattr("bench.federation.site.commit", lambda: next(seen))
    line = asyncio.run(run(a_setup(tmp_path, llama_bundle, method="lora-r8", budget=""), lambda _: None))
    assert line.commit == "began"
    assert next(seen) == "another"


def test_tables_are_merged_key_by_key() -> None:
    layers: tuple[dict[str, dict[str, object]], ...] = (
        {"task": {"rank": 8, "seed": 1}},
        {"task": {"rank": 2}, "annealing": {}},
    )
    assert merged(*layers) == {"task": {"rank": 2, "seed": 1}, "annealing": {}}
    assert layers[0] == {"task": {"rank": 8, "seed": 1}}


async def the_rates(setup: Setup) -> tuple[float, float]:
    """Of A and B, that a run's devices are told."""
    site = await open_site(setup, lambda _: None)
    try:
        training = (await site.plan()).plan.training
    finally:
        await site.aggregator.close()
    return training.lr_a, training.lr_b


def spoken(method: str, *losses: float | None, size: int = 10, budget: str = "") -> Line:
    """A run with these losses round by round, from 4 nats."""
    key = msgspec.structs.replace(SPOKEN, method=method, budget=budget, quick=False)
    line = a_line(KEY)
    curve = tuple(
        msgspec.structs.replace(line.curve[0], accuracy=None, loss=loss, bytes_up=size, bytes_down=0) for loss in losses
    )
    values = {name: getattr(key, name) for name in key.__struct_fields__}
    line = msgspec.structs.replace(
        line, **values, accuracy=None, accuracy_start=None, loss=losses[-1], loss_start=4.0, curve=curve
    )
    return msgspec.structs.replace(line, bytes_up=size * len(losses), bytes_down=0, bytes_head=0)


def test_lines_of_classifiers_stay_as_they_were(tmp_path: Path) -> None:
    """And a line says one or the other, never both or neither."""
    for line in (a_line(KEY), spoken("lora-r8", 3.0)):
        append_line(tmp_path / "r.jsonl", line)
    first, second = (json.loads(text) for text in (tmp_path / "r.jsonl").read_text().splitlines())
    assert not {"loss", "loss_start"} & (set(first) | set(first["curve"][0]))
    assert (second["accuracy"], second["loss"], second["loss_start"], second["alpha"]) == (None, 3.0, 4.0, None)
    assert second["curve"][0]["loss"] == 3.0
    assert list(read_lines(tmp_path / "r.jsonl").values()) == [a_line(KEY), spoken("lora-r8", 3.0)]
    for wrong in ({"accuracy": None}, {"loss": 3.0, "loss_start": 4.0}, {"accuracy": None, "loss": 3.0}):
        (tmp_path / "r.jsonl").write_text(json.dumps(first | wrong) + "\n")
        with pytest.raises(RequestError, match="expected accuracy and accuracy_start, or loss and loss_start"):
            read_lines(tmp_path / "r.jsonl")


def test_less_loss_is_better_and_counted_from_the_start() -> None:
    values = (None, 3.5, 3.04, 3.0, 3.2)
    assert LOSS.best(values) == 3.0
    assert LOSS.nearly(4.0, values) == pytest.approx(3.05)
    assert LOSS.rounds_until(3.05, values) == 3
    assert LOSS.rounds_until(2.9, values) is None
    assert ACCURACY.nearly(0.5, (0.6, None, 0.8)) == pytest.approx(0.76)  # of all that is right, as ever
    assert ACCURACY.rounds_until(0.76, (0.6, None, 0.8)) == 3


def test_rows_and_rivals_of_losses_compare_with_the_reference() -> None:
    lines = [spoken("annealed-kill-revive", 3.2, budget="small", size=30), spoken("lora-r8", 3.5, 3.0, 3.1, size=20)]
    reference, ours = rows_of(lines, Split("shakespeare", None))
    assert (reference.name[0], reference.apart, reference.rounds_to_95) == ("lora-r8", 0.0, 2.0)
    assert (ours.end, ours.apart, ours.bytes_ratio) == (3.2, pytest.approx(0.1), 2.0)
    assert ours.rounds_to_95 is None  # 3.05 was to be reached
    (rival,) = rivals_of(lines, ("annealed-kill-revive", "small", ""))
    assert (rival.rounds, rival.apart) == (1.0, pytest.approx(0.3))  # 3.5 at 20 bytes, against 3.2
    link = Link(1.0, round_trip_s=0.5, loss=0.0)
    assert seconds_to(lines[1], 3.05, link, cohort=5) == pytest.approx(2 * (20 / 5 / 125_000 + 3.0 + 0.1 / 5 / 20))
    assert seconds_to(lines[1], 2.9, link, cohort=5) is None


@pytest.mark.parametrize("only_losses", [False, True])
def test_the_report_has_losses_where_there_are_any(only_losses: bool, tmp_path: Path) -> None:
    results, out, page = tmp_path / "r.jsonl", tmp_path / "results.md", tmp_path / "results.html"
    arguments = ["--results", str(results), "--out", str(out), "--html", str(page)]
    if not only_losses:
        append_line(results, a_line(KEY))
        assert CliRunner().invoke(report.main, arguments).exit_code == 0
        assert "held-out loss against bytes" not in out.read_text()
        assert "held-out loss, nats" not in page.read_text()
    append_line(results, spoken("lora-r8", 3.5, 3.0))
    append_line(results, spoken("annealed-kill-revive", 3.5, 3.25, budget="small", size=10))
    assert CliRunner().invoke(report.main, arguments).exit_code == 0
    text = out.read_text()
    assert "## Speakers of Shakespeare: held-out loss against bytes" in text
    assert "| `annealed-kill-revive` small | 0 | 3.2500 | +0.2500 |" in text
    assert "Before the first round, on what is measured on the way: 4.0000." in text
    assert "The best loss that each method" in text
    assert ("accuracy against bytes" in text) == ("Head of banking77" in text) == (not only_losses)
    assert "Head of shakespeare" not in text  # nothing of it was made or sent
    assert "held-out loss, nats a token" in page.read_text()


def test_speakers_are_run_with_one_seed_unless_told_otherwise() -> None:
    keys = command.keys_of(command.Choice(), "", quick=False)
    mine = [key for key in keys if key.dataset == "shakespeare"]
    assert {(key.alpha, key.seed) for key in mine} == {(None, 0)}
    assert [key.method for key in mine] == [*command.CORE, *2 * ["annealed-kill-revive"]]  # three sizes of ours
    assert {(key.alpha, key.seed) for key in keys if key.dataset == "clinc150"} == {
        (alpha, seed) for alpha in (0.5, 0.1) for seed in (0, 1, 2)
    }
    assert [key.seed for key in keys] == sorted(key.seed for key in keys)
    few = command.keys_of(command.Choice(datasets=("shakespeare",)), "", quick=True)
    assert [(key.method, key.budget) for key in few][-2:] == [
        ("annealed-kill-revive", "small"),
        ("annealed-kill-revive", "half"),
    ]
    assert len(few) == 4
    assert {key.dataset for key in command.keys_of(command.Choice(), "", quick=True)} == {"banking77"}


def test_what_a_data_set_has_not_is_left_out_or_refused() -> None:
    """Left out where the data set was not named."""

    def datasets(**asked: tuple[object, ...]) -> set[str]:
        return {key.dataset for key in command.keys_of(command.Choice(**asked), "", quick=False)}  # type: ignore[arg-type]

    assert datasets(alphas=(0.5,)) == {"clinc150", "banking77"}
    assert datasets(alphas=(None,)) == {"clinc150", "shakespeare"}
    assert datasets(methods=("fedavg-full",)) == {"clinc150", "banking77"}
    with pytest.raises(RequestError, match="shakespeare: has only its natural split: expected --alpha natural, got 0"):
        datasets(datasets=("shakespeare",), alphas=(0.5,))
    with pytest.raises(RequestError, match="banking77: has no natural split"):
        datasets(datasets=("banking77",), alphas=(None,))
    with pytest.raises(RequestError, match="shakespeare: fedavg-full trains classifiers only"):
        datasets(datasets=("shakespeare",), methods=("fedavg-full",))


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    arguments = ["--data", str(tmp_path), "--dataset", "shakespeare", "--method", "fedavg-full"]
    done = CliRunner().invoke(command.main, arguments)
    assert done.exit_code == 2
    assert done.output.splitlines()[-1].endswith("shakespeare: fedavg-full trains classifiers only")
