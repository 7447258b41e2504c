"""Random synthetic lung patches for training: nodules among vessels, airways, walls and noise.

Everything is drawn from signed distances on the network's working grid. The patches teach a
network what a blob in lung-like surroundings is; they are not patients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Float = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Random = np.random.Generator

AIR = -1000.0


@dataclass
class Scene:
    """One patch while it is painted.

    Args:
        random: source of every choice.
        shape: (z, y, x) voxels.
        spacing: mm, isotropic.
    """

    random: Random
    shape: tuple[int, int, int]
    spacing: float
    hu: Float = field(init=False)
    nodules: Bool = field(init=False)
    lung: Bool = field(init=False)
    vertices: list[npt.NDArray[np.float64]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.hu = np.full(self.shape, self.random.uniform(-920, -800), np.float32)
        self.nodules = np.zeros(self.shape, bool)
        self.lung = np.ones(self.shape, bool)

    @property
    def size(self) -> npt.NDArray[np.float64]:
        """(z, y, x) mm."""
        return np.asarray(self.shape) * self.spacing

    def near(self, low: npt.ArrayLike, high: npt.ArrayLike) -> tuple[slice, slice, slice] | None:
        """The voxels between two corners (z, y, x) in mm, or None outside the patch."""
        first = np.maximum(np.floor(np.asarray(low) / self.spacing).astype(int), 0)
        last = np.minimum(np.ceil(np.asarray(high) / self.spacing).astype(int) + 1, self.shape)
        if (last <= first).any():
            return None
        z, y, x = (slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
        return z, y, x

    def points(self, part: tuple[slice, slice, slice]) -> list[Float]:
        """z, y and x in mm of the voxel centres of a part, ready to broadcast."""
        axes = [
            ((np.arange(size, dtype=np.float32) + 0.5) * np.float32(self.spacing))[piece]
            for size, piece in zip(self.shape, part, strict=True)
        ]
        return [axes[0][:, None, None], axes[1][:, None], axes[2]]

    def paint(
        self, part: tuple[slice, slice, slice], distance: Float, hu: float, strength: float = 1.0
    ) -> None:
        """Blend ``hu`` where the signed distance (mm) is below zero, with soft edges."""
        share = np.clip(0.5 - distance / self.spacing, 0, 1) * strength
        here = self.hu[part]
        here += share * (np.float32(hu) - here)


WHOLE = (slice(None), slice(None), slice(None))


def patch(random: Random, shape: tuple[int, int, int], spacing: float = 1.5) -> tuple[Float, Bool]:
    """One patch.

    Args:
        random: source of every choice; equal state gives an equal patch.
        shape: (z, y, x) voxels.
        spacing: mm, isotropic.

    Returns:
        HU (z, y, x) float32 and the nodules' mask (z, y, x).
    """
    scene = Scene(random, shape, spacing)
    _texture(scene)
    for _ in range(random.integers(2, 13)):
        _vessel(scene, random.uniform(0.7, 3.5), contrast=random.random() < 0.3)
    for _ in range(random.integers(0, 3)):
        _airway(scene)
    if random.random() < 0.3:
        _fissure(scene)
    if random.random() < 0.15:
        _blob(scene, random.uniform(-995, -950), random.uniform(4, 20))
    if random.random() < 0.65:
        _wall(scene)
    if random.random() < 0.3:
        _mediastinum(scene)
    for _ in range(random.choice(4, p=(0.25, 0.4, 0.22, 0.13))):
        _nodule(scene)
    return _scanned(scene), scene.nodules


def _texture(scene: Scene) -> None:
    """Slow density changes: gravity, perfusion, low-attenuation patches."""
    coarse = scene.random.standard_normal((4, 5, 5)).astype(np.float32)
    zoom = [s / c for s, c in zip(scene.shape, coarse.shape, strict=True)]
    scene.hu += scene.random.uniform(0, 30) * ndimage.zoom(coarse, zoom, order=1)


def _direction(random: Random) -> npt.NDArray[np.float64]:
    vector = random.standard_normal(3)
    return cast(npt.NDArray[np.float64], vector / np.linalg.norm(vector))


def _tube(scene: Scene, start: npt.ArrayLike, end: npt.ArrayLike, radius: float, hu: float) -> None:
    a, b = np.asarray(start), np.asarray(end)
    margin = radius + 2 * scene.spacing
    part = scene.near(np.minimum(a, b) - margin, np.maximum(a, b) + margin)
    if part is None:
        return
    points, axis = scene.points(part), (b - a).astype(np.float32)
    offset = [p - np.float32(s) for p, s in zip(points, a, strict=True)]
    along = sum(o * c for o, c in zip(offset, axis, strict=True)) / max(float(axis @ axis), 1e-6)
    along = np.clip(along, 0, 1)
    square = sum((o - along * c) ** 2 for o, c in zip(offset, axis, strict=True))
    distance = np.sqrt(square, dtype=np.float32) - np.float32(radius)
    strength = min(1.0, (radius / (0.6 * scene.spacing)) ** 2)
    scene.paint(part, distance, hu, strength)


def _vessel(
    scene: Scene, radius: float, contrast: bool, start: npt.ArrayLike | None = None
) -> None:
    """A bending, tapering tube that may branch."""
    random = scene.random
    at = random.uniform(-0.1, 1.1, 3) * scene.size if start is None else np.asarray(start)
    heading, hu = (
        _direction(random),
        random.uniform(120, 280) if contrast else random.uniform(0, 80),
    )
    for _ in range(random.integers(2, 8)):
        end = at + heading * random.uniform(5, 15)
        _tube(scene, at, end, radius, hu)
        scene.vertices.append(end)
        heading = heading + 0.5 * _direction(random)
        heading /= np.linalg.norm(heading)
        at, radius = end, max(0.5, radius * random.uniform(0.8, 1.0))
        if radius > 0.9 and random.random() < 0.3:
            _vessel(scene, radius * 0.75, contrast, at)


def _airway(scene: Scene) -> None:
    """A tube of air with a wall."""
    random = scene.random
    start = random.uniform(0, 1, 3) * scene.size
    end = start + _direction(random) * random.uniform(15, 50)
    radius = random.uniform(1, 5)
    _tube(scene, start, end, radius + random.uniform(0.7, 1.6), random.uniform(-400, 0))
    _tube(scene, start, end, radius, AIR)


def _plane(scene: Scene, bend: float) -> Float:
    """Signed distance (mm) of every voxel from a bent plane near the middle."""
    random = scene.random
    normal = _direction(random)
    centre = scene.size * random.uniform(0.25, 0.75, 3)
    offset = [p - np.float32(c) for p, c in zip(scene.points(WHOLE), centre, strict=True)]
    distance = sum(o * np.float32(n) for o, n in zip(offset, normal, strict=True))
    square = sum(o * o for o in offset)
    return cast(Float, distance + np.float32(bend) * (square - distance * distance))


def _fissure(scene: Scene) -> None:
    distance = np.abs(_plane(scene, scene.random.uniform(-0.004, 0.004))) - np.float32(0.5)
    scene.paint(WHOLE, distance, scene.random.uniform(-780, -650), 0.8)


def _wall(scene: Scene) -> None:
    """Chest wall: muscle, ribs, fat, and the air outside."""
    random = scene.random
    # Negative inside the wall; the lung is where the distance is positive.
    distance = _plane(scene, random.uniform(-0.006, 0.003)) + np.float32(random.uniform(10, 45))
    scene.lung &= distance > 0
    scene.paint(WHOLE, distance, random.uniform(20, 70))
    thick = random.uniform(8, 25)
    for _ in range(random.integers(0, 4)):
        start = random.uniform(-0.2, 1.2, 3) * scene.size
        axis = _direction(random) * 60
        rib = _capsule(scene, start, start + axis, random.uniform(3, 6))
        scene.paint(WHOLE, np.maximum(rib, distance + 2), random.uniform(200, 700))
    scene.paint(WHOLE, distance + np.float32(thick), random.uniform(-120, -80))
    if random.random() < 0.5:
        scene.paint(WHOLE, distance + np.float32(thick + random.uniform(5, 30)), AIR)


def _capsule(scene: Scene, a: npt.ArrayLike, b: npt.ArrayLike, radius: float) -> Float:
    start, axis = np.asarray(a, np.float32), np.asarray(b, np.float32) - np.asarray(a, np.float32)
    offset = [p - s for p, s in zip(scene.points(WHOLE), start, strict=True)]
    along = sum(o * c for o, c in zip(offset, axis, strict=True)) / float(axis @ axis)
    along = np.clip(along, 0, 1)
    square = sum((o - along * c) ** 2 for o, c in zip(offset, axis, strict=True))
    return cast(Float, np.sqrt(square, dtype=np.float32) - np.float32(radius))


def _ellipsoid(scene: Scene, centre: npt.ArrayLike, radii: npt.ArrayLike, rough: float) -> Float:
    """Signed distance (mm, to first order) from an ellipsoid with a lobulated surface."""
    points = scene.points(WHOLE)
    scaled = [
        (p - np.float32(c)) / np.float32(r)
        for p, c, r in zip(points, np.asarray(centre), np.asarray(radii), strict=True)
    ]
    length = np.sqrt(sum(s * s for s in scaled), dtype=np.float32)
    if rough > 0:
        phase = scene.random.uniform(0, 6.28, 3)
        waves = [np.sin(3 * s + p) for s, p in zip(scaled, phase, strict=True)]
        length = length + np.float32(rough) * (waves[0] + waves[1] + waves[2])
    return cast(Float, (length - 1) * np.float32(np.mean(np.asarray(radii))))


def _blob(scene: Scene, hu: float, radius: float) -> None:
    centre = scene.random.uniform(0, 1, 3) * scene.size
    scene.paint(WHOLE, _ellipsoid(scene, centre, [radius] * 3, 0.1), hu)


def _mediastinum(scene: Scene) -> None:
    """A large piece of soft tissue, such as the heart or the aorta."""
    random = scene.random
    radii = random.uniform(18, 45, 3)
    toward = _direction(random)
    centre = scene.size / 2 + toward * (scene.size / 2 + radii * random.uniform(-0.1, 0.6))
    distance = _ellipsoid(scene, centre, radii, 0.03)
    scene.lung &= distance > 0
    scene.paint(WHOLE, distance, random.uniform(20, 250))


def _nodule(scene: Scene) -> None:
    """A solid or ground-glass blob of 4 to 30 mm, sometimes on a vessel, never in the wall."""
    random = scene.random
    diameter = float(np.exp(random.uniform(np.log(4), np.log(30))))
    centre = random.uniform(0.05, 0.95, 3) * scene.size
    if scene.vertices and random.random() < 0.2:
        centre = scene.vertices[random.integers(len(scene.vertices))]
    index = tuple(np.clip((centre / scene.spacing).astype(int), 0, np.array(scene.shape) - 1))
    if not scene.lung[index]:
        return
    radii = diameter / 2 * random.uniform(0.8, 1.25, 3)
    solid = random.random() < 0.75
    hu = random.uniform(-60, 160) if solid else random.uniform(-680, -350)
    distance = _ellipsoid(scene, centre, radii, random.uniform(0, 0.06))
    distance = np.where(scene.lung, distance, np.float32(99))
    if solid or random.random() < 0.5:
        scene.paint(WHOLE, distance, hu)
    else:  # ground glass lets the vessels through
        scene.paint(WHOLE, distance, max(hu, float(scene.hu[index])), 0.9)
    scene.nodules |= distance < 0


def _scanned(scene: Scene) -> Float:
    """What a scanner and our resampling make of it: blur, thick slices, correlated noise."""
    random, hu = scene.random, scene.hu
    hu = ndimage.gaussian_filter(hu, (0, *[random.uniform(0.2, 0.7)] * 2))
    thickness = random.uniform(0.6, 5.0) / scene.spacing if random.random() < 0.6 else 0.0
    if thickness > 1:
        hu = _thick(hu, thickness, random.uniform(0, 1))
    noise = random.standard_normal(scene.shape, dtype=np.float32)
    noise = ndimage.gaussian_filter(
        noise, (random.uniform(0.2, 0.8), *[random.uniform(0.2, 0.8)] * 2)
    )
    return cast(
        Float, hu + noise * np.float32(random.uniform(2, 40) / max(float(noise.std()), 1e-6))
    )


def _thick(hu: Float, thickness: float, phase: float) -> Float:
    """Average slices of ``thickness`` voxels, interpolated back linearly along z."""
    depth = hu.shape[0]
    centres = np.arange(phase * thickness - thickness, depth + 2 * thickness, thickness)
    rows = np.arange(depth)
    overlap = np.minimum(rows[None] + 0.5, centres[:, None] + thickness / 2) - np.maximum(
        rows[None] - 0.5, centres[:, None] - thickness / 2
    )
    average = np.clip(overlap, 0, 1)
    seen = average.sum(1) > 1e-6
    average, centres = average[seen], centres[seen]
    average /= average.sum(1, keepdims=True)
    back = np.clip(1 - np.abs(rows[:, None] - centres[None]) / thickness, 0, 1)
    back /= np.maximum(back.sum(1, keepdims=True), 1e-6)
    mix = (back @ average).astype(np.float32)
    return cast(Float, np.tensordot(mix, hu, axes=1))
