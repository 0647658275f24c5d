"""Takes addresses out of sentences: errors of the network name them, and not everybody shall see them."""

from __future__ import annotations

import re
from typing import overload

HIDDEN = "(address hidden)"

_MULTIADDRESS = r"/(?:ip4|ip6|ip6zone|dns|dns4|dns6|dnsaddr|unix)/[^\s'\",;()<>\]]+"
_IP4 = r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?::\d{1,5})?(?![\w]|\.\d)"
# Two colons in a row, or eight groups: times of day and ranges of blocks have neither.
_IP6 = (
    r"\[?(?<![\w:.])(?=[0-9A-Fa-f:.]*(?:::|(?:[0-9A-Fa-f]{1,4}:){7}))"
    r"[0-9A-Fa-f:.]*[0-9A-Fa-f:](?:%\w+)?(?:\]:\d{1,5}|\])?"
)
# As p2pd says it: "lookup NAME: no such host".
_LOOKED_UP = r"(?<=lookup )[\w.-]*\w"
_ADDRESS = re.compile("|".join((_MULTIADDRESS, _IP4, _IP6, _LOOKED_UP)))


@overload
def hide_addresses(text: str) -> str: ...
@overload
def hide_addresses(text: None) -> None: ...
def hide_addresses(text: str | None) -> str | None:
    """The text with multiaddresses and ip addresses replaced. Peer ids stay, but for those that are part of one."""
    return None if text is None else _ADDRESS.sub(HIDDEN, text)
