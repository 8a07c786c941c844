"""Options from typed signatures, through jsonargparse; with a short help and one-line errors of our own."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import jsonargparse
from jsonargparse import ArgumentParser

from .._names import unknown
from .errors import UserError

INDENT = 28
HIDDEN = ("help", "print_config", "config")


class Options:
    """The options of one command.

    Args:
        command: as typed, e.g. "run language.bytes".
        function: its keyword arguments become options, its docstring their help. A parameter whose default is a
            dataclass becomes a group of options `--name.field`; those named in `flat` lose the prefix.
        positional: parameters given without a flag; those without a default are required.
        switches: boolean parameters whose option stands for itself and takes no value.

    A function may have an attribute `defaults_for`: from the values of the options that were given it makes dataclasses
    for those in `flat` whose default is None, such as the training that a chosen model takes.
    """

    def __init__(
        self,
        command: str,
        function: Callable,
        *,
        flat: Sequence[str] = (),
        positional: Sequence[str] = (),
        switches: Sequence[str] = (),
        about: str | None = None,
    ) -> None:
        self.command, self.function, self.flat, self.positional = command, function, tuple(flat), tuple(positional)
        self.switches = tuple(switches)
        self.about = about or (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
        self.parser = ArgumentParser(prog=f"statewise {command}", exit_on_error=False)
        self.groups: list[tuple[str, list[str]]] = []
        signature = inspect.signature(function)
        self.required = [n for n in positional if signature.parameters[n].default is inspect.Parameter.empty]
        self.parser.add_function_arguments(function, skip={*flat, *positional})
        nested = [n for n, p in signature.parameters.items() if dataclasses.is_dataclass(p.default) and n not in flat]
        keys = self._keys()
        self.groups.append(("options", [k for k in keys if k.split(".")[0] not in nested]))
        for name in nested:
            title = (inspect.getdoc(type(signature.parameters[name].default)) or name).split("\n")[0]
            self.groups.append((title.rstrip("."), [k for k in keys if k.startswith(f"{name}.")]))
        for name in flat:
            default = signature.parameters[name].default or self._depending({})[name]
            before = set(self._keys())
            self.parser.add_class_arguments(type(default), None)
            self.parser.set_defaults(dataclasses.asdict(default))
            title = (inspect.getdoc(type(default)) or name).split("\n")[0].rstrip(".")
            self.groups.append((title, [k for k in self._keys() if k not in before]))

    def _depending(self, values: Mapping[str, Any]) -> dict[str, Any]:
        defaults_for = getattr(self.function, "defaults_for", None)
        return defaults_for(values) if defaults_for else {}

    def add(self, name: str, kind: Any, help: str) -> None:
        """One more option that is not a parameter of the function; None if not given."""
        self.parser.add_argument(f"--{name}", type=kind, default=None, help=help)
        self.groups[0][1].append(name)

    def _actions(self) -> dict[str, Any]:
        found = {}
        for action in self.parser._actions:
            names = [o[2:] for o in action.option_strings if o.startswith("--")]
            if names and action.dest not in HIDDEN and not type(action).__name__.startswith("_ActionConfigLoad"):
                found[names[0]] = action
        return found

    def _keys(self) -> list[str]:
        return list(self._actions())

    # ---- help --------------------------------------------------------------------------------------------------

    def help(self) -> str:
        width = min(shutil.get_terminal_size().columns, 110)
        places = " ".join(n.upper() if n in self.required else f"[{n.upper()}]" for n in self.positional)
        flags = "[options]" if self._keys() else ""
        lines = [" ".join(f"usage: statewise {self.command} {places} {flags}".split()), ""]
        lines += textwrap.wrap(self.about, width)
        actions = self._actions()
        for title, keys in self.groups:
            if not keys:
                continue
            lines += ["", f"{title}:"]
            for key in keys:
                action = actions[key]
                head = f"  --{key.replace('_', '-')}" + ("" if key in self.switches else f" {self._kind(key)}")
                default = action.default
                text = re.sub(r"\s+", " ", action.help or "")
                text = re.sub(r" \((?:type|default|required).*$", "", text).replace("%%", "%")
                if default is not None and default not in ("", []):
                    text += f" [{default!r}]" if isinstance(default, str) and not default.strip() else f" [{default}]"
                body = textwrap.wrap(text, max(width - INDENT, 30)) or [""]
                # Two spaces between an option and its text, or the text on the next line.
                lines += [f"{head:<{INDENT}}{body[0]}"] if len(head) < INDENT - 1 else [head, " " * INDENT + body[0]]
                lines += [" " * INDENT + line for line in body[1:]]
        return "\n".join(lines)

    def _kind(self, key: str) -> str:
        hint = getattr(self._actions()[key], "_typehint", None) or getattr(self._actions()[key], "type", None)
        return describe_type(hint)

    # ---- parsing -----------------------------------------------------------------------------------------------

    def _name(self, flag: str) -> str:
        """--top-p and --top_p are the same option."""
        name = flag[2:].replace("-", "_")
        if name not in self._actions():
            known = [k.replace("_", "-") for k in self._keys()]
            raise UserError(f"{unknown('option', flag[2:], known)} (see statewise {self.command} --help)")
        return name

    def parse(self, argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Keyword arguments for the function (and values of options that were added).

        Args:
            defaults: options from a file, as nested mappings; what is in argv wins.

        Raises:
            UserError: unknown option, wrong type, missing value.
        """
        places, flags = [], []
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            if not word.startswith("--"):
                places.append(word)
                continue
            flag, has_value, value = word.partition("=")
            name = self._name(flag)
            if not has_value and name in self.switches:
                value = "true"
            elif not has_value:
                # A negative number is a value; anything else that begins with two dashes is the next option.
                if not rest or rest[0].startswith("--"):
                    raise UserError(f"{flag}: want a value ({self._kind(name)})")
                value = rest.pop(0)
            flags.append((flag, name, value))
        flags = self._collect(flags)
        if len(places) > len(self.positional):
            extra = places[len(self.positional)]
            raise UserError(f"unexpected argument {extra!r} (see statewise {self.command} --help)")
        if len(places) < len(self.required):
            missing = self.required[len(places)]
            raise UserError(f"{missing.upper()} is missing (see statewise {self.command} --help)")
        if defaults:
            self._set_defaults(defaults)
        for flag, name, value in flags:
            # One by one, so that the message can name the flag as it was typed.
            self._check(flag, name, [f"--{name}={value}"])
        words = [f"--{name}={value}" for _, name, value in flags]
        config = self.parser.parse_args(words)
        given = {name for _, name, _ in flags} | set(defaults or {})
        if depending := self._depending({name: value for name, value in vars(config).items() if name in given}):
            for made in depending.values():
                self.parser.set_defaults(dataclasses.asdict(made))
            self._set_defaults(defaults or {})
            config = self.parser.parse_args(words)
        try:
            instantiate = getattr(self.parser, "instantiate", None) or self.parser.instantiate_classes
            values = vars(instantiate(config))
        except ValueError as error:
            raise UserError(str(error)) from error
        return {**self._gather(values), **dict(zip(self.positional, places))}

    def _collect(self, flags: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
        """An option that takes a list of texts is given once for each of them: --prompt A --prompt B."""
        lists: dict[str, list[str]] = {}
        out = []
        for flag, name, value in flags:
            if self._takes_texts(name):
                lists.setdefault(name, []).append(value)
            else:
                out.append((flag, name, value))
        return out + [(f"--{name}", name, json.dumps(values)) for name, values in lists.items()]

    def _takes_texts(self, name: str) -> bool:
        return getattr(self._actions()[name], "_typehint", None) == list[str]

    def _check(self, flag: str, name: str, argv: list[str]) -> None:
        try:
            self.parser.parse_args(argv)
        except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
            if isinstance(error, ValueError) and not isinstance(error, jsonargparse.ArgumentError):
                raise UserError(str(error)) from error
            value = argv[0].partition("=")[2]
            raise UserError(f"{flag}: want {self._kind(name)}, got {value!r}") from error

    def _set_defaults(self, tree: Mapping[str, Any]) -> None:
        flat: dict[str, Any] = {}
        known = self._keys()
        for key, value in tree.items():
            below = [k for k in known if k.startswith(f"{key}.")]
            if below and isinstance(value, Mapping):
                flat |= {f"{key}.{k}": v for k, v in value.items()}
            else:
                flat[str(key)] = value
        for key, value in flat.items():
            if key not in known:
                raise UserError(f"config file: {unknown('option', key, known)}")
            # The parser lets a null through whatever the type.
            if value is None and not _takes_none(self._actions()[key]):
                raise UserError(f"config file: {key}: want {self._kind(key)}, got null")
            head, _, tail = key.partition(".")
            try:
                parsed = self.parser.parse_object({head: {tail: value}} if tail else {head: value})
            except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
                raise UserError(f"config file: {key}: want {self._kind(key)}, got {value!r}") from error
            self.parser.set_defaults({key: parsed[key]})

    def _gather(self, values: dict[str, Any]) -> dict[str, Any]:
        for name in self.flat:
            default = inspect.signature(self.function).parameters[name].default
            cls = type(default or self._depending(values)[name])
            fields = {f.name: values.pop(f.name) for f in dataclasses.fields(cls)}
            try:
                values[name] = cls(**fields)
            except ValueError as error:
                raise UserError(str(error)) from error
        return {k: v for k, v in values.items() if k not in HIDDEN}


def _takes_none(action: Any) -> bool:
    hint = getattr(action, "_typehint", None)
    return action.default is None or hint in (None, Any) or type(None) in get_args(hint)


def describe_type(hint: Any) -> str:
    """A word for a type in help and errors."""
    if hint is None:
        return "TEXT"
    if get_origin(hint) is Literal:
        return "|".join(str(a) for a in get_args(hint))
    parts = [a for a in get_args(hint) if a is not type(None)] if get_args(hint) else [hint]
    if hint == list[str]:
        return "TEXT ..."
    if get_origin(parts[0]) is Literal:
        return describe_type(parts[0])
    names = {int: "INT", float: "NUMBER", str: "TEXT", bool: "BOOL"}
    return names.get(parts[0], "VALUE")
