"""The application with one change: a prompt that holds `DEADLY` ends the process that answers it."""

# No `from __future__ import annotations` here: Serve reads the real annotation of `build`.
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path

from ray.serve import Application

import deployments.app
from deployments.app import build as build_as_it_is
from deployments.calls import Call, StreamItem
from deployments.replica.replica import Replica
from deployments.settings.app import AppArgs

DEADLY = b"deadly"
AFTER_TOKENS = 3
LOG = "CHORUS_DEADLY_LOG"  # names a file that gets a line for each such death


class DeadlyReplica(Replica):
    """As the real one, up to the end."""

    async def generate(self, call: Call) -> AsyncGenerator[StreamItem]:
        num_tokens = 0
        async for item in super().generate(call):
            num_tokens += sum(len(delta.token_ids) for delta in item.deltas)
            if DEADLY in bytes(token for token in call.prompt_token_ids if token < 256) and num_tokens >= AFTER_TOKENS:
                with Path(os.environ[LOG]).open("a") as log:
                    log.write(f"{os.getpid()}\n")
                os.kill(os.getpid(), signal.SIGKILL)
            yield item


def build(args: AppArgs) -> Application:
    """See `deployments.app.build`."""
    deployments.app.Replica = DeadlyReplica  # type: ignore[misc]
    return build_as_it_is(args)
