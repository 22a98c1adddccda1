"""Batches made in a GPU's memory: the same cases as on a CPU."""

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_batches_of_the_host_loader(tmp_path, dtype):
    for package in ("yaml", "pydantic", "tqdm", "deepspeed"):
        pytest.importorskip(package)
    from launch.training.device_batches import DeviceBatches
    from launch.training.loader import BatchSplit, SampleOrder, micro_batches
    from lightningdit.data import LatentDataset
    from lightningdit.device_latents import DeviceLatents
    from tests.test_launch_device_batches import GLOBAL, SETS, STEPS, write

    for name, kind in SETS.items():
        write(tmp_path / name, *kind)
        data = LatentDataset(tmp_path / name, latent_dtype=dtype, latent_multiplier=0.7, seed=3)
        order, split = SampleOrder(len(data), GLOBAL, 5), BatchSplit(GLOBAL, 1, 4)
        options = {"first_step": 1, "last_step": STEPS, "num_workers": 2, "pin_memory": False}
        made = DeviceBatches(DeviceLatents(data, "cuda"))
        both = (micro_batches(source, order, split, 0, **options) for source in (made, data))
        for on_device, on_host in zip(*both, strict=True):
            assert all(value.is_cuda for value in on_device.values())
            assert all(torch.equal(on_device[key].cpu(), value) for key, value in on_host.items())
