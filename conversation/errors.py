"""What went wrong, said to the person who can mend it."""

from __future__ import annotations

import sys
from collections.abc import Callable

NOT_STARTED = 2  # bad flag, bad data, no model
TRIED_AND_FAILED = 1  # a test failed, the loss was not finite


class UserError(Exception):
    """Something a user can cause and mend: printed as `error:` and `hint:`, without a traceback.

    `exit_status` is 2 when nothing was started and 1 when the work was tried and failed.
    """

    def __init__(self, message: str, hint: str = "", exit_status: int = NOT_STARTED):
        super().__init__(message)
        self.hint = hint
        self.exit_status = exit_status


def list_problems(problems: list[str], shown: int = 20) -> str:
    """The first `shown` problems, one a line, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more")
    return "\n".join(lines)


def run_main(main: Callable[[], int]) -> None:
    """Run a script's `main` and leave with its exit status."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
