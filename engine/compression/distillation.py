"""The model that is compressed teaches the smaller one: no labels are needed.

Probabilities are held against probabilities by cross entropy, logits by the divergence of their
softmax at a temperature (Hinton, Vinyals, Dean: arXiv:1503.02531, 2015), other numbers by their
squared difference in units of the teacher's variance.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from plinth.engine.compression.registry import Transform, register
from plinth.engine.errors import ConfigError


@register("distillation")
class Distillation(Transform):
    """Answers like the teacher's.

    Args:
        temperature: of the softmax of logits; higher looks more at the classes that lose.
        share: of this loss where there are labels too, 0 to 1.
    """

    def __init__(self, temperature: float = 2.0, share: float = 0.7) -> None:
        if not temperature > 0 or not 0 <= share <= 1:
            raise ConfigError(
                f"distillation at temperature {temperature} and share {share}",
                hint="a temperature above 0, a share from 0 to 1",
            )
        self.temperature, self.share = temperature, share

    def loss(self, output: Tensor, teacher: Tensor) -> Tensor:
        """Mean over rows (n, ...); classes lie along dimension 1."""
        return apart(output, teacher, self.temperature)


def apart(output: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """How far answers (n, ...) are from the teacher's, by what these are."""
    low, high = float(teacher.min()), float(teacher.max())
    if low >= 0 and high <= 1:
        # Probabilities, each alone or of classes: the cross entropy is least where they are equal.
        entropy = functional.binary_cross_entropy(teacher, teacher)
        return functional.binary_cross_entropy(output.clamp(0, 1), teacher) - entropy
    if teacher.ndim >= 2 and teacher.shape[1] >= 2:
        want = functional.log_softmax(teacher / temperature, dim=1)
        got = functional.log_softmax(output / temperature, dim=1)
        divergence = functional.kl_div(got, want, reduction="none", log_target=True).sum(1)
        return divergence.mean() * temperature**2
    return ((output - teacher) ** 2).mean() / teacher.var().clamp_min(1e-12)
