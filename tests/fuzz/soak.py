"""Many hostile inputs: ``python -m tests.fuzz.soak --count 1000000``; ``make soak`` runs it.

A parser may take a quarter of a gibibyte more address space than there was before and no more, so one that believes a
length before it has checked it fails here with a MemoryError. What fails is printed with the shortest bytes
that do; the run goes on, and ends with 1. Input number n of a parser is the same in every run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from tests.fuzz.http import http_faults
from tests.fuzz.mutations import mutated, shortest
from tests.fuzz.parsers import Parser, fault, make_parsers

HTTP = "http"
_HTTP_EVERY = 20  # one input in so many is a request: they take ten times as long
_SLICE = 1_000
_ROOM_BYTES = 256 << 20  # of address space; the largest input has 64 KiB, the interpreter and its threads need some
_MOST_MIB = 512  # of a process that serves: 140 with all that is imported
_PROGRESS_S = 10.0
_MOST_FAILURES = 5  # then it ends: the rest would be the same again


def parser_faults(parser: Parser, seeds: Sequence[int]) -> list[str]:
    """What is wrong with how a parser takes the inputs of these seeds, each with its shortest bytes."""
    found = []
    for seed in seeds:
        data = mutated(random.Random(f"{parser.name} {seed}"), parser.corpus)
        if fault(parser, data) is not None:
            short = shortest(data, lambda shorter: fault(parser, shorter) is not None)
            found.append(f"{parser.name}, seed {seed}: {fault(parser, short)}\n    {short[:2_000]!r}")
    return found


def _faults_in(folder: Path, name: str, seeds: range) -> list[str]:
    """The same in a process of its own, by the name of the parser."""
    if not _PARSERS:
        _PARSERS.update({parser.name: parser for parser in make_parsers(Path(tempfile.mkdtemp(dir=folder)))})
        for parser in _PARSERS.values():  # everything is loaded before memory is bounded
            parser_faults(parser, range(-50, 0))
    if name == HTTP:
        return _http_faults_in(Path(tempfile.mkdtemp(dir=folder)), seeds)
    with little_room():
        return parser_faults(_PARSERS[name], seeds)


_PARSERS: dict[str, Parser] = {}


@contextmanager
def little_room() -> Iterator[None]:
    """What asks for much more address space than there is in use now gets a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ROOM_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _http_faults_in(folder: Path, seeds: range) -> list[str]:
    """A server starts threads, which take address space and hardly any memory, so what it has is measured instead."""
    found = asyncio.run(http_faults(folder, seeds))
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [*found, f"{HTTP}: {peak_mib:.0f} MiB at the most"] if peak_mib > _MOST_MIB else found


def slices_of(count: int, first: int, names: Sequence[str]) -> list[tuple[str, range]]:
    """So many inputs in all, evenly over the parsers, in pieces; the HTTP ones last."""
    requests = count // _HTTP_EVERY
    each = -(-(count - requests) // len(names))
    shares = [*((name, each) for name in names), (HTTP, requests)]
    return [
        (name, range(start, min(start + _SLICE, first + share)))
        for name, share in shares
        for start in range(first, first + share, _SLICE)
    ]


def soak(count: int, first: int, jobs: int) -> int:
    """Try so many inputs in so many processes; the number of faults found."""
    broken, done, began = 0, 0, time.monotonic()
    told = began
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        pieces = slices_of(count, first, [parser.name for parser in make_parsers(Path(folder))])
        total = sum(len(seeds) for _, seeds in pieces)
        answers = pool.map(_faults_in, [Path(folder)] * len(pieces), *zip(*pieces, strict=True))
        for (_, seeds), found in zip(pieces, answers, strict=True):
            broken, done, now = broken + len(found), done + len(seeds), time.monotonic()
            for text in found[:_MOST_FAILURES]:
                _tell(text)
            if now - told > _PROGRESS_S or done == total or broken >= _MOST_FAILURES:
                told, rate = now, done / (now - began)
                _tell(f"{done:,} inputs, {broken} faults, {rate:,.0f}/s, {(total - done) / rate / 60:.0f} min left")
            if broken >= _MOST_FAILURES:
                pool.shutdown(cancel_futures=True)
                break
    return broken


def _tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.soak", description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="how many inputs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first of each parser; the next ones follow")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    given = parser.parse_args()
    return 1 if soak(given.count, given.seed, given.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
