"""What the command line says of options: their descriptions, and of a mistyped one the nearest that there is."""

import argparse
import dataclasses
import difflib
import inspect
import re
from typing import Any

_UNKNOWN = (
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'",
    r"Option '(?P<key>[\w.]+)' is not accepted",
    r"unrecognized arguments: --(?P<key>[\w.-]+)",
)
_TYPE = (
    r'Parser key "(?P<key>[\w.]+)":.*Subtypes: \[(?P<known>.*?)\]\n.*Given value: (?P<given>.*)',
    r'Parser key "(?P<key>[\w.]+)":\s+Expected a (?P<known><class .*?>)\. Got value: (?P<given>.*)',
)
_CHOICE = r'Parser key "(?P<key>[\w.]+)":\s+Expected a typing\.Literal\[(?P<known>[^]]*)\]\. Got value: (?P<given>.*)'


def nearest(word: str, known: Any) -> str:
    """' Did you mean ...?' for the known word nearest to a mistyped one, in whatever case, or nothing."""
    spelled = {each.lower(): each for each in known}
    matches = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=0.5)
    return f". Did you mean {spelled[matches[0]]!r}?" if matches else ""


def explain(message: str, known: list[str]) -> str:
    """The parser's message; of an unknown key with the nearest one, of a choice or a type with those there are."""
    if choice := re.search(_CHOICE, message):
        choices = re.findall(r"'([^']*)'", choice["known"])
        given = choice["given"].strip()
        return f"{choice['key']} must be one of {', '.join(choices)}, got {given!r}{nearest(given, choices)}"
    if typed := next((found for pattern in _TYPE if (found := re.search(pattern, message, re.S))), None):
        known_types = " or ".join(_yaml_type(name, typed["key"]) for name in _split(typed["known"]))
        return f"{typed['key']} must be {known_types}, got {typed['given'].strip()!r}"
    unknown = next((found for pattern in _UNKNOWN if (found := re.search(pattern, message))), None)
    if not unknown:
        return message
    parts = unknown.groupdict()
    key = f"{parts['group']}.{parts['key']}" if parts.get("group") else parts["key"]
    by_last = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    suggestion = f". Did you mean {by_last[0]!r}?" if by_last else nearest(key, known)
    return f"unknown option {key!r}{suggestion or '; known: ' + ', '.join(known)}"


def _split(types: str) -> list[str]:
    """The types of a list of them, whose own commas are inside brackets."""
    return re.split(r", (?![^\[]*\])", types)


def _yaml_type(name: str, key: str) -> str:
    """A type by what is written for it: null for None, [int, int] for a tuple of two."""
    name = re.sub(r"<class '(.*)'>", r"\1", name)
    if "." in name:
        return f"options, --{key}.NAME"
    return {"NoneType": "null"}.get(name, re.sub(r"^(tuple|list)(?=\[)", "", name))


def describe(parser: argparse.ArgumentParser, cls: type) -> None:
    """Gives the options of a config dataclass what its source says of them as their help, and sections as titles."""
    helps, sections = _helps(cls, "")
    for action in parser._actions:
        action.help = helps.get(action.dest, action.help)
    for group in parser._action_groups:
        dest = group._group_actions[0].dest if group._group_actions else ""
        if dest in sections:
            group.title, group.description = dest, inspect.cleandoc(sections[dest].__doc__ or "").partition("\n\n")[0]


def _helps(cls: type, prefix: str) -> tuple[dict[str, str], dict[str, type]]:
    """By dotted key, what comments beside fields and lines `name, name: ...` of docstrings say; the sections."""
    helps: dict[str, str] = {}
    sections: dict[str, type] = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        found = re.findall(r"^ {4}(\w+): .*?  # (.+)", inspect.getsource(base), re.M)
        for names, text in re.findall(r"^([\w, ]+): (.+(?:\n {4}.+)*)", inspect.cleandoc(base.__doc__ or ""), re.M):
            found += [(name, " ".join(text.split())) for name in names.split(", ")]
        # The command line reads YAML, whose None is null.
        helps |= {prefix + name: re.sub(r"\bNone\b", "null", text.replace("%", "%%")) for name, text in found}
    for f in dataclasses.fields(cls):
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            sections[prefix + f.name] = f.type
            inner, below = _helps(f.type, f"{prefix}{f.name}.")
            helps, sections = helps | inner, sections | below
    return helps, sections
