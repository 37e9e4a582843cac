"""The application with one change: a prompt that holds `DEADLY` ends the process that answers it."""

# No `from __future__ import annotations` here: Serve reads the real annotation of `build`.
import os
import signal
from collections import Counter
from pathlib import Path

from ray.serve import Application

import deployments.app
from deployments.app import build as build_as_it_is
from deployments.replica.replica import Replica
from deployments.replica.subscribers import Run
from deployments.settings.app import AppArgs
from engine.request import OutputDelta

DEADLY = b"deadly"
AFTER_TOKENS = 3
LOG = "CHORUS_DEADLY_LOG"  # names a file that gets a line for each such death


class DeadlyReplica(Replica):
    """As the real one, up to the end."""

    def _observe(self, run: Run, deltas: list[OutputDelta]) -> None:
        super()._observe(run, deltas)
        number, call = run.submission.number, run.submission.call
        counts = self.__dict__.setdefault("_counts", Counter())
        counts[number] += sum(len(delta.token_ids) for delta in deltas)
        if DEADLY in bytes(token for token in call.prompt_token_ids if token < 256) and counts[number] >= AFTER_TOKENS:
            with Path(os.environ[LOG]).open("a") as log:
                log.write(f"{os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGKILL)


def build(args: AppArgs) -> Application:
    """See `deployments.app.build`."""
    deployments.app.Replica = DeadlyReplica  # type: ignore[misc]
    return build_as_it_is(args)
