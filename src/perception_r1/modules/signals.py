"""SIGTERM, which all devices heed together, at the end of the same batch."""

from types import FrameType

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector


class SignalConnector(_SignalConnector):
    """Lightning's own, but that devices agree where its loops ask, and that nothing is exchanged in a signal handler.

    There Lightning (2.6) broadcasts, whenever a signal comes; but each device may get a different number of them, and
    then they wait for each other without end. And a device that was told alone would stop alone.

    Attributes:
        is_told: This device has got the signal.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.is_told = False
        super().__init__(trainer)

    @property
    def received_sigterm(self) -> bool:
        """Whether any device has got the signal; all ask together, after every batch."""
        if self.trainer.world_size == 1:
            return self.is_told
        return self.trainer.strategy.reduce_boolean_decision(self.is_told, all=False)

    @received_sigterm.setter
    def received_sigterm(self, value: bool) -> None:
        self.is_told = value

    def _sigterm_notifier_fn(self, signum: int, _: FrameType | None) -> None:
        if not self.is_told and self.trainer.strategy.launcher is not None:
            self.trainer.strategy.launcher.kill(signum)  # those that this process has started
        self.is_told = True


def is_told_to_stop(trainer: Trainer) -> bool:
    """Whether this device has got SIGTERM; it asks no other one."""
    connector = trainer._signal_connector
    return connector.is_told if isinstance(connector, SignalConnector) else connector.received_sigterm
