"""What the engine asks of whatever executes plans: a torch runner, a group of workers, or a fake in tests.

Torch-free: the engine and the fakes import it without pulling torch in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from engine.core.plan import StepPlan, StepResult

if TYPE_CHECKING:
    from engine.lora.image import AdapterImage


class StepNotLaunched(Exception):
    """A plan could not run, for want of memory: abandon it and the later ones, and go on.

    It may have been begun: its ends and adapter operations may be done, its own KV slots written; it has no samples.
    Any other exception of a runner is fatal: the device's state is not known any more. No EngineError, because it
    never leaves the engine.
    """


class PendingStep(Protocol):
    """A plan that was handed to the device."""

    def result(self) -> StepResult:
        """Block until the device is done. Raises: anything, and it is fatal."""
        ...


class Runner(Protocol):
    """Executes plans, strictly in the order of their ids.

    Ending a sequence or evicting an adapter that is gone already changes nothing: after an abandoned plan, the next
    repeats its ends and evicts what it loaded.
    """

    def submit(self, plan: StepPlan) -> PendingStep:
        """Execute `plan` after all earlier ones.

        Raises: StepNotLaunched (abandon this plan and the later ones); anything else is fatal.
        """
        ...

    def prepare_adapter(self, image: AdapterImage) -> None:
        """What can be done for an adapter before its step. Called from any thread, before `add_adapter`."""
        ...

    def add_adapter(self, image: AdapterImage) -> None:
        """Make a host image available to AdapterLoad operations of later plans."""
        ...

    def remove_adapter(self, key: str) -> None:
        """Forget a host image. Only when it is not resident."""
        ...

    def close(self) -> None:
        """End the runner's threads. Nothing is submitted afterwards."""
        ...
