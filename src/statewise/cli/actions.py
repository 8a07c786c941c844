"""Commands that are a handful of actions: `statewise COMMAND ACTION [options]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import UserError
from .options import Options

# Name -> (function of the options, which returns an exit code; names of the arguments that need no option name).
Actions = Mapping[str, tuple[Callable[..., int], list[str]]]


def run(command: str, actions: Actions, argv: Sequence[str], switches: Sequence[str] = ()) -> int:
    """Run the action that argv begins with, or show the help of all."""

    def options(action: str) -> Options:
        function, positional = actions[action]
        return Options(f"{command} {action}", function, positional=positional, switches=list(switches))

    action = argv[0] if argv and not argv[0].startswith("-") else None
    if action is not None and action not in actions:
        from .._names import unknown

        raise UserError(unknown(f"action of {command}", action, actions))
    if action is None or "--help" in argv or "-h" in argv:
        print("\n\n".join(options(name).help() for name in ([action] if action else actions)))
        return 0
    values: dict[str, Any] = options(action).parse(list(argv[1:]))
    return actions[action][0](**values)
