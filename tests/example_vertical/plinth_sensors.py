"""Predictive maintenance on Plinth: a window of vibration in, the health of a bearing out."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from plinth.engine import Call, Flow, InputError, Model, ModelSpec, Sla, TensorSpec
from plinth.verticals import Item, Settings, Vertical

WINDOW = 256
Acceleration = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]


class Vibration(BaseModel):
    """One window of acceleration, m/s², sampled at 10 kHz."""

    sensor: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    samples: list[Acceleration] = Field(min_length=WINDOW, max_length=WINDOW)


class Health(BaseModel):
    """How the bearing does: score 0 (healthy) to 1 (about to fail)."""

    sensor: str
    score: float
    alarm: bool


class SensorSettings(Settings):
    """The table ``[verticals.sensors]``."""

    alarm_above: float = Field(0.5, ge=0, le=1)


class Impulses(nn.Module):
    """Kurtosis and crest factor of each row (n, 256), weighed into a score (n, 1).

    Damaged bearings knock: the signal gets peaks its mean power does not explain.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Linear(2, 1)
        self.weigh.weight.data = torch.tensor([[0.6, 0.4]])
        self.weigh.bias.data = torch.tensor([-5.0])

    def forward(self, samples: Tensor) -> Tensor:
        """Samples (n, 256) float32 to scores (n, 1) float32."""
        centred = samples - samples.mean(1, keepdim=True)
        power = centred.square().mean(1).clamp_min(1e-6)
        kurtosis = centred.pow(4).mean(1) / power.square()
        crest = centred.abs().amax(1) / power.sqrt()
        return torch.sigmoid(self.weigh(torch.stack([kurtosis, crest], 1)))


class Sensors(Vertical[Vibration, Health]):
    """Scores vibration windows that come as records, or as a folder of CSV files."""

    name = "sensors"
    summary = "Predictive maintenance: vibration windows in, bearing health out."
    action = "score"
    request = Vibration
    response = Health
    settings_type = SensorSettings
    sla = Sla(deadline_ms=200)

    def models(self) -> Sequence[Model]:
        spec = ModelSpec(
            name="impulses",
            version="1.0.0",
            inputs=(TensorSpec(name="samples", shape=(WINDOW,), dtype="float32"),),
            outputs=(TensorSpec(name="score", shape=(1,), dtype="float32"),),
        )
        return [Model(spec, Impulses().eval())]

    def example(self) -> Vibration:
        knocks = [8.0 if at % 64 == 0 else 0.1 * (-1) ** at for at in range(WINDOW)]
        return Vibration(sensor="pump-7", samples=knocks)

    def infer(self, requests: Sequence[Vibration]) -> Flow[list[Health | InputError]]:
        if not requests:
            return []
        rows = torch.tensor([request.samples for request in requests])
        scores = yield Call("impulses", rows)
        limit = self.settings.alarm_above
        return [
            Health(sensor=request.sensor, score=score, alarm=score > limit)
            for request, score in zip(requests, scores[:, 0].tolist(), strict=True)
        ]

    def key(self, request: Vibration) -> str:
        return request.sensor

    def discover(self, folder: Path) -> Iterator[Item]:
        for path in sorted(folder.glob("*.csv")):
            yield Item(id=re.sub(r"[^A-Za-z0-9._-]", "_", path.stem)[:64], paths=(path,))

    def load(self, item: Item) -> Vibration:
        (path,) = item.paths
        if path.stat().st_size > 100_000:
            raise InputError(f"{path.name} is too large", hint=f"one file has {WINDOW} numbers")
        values = path.read_text(errors="replace").split()
        return self.parse(json.dumps({"sensor": item.id, "samples": values}).encode())
