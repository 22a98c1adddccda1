"""Captured steps on a GPU: the same cases as on a CPU."""

import pytest

from kernels.backends.device import cuda_reasons


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["inductor", "cudagraphs"])
@pytest.mark.parametrize("name", ["euler-linear", "rk4", "sde-heun", "unguided"])
def test_graphs_of_a_device_are_the_loop(name, compile):
    """Batches of a second, smaller size too; by the tests' tolerance, as compiled products round otherwise."""
    if reasons := cuda_reasons():
        pytest.skip("; ".join(reasons))
    for package in ("pydantic", "torchdiffeq"):
        pytest.importorskip(package)
    from lightningdit.config import SampleConfig
    from lightningdit.flow import Transport
    from lightningdit.sampler import sample
    from tests.golden import close
    from tests.test_lightningdit_step_graphs import GUIDED, NULL, SETTINGS, SHAPE, Y, batch_sampler, golden_model

    network, labels = golden_model("a").cuda(), Y.cuda()
    config = SampleConfig(**GUIDED | SETTINGS[name])
    want = sample(network, Transport(), config, labels, [0, 1, 2], shape=SHAPE, null_label=NULL).latents
    made = batch_sampler(network, config, compile=compile)
    for places in ([0, 1, 2], [2, 0], [1]):
        got = made(labels[places], places).latents
        close(f"samples {places}", got.cpu(), want[places].cpu(), atol=2e-4)
