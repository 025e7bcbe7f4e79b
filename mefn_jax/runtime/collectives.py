"""Traffic between devices in a compiled program, read from its text (HLO).

A collective inside a loop counts once for each iteration; the number of iterations stands in the loop's condition.
"""

import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "f64": 64, "s64": 64, "u64": 64}
CALLS = re.compile(r"(?:calls|to_apply|body|async_wrapped_computation)=%?([\w.-]+)")


def list_collectives(text: str) -> list[dict]:
    """Returns `[{kind, count, bytes}]`, one entry for each kind: executions in one run of the program, and the bytes of
    all results on one device."""
    totals = {}
    seen = set()
    bodies = split_computations(text)
    for name, executions in count_executions(bodies).items():
        for line in bodies[name]:
            kind, size = parse_collective(line)
            # A collective that overlaps with arithmetic occurs in several computations, with the same channel.
            channel = re.search(r"channel_id=(\d+)", line)
            identity = (kind, channel and channel[1], size)
            if kind is None or (kind != "collective-permute" and channel and identity in seen):
                continue
            seen.add(identity)
            count, total = totals.get(kind, (0, 0))
            totals[kind] = count + executions, total + executions * size
    return [{"kind": kind, "count": totals[kind][0], "bytes": totals[kind][1]} for kind in KINDS if kind in totals]


def parse_collective(line: str) -> tuple[str | None, int]:
    """Returns the kind of the collective that a line of HLO starts, and the bytes of its result; (None, 0) for any
    other line."""
    match = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z-]+?)(-start)?\(", line)
    if not match or match[2] not in KINDS:
        return None, 0
    sizes = [array_bytes(*shape) for shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match[1])]
    if match[2] == "collective-permute":
        return match[2], sizes[0]  # an asynchronous one lists operand, result and two counters
    if match[3] and match[2] == "all-gather":  # lists operands, then results
        sizes = sizes[len(sizes) // 2 :]
    return match[2], sum(sizes)


def array_bytes(kind: str, dimensions: str) -> int:
    """Returns the bytes of an array of an HLO type, e.g. "f32" and "8,128" for f32[8,128]."""
    return BITS.get(kind, 32) // 8 * math.prod(int(n) for n in dimensions.split(",") if n)


def split_computations(text: str) -> dict[str, list[str]]:
    """Returns the lines of each computation of a program, by name. The entry computation is named "ENTRY"."""
    bodies, lines = {}, []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if header and not line.startswith(" "):
            lines = bodies["ENTRY" if header[1] else header[2]] = []
        else:
            lines.append(line)
    return bodies


def count_executions(bodies: dict[str, list[str]]) -> dict[str, int]:
    """Returns how often each computation runs in one run of the program."""
    executions = {}

    def visit(name, number):
        executions[name] = executions.get(name, 0) + number
        for line in bodies[name]:
            condition = re.search(r"condition=%?([\w.-]+)", line)
            for callee in CALLS.findall(line):
                if callee in bodies:
                    visit(callee, number * (trip_count(bodies, condition[1], line) if condition else 1))

    visit("ENTRY", 1)
    return executions


def trip_count(bodies, condition: str, line: str) -> int:
    """Returns the number of iterations of a loop: the compiler's own count, else the greatest number that the loop's
    condition compares with."""
    annotation = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if annotation:
        return int(annotation[1])
    lines = list(bodies[condition])
    for callee in (name for line in bodies[condition] for name in CALLS.findall(line)):
        lines += bodies.get(callee, [])
    bounds = [int(n) for line in lines for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", line)]
    return max(bounds, default=1)
