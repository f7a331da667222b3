"""What every command shares: errors as one clear message with an exit code, and --debug."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from distill.errors import DistillError, MemoryExhaustedError

if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130
_DEBUG = "distill.debug"


class Guarded(click.Command):
    """A command whose errors are one clear message and an exit code; with --debug, also the traceback.

    Args:
        interrupted: what Ctrl-C leaves, from the command's parameters.
    """

    def __init__(
        self, *args: Any, interrupted: Callable[[dict[str, Any]], str] = lambda _: "", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.interrupted = interrupted

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, _terminated)
        # A shell script that starts us in the background lets us ignore SIGINT; a run can always be gone on with.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            left = self.interrupted(ctx.params)
            click.echo(f"\ninterrupted{'; ' if left else ''}{left}", err=True)
            _leave(ctx, INTERRUPTED)
        except DistillError as error:
            click.echo(f"error: {error}", err=True)
            _leave(ctx, error.exit_code)
        except MemoryError:
            click.echo(
                f"error: {MemoryExhaustedError('out of memory', fix='lower train.batch_size')}", err=True
            )
            _leave(ctx, MemoryExhaustedError.exit_code)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except BrokenPipeError:
            _leave(ctx, 0)  # the reader of our output, such as `head`, has seen enough
        except Exception as error:
            click.echo(
                f"error: {type(error).__name__}: {error}\n"
                "  this is a defect of distill; run again with --debug and report what it prints",
                err=True,
            )
            _leave(ctx, 1)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _leave(ctx: click.Context, code: int) -> NoReturn:
    if ctx.meta.get(_DEBUG):
        import traceback

        traceback.print_exc()
    ctx.exit(code)


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[_DEBUG] = value


def debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_remember_debug,
        help="Show the traceback of an error.",
    )(command)
