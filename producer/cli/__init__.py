"""The command ``nograd``.

Exit codes: 0 ok, 1 a job or row failed or has no outcome yet, 2 usage, configuration or no Redis, 3 error budget
exceeded, 4 cancelled, 5 verification failed, 130 Ctrl-C.
With ``--json``, stdout holds JSON alone (one document, or one line for each job), errors included:
``{"error": {"type", "code", "message"}}``. The line for people goes to stderr in either case.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

_EXIT_CODES = {"cancelled": 4, "budget_exceeded": 3, "backfill_cancelled": 4, "verification_failed": 5}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; never a traceback for what a user can mend."""
    sys.exit(run(sys.argv[1:] if argv is None else list(argv)))


def run(argv: Sequence[str]) -> int:
    """Run the command line; the exit code."""
    try:
        # Here, not above: a wrong environment variable shows when the app of `nograd.tasks` is made.
        from .root import cli

        return cli.main(args=list(argv), prog_name="nograd", standalone_mode=False) or 0
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:  # `nograd … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.ClickException as err:
        err.show()
        _report_json(argv, type(err).__name__, "usage", err.format_message())
        return 2
    except Exception as err:
        # By its attributes: if importing `nograd.tasks` is what failed, its classes cannot be imported here.
        code, message = getattr(err, "code", None), getattr(err, "message", None)
        if not isinstance(code, str) or not isinstance(message, str):
            raise
        click.echo(f"nograd: {message}", err=True)
        _report_json(argv, type(err).__name__, code, message)
        return _EXIT_CODES.get(code, 1 if _of_a_job(err) else 2)


def _of_a_job(err: Exception) -> bool:
    return any(cls.__name__ in {"JobError", "ResultTimeout"} for cls in type(err).__mro__)


def _report_json(argv: Sequence[str], name: str, code: str, message: str) -> None:
    words = list(argv)
    if "--json" in words[: words.index("--")] if "--" in words else "--json" in words:
        import msgspec

        click.echo(msgspec.json.encode({"error": {"type": name, "code": code, "message": message}}).decode())
