"""``massl-fast bench compare A B``: what differs between two records beyond the noise. Exit code 1: something got worse."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from statistics import median

from massl_fast import records
from massl_fast.benchmarks.compare import BETTER, FEW, NOISY, SAME, WORSE, circumstances, compare
from massl_fast.benchmarks.intervals import FEWEST_OF_BOTH
from massl_fast.commands.arguments import prints_json, sentences_aside

ORDER = (WORSE, BETTER, NOISY, FEW, SAME)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="A", help="file of records, or a folder of them")
    parser.add_argument("after", metavar="B", help="the same cases, measured later")
    parser.add_argument("--threshold", type=float, default=5.0, help="smallest change that counts, in percent (default: 5)")
    parser.add_argument("--figures", nargs="+", default=[], help="words of the names of figures to judge (default: all)")
    parser.add_argument("--all", action="store_true", help="list what did not change, too")
    prints_json(parser, "every judged figure")


def run(args: argparse.Namespace) -> int:
    if not args.threshold > 0:
        raise ValueError(f"--threshold is {args.threshold:g}; it takes more than 0 percent.")
    before, after = records.read(args.before), records.read(args.after)
    with sentences_aside(args):
        print("\n".join(circumstances(before, after)))
        differences, only_before, only_after = compare(before, after, args.threshold)
        if not differences:
            raise ValueError(f"{args.before} and {args.after} have no figure of a case in common that has a better side.")
        if args.figures:
            names = sorted({d.figure for d in differences})
            differences = [d for d in differences if any(word in d.figure for word in args.figures)]
            if not differences:
                raise ValueError(f"No figure is named by --figures {' '.join(args.figures)}; there are {', '.join(names)}.")
        for name, cases in ((args.before, only_before), (args.after, only_after)):
            if cases:
                print(f"Only in {name}: {'; '.join(cases[:5])}{f' and {len(cases) - 5} more' if len(cases) > 5 else ''}.")
        for d in sorted(differences, key=lambda d: (ORDER.index(d.verdict), -abs(d.percent))):
            if args.all or d.verdict in (WORSE, BETTER):
                print(f"{d.verdict:<15} {d.percent:+7.1f} %  {d.before:.5g} → {d.after:.5g} {d.unit}  {d.figure} of {d.case}")
        counts = Counter(d.verdict for d in differences)
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (WORSE, BETTER, SAME, NOISY, FEW) if counts[verdict])
        print(f"{len(differences)} figures compared: {told}.")
        if noisy := [d.resolution_percent for d in differences if d.verdict == NOISY]:
            print(
                f"Too noisy means that changes below {median(noisy):.0f} % (their median) would not have been seen. Measure longer, on a "
                f"quieter machine, or both sides several times in turn: records of equal cases are put together."
            )
        if counts[FEW]:
            print(f"An interval needs at least {FEWEST_OF_BOTH} samples on both sides.")
    if args.json:
        print(json.dumps([asdict(d) for d in differences]))
    return 1 if counts[WORSE] else 0
