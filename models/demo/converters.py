"""One converter per kind of file: bytes of a file from a Debian package to (title, text) documents."""

from __future__ import annotations

import ast
import gzip
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

from .html_text import html_to_text
from .sources import Kind

Document = tuple[str, str]
_POS = {"n": "noun", "v": "verb", "adj": "adjective", "adv": "adverb"}


def convert(path: Path, kind: Kind, *, mandoc: Path | None = None) -> Iterator[Document]:
    """Yields (title, text) for every document in the file at ``path``; text is not yet cleaned.

    mandoc: the mandoc program, needed for kind "man".
    """
    if kind == "wordnet":
        yield from wordnet(path)
        return
    if kind == "foldoc":
        yield from foldoc(path)
        return
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    if kind == "html":
        yield name, html_to_text(data)
    elif kind == "mallard":
        yield name, html_to_text(_mallard_to_html(data.decode("utf-8", "replace")).encode())
    elif kind == "man":
        yield name, man(data, mandoc)
    elif kind == "pod":
        yield name, pod(data.decode("utf-8", "replace"))
    elif kind == "text":
        yield name, unwrap(data.decode("utf-8", "replace"))
    elif kind == "py":
        text = data.decode("utf-8", "replace").expandtabs(4).rstrip()
        yield name, re.sub(r"\A(#[^\n]*\n|\n)+", "", text) + "\n"
    elif kind == "docstrings":
        yield name, docstrings(data.decode("utf-8", "replace"), _module_name(path))


def unwrap(text: str) -> str:
    """Joins hard-wrapped paragraphs into one line each; indented and list-like blocks stay as they are."""
    text = text.expandtabs(8).replace("\r\n", "\n")
    out = []
    for block in re.split(r"\n[ ]*\n", text):
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        plain = all(re.match(r"\S", line) and not re.match(r"[-*|+=~#>]", line) for line in lines)
        if plain and len(lines) > 1 and max(len(line) for line in lines) > 50 and not re.search(r"\S {3,}\S", block):
            out.append(" ".join(lines))
        else:
            out.append("\n".join(lines))
    return "\n\n".join(out)


def pod(text: str) -> str:
    """Perl's documentation format: headings, items, verbatim blocks, and X<...> formatting codes removed."""
    out = []
    for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").expandtabs(8)):
        block = block.strip("\n")
        if not block or re.match(r"=(cut|over|back|pod|for|begin|end|encoding)", block):
            continue
        if block[0] in " \t":
            out.append(textwrap.indent(textwrap.dedent(block), "    "))
            continue
        heading = re.match(r"=head(\d)\s+(.*)", block, re.S)
        item = re.match(r"=item\s*(.*)", block, re.S)
        body = _strip_pod_codes(" ".join((heading.group(2) if heading else item.group(1) if item else block).split()))
        if heading:
            body = (
                "#" * int(heading.group(1)) + " " + body.capitalize()
                if body.isupper()
                else ("#" * int(heading.group(1)) + " " + body)
            )
        if body.strip(" *#"):
            out.append(body.removeprefix("* "))
    return "\n\n".join(out)


def _strip_pod_codes(text: str) -> str:
    text = re.sub(r"[XZ]<[^<>]*>", "", text)
    text = re.sub(r"E<(\w+)>", lambda m: {"lt": "<", "gt": ">", "sol": "/", "verbar": "|"}.get(m.group(1), ""), text)
    for _ in range(3):
        text = re.sub(r"[BCFISL]<<+ (.*?) >>+", r"\1", text)
        text = re.sub(r"L<([^<>|]*)\|[^<>]*>", r"\1", text)
        text = re.sub(r"[BCFISL]<([^<>]*)>", r"\1", text)
    return text


def man(data: bytes, mandoc: Path | None) -> str:
    """A manual page through mandoc's HTML output; "" for pages that only include another one."""
    if len(data) < 200 or data.startswith(b".so"):
        return ""
    if mandoc is None:
        raise ValueError("kind 'man' needs the mandoc program: pass its path (Debian package mandoc)")
    done = subprocess.run([mandoc, "-T", "html", "-O", "fragment"], input=data, capture_output=True, check=False)
    text = html_to_text(b"<html><body>" + done.stdout + b"</body></html>")
    return re.sub(r"^# ([A-Z ]+)$", lambda m: "# " + m.group(1).capitalize(), text, flags=re.M)


def _mallard_to_html(text: str) -> str:
    text = re.sub(r"(?s)<info>.*?</info>|<\?.*?\?>|<!--.*?-->", "", text)
    text = re.sub(r"<(/?)title\b", r"<\1h2", text)
    text = re.sub(r"<(/?)item\b", r"<\1li", text)
    text = re.sub(r"<(/?)(screen|listing)\b", r"<\1pre", text)
    text = re.sub(r"(?s)<links?\b[^>]*/>|<media\b.*?(/>|</media>)", "", text)
    return "<html><body>" + re.sub(r"<(/?)page\b[^>]*>", r"<\1div>", text) + "</body></html>"


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    start = parts.index("dist-packages") + 1 if "dist-packages" in parts else len(parts) - 1
    return ".".join(part for part in parts[start:] if part != "__init__")


def docstrings(source: str, module: str) -> str:
    """The docstrings of a Python module's public functions and classes as a page of documentation."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    out = []
    head = ast.get_docstring(tree)
    if head:
        out.append(f"# {module}\n\n{unwrap(head)}")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 60:
                arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
                keyword = "class " if isinstance(node, ast.ClassDef) else ""
                out.append(f"{keyword}{module}.{node.name}{arguments}\n\n{unwrap(doc)}")
    return "\n\n".join(out)


def _dictd_entries(index: Path) -> Iterator[tuple[str, str]]:
    """Headword and entry of a dictd dictionary (RFC 2229 server files: base-64 offsets and a gzip body)."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    value = {digit: number for number, digit in enumerate(digits)}
    body = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())

    def number(text: str) -> int:
        total = 0
        for digit in text:
            total = total * 64 + value[digit]
        return total

    seen: set[int] = set()
    for line in index.read_text(encoding="utf-8", errors="replace").split("\n"):
        fields = line.split("\t")
        if len(fields) < 3 or fields[0].startswith("00"):
            continue
        start = number(fields[1])
        if start not in seen:
            seen.add(start)
            yield fields[0], body[start : start + number(fields[2])].decode("utf-8", "replace")


def wordnet(index: Path) -> Iterator[Document]:
    """WordNet's entries as ``word (noun): sense; sense`` lines, at most three senses for each part of speech."""
    for _, entry in _dictd_entries(index):
        head, _, rest = entry.partition("\n")
        flat = re.sub(r"\[(syn|ant):[^\]]*\]", "", " ".join(rest.split()))
        pieces = re.split(r"(?:^|\s)(?:(n|v|adj|adv) )?(\d+): ", flat)
        if len(pieces) < 4:
            pieces = re.split(r"(?:^|\s)(n|v|adj|adv)( ?): ", flat)
        senses: dict[str, list[str]] = {}
        part = "noun"
        for i in range(1, len(pieces) - 2, 3):
            part = _POS.get(pieces[i] or "", part)
            senses.setdefault(part, []).append(pieces[i + 2].strip().rstrip(";"))
        lines = [f"{head} ({part}): " + "; ".join(texts[:3]) + "." for part, texts in senses.items()]
        if lines:
            yield head, "\n".join(lines)


def foldoc(index: Path) -> Iterator[Document]:
    """Entries of the Free On-line Dictionary of Computing, without references and dates."""
    for _, entry in _dictd_entries(index):
        head, _, rest = entry.partition("\n")
        paragraphs = []
        for block in re.split(r"\n[ ]*\n", rest):
            flat = " ".join(block.split())
            flat = re.sub(r"\{([^{}]*)\}", r"\1", re.sub(r"^((\d+\. )?)<[^<>]*> ", r"\1", flat))
            if flat and not re.match(r"(\(\d{4}-|\(?https?:|\(?ftp:|\[|E-mail|Usenet|Home)", flat):
                paragraphs.append(flat)
        if paragraphs and len(" ".join(paragraphs)) > 60 and head:
            yield head, f"# {head.strip()}\n\n" + "\n\n".join(paragraphs)
