"""Where the demo model's text comes from: Debian packages (section main), the files taken of each, and their licences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["html", "mallard", "pod", "man", "text", "py", "docstrings", "wordnet", "foldoc"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One group of files inside one Debian package."""

    package: str
    """Debian binary package (bookworm, main)."""
    licence: str
    """Licence of the text, as in the package's copyright file."""
    kind: Kind
    """Which converter reads the files."""
    include: str
    """Regular expression searched in the path inside the package."""
    exclude: str = r"$^"
    """Regular expression of paths to leave out."""
    cap_mb: float = 6.0
    """Most text taken, in 10^6 characters; documents are taken in the order of their path's hash."""
    repeat: int = 1
    """How often the documents of the training split appear in the token stream."""


def _html(package: str, licence: str, cap_mb: float = 6.0, include: str = r"\.html$", **more: object) -> Source:
    return Source(package=package, licence=licence, kind="html", include=include, cap_mb=cap_mb, **more)  # type: ignore[arg-type]


def _man(package: str, licence: str, cap_mb: float = 2.0) -> Source:
    return Source(package=package, licence=licence, kind="man", include=r"share/man/man\d/[^/]+\.gz$", cap_mb=cap_mb)


def _py(package: str, licence: str, cap_mb: float, **more: object) -> Source:
    return Source(package=package, licence=licence, kind="py", include=r"\.py$", cap_mb=cap_mb, **more)  # type: ignore[arg-type]


PAGES_TO_SKIP = (
    r"genindex|py-modindex|/search\.html|/_modules/|/_sources/|/_downloads/|changelog|changes\b|whats_?new|"
    r"release[-_]?(notes|history)|/releases?/|relnotes|/NEWS|/tests?/|/test_|_test\.py$|/conftest\.py$|/idle_test/|"
    r"copyright|licen[sc]e|/gfdl|/fdl|bookindex|/sitemap|/history\.html|authors|contributors|/po/|/locale/"
)
"""Paths that hold indexes, change lists, tests or licence texts in every package."""

SOURCES: tuple[Source, ...] = (
    _html("python3.11-doc", "PSF-2.0", 30, repeat=3),
    _py("libpython3.11-stdlib", "PSF-2.0", 7, exclude=r"/lib2to3/|/encodings/|/pydoc_data/|/idlelib/"),
    _py("libpython3.11-minimal", "PSF-2.0", 3, exclude=r"/encodings/|stringprep|sre_constants"),
    _html("debian-policy", "GPL-2+", repeat=3, exclude=r"policy-1\.html|policy\.html$"),
    _html("developers-reference", "GPL-2+", repeat=3),
    _html("debian-handbook", "GPL-2+ or CC-BY-SA-3.0", include=r"/en-US/.*\.html$", repeat=3),
    _html("debian-faq", "GPL-2+", repeat=3),
    _html("debian-reference-en", "GPL-2+", repeat=3),
    _html("maint-guide", "GPL-2+", include=r"/html/[^/]+\.en\.html$|maint-guide[^/]*/[^/]*\.html$", repeat=2),
    _html("harden-doc", "GPL-2+", include=r"/en-US/.*\.html$", repeat=2),
    _html("debian-history", "GPL-2+", include=r"\.en\.html$|/en/.*\.html$", repeat=2),
    _html("debian-kernel-handbook", "GPL-2+", repeat=2),
    _html("installation-guide-amd64", "GPL-2", include=r"/en/.*\.html$", repeat=2),
    Source(
        package="doc-debian",
        licence="GPL-2+",
        kind="text",
        include=r"/debian/[^/]+(\.txt|manifesto)(\.gz)?$",
        exclude=r"\.1\.\d",
        cap_mb=1,
    ),
    Source(
        package="perl-doc",
        licence="Artistic or GPL-1+",
        kind="pod",
        include=r"\.pod$",
        exclude=r"delta\.pod|perlhist|perltoc|perluniprops|perlapi\.pod|perlgpl|perlartistic",
        cap_mb=10,
    ),
    _man("manpages", "GPL-2+, BSD and the man-pages verbatim licence", 4),
    _man("manpages-dev", "GPL-2+, BSD and the man-pages verbatim licence", 6),
    _man("coreutils", "GPL-3+"),
    _man("git-man", "GPL-2", 5),
    _man("findutils", "GPL-3+"),
    _man("grep", "GPL-3+"),
    _man("sed", "GPL-3+"),
    _man("tar", "GPL-3+"),
    _man("util-linux", "GPL-2+"),
    _man("procps", "GPL-2+"),
    _man("systemd", "LGPL-2.1+", 5),
    _man("apt", "GPL-2+"),
    _man("dpkg", "GPL-2+"),
    _man("dpkg-dev", "GPL-2+"),
    _man("openssh-client", "BSD-3-Clause"),
    _man("curl", "curl"),
    _man("rsync", "GPL-3+"),
    _man("iproute2", "GPL-2"),
    _man("cron", "GPL-2+ and Paul Vixie's"),
    _man("e2fsprogs", "GPL-2"),
    _man("nftables", "GPL-2"),
    _man("cryptsetup-bin", "GPL-2+"),
    _man("lvm2", "GPL-2"),
    _man("mount", "GPL-2+"),
    _man("passwd", "BSD-3-Clause"),
    _man("debhelper", "GPL-2+"),
    _man("devscripts", "GPL-2+"),
    _man("nano", "GPL-3+"),
    _man("less", "GPL-3+ or BSD"),
    _man("tmux", "ISC"),
    _man("zsh-common", "Zsh"),
    _html("git-doc", "GPL-2", 8, exclude=r"RelNotes"),
    _html("postgresql-doc-15", "PostgreSQL", 12, exclude=r"/release-|/features-|errcodes"),
    _html(
        "sqlite3-doc",
        "public domain",
        9,
        exclude=r"/c3ref/.*(list|intro)|/syntax/|changes|toc\.html|keyword_index|docs\.html",
    ),
    _html("apache2-doc", "Apache-2.0", 6, include=r"/manual/en/.*\.html$", exclude=r"quickreference|/directives\.html"),
    _html("cmake-doc", "BSD-3-Clause", 5),
    _html("linux-doc-6.1", "GPL-2", 24, exclude=r"/translations/|/dvb/|/v4l/|/hwmon/|kernel-parameters|/media/"),
    _html("libreoffice-help-en-us", "MPL-2.0", 6),
    Source(
        package="gnome-user-docs",
        licence="CC-BY-SA-3.0",
        kind="mallard",
        include=r"/help/C/.*\.page$",
        exclude=r"legal|nav",
    ),
    _html("gimp-help-en", "GFDL-1.2+, no invariant sections", 4),
    _html("octave-doc", "GPL-3+", 4),
    _html("r-doc-html", "GPL-2+", 4),
    _html("zsh-doc", "Zsh", 2),
    _html("postfix-doc", "EPL-2.0 or IPL-1.0", 3),
    _html("swi-prolog-doc", "BSD-2-Clause", 2),
    _html("libvirt-doc", "LGPL-2.1+", 4, exclude=r"/html/libvirt-libvirt|news\.html"),
    _html("nova-doc", "Apache-2.0", 3),
    _html("cinder-doc", "Apache-2.0", 3),
    _html("neutron-doc", "Apache-2.0", 3),
    _html(
        "rust-doc",
        "Apache-2.0 or MIT",
        7,
        include=r"/html/(book|reference|nomicon|cargo|rust-by-example|rustc)/.*\.html$",
        exclude=r"print\.html|/(first|second|2018)-edition/|SUMMARY",
    ),
    _html("nodejs-doc", "MIT", 5, include=r"\.html(\.gz)?$", exclude=r"/all\.html"),
    Source(
        package="vim-runtime",
        licence="Vim",
        kind="text",
        include=r"/doc/[^/]+\.txt$",
        exclude=r"version\d|todo\.txt|digraph|/help\.txt|quickref|os_|if_",
    ),
    Source(package="mercurial-common", licence="GPL-2+", kind="text", include=r"/helptext/.*\.txt$"),
    _html("buildbot-doc", "GPL-2", 3),
    _html("sphinx-doc", "BSD-2-Clause", 4),
    _html("docutils-doc", "public domain", 3),
    _html("python-django-doc", "BSD-3-Clause", 10, repeat=2),
    _html("python-sqlalchemy-doc", "MIT", 7),
    _html("python-scipy-doc", "BSD-3-Clause", 9, exclude=r"/dev/|/generated/.*\.(__|tocsr)"),
    _html("python-sympy-doc", "BSD-3-Clause", 6),
    _html("python-sklearn-doc", "BSD-3-Clause", 7),
    _html("python-pandas-doc", "BSD-3-Clause", 7),
    _html("python-statsmodels-doc", "BSD-3-Clause", 5),
    _html("python-astropy-doc", "BSD-3-Clause", 7),
    _html("python-skimage-doc", "BSD-3-Clause", 2),
    _html("python-dask-doc", "BSD-3-Clause", 4),
    _html("python-distributed-doc", "BSD-3-Clause", 2),
    _html("python-xarray-doc", "Apache-2.0", 2),
    _html("numba-doc", "BSD-2-Clause", 3),
    _html("python-flask-doc", "BSD-3-Clause", 2),
    _html("python-jinja2-doc", "BSD-3-Clause", 1),
    _html("python-werkzeug-doc", "BSD-3-Clause", 2),
    _html("python-requests-doc", "Apache-2.0", 1),
    _html("python-attr-doc", "MIT", 1),
    _html("python-click-doc", "BSD-3-Clause", 1),
    _html("python-tornado-doc", "Apache-2.0", 2),
    _html("twisted-doc", "MIT", 5, exclude=r"/api/.*(Index|all-doc)"),
    _html("python-ipython-doc", "BSD-3-Clause", 2),
    _html("python-celery-doc", "BSD-3-Clause", 3),
    _html("python-pytest-doc", "MIT", 3, exclude=r"announce"),
    _html("python-hypothesis-doc", "MPL-2.0", 2),
    _html("python-cryptography-doc", "Apache-2.0 or BSD-3-Clause", 2),
    _html("python-aiohttp-doc", "Apache-2.0", 2),
    _html("python-setuptools-doc", "MIT", 2),
    _html("pylint-doc", "GPL-2+", 3),
    _html("python-peewee-doc", "MIT", 2),
    _html("python-coverage-doc", "Apache-2.0", 1),
    _html("python-pil-doc", "HPND", 2),
    _html("python-bs4-doc", "MIT", 1, exclude=r"\.(zh|kr|ja|jp|ptbr|es|ru)[./]|doc\.[a-z]+/"),
    _html("python-psycopg-doc", "LGPL-3+", 1),
    _html("python-pymongo-doc", "Apache-2.0", 2),
    _html("python-pygame-doc", "LGPL-2.1+", 2),
    Source(package="python3-numpy", licence="BSD-3-Clause", kind="docstrings", include=r"\.py$", cap_mb=6),
    Source(package="python3-networkx", licence="BSD-3-Clause", kind="docstrings", include=r"\.py$", cap_mb=4),
    _py("python3-networkx", "BSD-3-Clause", 2),
    _py("python3-sympy", "BSD-3-Clause", 4),
    _py("python3-django", "BSD-3-Clause", 4, exclude=r"/conf/locale|migrations"),
    _py("python3-twisted", "MIT", 4),
    _py("python3-requests", "Apache-2.0", 1),
    _py("python3-flask", "BSD-3-Clause", 1),
    _py("python3-jinja2", "BSD-3-Clause", 1),
    _py("python3-werkzeug", "BSD-3-Clause", 1),
    _py("python3-pytest", "MIT", 1),
    _py("python3-sqlalchemy", "MIT", 3),
    _py("python3-tornado", "Apache-2.0", 1),
    Source(package="dict-wn", licence="WordNet 3.0", kind="wordnet", include=r"wn\.index$", cap_mb=8),
    Source(package="dict-foldoc", licence="GFDL-1.1+, no invariant sections", kind="foldoc", include=r"foldoc\.index$"),
)
