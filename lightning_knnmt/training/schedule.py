"""Learning rates over time."""

from dataclasses import dataclass

from lightning_knnmt.checks import check_at_least, check_number


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, inverse square root, and a linear decay to zero at the end.

    Attributes:
        lr: Peak learning rate, at most 1.
        warmup_steps: Optimizer steps until the peak.
        max_steps: Step at which the rate is 0; None: no final decay. On the command line it is `--trainer.max_steps`.
        decay_steps: Length of the final decay, in steps.
    """

    lr: float
    warmup_steps: int
    max_steps: int | None = None
    decay_steps: int = 0

    def __post_init__(self) -> None:
        check_number(above_zero=True, lr=self.lr)
        if self.lr > 1:
            raise ValueError(f"lr is {self.lr!r}, expected at most 1")
        check_at_least(0, warmup_steps=self.warmup_steps, decay_steps=self.decay_steps)
        check_at_least(1, max_steps=self.max_steps)
        if self.max_steps is not None and self.warmup_steps + self.decay_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps + decay_steps is {self.warmup_steps + self.decay_steps}, "
                f"expected at most max_steps={self.max_steps}"
            )

    def factor(self, step: int) -> float:
        """The learning rate of a step (counted from 0) as a share of the peak.

        >>> schedule = Schedule(lr=1.0, warmup_steps=4, max_steps=100, decay_steps=50)
        >>> [schedule.factor(step) for step in (0, 3, 15, 100)]
        [0.25, 1.0, 0.5, 0.0]
        """
        warmup = max(1, self.warmup_steps)
        factor = min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)
        if self.max_steps is not None and self.decay_steps:
            factor *= min(1.0, max(0, self.max_steps - step) / self.decay_steps)
        return factor
