"""Pages of HTML in one file: style, tables, sections. Imports no torch."""

from __future__ import annotations

import html
from collections.abc import Sequence

_STYLE = (
    "body{font-family:system-ui,sans-serif;max-width:960px;margin:24px auto;padding:0 16px;color:#222}"
    "table{border-collapse:collapse;font-size:13px;margin:8px 0 20px 0}td,th{padding:3px 10px;border-bottom:1px solid #ddd}"
    "td:not(:first-child),th:not(:first-child){text-align:right}h2{margin-top:34px;font-size:18px}"
    ".pair{display:flex;flex-wrap:wrap;gap:12px}.note{color:#666;font-size:12px}"
)


def page(title: str, heading: str, sections: Sequence[tuple[str, str]]) -> str:
    """A page of (title, HTML) sections, the empty ones left out; it needs no library and no network."""
    body = "".join(f"<h2>{html.escape(name)}</h2>{content}" for name, content in sections if content)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(heading)}</h1>{body}</body></html>\n"
    )


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, which are escaped."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"
