"""polyak's docstrings as Markdown: roles become links, examples fenced blocks, and ``::`` a colon.

What a signature has for polyak's own use, such as the fields of a result that begin with an underscore, is left out.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Module, Object, Parameters

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc|data):`(~?)([\w.]+)`")
_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 +\S.*)*", re.M)


class Docstrings(Extension):
    """Rewrites each docstring of a package once it is loaded."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Called by griffe with the whole package."""
        self._rewrite(pkg)

    def _rewrite(self, thing: Object) -> None:
        if thing.docstring:
            thing.docstring.value = as_markdown(thing.docstring.value, thing)
        if thing.is_function:
            shown = (one for one in thing.parameters if not one.name.startswith("_"))
            thing.parameters = Parameters(*shown)
        for member in thing.members.values():
            if not member.is_alias:
                self._rewrite(member)


def as_markdown(text: str, thing: Object) -> str:
    """The docstring of ``thing``."""
    text = _ROLE.sub(lambda role: _link(role[2], thing, short=bool(role[1])), text)
    text = text.replace("``", "`")
    text = _EXAMPLE.sub(lambda example: _fenced(example[0], example[1]), text)
    return re.sub(r"\s?::$", ":", text, flags=re.M)


def _fenced(example: str, indent: str) -> str:
    return f"{indent}```pycon\n{example}\n{indent}```"


def _link(name: str, thing: Object, short: bool) -> str:
    """A link to what is meant in the scope of ``thing``, where that has a place on a page; else just the name."""
    shown = name.rpartition(".")[2] if short else name
    if name.startswith("polyak"):
        return f"[`{shown}`][{name}]"
    first, dot, rest = name.partition(".")
    scope: Any = thing
    while scope is not None and first not in scope.members:
        scope = scope.parent
    if scope is None:
        return f"`{shown}`"
    member = scope.members[first]
    path = member.target_path if member.is_alias else member.path
    return f'<autoref identifier="{path}{dot}{rest}" optional><code>{shown}</code></autoref>'
