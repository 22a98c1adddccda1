"""Model cards of exports: front matter that the hub's own package reads, figures of these weights alone."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import kernels
from common.files import read_json, write_json
from launch.config import VavaeRun
from launch.export import main as export_main
from launch.trained import build_diffusion, diffusion_weights, from_checkpoint
from launch.training import checkpoint
from launch.training.checkpoint_search import find_checkpoint
from lightningdit.weights import save_export
from tests import toy
from tests.tiny_weights import a_run, write_weights
from vavae.weights import fingerprint, load_tokenizer

OPS = kernels.select("reference")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


def result(sha256: str | None, fid: float, model: str = "model") -> dict:
    """As evaluate writes it."""
    said = {"hashes": {model: sha256}} if sha256 else {}
    return (
        said
        | {"images" if model == "tokenizer" else "samples": 50_000}
        | {
            "metrics": {"fid": fid, "inception_score": 171.0},
            "samples_sha256": "0" * 64,
            "reference": {"path": "/data/mine/imagenet256.npz", "images": None, "sha256": "abcdef012345" + "6" * 52},
            "features": "inception-v3-compat",
            "solver": "ODE euler, 250 points, shift 0.3",
            "guidance": "scale 6.7 on the first 3 channels from time 0.11 on",
            "dtype": "bfloat16",
            "skipped": {},
            "notes": ["a | b", "few *images*"],
        }
    )


def rows_of(card: str, title: str) -> list[list[str]]:
    """Cells of the table in a section, without its head."""
    section = card.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_a_pipelines_card_has_the_figures_that_lie_beside_the_run(weights, tmp_path):
    own = fingerprint(build_diffusion(diffusion_weights(a_run(weights)), OPS, "run"))
    (weights / "run/samples").mkdir()
    write_json(weights / "run/samples/evaluation.json", result(own, 2.1234567))
    write_json(weights / "run/other.json", result("1" * 64, 99.0))
    write_json(weights / "run/unstated.json", result(None, 98.0))
    (weights / "run/broken.json").write_text("{")
    assert export_main([str(weights / "run"), str(tmp_path / "x"), "--format", "diffusers", "--license", "mit"]) == 0
    text = (tmp_path / "x/README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "diffusers",
        "unconditional-image-generation",
        "mit",
    )
    assert {"class-conditional", "arxiv:2501.01423"} <= set(data.tags)
    fid, score = rows_of(text, "Figures")
    assert (
        fid[:4] == ["fid", "2.12346", "50,000", "ODE euler, 250 points, shift 0.3"] and score[0] == "inception\\_score"
    )
    assert fid[4].startswith("scale 6.7 on the first 3 channels") and fid[7] == "imagenet256.npz, SHA-256 abcdef012345"
    assert "* a \\| b\n* few \\*images\\*" in text and "99" not in "".join(map(str, (fid, score)))
    training = dict(rows_of(text, "Training"))
    assert training["steps"] == "7" and training["images seen"] == "56 (8 a step, of 20)" and training["seed"] == "0"
    assert 'path\\_type "Linear"' in training["transport"] and str(weights) not in text.partition("## Provenance")[0]
    assert own in text and fingerprint(load_tokenizer(weights / "tokenizer.safetensors", OPS)) in text
    assert "trust_remote_code=True" in text and "3 steps of Euler's method with guidance scale\n2 (constant)" in text


def test_figures_of_other_weights_are_refused(weights, tmp_path):
    write_json(tmp_path / "other.json", result("1" * 64, 3.0))
    write_json(tmp_path / "none.json", {"fid": 3.0})
    for name, why in (("other", "are figures of other weights"), ("none", "is no result of evaluate")):
        argv = [str(weights / "run"), str(tmp_path / "x"), "--format", "diffusers", "--results"]
        with pytest.raises(ValueError, match=f"--results .*{name}.json {why}"):
            export_main([*argv, str(tmp_path / f"{name}.json")])
        assert not (tmp_path / "x").exists()
    write_json(tmp_path / "unstated.json", result(None, 4.5))
    assert export_main([*argv, str(tmp_path / "unstated.json")]) == 0
    assert rows_of((tmp_path / "x/README.md").read_text(encoding="utf-8"), "Figures")[0][:2] == ["fid", "4.5"]


def test_a_tokenizers_card_takes_no_figures_of_samples(weights, tmp_path):
    """They state its hash as well: it decoded them."""
    source = tmp_path / "tokenizer.safetensors"
    shutil.copytree(weights, tmp_path, dirs_exist_ok=True)
    own = fingerprint(load_tokenizer(source, OPS))
    of_samples = result("1" * 64, 2.0)
    of_samples["hashes"]["tokenizer"] = own
    write_json(tmp_path / "evaluation.json", of_samples)
    write_json(tmp_path / "rfid.json", result(own, 0.5, "tokenizer"))
    write_json(tmp_path / "none.json", {"metrics": {"fid": 3.0}, "made": {"hashes": {"model": "1" * 64}}})
    assert export_main([str(source), str(tmp_path / "x"), "--card"]) == 0
    assert [row[1] for row in rows_of((tmp_path / "x.md").read_text(encoding="utf-8"), "Figures")] == ["0.5", "171"]
    for name, why in (("evaluation", "are figures of samples, not"), ("none", "is no result of evaluate: it lacks")):
        with pytest.raises(ValueError, match=f"{name}.json {why}"):
            export_main(
                [str(source), str(tmp_path / f"of_{name}"), "--card", "--results", str(tmp_path / f"{name}.json")]
            )


def test_figures_decoded_by_another_tokenizer_are_refused(weights, tmp_path):
    own = fingerprint(build_diffusion(diffusion_weights(a_run(weights)), OPS, "run"))
    other = result(own, 2.5)
    other["hashes"]["tokenizer"] = "2" * 64
    write_json(tmp_path / "other.json", other)
    write_json(tmp_path / "reconstructions.json", result("2" * 64, 0.5, "tokenizer"))
    argv = [str(weights / "run"), str(tmp_path / "x"), "--format", "diffusers", "--results"]
    for name, why in (("other", "other weights .*tokenizer's 2222"), ("reconstructions", "a tokenizer alone")):
        with pytest.raises(ValueError, match=f"{name}.json are figures of {why}"):
            export_main([*argv, str(tmp_path / f"{name}.json")])


def test_what_goes_to_others_tells_no_folder_of_this_machine(weights, tmp_path):
    """A run's pipeline, one of weights that tell neither transport nor settings, and tokenizers, with their cards."""
    network = from_checkpoint(find_checkpoint(weights / "run"))
    untold = {key: value for key, value in network.extra.items() if key != "transport"}
    save_export(tmp_path / "untold", replace(network, sample=None, extra=untold))
    checkpoint.save(tmp_path / "vavae", *tokenizers_checkpoint(weights))
    told = result(None, 2.0) | {"notes": [f"the reference is {tmp_path}/real.npz, of https://example.org/a/b"]}
    write_json(tmp_path / "told.json", told | {"features": f"{tmp_path}/inception.pt"})
    tokenizer = str(weights / "tokenizer.safetensors")
    for source, *more in (
        (weights / "run", "--results", tmp_path / "told.json"),
        (tmp_path / "untold.safetensors", "--tokenizer", tokenizer),
        (tokenizer, "--card"),
        (tmp_path / "vavae", "--card"),
    ):
        folder = tmp_path / "out" / Path(source).stem
        assert export_main([str(source), str(folder), "--format", "diffusers", *map(str, more)]) == 0
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) == 2 * 8 + 2 * 3
    folders = [str(folder).encode() for folder in (tmp_path, weights)]
    assert [path for path in written if any(folder in path.read_bytes() for folder in folders)] == []
    card = (tmp_path / "out/untold/README.md").read_text(encoding="utf-8")
    assert "untold.safetensors does not tell its transport" in card
    card = (tmp_path / "out/run/README.md").read_text(encoding="utf-8")
    assert "* the reference is real.npz, of https://example.org/a/b" in card and "| inception.pt |" in card


def tokenizers_checkpoint(weights) -> tuple[dict, dict]:
    tokenizer = load_tokenizer(weights / "tokenizer.safetensors", OPS)
    run = VavaeRun(preset="default", model=tokenizer.config, data={"data_path": "images", "image_size": 8})
    description = toy.checkpoint_state(3, "vavae", "autoencoder", config=run.model_dump(mode="json"))
    return description, {"autoencoder": dict.fromkeys(("model", "ema"), tokenizer.state_dict())}


def test_cards_of_other_exports(weights, tmp_path):
    assert export_main([str(weights / "run"), str(tmp_path / "net"), "--card"]) == 0
    text = (tmp_path / "net.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.library_name == "lightningdit" and "sample CONFIG ckpt_path=net.safetensors" in text
    source = weights / "tokenizer.safetensors"
    own = fingerprint(load_tokenizer(source, OPS))
    write_json(tmp_path / "r.json", result(own, 0.5, "tokenizer"))
    named = ["--card", "--results", str(tmp_path / "r.json")]
    assert export_main([str(source), str(tmp_path / "vae"), "--format", "diffusers", *named]) == 0
    assert export_main([str(source), str(tmp_path / "copy"), *named]) == 0
    for path, library in ((tmp_path / "vae/README.md", "diffusers"), (tmp_path / "copy.md", "lightningdit")):
        text = path.read_text(encoding="utf-8")
        assert ModelCard(text).data.library_name == library and own in text
        assert rows_of(text, "Figures")[0][:2] == ["fid", "0.5"] and "latents of 4 channels, 2 times smaller" in text
    assert read_json(tmp_path / "vae/config.json")["_class_name"] == "AutoencoderKL"


@pytest.mark.parametrize("source", ["run", "tokenizer.safetensors", "tokenizer folder"])
def test_an_export_whose_card_cannot_be_leaves_nothing(weights, tmp_path, source):
    write_json(tmp_path / "r.json", result("0" * 64, 0.5, "model" if source == "run" else "tokenizer"))
    argv = [str(weights / source.replace(" folder", ".safetensors")), str(tmp_path / "x"), "--card"]
    argv += ["--results", str(tmp_path / "r.json"), *(["--format", "diffusers"] if "folder" in source else [])]
    with pytest.raises(ValueError, match=r"r\.json"):
        export_main(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_card_replaces_none_and_what_only_a_card_holds_needs_one(weights, tmp_path):
    (tmp_path / "x.md").write_text("mine")
    for argv, why in (
        (["--card"], r"x\.md is already there"),
        (["--license", "mit"], "--license changes nothing without --card or --push"),
        (["--results", "r.json"], "--results changes nothing without --card or --push"),
    ):
        with pytest.raises(ValueError, match=why):
            export_main([str(weights / "run"), str(tmp_path / "x"), *argv])
    assert [path.name for path in tmp_path.iterdir()] == ["x.md"] and (tmp_path / "x.md").read_text() == "mine"
