"""An enrolled device at work: poll, fetch, train, seal, upload, until the task is finished.

:mod:`edge_runtime.device.state` decides; this carries it out. Every action may be interrupted at any instant and is
safe to repeat: downloads resume, training goes on from its last checkpoint, and a sealed update is durable before its
first byte leaves. What may pass by itself (no connection, a bad download, a plan that must not be obeyed) is reported
and waited for; what cannot ends :meth:`Device.run` with its own error.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_runtime.at_rest import AtRestError
from edge_runtime.device import events
from edge_runtime.device.artifacts import Request
from edge_runtime.device.capability import SelfReport
from edge_runtime.device.errors import (
    ArtifactError,
    CorruptFileError,
    HeldError,
    RefusedError,
    TrainingError,
    TransportError,
)
from edge_runtime.device.fetch import Store
from edge_runtime.device.files import sync_folder, write_record
from edge_runtime.device.gate import Gate
from edge_runtime.device.home import Home
from edge_runtime.device.host import Backoff, Host
from edge_runtime.device.inspector import Inspector, demand
from edge_runtime.device.outbox import Outbox, pending_for
from edge_runtime.device.plan_trust import PlanTrust
from edge_runtime.device.records import DeviceState, Pending, Published, Settings
from edge_runtime.device.state import Action, Discard, Poll, Publish, Stop, Train, Upload, accept, decide
from edge_runtime.device.state import done_with as done
from edge_runtime.device.trainer import Trainer
from edge_runtime.device.transport import PlanAnswer, Transport
from edge_runtime.training.job import (
    FRAME_NAME,
    JOB_PURPOSES,
    Done,
    Evaluated,
    Event,
    MeasuredPart,
    Notice,
    Resumed,
    Stepped,
    Stilled,
    TrainingJob,
)
from edge_runtime.wire import (
    EnvelopeContext,
    NotFoundError,
    Plan,
    PlanError,
    PlanFormatError,
    PlanOrderError,
    RequestFormatError,
    RequestTooLargeError,
    RoundAheadError,
    RoundError,
    SignatureError,
    SignedPlan,
    UpdateDigestError,
    UpdateError,
    check_answer,
    choose_tier,
    problem_for,
    seal,
)

# Reported, and tried again later. A bad signature is among them because a board without a battery starts with a wrong
# clock, which the next time service mends.
MAY_PASS = (TransportError, RefusedError, ArtifactError, PlanError, SignatureError, RoundAheadError)


@dataclass(frozen=True)
class RunOptions:
    """What the user decided about a run."""

    settings: Settings
    threads: int | None = None  # None: all cores
    skip_bad: bool = False
    memory_budget_mb: int | None = None
    packed_weights: bool = False
    micro_tokens: int | None = None  # None: what suits model and budget
    remember_mb: int | None = None  # None: what suits the disk
    checkpoint_s: float = 30.0  # of training, from one checkpoint to the next
    tier: int = 0  # the least the user wants to carry; a weaker one where the plan means this device to
    once: bool = False  # stop after one round
    wait_s: int = 30  # how long a poll may be held by the server
    backoff_s: float = 1.0  # first wait after a failure
    backoff_cap_s: float = 60.0


@dataclass(frozen=True)
class Tools:
    """What a device works with besides its home and its connection."""

    trainer: Trainer
    inspector: Inspector
    host: Host
    report: Callable[[events.DeviceEvent], None]


class Device:
    """One enrolled device; the caller holds the home's lock and an open client."""

    def __init__(self, home: Home, client: Transport, tools: Tools, options: RunOptions) -> None:
        self._home = home
        self._identity = home.identity()
        self._state = home.state()
        self._client = client
        self._client.traffic.up, self._client.traffic.down = self._state.bytes_up, self._state.bytes_down
        self._tools = tools
        self._options = options
        self._vault = home.vault()
        self._outbox = Outbox(home.outbox, self._vault)
        self._trust = PlanTrust(home, client, tools.report)
        self._store = Store(home, client, tools.inspector, options.settings.floors)
        self._carried = 0  # the tier of the round that is trained
        self._self_report = SelfReport(home, client, self._identity.task, tools.host.clock)
        self._gate = Gate(tools.host, lambda: home.settings().rules, tools.report)
        self._signed: SignedPlan | None = None
        self._backoffs: dict[type[Action], Backoff] = {}
        self._reported = ""  # digest of the plan the user was told about last
        self._rounds = 0  # ended in this run

    async def run(self) -> None:
        """Work until the task is finished, or for one round.

        Raises:
            UnknownDeviceError, DeviceRevokedError, NotPermittedError, NotFoundError: the server knows this device or
                its task no longer.
            TrainingInputError: the user's data is the cause.
            UntrustedServerError: the server's certificate is not to be trusted.
            TrainingError, CorruptFileError, OSError: the device's own.
        """
        identity = self._identity
        self._tools.report(
            events.Started(identity.device, identity.task, identity.server, round=self._state.done_round)
        )
        self._home.clear_work()  # a crash may have left an update there that is not sealed
        self._outbox.sweep()
        try:
            if not self._state.finished:
                await self._self_report.tell()
            while not (self._options.once and self._rounds):
                action = decide(self._state, self._outbox.first(), self._signed)
                if isinstance(action, Stop):
                    self._report_finished()
                    return
                await self._try(action)
        finally:
            self._save(self._state)  # the byte counts

    async def _try(self, action: Action) -> None:
        """Carry out an action, or wait when it failed for a reason that may pass."""
        # A success of one kind says nothing about another: polls go on working while a bad bundle keeps failing.
        kind = type(action)
        if kind not in self._backoffs:
            self._backoffs[kind] = Backoff(
                self._tools.host, base_s=self._options.backoff_s, cap_s=self._options.backoff_cap_s
            )
        backoff = self._backoffs[kind]
        try:
            await self._do(action)
        except MAY_PASS as error:
            self._signed = None  # by the time this works another plan may be in force
            retry_s, waited_s = backoff.next_wait(error)
            self._tools.report(events.Waiting(type(error).__name__, str(error), waited_s, retry_s))
            await self._tools.host.sleep(retry_s)
        else:
            backoff.reset()

    async def _do(self, action: Action) -> None:
        if isinstance(action, Poll):
            await self._poll(action.after)
        elif isinstance(action, Train):
            await self._train_if_eligible(action.signed)
        elif isinstance(action, Upload):
            await self._upload(action.pending)
        elif isinstance(action, Publish):
            await self._publish(action.signed)
        elif isinstance(action, Discard):
            self._outbox.remove(action.pending.round)

    async def _poll(self, after: int) -> None:
        clock = self._tools.host.clock
        asked = clock()
        answer = await self._client.plan(self._identity.task, after=after, wait_s=self._options.wait_s)
        if answer.data is None:
            # A server that does not hold polls must not be asked in a tight loop, whatever it says.
            at_once_s = 1.0 if clock() - asked < 1.0 else 0.0
            pause_s = max(answer.retry_after_s or 0.0, at_once_s)
            await self._tools.host.sleep(min(pause_s, self._options.backoff_cap_s))
            return
        state, signed = await self._trust.checked(functools.partial(self._accept, answer, after))
        self._home.save_plan(signed.plan.round, signed.data)
        if signed.digest != self._reported:
            self._tools.report(_planned(signed))
        self._reported = signed.digest
        self._save(state)
        self._signed = signed

    def _accept(self, answer: PlanAnswer, after: int, key: Ed25519PublicKey) -> tuple[DeviceState, SignedPlan]:
        """The state that has seen the plan, and the plan, if ``key`` signed it and the answer it came in."""
        task, floors = self._identity.task, self._options.settings.floors
        state, signed = accept(self._state, answer.data or b"", key=key, task=task, floors=floors)
        if answer.request is not None:
            check_answer(answer.proof, digest=signed.digest, request=answer.request, key=key)
        if signed.plan.round <= after:
            raise PlanOrderError(
                f"plan: not what was asked for: expected a round after {after}, got {signed.plan.round}"
            )
        return state, signed

    async def _fetch(self, signed: SignedPlan) -> tuple[Path, Path]:
        """The plan's bundle folder and adapter file, verified."""
        plan, before = signed.plan, self._client.traffic.down
        bundle = await self._store.bundle(plan.bundle)
        adapter = await self._store.adapter(plan, self._state)
        # This order: until the state knows the new adapter, the next one may have to be patched from the old.
        self._save(
            msgspec.structs.replace(self._state, bundle=plan.bundle, adapter=plan.adapter, adapter_round=plan.round)
        )
        self._home.prune(bundle=plan.bundle, adapter=plan.adapter)
        self._tools.report(events.Fetched(plan.round, self._client.traffic.down - before))
        return bundle, adapter

    async def _train_if_eligible(self, signed: SignedPlan) -> None:
        round_ = signed.plan.round
        if await self._gate.wait(round_, counted_at=self._state.counted_at):
            self._signed = None  # by now another plan may be in force
            return
        with contextlib.suppress(HeldError):  # its user was told; the same action comes next, and waits
            await self._gate.train(round_, self._train(signed))

    async def _train(self, signed: SignedPlan) -> None:
        plan = signed.plan
        bundle, adapter = await self._fetch(signed)
        work, self._carried = self._home.fresh_work(), self._tier(plan)
        job = TrainingJob(
            plan=str(self._home.plan_path(plan.round)),
            round=plan.round,
            plan_key=self._trust.plan_key,
            bundle=str(bundle),
            adapter=str(adapter),
            data=self._options.settings.data,
            evaluation=self._options.settings.evaluation,
            out=str(work),
            grant=self._vault.grant(*JOB_PURPOSES),
            skip_bad=self._options.skip_bad,
            threads=self._options.threads,
            memory_budget_mb=self._options.memory_budget_mb,
            packed_weights=self._options.packed_weights,
            micro_tokens=self._options.micro_tokens,
            remember_mb=self._options.remember_mb,
            remembered=str(self._home.remembered),
            tier=self._carried,
            residual=str(self._home.residual),
            checkpoint=str(self._home.checkpoint),
            checkpoint_s=self._options.checkpoint_s,
            personal=str(self._home.personal),
            importance=str(self._home.importance),
            rounding_seed=int.from_bytes(self._tools.host.entropy(8), "big"),
        )
        try:
            result = await self._tools.trainer.train(job, lambda event: self._relay(plan.round, event))
            self._journal(signed, result, work)
        finally:
            self._home.clear_work()

    def _tier(self, plan: Plan) -> int:
        """The tier of a plan that this device takes, by what is known of it and what its user wants."""
        now, allowed = self._self_report.now, self._options.memory_budget_mb
        memory = now.available_mb if allowed is None else min(now.available_mb, allowed)
        return choose_tier(plan.tiers or (), memory_mib=memory, step_s=now.step_s or None, wanted=self._options.tier)

    def _journal(self, signed: SignedPlan, result: Done, work: Path) -> None:
        """Seal the frame that lies in ``work`` and make it durable, or stay out of the round."""
        plan = signed.plan
        if result.weight < plan.min_examples:
            detail = f"this device has {result.weight} examples: expected at least {plan.min_examples}"
            self._skip(plan.round, "few-examples", detail)
            return
        self._tools.report(_trained(plan.round, result))
        try:
            data = self._vault.read(work / FRAME_NAME, "frame", round_=plan.round)
        except FileNotFoundError as error:
            raise TrainingError("training: the child ended well, but left no update") from error
        except AtRestError as error:
            raise TrainingError(f"training: the child ended well, but its update cannot be opened: {error}") from error
        context = EnvelopeContext.of(signed, self._identity.device)
        try:
            sealed = seal(data, round_key=plan.round_key, context=context)
        except PlanFormatError as error:  # training again would not mend the plan's key
            self._skip(plan.round, problem_for(error).name, str(error))
            return
        pending = pending_for(plan.task, plan.round, signed.digest, sealed=sealed, weight=result.weight)
        self._outbox.add(pending, sealed, carried=work)

    async def _upload(self, pending: Pending) -> None:
        try:
            receipt = await self._client.upload(pending, self._outbox.sealed(pending))
        except UpdateDigestError as error:  # the file was checked just now, so the link changed the bytes
            raise TransportError(str(error)) from error
        except (RoundError, UpdateError, RequestFormatError, RequestTooLargeError, NotFoundError) as error:
            self._skip(pending.round, problem_for(error).name, str(error))
        except CorruptFileError as error:
            # Training again would send other bytes for a round the server may have counted already.
            self._skip(pending.round, "damaged", str(error))
        else:
            self._outbox.keep_carried(pending.round, self._home.folder)  # first: see the outbox
            state = done(self._state, pending.round, counted_at=self._tools.host.clock())
            self._end_round(state, pending.round)
            self._tools.report(events.Uploaded(pending.round, pending.bytes, receipt.weight))
            await self._self_report.tell()

    async def _publish(self, signed: SignedPlan) -> None:
        plan = signed.plan
        bundle, adapter = await self._fetch(signed)
        folder = self._home.published_folder
        staging = folder.with_name(folder.name + ".partial")
        request = Request("publish", str(bundle), plan.bundle, str(adapter), plan.ranks, str(staging))
        own = {
            "personal": str(self._home.personal),
            "parts": plan.personal_parts,
            "grant": self._vault.grant("personal"),
        }
        reply = await demand(self._tools.inspector, msgspec.structs.replace(request, **own))
        for text in reply.notices:
            self._tools.report(events.Noticed(text))
        write_record(staging / "published.json", Published(plan.task, plan.round, plan.bundle, plan.adapter))
        shutil.rmtree(folder, ignore_errors=True)
        staging.replace(folder)
        sync_folder(folder.parent)
        self._home.remembered.unlink(missing_ok=True)
        self._save(msgspec.structs.replace(self._state, finished=True, published=plan.adapter))

    def _report_finished(self) -> None:
        state, folder = self._state, self._home.published_folder
        self._tools.report(
            events.Finished(state.seen_round, state.published, str(folder), state.bytes_up, state.bytes_down)
        )

    def _skip(self, round_: int, reason: str, detail: str) -> None:
        self._end_round(done(self._state, round_), round_)
        self._tools.report(events.Skipped(round_, reason, detail))

    def _end_round(self, state: DeviceState, round_: int) -> None:
        # This order: after a crash in between, the journal entry is known to be done with and dropped.
        self._save(state)
        self._outbox.remove(round_)
        self._home.checkpoint.unlink(missing_ok=True)
        self._signed = None
        self._rounds += 1

    def _save(self, state: DeviceState) -> None:
        traffic = self._client.traffic
        state = msgspec.structs.replace(state, bytes_up=traffic.up, bytes_down=traffic.down)
        if state != self._state:
            self._home.save_state(state)
        self._state = state

    def _relay(self, round_: int, event: Event) -> None:
        """Pass a training event on with its round."""
        if isinstance(event, Notice):
            self._tools.report(events.Noticed(event.text))
        elif isinstance(event, Evaluated):
            self._tools.report(events.EvaluatedRound(round_, event.examples, event.correct, event.loss))
        elif isinstance(event, MeasuredPart):
            self._tools.report(events.MeasuredPart(round_, event.examples, event.of))
        elif isinstance(event, Resumed):
            self._self_report.interrupted()
            self._tools.report(events.TrainingResumed(round_, event.step, event.steps))
        elif isinstance(event, Stepped):
            if self._carried == 0:
                self._self_report.stepped(event.step)
            self._tools.report(events.StepDone(round_, event.step, event.steps, event.loss))
        elif isinstance(event, Stilled):
            self._tools.report(events.ModulesStilled(round_, event.step, event.modules))


def _planned(signed: SignedPlan) -> events.Planned:
    plan = signed.plan
    return events.Planned(
        round=plan.round,
        rounds=plan.rounds,
        state=plan.state,
        digest=signed.digest,
        factors_alive=sum(len(module.alive) for module in plan.modules),
        factors=2 * len(plan.modules),
        head_alive=plan.head_alive,
        adapter_bytes=plan.adapter_bytes,
        personal=plan.personal_parts,
    )


def _trained(round_: int, result: Done) -> events.TrainedRound:
    m = result.metrics
    return events.TrainedRound(
        round=round_,
        weight=result.weight,
        steps=m.steps,
        loss_start=m.loss_start,
        loss_end=m.loss_end,
        seconds=m.seconds,
        peak_private_mb=m.peak_private_mb,
        peak_total_mb=m.peak_total_mb,
        spared=result.spared,
        tier=m.tier,
        skipped=result.skipped,
        examples=result.examples[0],
        of_examples=result.examples[1],
    )
