"""Pieces of the HTML pages that runs and benchmarks are shown on: one self-contained file, no script, no network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from massl_fast.report.style import STYLE


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page; empty sections are left out."""
    body = "\n".join(part for part in sections if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{body}</section>"


def grid(figures: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def figure(title: str, svg: str, note: str = "") -> str:
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return (
        f'<figure class="card"><h3>{escape(title)}</h3>{svg}' + (f"<figcaption>{escape(note)}</figcaption>" if note else "") + "</figure>"
    )


def table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = "".join(f"<tr><th>{escape(key).replace('_', '_<wbr>')}</th><td>{shown(value)}</td></tr>" for key, value in rows)
    return f'<table class="pairs">{cells}</table>'


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        rows += flat(value, f"{name} · ") if isinstance(value, dict) and value else [(name, value)]
    return rows


def shown(value: Any) -> str:
    if value is None or value == "" or value == [] or value == {}:
        return '<span class="none">–</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return escape(", ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in value))
    return escape(f"{value:.6g}" if isinstance(value, float) else str(value))
