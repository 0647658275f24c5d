"""How a command's process ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


def end_with(run: Callable[[], object]) -> NoReturn:
    """Run a command that ends by SystemExit, and end its process.

    Threads that still compute are daemons, and the interpreter's own end would stop them in the middle of native code,
    which aborts the process. So beside such threads it ends without that.
    """
    code: object = 0
    try:
        run()
    except SystemExit as end:
        code = end.code
    if all(thread is threading.main_thread() for thread in threading.enumerate()):
        sys.exit(code)  # type: ignore[arg-type]
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
