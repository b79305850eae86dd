"""HTML to readable plain text, for the corpus of the demo model (developers only; needs lxml).

Headings become ``# ...`` lines, paragraphs one line each, list items ``- ...`` lines, definition terms a line of their
own, table rows ``a | b`` lines, and ``<pre>`` blocks are indented by four spaces::

    <h2>Usage</h2><p>Call <code>f</code>:</p><pre>f(1)</pre>    ->    ## Usage

                                                                      Call f:

                                                                          f(1)
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

MAX_PRE_LINES = 60
"""Code blocks are cut here: longer ones are listings, not documentation."""

_DROP_TAGS_NAMES = (
    "script style nav header footer aside form svg math img iframe noscript object button select link meta"
)
_DROP_TAGS = frozenset(_DROP_TAGS_NAMES.split())
_DROP_CLASSES_NAMES = (
    "headerlink viewcode-link sphinxsidebar related footer navheader navfooter breadcrumb breadcrumbs toc "
    "contents linenos indextable genindextable toctree-wrapper bottomnav topnav navigation prompt-toggle "
    "reference-section sidebar version-list search wy-nav-side wy-breadcrumbs edit-link pilcrow lang-switch "
    "langswitch local-toc localtoc sectnum-hidden toc-list sphx-glr-thumbnails sphx-glr-footer sphx-glr-download "
    "nav-wrapper reftitle prev next up page-nav page_nav deprecated-badge head-vol foot-date head foot "
    "table-of-contents docnav"
)
_DROP_CLASSES = frozenset(_DROP_CLASSES_NAMES.split())
_DROP_IDS_NAMES = "toc sidebar navigation footer header preamble page-header path quickview comments_section"
_DROP_IDS = frozenset(_DROP_IDS_NAMES.split())
_BLOCKS_NAMES = (
    "p div section article main body ul ol dl table tbody thead tfoot blockquote center fieldset figure "
    "figcaption details summary address hr caption dd"
)
_BLOCKS = frozenset(_BLOCKS_NAMES.split())
_SPACE = re.compile(r"[ \t\r\n\f\v\u00a0]+")
_MAIN_QUERIES = (
    "//*[@role='main']",
    "//main",
    "//article",
    "//div[@class='body']",
    "//div[@id='content']",
    "//div[@id='page-content']",
    "//div[@class='content']",
)


class _Writer:
    """Collects the blocks of one page while its tree is walked."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.inline: list[str] = []
        self.prefix = ""

    def text(self, text: str | None) -> None:
        if text:
            self.inline.append(text)

    def flush(self) -> None:
        line = _SPACE.sub(" ", "".join(self.inline)).strip()
        self.inline = []
        if line:
            self.blocks.append(self.prefix + line)
            self.prefix = ""

    def walk(self, element: Any) -> None:
        tag = element.tag
        if not isinstance(tag, str) or tag in _DROP_TAGS or _is_dropped(element):
            return
        if tag == "pre":
            self.flush()
            self._code(element)
        elif tag in ("h1", "h2", "h3", "h4", "h5", "h6"):
            self.flush()
            heading = _inline_text(element)
            if heading:
                self.blocks.append("#" * min(int(tag[1]), 4) + " " + heading)
        elif element.get("class") == "classifier":  # numpydoc: name, then type
            self.text(" : ")
            self._children(element)
        elif tag == "br":
            self.text("\n" if not self.inline else " ")
        elif tag == "tr" and not element.xpath(".//p[2]|.//pre|.//table|.//ul|.//dl"):
            self.flush()
            cells = [_inline_text(cell) for cell in element if isinstance(cell.tag, str) and not _is_dropped(cell)]
            row = " | ".join(cell for cell in cells if cell)
            if row:
                self.blocks.append(row)
        elif tag in ("li", "dt", "tr", "td", "th") or tag in _BLOCKS:
            self.flush()
            if tag == "li":
                self.prefix = "- "
            self._children(element)
            self.flush()
            self.prefix = ""
        else:
            self._children(element)

    def _children(self, element: Any) -> None:
        self.text(element.text)
        for child in element:
            self.walk(child)
            self.text(child.tail)

    def _code(self, element: Any) -> None:
        lines = [line.rstrip() for line in textwrap.dedent(_visible_text(element).expandtabs(4)).split("\n")]
        while lines and not lines[0]:
            lines.pop(0)
        while lines and not lines[-1]:
            lines.pop()
        if lines:
            self.blocks.append("\n".join("    " + line if line else "" for line in lines[:MAX_PRE_LINES]))


def _is_dropped(element: Any) -> bool:
    if element.get("id") in _DROP_IDS:
        return True
    classes = element.get("class")
    return bool(classes) and not _DROP_CLASSES.isdisjoint(classes.split())


def _visible_text(element: Any) -> str:
    if not isinstance(element.tag, str) or element.tag in _DROP_TAGS or _is_dropped(element):
        return ""
    parts = [" : " if element.get("class") == "classifier" else "", element.text or ""]
    for child in element:
        parts.append("\n" if child.tag == "br" else _visible_text(child))
        parts.append(child.tail or "")
    return "".join(parts)


def _inline_text(element: Any) -> str:
    return _SPACE.sub(" ", _visible_text(element)).strip()


def html_to_text(data: bytes) -> str:
    """The readable text of an HTML page, blocks separated by an empty line; "" where the page has no body.

    data: the page's bytes, UTF-8 or with a declared charset.
    """
    import lxml.etree
    import lxml.html

    encoding = "utf-8" if b"charset=iso-8859-1" not in data[:2000].lower() else "iso-8859-1"
    try:
        root = lxml.html.document_fromstring(data, parser=lxml.html.HTMLParser(encoding=encoding, huge_tree=True))
    except lxml.etree.ParserError:  # an empty document
        return ""
    main = root
    for query in _MAIN_QUERIES:
        found = root.xpath(query)
        if len(found) == 1:
            main = found[0]
            break
    else:
        bodies = root.xpath("//body")
        if bodies:
            main = bodies[0]
    writer = _Writer()
    main.attrib.pop("class", None)
    main.attrib.pop("id", None)
    writer.walk(main)
    writer.flush()
    out: list[str] = []
    for block in writer.blocks:  # consecutive list items and table rows stay together
        item = block.startswith("- ") or " | " in block
        if out and item and (out[-1].split("\n")[-1].startswith("- ") or " | " in out[-1].split("\n")[-1]):
            out[-1] += "\n" + block
        else:
            out.append(block)
    return "\n\n".join(out)
