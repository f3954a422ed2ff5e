"""The manifest: everything a device must know about a bundle besides the numbers.

``manifest.json`` names the digest of every other file, so the digest of the manifest is the digest of the bundle.
Graph inputs and outputs have fixed names, stated at :class:`BlockKind`, :class:`Embed` and :class:`Head`; those of a
bundle for onnxruntime-training at :data:`TRAINING_FILES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Literal, get_args

import msgspec

from edge_runtime.bundle.errors import ManifestError

SCHEMA = 2
MANIFEST_NAME = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"  # frozen ones; bundles of the engine ``blocks`` have it
MAX_MANIFEST_BYTES = 4 << 20

Base = Literal["fp32", "fp16", "int8", "int4"]
Task = Literal["classify", "lm"]
Factor = Literal["A", "B"]
EngineName = Literal["blocks", "ort-training"]
FACTORS: tuple[Factor, ...] = get_args(Factor)

# What onnxruntime-training's own tools call these files. Inputs of the models: ``input_ids`` and ``attention_mask``
# (batch, seq), ``rows`` and ``labels`` (n,), all int64, then every parameter by the name it has in the adapter or in
# the Hugging Face model. Outputs: ``loss`` () mean nats of the rows, ``correct`` () int64; of the evaluation model
# ``logits`` (n, classes) too. The checkpoint holds every parameter, those of the adapter (at rank r_max) as trainable.
TRAINING_MODEL = "training/training_model.onnx"
EVALUATION_MODEL = "training/eval_model.onnx"
OPTIMIZER_MODEL = "training/optimizer_model.onnx"
CHECKPOINT = "training/checkpoint"
TRAINING_FILES = (TRAINING_MODEL, EVALUATION_MODEL, OPTIMIZER_MODEL, CHECKPOINT)

# A relative path that means the same file on every system and in every URL: no "..", no drive, no hidden file.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}(?:/[A-Za-z0-9_][A-Za-z0-9._-]{0,99}){0,3}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class _Versioned(msgspec.Struct):
    """Only the schema: a manifest of another schema is told by its number, whatever its other fields are."""

    schema: object = None


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the bundle: SHA-256 in hex and length in bytes."""

    sha256: str
    bytes: int


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One linear layer inside a block kind that carries a LoRA pair."""

    name: str  # path inside the block, for example "attention.self.query"
    in_features: int
    out_features: int


class FastForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The same block with int8 products: the contract of its kind, but the ``weights`` are read in int8.

    Each is three inputs instead of ``w:{weight}``: ``q:{weight}`` int8 (out, in), ``qt:{weight}`` its transpose and
    ``qs:{weight}`` float32 (out,), so that weight = qs · q. Scales of ``weights`` are not read.
    """

    graph: str
    weights: tuple[str, ...]
    long: str | None = None  # as the kind's; there is one exactly when the kind has one


class BlockKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One joint forward and backward graph, shared by every block of this kind.

    Inputs: ``hidden`` (batch, seq, width) · each name of ``shared`` · ``d_out`` like hidden · ``w:{weight}`` ·
    per slot ``lora_a:{slot}`` (r, in), ``lora_b:{slot}`` (out, r), ``scale:{slot}`` ().
    Outputs: ``out`` · ``d_hidden`` · per slot ``d_lora_a:{slot}``, ``d_lora_b:{slot}``.
    Batch, sequence and every slot's rank are symbolic.
    ``long`` is a second graph of the same contract and results, which does less work on long sequences; it takes eight
    tokens or more.
    """

    name: str
    graph: str  # file inside the bundle, "graphs/block.onnx"
    weights: tuple[str, ...]  # paths inside the block of its frozen parameters
    slots: tuple[Slot, ...]
    shared: tuple[str, ...]  # outputs of the embed graph that the block reads
    fast: FastForm | None = None
    long: str | None = None


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One block of the model; its weights are stored as ``{prefix}.{weight}``."""

    kind: str
    prefix: str  # path of the block in the Hugging Face model, "bert.encoder.layer.0"


class Embed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Token ids to the first hidden state and to what all blocks share.

    Inputs: ``input_ids`` and ``attention_mask`` (batch, seq) int64, padding on the right · ``w:{weight}``.
    Outputs: ``hidden`` (batch, seq, width) · each name of ``shared``.
    """

    graph: str
    weights: tuple[str, ...]  # full parameter names in the Hugging Face model
    shared: tuple[str, ...]


class Param(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trained head parameter."""

    name: str  # path inside the head module, "weight"
    shape: tuple[int, ...]


class Vocabulary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The output projection of a language model, some rows of its weights at a time.

    A pass over all rows keeps, for each of n positions, what the loss and its gradient need: like attention in chunks
    of keys (Dao et al., arXiv 2205.14135), with the vocabulary as keys and values. No (n, vocab_size) array is made.

    Inputs: ``normed`` (n, width) · ``w:{weight}``, rows f to f + c of each · ``labels`` (n,) int64, the row inside this
    chunk · ``inside`` (n, 1) bool, whether the label is in it · the state so far: ``top`` (n, 1), the largest logit,
    ``total`` (n, 1), the sum of exp(logit - top), ``gold`` (n, 1), the label's logit, ``pull`` (n, width), the sum of
    exp(logit - top) · weight row, ``target`` (n, width), the label's weight row.
    Outputs: ``logits`` (n, c) · ``next_top``, ``next_total``, ``next_gold``, ``next_pull``, ``next_target``.
    """

    graph: str
    weights: tuple[str, ...]  # full names; axis 0 of each is the vocabulary


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Selected rows of the last hidden state to loss, metrics and gradients.

    Inputs: ``rows`` (n, width) · ``labels`` (n,) int64 · ``grad_scale`` () · ``w:{weight}`` · ``p:{param}``.
    Outputs: ``logits`` (n, classes) · ``loss_sum`` () nats · ``correct`` () int64 · ``d_rows`` (n, width) and
    ``d_p:{param}``, both of ``grad_scale · loss_sum``.
    With a ``vocabulary`` the graph is only what stands before it: ``rows``, ``w:{weight}`` and ``d_normed`` to
    ``normed`` and ``d_rows``, all (n, width).
    ``select`` says which rows: the first position of each example, or every position whose next token is trained.
    """

    graph: str
    select: Literal["first", "target"]
    weights: tuple[str, ...]  # full names of the frozen parameters
    module: str | None = None  # name of the trained head module, "classifier"; None when nothing of it is trained
    params: tuple[Param, ...] = ()
    vocabulary: Vocabulary | None = None  # task lm

    @property
    def linear(self) -> tuple[int, int] | None:
        """(classes, features) where what is trained is one linear layer with a bias, else None."""
        shapes = {param.name: param.shape for param in self.params}
        weight, bias = shapes.get("weight", ()), shapes.get("bias", ())
        return (weight[0], weight[1]) if len(shapes) == len(weight) == 2 and bias == weight[:1] else None


class Module(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One LoRA target module of one block."""

    name: str  # full path in the Hugging Face model
    block: int
    slot: str
    in_features: int
    out_features: int


class ChatRole(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands before and after a message of this role."""

    before: str
    after: str


class Chat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model's chat template where it is a sequence of wrapped messages; checked against the real one at export."""

    roles: dict[str, ChatRole]
    preamble: str = ""  # put first when the conversation does not begin with a system message


class Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How text becomes token ids: ``prefix_ids + encode(text) + suffix_ids``, at most ``max_tokens``."""

    max_tokens: int
    vocab_size: int
    pad_id: int
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    chat: Chat | None = None


class PeftInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``adapter_config.json`` needs so that peft loads a result on top of the original model."""

    base_model: str
    task_type: Literal["SEQ_CLS", "CAUSAL_LM"]
    target_modules: tuple[str, ...]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """See the module's text; ``modules`` are ordered by block, then as their kind lists its slots.

    ``engine`` says which engine the files are for. In a bundle for ``ort-training`` every ``graph`` is the evaluation
    model, which holds all parts, and the frozen weights are in the checkpoint.
    """

    schema: int
    model: str
    task: Task
    width: int
    base: Base  # how frozen matrices are stored; a quantised ``{weight}`` has a ``{weight}:scale`` beside it
    embed: Embed
    kinds: tuple[BlockKind, ...]
    blocks: tuple[Block, ...]
    head: Head
    modules: tuple[Module, ...]
    r_max: int
    scale: float  # alpha / r_max, constant whatever the rank
    text: Text
    peft: PeftInfo
    parameters: int  # of the whole base model, for comparing with full-model averaging
    files: dict[str, FileEntry]
    labels: tuple[str, ...] = ()  # classify only; index is the class id
    tool_versions: dict[str, str] = {}
    engine: EngineName = "blocks"  # not written then, so that devices from before it was a choice read the manifest

    def kind_of(self, block: int) -> BlockKind:
        """The kind of block number ``block``."""
        wanted = self.blocks[block].kind
        return next(kind for kind in self.kinds if kind.name == wanted)

    @property
    def graphs(self) -> frozenset[str]:
        """Every graph file of the bundle."""
        vocabulary = {self.head.vocabulary.graph} if self.head.vocabulary else set()
        forms = [form for kind in self.kinds for form in (kind, kind.fast) if form is not None]
        blocks = {form.graph for form in forms} | {form.long for form in forms if form.long is not None}
        return frozenset({self.embed.graph, self.head.graph} | vocabulary | blocks)

    @property
    def module_names(self) -> tuple[str, ...]:
        """Names of the LoRA modules in plan order, the trained head not included."""
        return tuple(module.name for module in self.modules)

    @property
    def features(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of every LoRA module by name."""
        return {module.name: (module.in_features, module.out_features) for module in self.modules}

    @property
    def module_blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks that have LoRA modules, rising."""
        return tuple(sorted({module.block for module in self.modules}))

    @property
    def places(self) -> dict[str, int]:
        """Number of the block of every LoRA module by name."""
        return {module.name: module.block for module in self.modules}

    @property
    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the trained head's tensors by adapter name; empty when nothing of the head is trained."""
        return {f"{self.head.module}.{param.name}": param.shape for param in self.head.params}


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes whose SHA-256 is the bundle's digest."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1)


def parse_manifest(data: bytes) -> Manifest:
    """Read and cross-check a manifest.

    Raises:
        ManifestError: not JSON of this schema, or its parts contradict each other.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"manifest: too large: expected at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}")
    try:
        version = msgspec.json.decode(data, type=_Versioned).schema
        if version != SCHEMA:
            raise ManifestError(
                f"manifest: unknown schema: expected {SCHEMA}, got {version!r:.40}: export the bundle again"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"manifest: not a manifest of schema {SCHEMA}: {str(error)[:200]}") from error
    problems = [*_contradictions(manifest), *_bad_files(manifest), *_bad_numbers(manifest)]
    if problems:
        raise ManifestError("manifest: contradicts itself: " + "; ".join(problems))
    return manifest


def _contradictions(manifest: Manifest) -> list[str]:
    """Every way in which the parts of a manifest do not fit together."""
    kinds = {kind.name: kind for kind in manifest.kinds}
    unknown = sorted({block.kind for block in manifest.blocks} - set(kinds))
    if unknown:
        return [f"blocks of unknown kind {unknown}"]
    modules = tuple(
        Module(f"{block.prefix}.{slot.name}", index, slot.name, slot.in_features, slot.out_features)
        for index, block in enumerate(manifest.blocks)
        for slot in kinds[block.kind].slots
    )
    shared = {name for kind in manifest.kinds for name in kind.shared}
    agreeing = ("classify", "first", "SEQ_CLS"), ("lm", "target", "CAUSAL_LM")
    rules = {
        "a block kind stands twice": len(kinds) != len(manifest.kinds),
        "modules are not the slots of the blocks in order": modules != manifest.modules,
        "a module stands twice": len(set(manifest.module_names)) != len(manifest.modules),
        "a block kind reads shared tensors that embed does not make": not shared <= set(manifest.embed.shared),
        "labels belong to task classify, and only to it": (manifest.task == "classify") != bool(manifest.labels),
        "a label stands twice": len(set(manifest.labels)) != len(manifest.labels),
        "a vocabulary belongs to task lm, and only to it": (
            (manifest.task == "lm" and manifest.engine == "blocks") != bool(manifest.head.vocabulary)
        ),
        "head module and head params go together": (manifest.head.module is None) == bool(manifest.head.params),
        "a head param stands twice": len({p.name for p in manifest.head.params}) != len(manifest.head.params),
        f"task, head.select and peft.task_type must be one of {agreeing}": (
            (manifest.task, manifest.head.select, manifest.peft.task_type) not in agreeing
        ),
    }
    return [message for message, broken in rules.items() if broken]


def _bad_files(manifest: Manifest) -> Iterator[str]:
    """What is wrong with the table of files: these names become paths and URLs."""
    own = {WEIGHTS_FILE} if manifest.engine == "blocks" else set(TRAINING_FILES)
    missing = sorted((manifest.graphs | own | {"adapter.safetensors", "tokenizer.json"}) - set(manifest.files))
    if missing:
        yield f"files without a digest: {missing}"
    unsafe = [name[:200] for name in manifest.files if not _FILE_NAME.fullmatch(name) or name == MANIFEST_NAME]
    if unsafe:
        yield f"file names that are not plain names inside the bundle: {unsafe[:5]}"
    entries = manifest.files.items()
    vague = [name[:200] for name, entry in entries if not _DIGEST.fullmatch(entry.sha256) or entry.bytes < 0]
    if vague:
        yield f"files without 64 hex digits and a length: {vague[:5]}"


def _bad_numbers(manifest: Manifest) -> Iterator[str]:
    """Numbers no model has."""
    features = {size for module in manifest.modules for size in (module.in_features, module.out_features)}
    sizes = {manifest.width, manifest.text.max_tokens, manifest.text.vocab_size} | features
    sizes |= {size for param in manifest.head.params for size in param.shape}
    if not all(0 < size < 2**31 for size in sizes):
        yield "width, features, max_tokens, vocab_size and shapes must be from 1 to 2**31 - 1"
    if not 0 < manifest.r_max <= 1024:
        yield f"r_max must be from 1 to 1024, got {manifest.r_max}"
    if not 0 < manifest.scale < math.inf:
        yield f"scale must be positive, got {manifest.scale}"
    ids = (manifest.text.pad_id, *manifest.text.prefix_ids, *manifest.text.suffix_ids)
    if not all(0 <= token < manifest.text.vocab_size for token in ids):
        yield "pad_id, prefix_ids and suffix_ids must be below vocab_size"
    if manifest.parameters < 0:
        yield "parameters must not be negative"
