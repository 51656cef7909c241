"""What a training run leaves behind: numbers per step, evaluations, speed."""

import json
import math
from dataclasses import asdict, dataclass, field


@dataclass
class History:
    """The record of one run; entry i of each list is the run's i-th step.

    Args:
        label: what the run is called in progress and reports.
        step: 1, 2, … the number of the step.
        loss: the training loss, all terms.
        cross_entropy: nats per token.
        lr: the learning rate of the step.
        tokens: tokens of the step, over all processes.
        seconds: wall time of the step, without evaluations and checkpoints.
        imbalance: load of the busiest expert over the mean, worst layer; None without experts.
        evals: what `evaluate` returned, with the "step" it was taken after.
        wall_seconds: the whole of `fit`, evaluations and checkpoints included, over all resumptions.
        interrupted: Ctrl-C ended the run.
        stopped_early: the time budget ended the run.

    >>> history = History(step=[1], loss=[5.5], cross_entropy=[5.4], lr=[1e-3], tokens=[64], seconds=[0.5],
    ...                   imbalance=[None])
    >>> history.tokens_per_second, History.from_json(history.to_json()) == history
    (128.0, True)
    """

    label: str = ""
    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    cross_entropy: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    imbalance: list[float | None] = field(default_factory=list)
    evals: list[dict[str, float]] = field(default_factory=list)
    wall_seconds: float = 0.0
    interrupted: bool = False
    stopped_early: bool = False

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.step)

    @property
    def train_seconds(self) -> float:
        """Summed wall time of the steps."""
        return math.fsum(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Training speed over all processes, without evaluations and checkpoints; 0 before a step."""
        return sum(self.tokens) / self.train_seconds if self.seconds else 0.0

    @property
    def bits_per_token(self) -> list[float]:
        """Training cross-entropy in bits per token, which for byte tokens is bits per byte."""
        return [value / math.log(2) for value in self.cross_entropy]

    def to_json(self) -> str:
        """JSON that `from_json` turns back into an equal history, float for float."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "History":
        """The history that `to_json` wrote."""
        return cls(**json.loads(text))
