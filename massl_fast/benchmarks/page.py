"""Records as one HTML page that needs nothing but itself; of a case that was measured several times, the latest."""

from __future__ import annotations

from collections.abc import Sequence

from massl_fast.benchmarks.chapters import Row, chapters
from massl_fast.records import latest
from massl_fast.report.html import render


def page_of(rows: Sequence[Row]) -> str:
    """The page of some records as HTML."""
    rows = latest(rows)
    dates = sorted(row["date"][:10] for row in rows)
    commits = dict.fromkeys(row["git"]["commit"][:10] + (" with changes" if row["git"]["dirty"] else "") for row in rows)
    load = max(row["hardware"].get("load_1_minute", 0) for row in rows)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return render(
        "benchmarks.html",
        title=device_of(rows),
        subject=" benchmarks",
        words=f"{when} · commit {', '.join(commits)} · load up to {load:g} on {rows[0]['hardware']['cores']} cores",
        chapters=chapters(rows),
        machine=circumstances(rows),
        commands=list(dict.fromkeys(row["command"] for row in rows)),
    )


def device_of(rows: Sequence[Row]) -> str:
    """The GPU, or the processor."""
    return ", ".join(dict.fromkeys(row["hardware"].get("gpu") or row["hardware"]["processor"] for row in rows))


def circumstances(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Hardware and versions, each value that occurs."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for key, value in (row["hardware"] | row["versions"]).items():
            if key != "load_1_minute":
                found.setdefault(key, {})[str(value)] = None
    return [(key, ", ".join(values)) for key, values in found.items()]
