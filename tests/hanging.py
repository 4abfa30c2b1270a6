"""A device in the gateway's process whose model never ends its first step, for a config to name."""

from __future__ import annotations

import time
from typing import Any

from selfroute.device.live import LiveConfig, LiveEngine


class HangingDevice(LiveEngine):
    """The shipped model, hanging."""

    Config = LiveConfig

    def __init__(self, config: LiveConfig) -> None:
        super().__init__(config)
        self._engine.model.register_forward_pre_hook(_hang)


def _hang(module: Any, args: Any) -> None:
    print("hangs", flush=True)
    time.sleep(600)
