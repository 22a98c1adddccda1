"""Pictures: strips between samples and from noise to data, nearest images, names of classes."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from launch import sample, show
from launch.evaluation.image_source import open_images
from launch.sampling.class_names import class_captions, imagenet_names
from launch.sampling.neighbours import nearest_images
from launch.sampling.picture import picked_for_picture
from launch.sampling.strips import BlendedLabels, denoising, interpolation, predicted_data, slerp
from lightningdit.config import TransportConfig
from lightningdit.flow import Transport
from tests import toy
from tests.tiny_weights import a_run, document, write_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def generator(weights):
    run = a_run(weights, cfg_scale=2.0)
    return sample.make_generator(run, run.sampling(), np.array([0]))[0]


def test_slerp_keeps_the_length_and_ends_where_it_should():
    a, b = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    path = slerp(a, b * a.norm() / b.norm(), torch.tensor([0.0, 0.25, 0.5, 1.0]))
    assert torch.allclose(path.flatten(1).norm(dim=1), a.norm()) and torch.allclose(path[0], a)
    angles = [torch.nn.functional.cosine_similarity(a.flatten(), p.flatten(), 0).arccos().item() for p in path]
    assert angles == pytest.approx([0, angles[3] / 4, angles[3] / 2, angles[3]], abs=1e-6)
    assert torch.allclose(slerp(a, a, torch.tensor([0.3]))[0], a)


def test_labels_blend_along_a_line_and_the_null_label_does_not():
    table = torch.nn.Embedding(4, 5)
    blended = BlendedLabels(table, 2, torch.tensor([0.0, 0.25, 1.0]), null_label=3)
    found = blended(torch.tensor([1, 1, 1, 3, 3, 3]))
    one, two, null = table.weight[1], table.weight[2], table.weight[3]
    assert torch.allclose(found, torch.stack([one, 0.75 * one + 0.25 * two, two, null, null, null]), atol=1e-6)


def test_an_interpolation_ends_in_the_samples_themselves(weights, generator, tmp_path):
    """Of indices 4 and 2, of classes 1 and 2, as sampling makes them."""
    sample.generate(a_run(weights, cfg_scale=2.0, fid_num=5), tmp_path, labels=[0, 0, 2, 0, 1])
    with np.load(tmp_path / "samples.npz") as content:
        want = content["arr_0"].astype(int)
    strip = interpolation(generator, [4, 2], [1, 2], 5).numpy().astype(int)
    assert np.abs(strip[0] - want[4]).max() <= 1 and np.abs(strip[-1] - want[2]).max() <= 1
    steps = np.abs(np.diff(strip, axis=0)).mean((1, 2, 3))
    assert (steps > 0).all() and steps.max() < np.abs(strip[-1] - strip[0]).mean()


def test_a_denoising_ends_in_the_sample_and_predicts_it_at_the_end(weights, generator, tmp_path):
    sample.generate(a_run(weights, cfg_scale=2.0, fid_num=2), tmp_path)
    with np.load(tmp_path / "samples.npz") as content:
        want = content["arr_0"].astype(int)
    found = denoising(generator, [0, 1], [0, 1], 3)
    assert found.times[0] == 0 and found.times[-1] == pytest.approx(1) and len(found.times) == 3
    for images in (found.states, found.predictions):
        assert images.shape == (2, 3, 8, 8, 3) and np.abs(images[:, -1].numpy().astype(int) - want).max() <= 1
    assert not torch.equal(found.states[:, 0], found.predictions[:, 0])
    with pytest.raises(ValueError, match="2 to num_sampling_steps 4"):
        denoising(generator, [0], [0], 5)


@pytest.mark.parametrize("path", ["Linear", "GVP", "VP"])
def test_the_predicted_data_are_those_that_the_path_came_from(path):
    transport = Transport.from_config(TransportConfig(path_type=path))
    x1, x0 = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    xt, velocity = transport.interpolate(x0, x1, t)
    assert torch.allclose(predicted_data(transport, xt, velocity, t), x1, rtol=1e-5, atol=1e-5)


def test_nearest_images_are_those_of_brute_force(tmp_path):
    toy.write_images(tmp_path / "images", 10, size=8)
    images = open_images(tmp_path / "images")
    pixels = torch.cat(list(images.batches(3))).double() / 255
    samples = (torch.cat(list(images.batches(3)))[[7, 2]].int() + 3).clamp(0, 255).byte()
    found = nearest_images(samples, images, 4, batch_size=3)
    distances = np.array([[math.sqrt(((s.double() / 255 - p) ** 2).mean()) for p in pixels] for s in samples])
    order = distances.argsort(1, kind="stable")[:, :4]
    assert found.indices.tolist() == order.tolist() and found.indices[:, 0].tolist() == [7, 2]
    np.testing.assert_allclose(found.distances, np.take_along_axis(distances, order, 1), rtol=1e-5)
    assert torch.equal(found.images.double() / 255, pixels[found.indices])
    with pytest.raises(ValueError, match="holds 10 images; 11 neighbours"):
        nearest_images(samples, images, 11)
    with pytest.raises(ValueError, match=r"samples are 4×4, .* holds 8×8"):
        nearest_images(samples[:, :4, :4], images, 1)


def test_names_of_imagenet_stand_beside_labels_of_models_that_have_none():
    imagenet = imagenet_names()
    assert (imagenet[0], imagenet[207], imagenet[388], imagenet[999]) == (
        "tench",
        "golden retriever",
        "giant panda",
        "toilet tissue",
    )
    assert class_captions(None, 1000)[388] == "388 giant panda"
    from timm.data import ImageNetInfo

    ids = ImageNetInfo().label_names()
    assert class_captions(ids, 1000)[207] == "207 golden retriever"
    assert class_captions(ids[::-1], 1000)[0] == f"0 {ids[-1]}", "of another order: no names that may be wrong"
    assert class_captions(["cat", "dog"], 2) == ["0 cat", "1 dog"] and class_captions(None, 2) == ["0", "1"]
    assert class_captions([f"c{i}" for i in range(1000)], 1000)[3] == "3 c3"


def test_the_picture_shows_whole_grids_and_else_some_of_ten_classes():
    labels = np.arange(5000) % 1000
    assert picked_for_picture(labels, None).tolist() == list(range(10))
    assert picked_for_picture(labels[:24], 8).tolist() == list(range(24))
    few = picked_for_picture(np.repeat([5, 1, 9], 30), None)
    assert few.tolist() == [*range(10), *range(30, 40), *range(60, 70)]


def test_the_program_draws_each(weights, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(document(weights)))
    toy.write_images(tmp_path / "images", 6, size=8)
    sample.generate(a_run(weights, format="png", fid_num=3), tmp_path / "samples")
    strip = [str(config), "--labels", "1,2", "--device", "cpu", "--columns", "4", "--output"]
    assert show.main(["interpolation", *strip, str(tmp_path / "a.png"), "sample.seed=1"]) == 0
    assert show.main(["denoising", *strip, str(tmp_path / "b.png")]) == 0
    where = ["--samples", str(tmp_path / "samples"), "--images", str(tmp_path / "images"), "--device", "cpu"]
    assert show.main(["nearest", *where, "--count", "2", "--columns", "3", "--output", str(tmp_path / "c.png")]) == 0
    for name, key in (("a", "weights"), ("b", "times"), ("c", "distances")):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 4 * 64
        assert json.loads((tmp_path / f"{name}.json").read_text())[key]
    for arguments, why in (
        (["grid"], "show grid: what to show is one of"),
        (["denoising", *strip, str(tmp_path / "d.png"), "sample.mode=SDE"], "strips follow an ODE"),
        (["interpolation", *strip, str(tmp_path / "d.png"), "--indices", "0"], "--labels 1,2: one, or as many"),
        (["interpolation", *strip, str(tmp_path / "d.png"), "--indices", "0,x"], "--indices 0,x: whole numbers"),
        (["interpolation", *strip, str(tmp_path / "d.jpg")], "pictures are .png"),
    ):
        with pytest.raises(ValueError, match=why):
            show.main(arguments)
    assert not (tmp_path / "d.png").exists()
