"""A process in which everybody writes to stderr in his own way: `python noisy_process.py [verbose]`."""

from __future__ import annotations

import logging
import sys
import threading
import warnings

from swarm.scripts.logs import adopt_loggers, say, say_error, set_up_logging

if __name__ == "__main__":  # at once, as a command does
    set_up_logging(verbose=sys.argv[1:] == ["verbose"], log_json=True)


def fail() -> None:
    raise ValueError("in a thread\nof its own")


class Fragile:
    def __del__(self) -> None:
        raise ValueError("while it was collected")


if __name__ == "__main__":
    from hivemind.utils.logging import get_logger
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    adopt_loggers()
    get_logger("hivemind.test").info("hivemind informs")
    get_logger("hivemind.test").warning("hivemind warns", extra={"caller": "here", "level": 7})
    transformers_logging.get_logger("transformers.test").warning("transformers warns")
    logging.getLogger("swarm.test").info("swarm informs")
    logging.getLogger("swarm.test").warning("two\nlines \N{LINE SEPARATOR} \x1b[31m", extra={"rate": float("nan")})
    warnings.warn("advice for programmers", stacklevel=1)
    say("loading")
    say_error("no such folder")
    print("printed", file=sys.stderr)
    sys.stderr.write("a part, ")
    sys.stderr.write("and the rest\r\n")
    for _ in tqdm(range(3), desc="bar", ascii=True):
        pass
    thread = threading.Thread(target=fail, name="worker")
    thread.start()
    thread.join()
    fragile = Fragile()
    del fragile
    raise ZeroDivisionError("at last")
