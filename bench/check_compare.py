"""Does ``massl-fast bench compare`` find a kernel that became 10% slower, and nothing where nothing changed?

``python bench/check_compare.py``. Twenty times each: the read-out of a memory is timed beside itself with 10% more entries in its
blocks, and beside itself as it is, calls in turn; both sides are made records and compared by the command's own criterion. Exit
code 1: fewer than 19 of 20 found, or an alarm where there was nothing. On a GPU times are those of the device's events, on a CPU
processor seconds, which other work hardly changes.
"""

from __future__ import annotations

import argparse
import sys

import torch

from massl_fast import records
from massl_fast.benchmarks.beside import Call, time_variants
from massl_fast.benchmarks.compare import SAME, WORSE, compare
from massl_fast.kernels import memory_readout

TRIES, SAMPLES, SLOWER = 20, 30, 1.1
BLOCKS, BLOCK, ROWS, WIDTH = 4, 4000, 112, 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=TRIES)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    plain, planted = call_of(BLOCK, device), call_of(round(SLOWER * BLOCK), device)
    verdicts: dict[str, list[str]] = {"planted": [], "nothing": []}
    for name, other in (("planted", planted), ("nothing", plain)) * args.tries:
        sides = []
        for times in time_variants({"a": plain, "b": other}, [None], SAMPLES, device).values():
            samples = [wall if device.type == "cuda" else processor for wall, processor in times]
            sides.append(records.record("kernels", {"operation": "readout"}, {"time": records.figure(samples, "s", "lower")}))
        (difference,), _, _ = compare(sides[:1], sides[1:])
        verdicts[name].append(difference.verdict)
        print(f"{name:<8} {difference.percent:+6.1f} %  {difference.verdict}", flush=True)
    found, quiet = verdicts["planted"].count(WORSE), verdicts["nothing"].count(SAME)
    alarms = sum(verdict in ("worse", "better") for verdict in verdicts["nothing"])
    print(f"A kernel {100 * (SLOWER - 1):.0f} % slower: found in {found} of {args.tries} tries.")
    print(f"The same kernel: {alarms} alarms in {args.tries} tries, called the same in {quiet}.")
    return int(found < 0.95 * args.tries or alarms > 0)


def call_of(block: int, device: torch.device) -> Call:
    """A call of the read-out over blocks of ``block`` entries."""
    generator = torch.Generator(device).manual_seed(0)
    unit = torch.nn.functional.normalize
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = unit(torch.randn(ROWS, WIDTH, device=device, generator=generator), dim=-1).to(dtype)
    memory = unit(torch.randn(BLOCKS * block, WIDTH, device=device, generator=generator), dim=-1).to(dtype)
    partition = torch.arange(len(memory), device=device, dtype=torch.int32)
    return lambda _: memory_readout(rows, memory, block_size=block, temperature=0.1, partition=partition)


if __name__ == "__main__":
    sys.exit(main())
