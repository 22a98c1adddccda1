"""The evaluation program, and the networks that it compares images by."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from launch import evaluate
from launch.evaluation import features
from tests import toy
from tests.measured import (
    FACTS,
    distance,
    images,
    likeness,
    means,
    peak_ratio,
    save_folder,
    small_foundation,
    small_tokenizer,
)
from vavae.weights import write_export


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.mark.parametrize("names", [("samples", "reference"), ("originals", "reconstructions")])
def test_the_program_asks_for_one_size_before_it_loads_networks(tmp_path, monkeypatch, names):
    for network in ("_extractor", "perceptual_distance"):
        monkeypatch.setattr(evaluate, network, None)
    for name, size in zip(names, (16, 32), strict=True):
        np.savez(tmp_path / f"{name}.npz", images(0, 3, size=size).numpy())
    arguments = [text for name in names for text in (f"--{name}", str(tmp_path / f"{name}.npz"))]
    with pytest.raises(ValueError, match=r"16×16, .* of 32×32: they cannot be compared"):
        evaluate.main(arguments)


@pytest.fixture(scope="module")
def foundation(tmp_path_factory):
    return small_foundation(tmp_path_factory.mktemp("foundation"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        *(("grid", value, "grid: a whole number is wanted") for value in ("2", "4", 2.0, 4.5, None, True, [4], {})),
        *(("grid", value, "grid: must be at least 1") for value in (0, -2)),
        ("grid", 10**6, "grid: must be at most"),
        *(("config", value, "config: a section of keys is wanted") for value in (5, None, [], "x")),
        ("config", {"model_nam": "x"}, "config: .*did you mean 'model_name'"),
        ("config", {"model_args": {"depth": "1"}}, r"config\.model_args: .*depth: a whole number"),
        ("config", {"model_name": "a\0b"}, r"config\.model_name: .*not allowed in names"),
    ],
)
def test_what_is_wrong_in_the_description_of_a_foundation_model_is_named(tmp_path, foundation, key, value, words):
    facts = json.loads(foundation.with_suffix(".json").read_text())
    (tmp_path / "net.json").write_text(json.dumps(facts | {key: value}))
    with pytest.raises(ValueError, match=f"needs net.json beside it, .*{words}") as e:
        features.FoundationFeatures.from_file(tmp_path / "net.safetensors")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ("[]", "its content: "),
        ("3", "its content: "),
        ('{"kind": "vavae", "config": {}}', "is of kind 'vavae', not 'foundation'"),
        ('{"grid": ' + 5000 * "1" + "}", "is too long"),
    ],
)
def test_what_is_no_description_of_a_foundation_model_is_refused(tmp_path, text, words):
    (tmp_path / "net.json").write_text(text)
    with pytest.raises(ValueError, match=f"needs net.json beside it, .*{words}") as e:
        features.FoundationFeatures.from_file(tmp_path / "net.safetensors")
    assert "sys.set" not in str(e.value)


@pytest.mark.parametrize("key", ["config", "grid"])
def test_a_description_of_a_foundation_model_is_whole(tmp_path, foundation, key):
    facts = json.loads(foundation.with_suffix(".json").read_text())
    del facts[key]
    (tmp_path / "net.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"needs net.json beside it, .*{key}: is missing"):
        features.FoundationFeatures.from_file(tmp_path / "net.safetensors")


def tokens(foundation, pixels: np.ndarray) -> np.ndarray:
    """The means over a vision transformer's tokens, [N, 12], by timm, for uint8 images."""
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=2, num_classes=10
    ).eval()
    net.load_state_dict(load_file(foundation), strict=False)
    x = torch.from_numpy(pixels / 127.5 - 1).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        return net.forward_features(x)[:, 1:].mean(1).double().numpy()  # the first is no place in the image


def test_program_on_samples(tmp_path, foundation, capsys):
    np.savez(tmp_path / "samples.npz", images(14, 30).numpy())
    (tmp_path / "samples.json").write_text(json.dumps(FACTS | {"seed": 5}))
    save_folder(tmp_path / "real", images(15, 40, size=20))
    run = [
        "--samples",
        str(tmp_path / "samples.npz"),
        "--reference",
        str(tmp_path / "real"),
        "--image-size",
        "16",
        "--foundation",
        str(foundation),
        "--set",
        "nfe=98",
        "--output",
        str(tmp_path / "out" / "report.json"),
    ]
    assert evaluate.main(run) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["nfe"] == 98 and report["solver"] == "euler" and report["seed"] == 5 and report["samples"] == 30
    assert report["features"] == "foundation model net.safetensors"
    real = [Image.fromarray(x.numpy()).resize((16, 16), Image.BICUBIC) for x in images(15, 40, size=20)]
    fake = tokens(foundation, images(14, 30).numpy())
    fid = distance(fake, tokens(foundation, np.stack([np.asarray(image) for image in real])))
    assert report["metrics"]["fid"] == pytest.approx(fid, rel=1e-3)
    out = capsys.readouterr().out
    assert f"{fid:.4f}" in out and "guidance          2.0" in out and "sfid            not measured" in out
    how = {"decoder": "pil", "decoded_on": "cpu", "exif_rotation": False, "crop": "center", "image_size": 16}
    assert report["reference"]["files"] == {"resized": 40} | how
    assert report["basis"]["fid"]["resize"].startswith("16 × 16") and report["networks"][0]["sha256"] in out
    refuses_to_set(set(report) - set(FACTS) - {"seed"}, run)


def refuses_to_set(keys, argv):
    """What a result holds beside its metadata stands; a --set of it would be lost."""
    for key in keys:
        with pytest.raises(ValueError, match=f"--set '{key}=1': {key} is what evaluate itself finds out"):
            evaluate.main([*argv, "--set", f"{key}=1"])


def test_program_on_a_tokenizer(tmp_path, tokenizer, foundation, monkeypatch):
    write_export(tmp_path / "vae.safetensors", tokenizer.state_dict(), tokenizer.config, step=1)
    folder = save_folder(tmp_path / "originals", images(16, 20))

    def no_download(weights, device, download):
        raise RuntimeError("could not download VGG-16")

    monkeypatch.setattr(evaluate, "perceptual_distance", no_download)
    run = [
        "--tokenizer",
        str(tmp_path / "vae.safetensors"),
        "--originals",
        str(folder),
        "--device",
        "cpu",
        "--foundation",
        str(foundation),
        "--posterior",
        "mode",
        "--output",
        str(tmp_path / "r.json"),
    ]
    assert evaluate.main(run) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report["metrics"]) == {"rfid", "psnr", "ssim"} and len(report["hashes"]["tokenizer"]) == 64
    assert "could not download VGG-16 (here: --lpips-weights)" in report["skipped"]["lpips"]
    original = images(16, 20).numpy()
    with torch.no_grad():
        x = torch.from_numpy(original / 127.5 - 1).float().permute(0, 3, 1, 2)
        values = (127.5 * tokenizer.decode(tokenizer.encode(x).mode()) + 128).permute(0, 2, 3, 1).numpy()
    decoded = values.clip(0, 255).astype(np.uint8)
    np.savez(tmp_path / "decoded.npz", decoded)
    run = [
        "--reconstructions",
        str(tmp_path / "decoded.npz"),
        "--originals",
        str(folder),
        "--device",
        "cpu",
        "--foundation",
        str(foundation),
        "--output",
        str(tmp_path / "s.json"),
    ]
    assert evaluate.main(run) == 0
    again = json.loads((tmp_path / "s.json").read_text())
    assert again["dtype"] == "not stated"
    refuses_to_set(set(again) - set(FACTS), run)
    want = {
        "psnr": peak_ratio(original, decoded),
        "ssim": likeness(original, decoded),
        "rfid": distance(tokens(foundation, decoded), tokens(foundation, original)),
    }
    for metrics in (report["metrics"], again["metrics"]):
        # SSIM of noise is near 0, and CPUs round a value or two of the images to other numbers.
        assert metrics == {name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in want.items()}


@pytest.mark.parametrize("option", ["--inception-weights", "--foundation", "--lpips-weights"])
@pytest.mark.parametrize("content", [None, b"damaged"])
def test_weights_that_were_named_are_not_left_out(tmp_path, monkeypatch, option, content):
    for name in ("originals", "decoded"):
        save_folder(tmp_path / name, images(19, 4))
    weights = tmp_path / "named.safetensors"
    if content is not None:
        weights.write_bytes(content)
    if option == "--lpips-weights":
        monkeypatch.setattr(evaluate, "_extractor", lambda args, device: means)
    folders = ["--originals", str(tmp_path / "originals"), "--reconstructions", str(tmp_path / "decoded")]
    with pytest.raises(ValueError, match="named"):
        evaluate.main([*folders, "--device", "cpu", option, str(weights), "--output", str(tmp_path / "r.json")])
    assert not (tmp_path / "r.json").exists()


def test_an_earlier_result_beside_the_images_changes_no_figure(tmp_path, foundation):
    """`--output` beside the images puts it where their metadata are looked for."""
    for name, seed in (("a", 21), ("b", 22)):
        np.savez(tmp_path / f"{name}.npz", images(seed, 30).numpy())

    def measured(samples, reference, *more):
        given = [
            "--samples",
            f"{tmp_path}/{samples}.npz",
            "--reference",
            f"{tmp_path}/{reference}.npz",
            "--foundation",
            str(foundation),
            "--output",
            str(tmp_path / "a.json"),
        ]
        assert evaluate.main([*given, *more]) == 0
        return json.loads((tmp_path / "a.json").read_text())

    assert measured("a", "b")["metrics"]["fid"] > 1e-3
    again = measured("a", "a", "--set", "note=x")
    assert abs(again["metrics"]["fid"]) < 1e-4 and (again["samples"], again["note"]) == (30, "x")
    with pytest.raises(ValueError, match=r"a\.json is a result of evaluate"):
        measured("a", "a", "--metadata", str(tmp_path / "a.json"))


def test_program_takes_the_reference_of_a_config(tmp_path, foundation, monkeypatch):
    np.savez(tmp_path / "samples.npz", images(17, 30).numpy())
    np.savez(tmp_path / "real.npz", images(18, 30).numpy())
    config = {
        "preset": "default",
        "data": {"data_path": "x", "fid_reference_file": str(tmp_path / "real.npz"), "image_size": 16},
        "model": {"model_type": "LightningDiT-B/1"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    given = [str(tmp_path / "run.yaml"), "--samples", str(tmp_path / "samples.npz"), "--foundation", str(foundation)]
    assert evaluate.main([*given, "--output", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["reference"]["path"] == str(tmp_path / "real.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --samples, --originals, --latents and --write-reference, got 0 of them"),
        (
            ["--samples", "a", "--originals", "b"],
            "one of --samples, --originals, .*, got 2 of them",
        ),
        (
            ["--samples", "a", "--latents", "b"],
            "one of --samples, --originals, .*, got 2 of them",
        ),
        (["--latents", "{here}/none"], "none is not a directory"),
        (["--originals", "b"], "either --reconstructions or --tokenizer"),
        (["--samples", "a"], "no reference"),
        (["--samples", "a", "--reference", "b", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--samples", "a", "--reference", "b", "--image-size", "0"], "--image-size must be at least 1, got 0"),
        (["--samples", "a", "--reference", "b", "--device", "cuda:99"], "--device 'cuda:99' is not there.*has cpu"),
        (["--samples", "a", "--reference", "b", "--device", "gpu"], "--device 'gpu' is not there.*has cpu"),
        (["--samples", "a", "--reference", "b", "--device", "mps"], "--device 'mps' is not there.*has cpu"),
        (
            ["--samples", "{here}", "--reference", "{here}", "--set", "x", "--foundation", "n"],
            "not of the form key=value",
        ),
        (["--samples", "{here}", "--reference", "{here}", "--set", "=3"], "not of the form key=value"),
        (
            ["--samples", "{here}", "--reference", "{here}", "--foundation", "none.safetensors"],
            "needs none.json beside it",
        ),
        (
            ["--samples", "{here}", "--reference", "{here}", "--inception-weights", "no.pth"],
            "cannot be read as weights",
        ),
    ],
)
def test_program_refuses(arguments, message, tmp_path):
    save_folder(tmp_path, images(0, 2))
    with pytest.raises(ValueError, match=message):
        evaluate.main([a.format(here=tmp_path) for a in arguments])


@pytest.mark.parametrize("value", [".nan", ".inf", "{a: [1, -.inf]}"])
def test_metadata_that_json_cannot_hold_are_refused_before_anything_is_measured(tmp_path, value):
    latents = str(toy.write_latents(tmp_path / "latents"))
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", images(21, 30).numpy())
    (tmp_path / "facts.json").write_text('{"nfe": NaN}')
    samples = ["--samples", f"{tmp_path}/a.npz", "--reference", f"{tmp_path}/b.npz"]
    pairs = ["--originals", f"{tmp_path}/a.npz", "--reconstructions", f"{tmp_path}/b.npz"]
    for question in (["--latents", latents], samples, pairs):
        with pytest.raises(ValueError, match=r"--set '.*(is nothing that JSON can hold|is a tag in YAML)"):
            evaluate.main([*question, "--set", f"x={value}"])
        with pytest.raises(ValueError, match=r"facts\.json is damaged: no JSON \(NaN is no finite number\)"):
            evaluate.main([*question, "--metadata", f"{tmp_path}/facts.json"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_figure_that_is_not_finite_is_none(tmp_path, monkeypatch, capsys, value):
    result = {"metrics": {"gini": 0.5, "density_cv": value}, "skipped": {}, "notes": []}
    monkeypatch.setattr(evaluate, "_latents", lambda args: result)
    with pytest.raises(ValueError, match=r"not finite, so no figure, of a: density_cv$"):
        evaluate.main(["--latents", "a", "--output", str(tmp_path / "r.json")])
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("facts", "labels", "message"),
    [
        ({"num_samples": 50_000}, [0, 1, 2], "holds 3 images, the metadata beside them promise 50,000"),
        ({}, [0, 1], "arr_1 has 2 labels of 3 images"),
        ({"classes": ["a", "b"]}, [0, 1, 2], "image 2 has label 2; labels are 0 to 1"),
    ],
)
def test_samples_that_are_not_as_described_are_refused_before_networks_are_loaded(
    tmp_path, monkeypatch, facts, labels, message
):
    monkeypatch.setattr(evaluate, "_extractor", None)
    np.savez(tmp_path / "samples.npz", images(0, 3).numpy(), np.array(labels))
    (tmp_path / "samples.json").write_text(json.dumps(facts))
    np.savez(tmp_path / "real.npz", images(1, 3).numpy())
    with pytest.raises(ValueError, match=message):
        evaluate.main(["--samples", f"{tmp_path}/samples.npz", "--reference", f"{tmp_path}/real.npz"])


def test_pairs_of_other_numbers_are_named_before_networks_are_loaded(tmp_path, monkeypatch):
    for network in ("_extractor", "perceptual_distance"):
        monkeypatch.setattr(evaluate, network, None)
    for name, count in (("a", 4), ("b", 8)):
        np.savez(tmp_path / f"{name}.npz", images(0, count).numpy())
    pairs = ["--originals", f"{tmp_path}/a.npz", "--reconstructions", f"{tmp_path}/b.npz"]
    with pytest.raises(ValueError, match=r"/a\.npz holds 4 images, .*/b\.npz 8: they do not pair"):
        evaluate.main(pairs)
