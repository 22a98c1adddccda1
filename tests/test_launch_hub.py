"""Weights from and to the hub: the real huggingface_hub, before a server on loopback; uploads before a stand-in."""

import builtins
import sys
from pathlib import Path
from unittest.mock import create_autospec

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import constants, errors

import kernels
from common.files import DownloadError
from launch import hub
from launch.config import ConfigError, LightningDiTRun
from launch.export import main as export_main
from launch.hub import Reference, download, local_copy
from launch.trained import build_tokenizer, diffusion_weights
from tests.fake_hub import COMMIT, serve
from tests.tiny_weights import document, write_weights
from vavae.weights import fingerprint, load_tokenizer

OPS = kernels.select("reference")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def repositories(weights, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("exports")
    assert export_main([str(weights / "run"), str(root / "own/net"), "--card"]) == 0
    assert export_main([str(weights / "run"), str(root / "pipeline"), "--format", "diffusers"]) == 0
    own = contents(root / "own")
    more = {"two.safetensors": b"x", "run.py": b"raise SystemExit", "other/one[1].safetensors": b"y"}
    return {"me/net": own, "me/pipeline": contents(root / "pipeline"), "me/many": own | more, "me/none": {"a.txt": b""}}


@pytest.fixture
def server(repositories, tmp_path, monkeypatch):
    with serve(repositories) as (server, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)  # of the functions that diffusers calls
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")[2]
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}" + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def a_run(weights, ckpt_path: str, vae: str | None = None) -> LightningDiTRun:
    run = document(weights) | {"ckpt_path": ckpt_path}
    run["vae"] = run["vae"] | ({"ckpt_path": vae} if vae else {})
    return LightningDiTRun.model_validate(run)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("hf://me/net", Reference("me/net")),
        ("hf:/me/net", Reference("me/net")),  # as a Path has it
        ("hf://me/net.v1@v2/a/b.safetensors", Reference("me/net.v1", "v2", "a/b.safetensors")),
        ("hf://me/net/x@y.pt", Reference("me/net", None, "x@y.pt")),
    ],
)
def test_a_reference_names_repository_revision_and_file(text, expected):
    assert Reference.read(text) == expected
    assert Reference.read(str(expected)) == expected


@pytest.mark.parametrize("text", ["hf://me", "hf://", "hf://me/net/", "hf://me/net@", "hf://me/net/../x", "hf://a b/c"])
def test_what_is_no_reference_is_said(text):
    with pytest.raises(
        ConfigError, match=r"is no reference to the hub: hf://OWNER/NAME\[@REVISION\]\[/FILE\] is wanted"
    ):
        local_copy(text)


@pytest.mark.parametrize(
    "reference", ["hf://me/net", "hf://me/net@v1", "hf://me/many/net.safetensors", "hf://me/pipeline"]
)
def test_a_network_is_sampled_from_the_hub(weights, server, reference, caplog):
    caplog.set_level("INFO", "launch")
    found, expected = (
        diffusion_weights(a_run(weights, reference)),
        diffusion_weights(a_run(weights, str(weights / "run"))),
    )
    assert all(torch.equal(found.state[name], value) for name, value in expected.state.items())
    assert found.latents.to_json() == expected.latents.to_json() and found.step == 7
    assert f"{reference}: taken from" in caplog.text
    taken = {path for command, path in server.requests if command == "GET" and "/resolve/" in path}
    assert taken and all(path.endswith((".json", ".safetensors")) for path in taken)  # no code, no pickles


def test_a_tokenizer_is_that_of_the_pipeline(weights, server, tmp_path):
    found = build_tokenizer(a_run(weights, "hf://me/pipeline", "hf://me/pipeline"), OPS)
    assert fingerprint(found) == fingerprint(load_tokenizer(weights / "tokenizer.safetensors", OPS))
    assert export_main(["hf://me/pipeline", str(tmp_path / "x")]) == 0
    assert (tmp_path / "x.safetensors").is_file()


def test_what_was_downloaded_is_taken_from_the_cache(server, monkeypatch):
    first = download(Reference("me/net"))
    gets = sum(command == "GET" and "/resolve/" in path for command, path in server.requests)
    assert download(Reference("me/net")) == first and COMMIT in str(first)
    assert gets == sum(command == "GET" and "/resolve/" in path for command, path in server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(server.requests)
    assert download(Reference("me/net")) == first
    with pytest.raises(DownloadError, match="hf://me/pipeline: the hub cannot be reached, or HF_HUB_OFFLINE is set"):
        download(Reference("me/pipeline"))
    assert len(server.requests) == asked


@pytest.mark.parametrize(
    "reference, kind, why",
    [
        ("hf://me/absent", ConfigError, "no such repository, or it is private and this token may not see it"),
        ("hf://me/net@v9", ConfigError, "hf://me/net@v9: it has no such revision"),
        ("hf://me/net/absent.pt", ConfigError, "the repository has no file absent.pt"),
        (
            "hf://me/many",
            ConfigError,
            "one safetensors file is wanted, and the repository holds net.safetensors, other",
        ),
        ("hf://me/none", ConfigError, "one safetensors file is wanted, and the repository has none"),
        ("hf://gated/net", ConfigError, "access to it has to be asked for on its page"),
        ("hf://broken/net", DownloadError, "hf://broken/net: .*418"),
    ],
)
def test_why_the_hub_gives_nothing_is_said(server, reference, kind, why):
    with pytest.raises(kind, match=why):
        local_copy(reference)


def test_stock_diffusers_loads_a_pipeline_from_the_hub(weights, server, tmp_path, monkeypatch):
    """Its code, too, which it takes from the folder of the network."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained("me/pipeline")
    pipe = diffusers.DiffusionPipeline.from_pretrained("me/pipeline", trust_remote_code=True)
    network = diffusion_weights(a_run(weights, str(weights / "run")))
    state = pipe.transformer.state_dict()
    assert state and all(torch.equal(network.state[name], value) for name, value in state.items())
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1], num_inference_steps=2).images[0].size == (8, 8)


def test_a_file_whose_name_is_a_pattern_is_that_file(server):
    assert local_copy("hf://me/many/other/one[1].safetensors").read_bytes() == b"y"


def test_a_hub_that_cannot_be_reached_is_said(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DownloadError, match="hf://me/net: the hub cannot be reached"):
        local_copy("hf://me/net")


def test_without_the_prefix_nothing_is_asked_of_the_net(weights, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="me/net does not exist; if a repository of the hub is meant, write hf://me/net"
    ):
        diffusion_weights(a_run(weights, "me/net"))
    (tmp_path / "me").mkdir()
    assert local_copy("me/net") == Path("me/net")
    assert not server.requests


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    with pytest.raises(ConfigError, match=r"pip install 'lightningdit\[hub\]'"):
        local_copy("hf://me/net")


@pytest.fixture
def api(monkeypatch):
    """The real interface of HfApi, whose calls do nothing: arguments that it does not take are errors."""
    stand_in = create_autospec(huggingface_hub.HfApi, instance=True)
    stand_in.create_commit.return_value.commit_url = "https://hub/commit/1"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    return stand_in


@pytest.mark.parametrize("format", ["own", "diffusers"])
def test_an_export_is_pushed_as_one_commit(weights, tmp_path, api, capsys, format):
    argv = [str(weights / "run"), str(tmp_path / "net"), "--format", format, "--push", "me/net", "--private"]
    assert export_main([*argv, "--revision", "v1", "--license", "mit"]) == 0
    api.create_repo.assert_called_once_with("me/net", private=True, exist_ok=True)
    api.create_branch.assert_called_once_with("me/net", branch="v1", exist_ok=True)
    (repository, operations), options = api.create_commit.call_args
    assert repository == "me/net" and options["revision"] == "v1" and options["commit_message"]
    sent = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}
    if format == "diffusers":
        assert sent == contents(tmp_path / "net")
    else:
        assert sent.keys() == {"net.safetensors", "net.json", "net.pt", "README.md"}
        assert sent["README.md"] == (tmp_path / "net.md").read_bytes()
    assert b"license: mit\n" in sent["README.md"]
    assert "me/net: " in (said := capsys.readouterr().out) and "https://hub/commit/1" in said


def test_a_push_that_fails_keeps_the_export_and_says_how_to_try_again(weights, tmp_path, api):
    api.create_repo.side_effect = errors.LocalTokenNotFoundError("no token")
    with pytest.raises(ConfigError, match=r"a token is needed: .* All is written here .*`hf upload me/net .*net`"):
        export_main([str(weights / "run"), str(tmp_path / "net"), "--format", "diffusers", "--push", "me/net"])
    assert (tmp_path / "net/model_index.json").is_file()


def test_the_check_of_a_name_needs_no_module_that_others_imported(monkeypatch):
    """In a fresh interpreter `errors` and `utils` are no attributes of the package yet."""
    for name in ("errors", "utils"):
        monkeypatch.delattr(huggingface_hub, name, raising=False)
        with pytest.raises(AttributeError, match=name):
            getattr(huggingface_hub, name)
    hub.require_upload("me/net")
    with pytest.raises(ConfigError, match="--push me/-net"):
        hub.require_upload("me/-net")


def test_a_push_to_no_repository_is_refused_before_anything_is_written(weights, tmp_path, api):
    for name in ("net", "me/net/x", "me/-net", "hf://me/net"):
        with pytest.raises(ConfigError, match=f"--push '?{name}"):
            export_main([str(weights / "run"), str(tmp_path / "net"), "--push", name])
    for option in (["--private"], ["--revision", "v1"]):
        with pytest.raises(ConfigError, match=f"{option[0]} changes nothing without --push"):
            export_main([str(weights / "run"), str(tmp_path / "net"), *option])
    assert not list(tmp_path.iterdir()) and not api.mock_calls and hub.FORM
