"""The engine against torch autograd on a real peft model, and what killing must do."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.bundle import Array, Bundle, cut_ranks, open_bundle, write_peft_folder
from edge_runtime.data import Batch
from edge_runtime.engine.budget import KeptSizes
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.engine.interface import Gradients
from edge_runtime.engine.model import BlockEngine
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.wire import Layout

TOLERANCE = 1e-4


@dataclass
class Case:
    """One bundle with a non-trivial adapter of mixed ranks, a padded batch, and autograd's answer."""

    bundle: Bundle
    engine: BlockEngine
    adapter: dict[str, Array]
    batch: Batch
    loss: float
    gradients: dict[str, Array]
    logits: Array


def random_adapter(bundle: Bundle, rng: np.random.Generator) -> dict[str, Array]:
    """Every tensor random (B too, so that A has a gradient), ranks 1 to 4 mixed over the modules."""
    full = {k: rng.normal(scale=0.1, size=v.shape).astype(np.float32) for k, v in bundle.initial_adapter().items()}
    ranks = {name: int(rng.integers(1, 5)) for name in bundle.manifest.module_names}
    return cut_ranks(bundle.manifest, full, ranks)


def make_batch(bundle: Bundle, rng: np.random.Generator) -> Batch:
    """Three examples of 11, 7 and 4 tokens."""
    manifest = bundle.manifest
    ids = rng.integers(4, manifest.text.vocab_size, size=(3, 11))
    mask = (np.arange(11) < np.array([[11], [7], [4]])).astype(np.int64)
    ids[mask == 0] = manifest.text.pad_id
    if manifest.task == "classify":
        rows, labels = np.arange(3) * 11, np.array([0, 3, 1])
    else:
        targets = mask[:, 1:] == 1
        rows = np.flatnonzero(np.pad(targets, ((0, 0), (0, 1))))
        labels = ids[:, 1:][targets]
    return Batch(ids, mask, rows=rows, labels=labels, examples=np.arange(3))


def autograd(folder: Path, bundle: Bundle, adapter: dict[str, Array], batch: Batch, work: Path) -> tuple[Any, ...]:
    """Loss, gradients and logits of transformers + peft with the adapter loaded from a peft folder."""
    import torch
    import transformers
    from peft import PeftModel

    write_peft_folder(work, bundle.manifest, adapter)
    kind = "SequenceClassification" if bundle.manifest.task == "classify" else "CausalLM"
    extra = {"num_labels": len(bundle.manifest.labels)} if bundle.manifest.labels else {}
    base = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder, **extra)
    model = PeftModel.from_pretrained(base, work, is_trainable=True).eval()
    output = model(input_ids=torch.tensor(batch.input_ids), attention_mask=torch.tensor(batch.attention_mask))
    logits = output.logits
    if bundle.manifest.task == "lm":
        logits = logits.reshape(-1, logits.shape[-1])[torch.tensor(batch.rows)]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(batch.labels))
    loss.backward()
    gradients = {}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            name = key.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            name = name.replace(".lora_A.default.weight", ".lora_a").replace(".lora_B.default.weight", ".lora_b")
            gradients[name] = parameter.grad.numpy()
    return loss.item(), gradients, logits.detach().numpy()


def write_answer(path: Path, loss: float, gradients: dict[str, Array], logits: Array) -> None:
    with path.open("wb") as file:
        np.savez(file, loss=loss, logits=logits, **{f"gradient {name}": array for name, array in gradients.items()})


def read_answer(path: Path) -> tuple[float, dict[str, Array], Array]:
    with np.load(path) as stored:
        gradients = {key.split(" ")[1]: stored[key] for key in stored.files if key.startswith("gradient ")}
        return float(stored["loss"]), gradients, stored["logits"]


@pytest.fixture(scope="module", params=["bert", "llama"])
def case(request: pytest.FixtureRequest, made: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Both model types; autograd's answer may come from a machine that has torch."""
    bundle = open_bundle(request.getfixturevalue(f"{request.param}_bundle"))
    rng = np.random.default_rng(7)
    adapter, batch = random_adapter(bundle, rng), make_batch(bundle, rng)
    folder = request.getfixturevalue(f"{request.param}_folder")
    work = tmp_path_factory.mktemp("peft")
    answer = made(
        f"{request.param}-answer.npz",
        lambda path: write_answer(path, *autograd(folder, bundle, adapter, batch, work)),
    )
    return Case(bundle, BlockEngine(bundle), adapter, batch, *read_answer(answer))


def alive(case: Case, names: list[str]) -> AdapterParameters:
    return AdapterParameters(case.adapter, Layout(tuple((name, case.adapter[name].shape) for name in names)))


def step(case: Case, names: list[str], engine: BlockEngine | None = None) -> Gradients:
    engine = engine or case.engine
    engine.use(alive(case, names))
    return engine.gradients(case.batch)


def error(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_every_gradient_equals_autograd(case: Case) -> None:
    """All alive, mixed ranks, padding: loss and every gradient as torch + peft have them."""
    made = step(case, list(case.adapter))
    assert made.score.loss == pytest.approx(case.loss, rel=TOLERANCE)
    assert made.tensors.keys() == case.gradients.keys() == case.adapter.keys()
    for name, wanted in case.gradients.items():
        assert error(made.tensors[name], wanted) < TOLERANCE, name


def test_every_single_factor_alone(case: Case) -> None:
    """With one factor alive, or only the head, only its gradient is made, and it is the same one."""
    head = [name for name in case.adapter if name.startswith("classifier.")]
    for names in [*([name] for name in case.adapter if name not in head), *([head] if head else [])]:
        made = step(case, names)
        assert sorted(made.tensors) == sorted(names)
        for name in names:
            assert error(made.tensors[name], case.gradients[name]) < TOLERANCE, name


@pytest.mark.parametrize("budget_mb", [0, 1])
def test_recomputing_changes_nothing(case: Case, budget_mb: int) -> None:
    """Recomputed activations give the gradients that kept ones give."""
    engine = BlockEngine(case.bundle, memory_budget_mb=budget_mb)
    kept, recomputed = step(case, list(case.adapter)), step(case, list(case.adapter), engine)
    for name, wanted in kept.tensors.items():
        np.testing.assert_allclose(recomputed.tensors[name], wanted, rtol=1e-5, atol=1e-7)


def test_budget_decides_block_by_block(case: Case) -> None:
    """A budget for one and a half blocks keeps the highest block and recomputes the others."""
    case.engine.use(alive(case, list(case.adapter)))
    _, _, tape = case.engine._forward(case.batch, taped=True)
    assert [variant.keep for _, variant, _ in tape] == [True] * 3
    one_block = sum(value.tensor_size_in_bytes() for name, value in tape[2][2].items() if name != "hidden")
    tight = BlockEngine(case.bundle)
    tight._sizes = KeptSizes(one_block * 3 // 2)
    tight.use(alive(case, list(case.adapter)))
    for _ in range(2):  # before and after the sizes are known
        _, _, tape = tight._forward(case.batch, taped=True)
        assert [variant.keep for _, variant, _ in tape] == [False, False, True]
        assert [len(kept) > 2 for _, _, kept in tape] == [False, False, True]


def test_a_decision_stands_until_a_size_is_learned(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step decides again for each of its two variants; a later one decides once for all blocks."""
    asked: list[int] = []
    decide = KeptSizes.first_kept

    def counted(sizes: KeptSizes, variants: Sequence[Hashable], shape: tuple[int, int]) -> int:
        asked.append(len(variants))
        return decide(sizes, variants, shape)

    monkeypatch.setattr(KeptSizes, "first_kept", counted)
    engine, adapter = BlockEngine(case.bundle), case.bundle.initial_adapter()  # of equal ranks, so of equal sizes
    engine.use(AdapterParameters(adapter, Layout(tuple((name, array.shape) for name, array in adapter.items()))))
    for expected in ([3, 3, 3], [3]):
        asked.clear()
        engine.gradients(case.batch)
        assert asked == expected


def test_backward_stops_at_the_lowest_alive_block(case: Case) -> None:
    """Below the lowest alive block no backward variant exists, and its own makes no input gradient."""
    top = [name for name in case.adapter if ".2." in name]
    case.engine.use(alive(case, top))
    assert case.engine.lowest_alive == 2
    _, _, tape = case.engine._forward(case.batch, taped=True)
    assert [(index, variant.input_gradient) for index, variant, _ in tape] == [(2, False)]


def test_long_sequences_take_the_long_graph(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder's has its queries in chunks; the gradients are autograd's, kept or recomputed. An encoder has none."""
    monkeypatch.setattr("edge_runtime.engine.block.LONG_TOKENS", 8)
    for budget in (None, 0):
        engine = BlockEngine(case.bundle, memory_budget_mb=budget)
        made = step(case, list(case.adapter), engine)
        assert max(error(made.tensors[name], wanted) for name, wanted in case.gradients.items()) < TOLERANCE
        forms = next(iter(engine._kinds.values()))
        assert (forms.long is forms.short) == (case.bundle.manifest.task == "classify")
        assert forms.long._sessions
        assert forms.long is forms.short or not forms.short._sessions


def test_killed_factor_leaves_the_graph(case: Case) -> None:
    """A dead factor's gradient is no output of the block's graph, and its products are not in it."""
    variants = next(iter(case.engine._kinds.values())).short
    slot = variants.kind.slots[0].name
    everything = [f"d_lora_{f}:{s.name}" for s in variants.kind.slots for f in "ab"]
    without_a = [name for name in everything if name != f"d_lora_a:{slot}"]
    whole, cut = variants.graph.derive(everything), variants.graph.derive(without_a)
    assert f"d_lora_a:{slot}" not in {value.name for value in cut.graph.output}
    products = {"MatMul", "Gemm"}
    count = [sum(node.op_type in products for node in model.graph.node) for model in (whole, cut)]
    assert count[1] < count[0]
    assert len(cut.graph.node) < len(whole.graph.node)
    assert variants.graph.node_count(["out"]) < len(cut.graph.node)


def test_logits_equal_peft(case: Case) -> None:
    """With ranks cut differently in every module, the forward pass equals peft with rank_pattern."""
    case.engine.use(alive(case, []))
    assert error(case.engine.logits(case.batch), case.logits) < TOLERANCE
    score = case.engine.evaluate(case.batch)
    assert score.loss == pytest.approx(case.loss, rel=TOLERANCE)
    assert score.correct == int((case.logits.argmax(1) == case.batch.labels).sum())


def test_frozen_weights_are_mapped_not_copied(case: Case) -> None:
    """After a training step every frozen weight the engine feeds still lies inside the mapped file."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list a process's mappings")
    step(case, list(case.adapter))
    lines = [
        line for line in maps.read_text().splitlines() if line.endswith(str(case.bundle.path("weights.safetensors")))
    ]
    ranges = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines]
    fed = [value for index in range(3) for value in case.engine._frozen.exact(index).values()]
    assert len(fed) > 20
    for value in fed:
        assert any(start <= value.data_ptr() < end for start, end in ranges)


def test_nothing_alive_is_refused(case: Case) -> None:
    """Training without an alive factor is a mistake of the plan, said in one line."""
    case.engine.use(alive(case, []))
    with pytest.raises(EngineInputError, match="nothing is alive"):
        case.engine.gradients(case.batch)


def test_foreign_names_are_refused(case: Case) -> None:
    """An alive name that is none of the bundle's is named."""
    parameters = AdapterParameters(
        {**case.adapter, "x.lora_a": np.zeros((1, 1), np.float32)}, Layout((("x.lora_a", (1, 1)),))
    )
    with pytest.raises(EngineInputError, match=r"x\.lora_a"):
        case.engine.use(parameters)


def test_a_missing_tensor_is_refused(case: Case) -> None:
    """An adapter without one of the modules cannot be used."""
    name = next(iter(case.adapter))
    rest = {key: array for key, array in case.adapter.items() if key != name}
    with pytest.raises(EngineInputError, match="no tensor"):
        case.engine.use(AdapterParameters(rest, Layout(())))
