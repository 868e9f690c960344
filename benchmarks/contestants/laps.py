"""What an iteration takes within a run: the mean over all but the first, whose preparations are not its own."""

import time
from dataclasses import dataclass, field


@dataclass
class Laps:
    """When each iteration ended."""

    ends: list[float] = field(default_factory=list)

    def end(self) -> None:
        """Notes that an iteration ended."""
        self.ends.append(time.perf_counter())

    @property
    def mean(self) -> float:
        """Seconds of an iteration."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
