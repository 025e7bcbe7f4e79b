"""What a compiled program sends between devices, read from its text (HLO).

A collective in a loop counts as often as the loop runs, which the text says in the loop's condition.
"""

import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "f64": 64, "s64": 64, "u64": 64}
CALLS = re.compile(r"(?:calls|to_apply|body|async_wrapped_computation)=%?([\w.-]+)")


def list_collectives(text: str) -> list[dict]:
    """`[{kind, count, bytes}]` by kind: how often a step, and the bytes of all their results on one device."""
    found = {}
    seen = set()
    bodies = split_computations(text)
    for name, times in count_executions(bodies).items():
        for line in bodies[name]:
            kind, size = parse_collective(line)
            # A collective that is overlapped with arithmetic stands in several computations, under one channel.
            channel = re.search(r"channel_id=(\d+)", line)
            place = (kind, channel and channel[1], size)
            if kind is None or (kind != "collective-permute" and channel and place in seen):
                continue
            seen.add(place)
            count, total = found.get(kind, (0, 0))
            found[kind] = count + times, total + times * size
    return [{"kind": kind, "count": found[kind][0], "bytes": found[kind][1]} for kind in KINDS if kind in found]


def parse_collective(line: str) -> tuple[str | None, int]:
    """The kind of collective that a line of HLO begins, and the bytes of its result; None where it is none."""
    match = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z-]+?)(-start)?\(", line)
    if not match or match[2] not in KINDS:
        return None, 0
    sizes = [array_bytes(*shape) for shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match[1])]
    if match[2] == "collective-permute":
        return match[2], sizes[0]  # an asynchronous one has its operand, result and two counters
    if match[3] and match[2] == "all-gather":  # operands, then results
        sizes = sizes[len(sizes) // 2 :]
    return match[2], sum(sizes)


def array_bytes(kind: str, dimensions: str) -> int:
    """Bytes of an array of HLO's type `kind`, e.g. f32[8,128]."""
    return BITS.get(kind, 32) // 8 * math.prod(int(n) for n in dimensions.split(",") if n)


def split_computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a program, by name; the first to run is "ENTRY"."""
    bodies, lines = {}, []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if header and not line.startswith(" "):
            lines = bodies["ENTRY" if header[1] else header[2]] = []
        else:
            lines.append(line)
    return bodies


def count_executions(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in one run of the program."""
    times = {}

    def visit(name, number):
        times[name] = times.get(name, 0) + number
        for line in bodies[name]:
            condition = re.search(r"condition=%?([\w.-]+)", line)
            for called in CALLS.findall(line):
                if called in bodies:
                    visit(called, number * (trip_count(bodies, condition[1], line) if condition else 1))

    visit("ENTRY", 1)
    return times


def trip_count(bodies, condition: str, line: str) -> int:
    """How often a loop runs: what the compiler says, else the greatest number that its condition compares with."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    lines = list(bodies[condition])
    for called in (name for line in bodies[condition] for name in CALLS.findall(line)):
        lines += bodies.get(called, [])
    bounds = [int(n) for line in lines for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", line)]
    return max(bounds, default=1)
