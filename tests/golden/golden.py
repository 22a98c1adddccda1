"""Load recorded vectors, compare against them, and rebuild storage-free weights.

g = G("01_dit_a")
model.load_state_dict(g.group("param/"))
close("eval output", model(g["in/x"], g["in/t"], g["in/y"]), g["out/eval"], atol=5e-6)
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

ROOT = Path(__file__).parent


class G:
    """The tensors of one recorded file by key, with its metadata."""

    def __init__(self, name: str):
        with safe_open(str(ROOT / f"{name}.safetensors"), framework="pt") as f:
            self.meta = f.metadata() or {}
            self._tensors = {key: f.get_tensor(key) for key in f.keys()}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose key starts with `prefix`, under the rest of the key."""
        return {k.removeprefix(prefix): v for k, v in self._tensors.items() if k.startswith(prefix)}


def J(name: str):
    """The JSON report beside a recorded file."""
    return json.loads((ROOT / f"{name}.json").read_text())


def close(name: str, got, want, atol: float = 5e-6, rtol: float = 0.0, relmax: float | None = None) -> None:
    """Assert |got - want| <= atol + rtol·|want|, or <= relmax·max|want| where `relmax` is given.

    Non-finite values must sit in the same places.
    """
    got, want = torch.as_tensor(got).detach().double().cpu(), torch.as_tensor(want).detach().double()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, recorded {tuple(want.shape)}"
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite), f"{name}: non-finite values in other places than recorded"
    if not finite.any():
        return
    difference, size = (got - want)[finite].abs(), want[finite].abs()
    limit = size.new_full((), relmax) * size.max() if relmax is not None else atol + rtol * size
    bad = int((difference > limit).sum())
    assert not bad, f"{name}: {bad} of {want.numel()} values off, worst {difference.max():.3e}"


def close_grads(name: str, got: dict, want: dict, relmax: float = 2e-5, zero_floor: float = 1e-5) -> None:
    """Assert every gradient of `want` within relmax of its own largest value.

    A term relative to the largest gradient of all covers tensors whose exact gradient is zero (a bias in front of a
    norm, a key bias under softmax), where only rounding is left.
    """
    missing = sorted(set(want) - set(got))
    assert not missing, f"{name}: no gradient for {missing[:5]}"
    top = max(float(w.abs().max()) for w in want.values())
    for key, w in want.items():
        limit = relmax * float(w.abs().max()) + max(relmax * zero_floor, 3e-7) * top
        worst = float((got[key].detach().double().cpu() - w.double()).abs().max())
        assert worst <= limit, f"{name}: gradient of {key} off by {worst:.3e}, limit {limit:.3e}"


def formula_weight(i: int, shape, std: float, mean: float = 0.0) -> torch.Tensor:
    """Tensor number `i` of a storage-free family: splitmix64 of (i·2^40 + j), uniform with the given mean and std."""
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        s = (np.uint64(i) << np.uint64(40)) + np.arange(count, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        s = (s ^ (s >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        s = (s ^ (s >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        s = s ^ (s >> np.uint64(31))
    uniform = (s >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return torch.from_numpy((mean + std * math.sqrt(12.0) * (uniform - 0.5)).astype(np.float32).reshape(tuple(shape)))
