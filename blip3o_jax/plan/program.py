"""Memory, kernels and communication of a compiled program, from the compiler's report and its optimised HLO text.

Kernels are counted as the machine launches them: fusions, library calls, copies and collectives. A loop with a known
trip count counts that often. A loop whose count is known at run time only, such as that over image tokens, counts once
and is listed with the kernels of one iteration.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
NO_KERNEL = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier")
CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|branch_computations|called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
HEAD = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    shape: str  # as the text writes it
    opcode: str
    rest: str  # operands and attributes

    @property
    def bytes(self) -> int:
        """Of its result, without padding."""
        return shape_bytes(self.shape)

    def called(self) -> list[str]:
        """Computations that it runs."""
        return [name.strip().lstrip("%") for match in CALLED.findall(self.rest) for name in match.split(",")]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one kind along some axes of the mesh, over a whole run of the program."""

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int  # of the whole arrays on one device: reduced or scattered from, else received


Say = Callable[[str], None]
"""Called with a line for the user."""


def silent(line: str) -> None:
    """Says nothing."""


class DoesNotFit(Exception):
    """The compiler's answer to a program that needs more than the memory of a device.

    `needed_bytes` are those of one device, arguments and results included, though the TPU's compiler calls all of it
    temporaries; 0 if it does not say.
    """

    program = "update"  # the refused program: "update", or a stage of sampling
    working_bytes = 0  # of one device, beside the parameters of training, where a stage of sampling does not fit

    def __init__(self, message: str):
        super().__init__(" ".join(message.split())[:200])
        size = re.search(r"\(([\d.]+)([KMGT])\) exceeds", message)
        self.needed_bytes = int(float(size[1]) * 1024 ** " KMGT".index(size[2])) if size else 0


@dataclasses.dataclass(frozen=True)
class Program:
    """Needs of one compiled program. Bytes are those of one device."""

    peak_bytes: int  # the most that is held at a time, arguments included
    argument_bytes: int
    temporary_bytes: int  # of all temporaries, those included that are never held at the same time
    code_bytes: int
    kernels: int  # launched, loops of an unknown count taken once
    loops: dict[str, int]  # loop of an unknown count -> kernels of one iteration
    collectives: tuple[Collective, ...]
    largest: tuple[tuple[int, str, str], ...]  # bytes, shape, and where in the source the array comes from

    @property
    def working_bytes(self) -> int:
        """What it takes at its peak beside its arguments."""
        return self.peak_bytes - self.argument_bytes


def compile_lowered(
    name: str,
    lowered: jax.stages.Lowered,
    say: Say = silent,
    options: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compiles a program.

    Args:
      say: called with a line that names the program, since a large one takes many minutes.

    Raises:
      DoesNotFit: it needs more memory than a device has.
    """
    say(f"compiling {name}")
    try:
        return lowered.compile(dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error)) from error


def read(compiled: Any, mesh: Any = None, largest: int = 5) -> Program:
    """The needs of a `jax.stages.Compiled`, with collectives along the axes of the mesh that it is laid out on."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    computations = dict(parse(text))
    entry = re.search(r"^ENTRY %([\w.\-]+)", text, re.MULTILINE)[1]
    counter = _Counter(computations, {} if mesh is None else dict(mesh.shape))
    kernels = counter.run(entry, 1)
    peak = memory.peak_memory_in_bytes
    if mesh is None or mesh.devices.flat[0].platform == "cpu":  # where the reported peak leaves temporaries out
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = held + memory.temp_size_in_bytes
    return Program(
        peak_bytes=peak,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        kernels=kernels,
        loops=counter.loops,
        collectives=counter.collectives(),
        largest=tuple(_largest(computations, _frames(text), largest)),
    )


def parse(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Computations of HLO text: name, instructions."""
    name, found = "", []
    for line in text.splitlines():
        if head := HEAD.match(line):
            name, found = head[1], []
        elif line == "}":
            yield name, found
        elif match := INSTRUCTION.match(line):
            shape, _, rest = _shape_and_rest(match[2])
            opcode, _, rest = rest.partition("(")
            found.append(Instruction(match[1], shape, opcode, rest))


def array_bytes(kind: str, sizes: str) -> int:
    """Bytes of an array such as `bf16[8,4096]`, given as `bf16` and `8,4096`."""
    width = BYTES.get(kind) or int("".join(filter(str.isdigit, kind[:3])) or 0) / 8
    return int(width * math.prod(int(size) for size in sizes.split(",") if size))


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays of a shape."""
    return sum(array_bytes(kind, sizes) for kind, sizes in ARRAY.findall(shape))


def elements(shape: str) -> list[str]:
    """The elements of a tuple's shape, tuples or arrays."""
    found, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return found


def first_group(rest: str) -> list[int]:
    """Devices of the first replica group, by their place in the mesh; HLO writes groups in three ways."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return [int(index) for index in match[1].split(",")]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        groups, tile, order = ([int(x) for x in part.split(",")] if part else None for part in match.groups())
        places = np.arange(math.prod(tile)).reshape(tile)
        return (places if order is None else places.transpose(order)).reshape(groups)[0].tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        used = re.findall(r"'(\w+)'", match[2])
        places = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        return places[tuple(slice(None) if name in used else 0 for name in axes)].ravel().tolist()
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return [int(match[1]), int(match[2])]
    return []


def axes_of(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of the mesh along which the devices of a group differ."""
    if not group or math.prod(mesh.values()) <= max(group):
        return ()
    places = np.stack(np.unravel_index(group, tuple(mesh.values())))
    return tuple(name for name, place in zip(mesh, places) if len(set(place.tolist())) > 1)


class _Counter:
    """Walks the computations that are launched one after the other."""

    def __init__(self, computations: dict[str, list[Instruction]], mesh: dict[str, int]):
        self._computations, self._mesh = computations, mesh
        self._channels: dict[tuple, tuple[str, tuple[str, ...], int, int]] = {}
        self.loops: dict[str, int] = {}

    def run(self, name: str, times: int, path: tuple[str, ...] = ()) -> int:
        """Kernels of one run of a computation that runs so many times, called by the instructions of `path`."""
        total = 0
        for each in self._computations.get(name, ()):
            self._note(each, times, path)
            if each.opcode == "while":
                total += self._loop(each, times, path)
            elif each.opcode in ("call", "conditional", "async-start"):
                total += max((self.run(called, times, (*path, each.name)) for called in each.called()), default=0)
            elif each.opcode not in NO_KERNEL and not each.opcode.endswith("-done"):
                self._look_into(each, times, path)
                total += 1
        return total

    def collectives(self) -> tuple[Collective, ...]:
        sums: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for kind, axes, count, size in self._channels.values():
            entry = sums.setdefault((kind, axes), [0, 0])
            entry[0] += count
            entry[1] += count * size
        return tuple(Collective(*key, *entry) for key, entry in sorted(sums.items()))

    def _loop(self, loop: Instruction, times: int, path: tuple[str, ...]) -> int:
        count = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest)
        trips = int(count[1]) if count else 1
        inside = sum(self.run(called, times * trips, (*path, loop.name)) for called in loop.called())
        if not count:
            origin = re.search(r'op_name="([^"]*)"', loop.rest)
            self.loops[origin[1] if origin else loop.name] = inside
        return trips * inside

    def _look_into(self, each: Instruction, times: int, path: tuple[str, ...]) -> None:
        """Collectives within a fusion: the TPU's compiler joins them with the products that wait for them."""
        for called in each.called():
            for inner in self._computations.get(called, ()):
                self._note(inner, times, path)
                self._look_into(inner, times, path)

    def _note(self, each: Instruction, times: int, path: tuple[str, ...]) -> None:
        """Notes an instruction if it communicates."""
        kind = each.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return
        channel = re.search(r"channel_id=(\d+)", each.rest)  # which copies of one collective share
        group, size = first_group(each.rest), each.bytes
        if each.opcode.endswith("-start") and kind != "all-reduce":  # a tuple of operands, results, and the context
            size = shape_bytes(elements(each.shape)[1])
        if kind == "reduce-scatter":
            size *= max(len(group), 1)
        axes = axes_of(group, self._mesh)
        self._channels[path, channel[1] if channel else each.name] = (kind, axes, times, size)


def _shape_and_rest(text: str) -> tuple[str, str, str]:
    """The type before an instruction's opcode, which may be a nested tuple."""
    if not text.startswith("("):
        return text.partition(" ")
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: index + 1], " ", text[index + 2 :]
    return text, "", ""


def _frames(text: str) -> dict[str, str]:
    """Stack frame -> file and line of the source, from the tables at the head of the text."""
    names = dict(re.findall(r'^(\d+) "([^"]*\.py)"$', text, re.MULTILINE))
    places = re.findall(r"^(\d+) \{file_name_id=(\d+) .*?line=(\d+) ", text, re.MULTILINE)
    lines = {index: f"{'/'.join(names.get(file, '?').split('/')[-2:])}:{line}" for index, file, line in places}
    frames = re.findall(r"^(\d+) \{file_location_id=(\d+)", text, re.MULTILINE)
    return {index: lines.get(place, "?") for index, place in frames}


def _largest(
    computations: dict[str, list[Instruction]], frames: dict[str, str], count: int
) -> Iterator[tuple[int, str, str]]:
    fused = {
        called for body in computations.values() for each in body if each.opcode == "fusion" for called in each.called()
    }
    seen: dict[tuple[str, str], int] = {}
    for name, body in computations.items():
        for each in () if name in fused else body:
            made = each.opcode in ("fusion", "custom-call") or not each.shape.startswith("(")
            if each.opcode in NO_KERNEL or not made:  # the tuple of a loop holds what others made
                continue
            frame = re.search(r"stack_frame_id=(\d+)", each.rest)
            where = frames.get(frame[1], "?") if frame else "?"
            for kind, sizes in ARRAY.findall(each.shape):
                seen[f"{kind}[{sizes}]", where] = array_bytes(kind, sizes)
    ordered = sorted(seen.items(), key=lambda item: -item[1])
    yield from ((size, shape, where) for (shape, where), size in ordered[:count])
