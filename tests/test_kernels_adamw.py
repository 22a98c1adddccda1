"""`adamw_ema_`, every backend: against torch's AdamW with an average beside it; what a skipped step leaves alone."""

import pytest
import torch

import kernels
from kernels.testing.checks import same_bits
from tests.golden import close

OP = kernels.OPS["adamw_ema_"]
STATES = ("param", "exp_avg", "exp_avg_sq", "ema")
NUMBERS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.99}


@pytest.fixture(params=OP.backends)
def adamw(request):
    """The op on one backend; the test is skipped, with that backend's reasons, where it cannot serve the call."""
    function, _ = OP.resolve(request.param)

    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except kernels.BackendUnavailable as error:
            pytest.skip(str(error))

    return call


def state(n: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A fresh run: zero moments, the average equal to the weights."""
    param = torch.linspace(-1, 1, n, dtype=dtype)
    zeros = torch.zeros_like(param)
    return {
        "param": param,
        "grad": zeros.clone(),
        "exp_avg": zeros.clone(),
        "exp_avg_sq": zeros.clone(),
        "ema": param.clone(),
    }


def scalars(step: float = 1, lr: float = 1e-2, grad_scale: float = 1.0, skip: bool | float = False) -> dict:
    return {
        "step": torch.tensor(step),
        "lr": torch.tensor(lr, dtype=torch.float64),
        "grad_scale": torch.tensor(grad_scale),
        "skip": torch.tensor(skip),
    }


@pytest.mark.parametrize(("dtype", "relmax"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_fifty_steps_are_those_of_torch(adamw, dtype, relmax):
    """Learning rate, gradient scale and step vary; torch's optimizer gets scaled gradients and a separate average."""
    ours = state(257, dtype)
    theirs = torch.nn.Parameter(ours["param"].clone().double())
    average = theirs.detach().clone()
    optimizer = torch.optim.AdamW([theirs], lr=1.0, betas=NUMBERS["betas"], eps=1e-8, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 51):
        grad = torch.randn(257, generator=generator, dtype=dtype) * torch.linspace(1e-4, 10, 257, dtype=dtype)
        lr, scale = 1e-2 / step, 0.5 + 1 / step
        ours["grad"].copy_(grad)
        adamw(**ours, **scalars(step, lr, scale), **NUMBERS)
        optimizer.param_groups[0]["lr"] = lr
        theirs.grad = grad.double() * float(torch.tensor(scale))
        optimizer.step()
        average.lerp_(theirs.detach(), 1 - NUMBERS["ema_decay"])
    moments = optimizer.state[theirs]
    truth = {"param": theirs, "ema": average, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
    for name, want in truth.items():
        close(name, ours[name], want, relmax=relmax)


def test_first_step_bias_correction_has_all_its_digits(adamw):
    """1 − 0.999 in float32 has four digits left; the very first update would be off by 1e-5 of itself."""
    ours = state(5)
    ours["param"].zero_()
    ours["grad"].fill_(1.0)
    adamw(**ours, **scalars(1, 1.0), betas=(0.9, 0.999), eps=0.0, weight_decay=0.0, ema_decay=0.0)
    close("one unit of the learning rate", ours["param"], torch.full((5,), -1.0), atol=5e-7)
    assert torch.equal(ours["ema"], ours["param"])


@pytest.mark.parametrize("skip", [True, 1.0, 7, torch.inf])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
def test_a_skipped_step_changes_no_bit(adamw, skip, poison):
    ours = state(33)
    copy = torch.randn(33, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours["param"][3] = -0.0
    ours["grad"].fill_(poison)
    before = {name: tensor.clone() for name, tensor in (ours | {"bf16_param": copy}).items()}
    adamw(**ours, **scalars(2, grad_scale=poison, skip=skip), **NUMBERS, bf16_param=copy)
    for name, tensor in (ours | {"bf16_param": copy}).items():
        assert same_bits(tensor, before[name]), name


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_the_copy_is_the_rounded_weight_and_the_gradient_is_kept(adamw, grad_dtype):
    ours, copy = state(100), torch.full((100,), float("nan"), dtype=torch.bfloat16)
    ours["grad"] = torch.linspace(-3, 3, 100).to(grad_dtype)
    grad = ours["grad"].clone()
    assert adamw(**ours, **scalars(), **NUMBERS, bf16_param=copy) is None
    assert same_bits(copy, ours["param"].bfloat16())
    assert same_bits(ours["grad"], grad)


def test_tensors_are_changed_in_place(adamw):
    """Views of one flat buffer, as a partition is, see the update."""
    flat = torch.linspace(-1, 1, 40)
    ours = state(10) | {"param": flat[20:30]}
    ours["grad"].fill_(1.0)
    before = flat.clone()
    adamw(**ours, **scalars(), **NUMBERS)
    changed = flat != before
    assert changed[20:30].all() and not changed[:20].any() and not changed[30:].any()


def test_scalars_may_have_one_dimension(adamw):
    one, other = state(6), state(6)
    for ours, reshape in ((one, lambda t: t), (other, lambda t: t.reshape(1))):
        ours["grad"].fill_(0.3)
        adamw(**ours, **{name: reshape(t) for name, t in scalars().items()}, **NUMBERS)
    assert all(same_bits(one[name], other[name]) for name in STATES)
