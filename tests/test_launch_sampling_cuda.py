"""The two stages of sampling on a GPU: the same cases as on a CPU."""

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_decodes_on_another_stream_what_the_first_one_samples(tmp_path):
    """In one batch and in several, against one stage after the other."""
    for package in ("yaml", "pydantic", "tqdm", "torchdiffeq", "numpy"):
        pytest.importorskip(package)
    import numpy as np

    from launch import sample
    from launch.sampling.pipeline import Pipeline
    from tests.tiny_weights import a_run, write_weights

    weights = write_weights(tmp_path)
    device = torch.device("cuda")
    run = a_run(weights, fid_num=12)
    generator, _ = sample.make_generator(run, run.sampling(), np.arange(12) % 3)
    generator.to(device)
    want = generator.decode(generator.solve(range(12)))["images"].cpu().numpy().astype(int)
    with Pipeline(generator.solve, generator.decode, device) as pipeline:
        assert pipeline.unit == 1 and pipeline._stream != torch.cuda.current_stream()
        waiting = [pipeline.start(start, start + 3) for start in range(0, 12, 3)]
        found = np.concatenate([result()["images"] for result in waiting]).astype(int)
    assert np.abs(found - want).max() <= 1
