"""bitsandbytes, without what it would fetch from elsewhere."""

from __future__ import annotations

import logging
import sys


def import_bitsandbytes() -> None:
    """To be called before anything imports it.

    While it is imported, on a CPU with AVX512-BF16, it downloads a kernel from the public hub and runs it, if the
    package `kernels` happens to be installed. A server asks nobody but its swarm, and computes as others with its
    numerics tag do.
    """
    if "bitsandbytes" in sys.modules:
        return
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(
        logging.ERROR
    )  # it complains of what it could not fetch
    loaded = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # its import fails, as if it were not installed
    try:
        import bitsandbytes  # noqa: F401
    finally:
        del sys.modules["kernels"]
        if loaded is not None:
            sys.modules["kernels"] = loaded
