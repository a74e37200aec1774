"""Machine code of NVIDIA GPUs as text, read: instructions, the inner loop, registers that change while tensor cores may still read them.

The text is nvdisasm's, of compute capabilities 8.0 to 9.0. ptxas 12.8 and 12.9 are known to reuse a register before an asynchronous product
has read it (triton#11781, fixed in ptxas 13.3); only a look at each compiled loop shows whether it does.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE = re.compile(r"^\s+/\*(?P<address>[0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*);", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_\w+):", re.MULTILINE)
_PRODUCT = re.compile(r"(?:HGMMA|IGMMA|QGMMA|HMMA|UTCHMMA|UTCMMA)\b")
_REGISTER = re.compile(r"^R(\d+)(?:\.\w+)*$")
_NO_RESULT = ("ST", "RED", "BAR", "BRA", "BRX", "CALL", "RET", "EXIT", "WARPSYNC", "NANOSLEEP", "MEMBAR", "UTMASTG")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    """Opcode with its modifiers: HGMMA.64x128x16.F32.BF16."""
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @property
    def is_product(self) -> bool:
        """Whether tensor cores carry it out."""
        return _PRODUCT.match(self.name) is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns and depth of a product: of a warp group for HGMMA.64x128x16, of a warp for HMMA.16816."""
        found = re.search(r"\.(\d+)x(\d+)x(\d+)", self.name)
        if found:
            rows, columns, depth = map(int, found.groups())
            return rows, columns, depth
        return {"1688": (16, 8, 8), "16816": (16, 8, 16), "1684": (16, 8, 4)}[re.findall(r"\.(\d+)", self.name)[0]]

    @property
    def matrices(self) -> int:
        """8 × 8 matrices of 128 bytes that LDSM loads."""
        return int(self.name[-1]) if self.name[-1] in "24" else 1

    @property
    def bytes_per_thread(self) -> int:
        """Bytes that a load or store moves per thread."""
        return next((int(bits) // 8 for bits in ("128", "64") if f".{bits}" in self.name), 4)

    def written(self) -> range:
        """Registers that it writes; empty for stores, jumps and what has its result elsewhere."""
        operands = list(self.operands)
        while operands and re.match(r"^!?U?P(T|\d+)$", operands[0]):  # predicates come first
            operands.pop(0)
        found = _REGISTER.match(operands[0]) if operands else None
        if found is None or self.opcode.startswith(_NO_RESULT) or "SETP" in self.opcode or self.opcode in ("PLOP3", "R2P"):
            return range(0)
        first = int(found.group(1))
        return range(first, first + self._width())

    def _width(self) -> int:
        """Registers of the result."""
        if self.opcode == "HGMMA":
            rows, columns, _ = self.shape
            return rows * columns // 128 // (1 if ".F32" in self.name else 2)
        if self.opcode == "HMMA":
            return 4 if self.name.split(".")[2] == "F32" else 2
        if self.opcode == "LDSM":
            return self.matrices
        if ".128" in self.name:
            return 4
        return 2 if ".64" in self.name or ".WIDE" in self.name or self.name == "CS2R" or ".F64" in self.name else 1


def instructions(code: str) -> list[Instruction]:
    """All instructions of nvdisasm's output, in order."""
    return [
        Instruction(int(m["address"], 16), m["name"], tuple(part.strip() for part in m["operands"].split(",") if part.strip()))
        for m in _LINE.finditer(code)
    ]


def loops(code: str) -> Iterator[list[Instruction]]:
    """The bodies of loops: what lies between a label and a jump back to it."""
    found = instructions(code)
    starts = {}
    for label in _LABEL.finditer(code):
        following = _LINE.search(code, label.end())
        if following:
            starts[label.group(1)] = int(following["address"], 16)
    for jump in found:
        target = re.search(r"\.L_\w+", " ".join(jump.operands)) if jump.opcode == "BRA" else None
        if target and starts[target.group()] < jump.address:
            yield [one for one in found if starts[target.group()] <= one.address <= jump.address]


def inner_loop(code: str) -> list[Instruction]:
    """The smallest loop with tensor-core products; ValueError where there is none."""
    bodies = [body for body in loops(code) if any(one.is_product for one in body)]
    if not bodies:
        raise ValueError("The machine code has no loop with tensor-core instructions.")
    return min(bodies, key=len)


def overwritten(body: list[Instruction]) -> list[Instruction]:
    """Instructions of a loop that write a register while an asynchronous product may still read or write it.

    A product reads operands from registers, and adds to its accumulator, until a wait has seen its group end. The loop is walked twice, so
    that products of one turn meet the instructions of the next; jumps inside the loop are taken as not taken.
    """
    groups: list[set[int]] = []  # registers in use, of groups that have been committed, oldest first
    current: set[int] = set()
    found = []
    for instruction in body * 2:
        if instruction.opcode == "WARPGROUP" and "DEPBAR" in instruction.name:
            groups = groups[max(0, len(groups) - int(instruction.operands[-1], 16)) :]
        elif instruction.opcode == "HGMMA":
            current |= set(instruction.written())
            operand = _REGISTER.match(instruction.operands[1])
            if operand:
                current |= set(range(int(operand.group(1)), int(operand.group(1)) + 4))  # 64 rows of 32 bytes over 128 threads
            if "gsb0" in instruction.operands:
                groups.append(current)
                current = set()
        elif any(register in used for used in (*groups, current) for register in instruction.written()):
            found.append(instruction)
    return list(dict.fromkeys(found))
