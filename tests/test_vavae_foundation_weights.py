"""Files of a foundation model's weights: timm's layout, the authors' own, and files of something else."""

import re

import pytest
import torch

from common.tensors import WeightsError, write_tensors
from tests.foundation_models import GRID, images, section, timm_network
from tests.golden import close
from vavae.foundation import FoundationModel
from vavae.foundation.names import SHORT_NAMES


def load(name: str, path, **arguments) -> FoundationModel:
    return FoundationModel.from_config(section(name, weights=str(path), model_args=arguments), GRID)


def renamed(state: dict, *swaps: tuple[str, str]) -> dict:
    """The tensors under names in which each pattern, in order, is replaced."""
    names = {key: key for key in state}
    for old, new in swaps:
        names = {key: re.sub(old, new, name) for key, name in names.items()}
    return {names[key]: value for key, value in state.items()}


def dinov2(state: dict) -> dict:
    return renamed(state, (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")) | {"mask_token": torch.zeros(1, 32)}


def dinov2_with_registers(state: dict) -> dict:
    """There the class token has a position of its own, here it is summed."""
    position = torch.randn(1, 1, 32)
    state = state | {
        "pos_embed": torch.cat([position, state["pos_embed"]], 1),
        "cls_token": state["cls_token"] - position,
    }
    return renamed(state, ("reg_token", "register_tokens")) | {"mask_token": torch.zeros(1, 32)}


def dinov3(state: dict) -> dict:
    state = renamed(state, ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("reg_token", "storage_tokens"))
    unused = {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(4)}
    for block in (0, 1):  # biases that are 0 in these models
        unused |= {f"blocks.{block}.attn.qkv.{kind}": torch.zeros(96) for kind in ("bias", "bias_mask")}
    return state | unused


OPEN_CLIP = (
    (r"^patch_embed\.proj", "conv1"),
    ("^norm_pre", "ln_pre"),
    (r"^norm\.", "ln_post."),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"norm([12])", r"ln_\1"),
    (r"attn\.qkv\.", "attn.in_proj_"),
    (r"attn\.proj", "attn.out_proj"),
    (r"^blocks\.", "transformer.resblocks."),
    ("^pos_embed", "positional_embedding"),
    ("^cls_token", "class_embedding"),
    ("^", "visual."),
)


def open_clip(state: dict) -> dict:
    kept = {key: value for key, value in state.items() if not key.startswith(("head", "attn_pool"))}
    state = renamed(kept, *OPEN_CLIP)
    state["visual.class_embedding"] = state["visual.class_embedding"][0, 0]
    state["visual.positional_embedding"] = state["visual.positional_embedding"][0]
    return state | {"token_embedding.weight": torch.zeros(5, 4), "visual.proj": torch.zeros(32, 7)}


def open_clip_of_timm(state: dict) -> dict:
    return renamed(state, ("^", "visual.trunk.")) | {"text.token_embedding.weight": torch.zeros(5, 4)}


def eva02(state: dict) -> dict:
    swaps = ("^fc_norm", "norm"), (r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2"), (r"mlp\.fc2", "mlp.w3")
    state = renamed({key: value for key, value in state.items() if not key.startswith("head")}, *swaps)
    state = renamed(state, (r"mlp\.norm", "mlp.ffn_ln"), (r"q_proj\.bias", "q_bias"), (r"v_proj\.bias", "v_bias"))
    return state | {"mask_token": torch.zeros(1, 1, 32), "lm_head.weight": torch.zeros(9, 32)}


def sam(state: dict) -> dict:
    state = renamed(state, (r"mlp\.fc", "mlp.lin"), ("^", "image_encoder."))
    state = {key: value for key, value in state.items() if "head" not in key}
    return state | {"mask_decoder.iou_token.weight": torch.zeros(1, 8)}


AUTHORS = {
    "dinov2-g": (dinov2, None),
    "dinov2-s-reg": (dinov2_with_registers, None),
    "dinov3-b": (dinov3, None),
    "mae-b": (lambda state: {key: value for key, value in state.items() if "head" not in key}, "model"),
    "clip-b": (open_clip, "state_dict"),
    "siglip2-b": (open_clip_of_timm, None),
    "pe-core-b": (open_clip, None),
    "sam-b": (sam, None),
    "eva02-b": (eva02, "module"),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_a_file_of_the_authors_gives_the_same_features_as_timms(tmp_path, capsys, name):
    network, (convert, entry) = timm_network(name), AUTHORS[name]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    write_tensors(tmp_path / "timm.safetensors", state)
    theirs = convert(state)
    assert theirs.keys() != state.keys()
    torch.save(theirs if entry is None else {entry: theirs, "epoch": 3}, tmp_path / "theirs.pth")
    sized = {"img_size": 48} if name.startswith("sam") else {}
    got, want = (load(name, tmp_path / file, **sized)(images()) for file in ("theirs.pth", "timm.safetensors"))
    close(name, got, want, atol=1e-6 * want.abs().max().item())
    assert capsys.readouterr().out == ""


def test_heads_are_left_out_and_may_be_missing(tmp_path, caplog):
    network = timm_network("siglip2-b")
    state = network.state_dict()
    heads = {key for key in state if key.startswith(("head.", "attn_pool."))}
    assert any(key.startswith("attn_pool.") for key in heads) and "head.weight" in heads
    write_tensors(tmp_path / "whole.safetensors", state | {"fc_norm.weight": torch.ones(32)})
    write_tensors(tmp_path / "bare.safetensors", {k: v for k, v in state.items() if k not in heads})
    caplog.clear()
    with caplog.at_level("INFO", logger="vavae.foundation.weights"):
        whole, bare = (
            load("siglip2-b", tmp_path / "whole.safetensors"),
            load("siglip2-b", tmp_path / "bare.safetensors"),
        )
    assert torch.equal(whole(images()), bare(images()))
    said = [record.getMessage() for record in caplog.records if record.name == "vavae.foundation.weights"]
    assert said == [f"{tmp_path}/whole.safetensors: left out {len(heads) + 1} tensors of heads"]


def test_what_is_saved_comes_back(tmp_path):
    """SAM's relative positions are gathered, but written as timm names and shapes them."""
    torch.manual_seed(0)
    model = FoundationModel.from_config(section("sam-b", model_args={"img_size": 64}), GRID, pretrained=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save(tmp_path / "sam.safetensors")
    first, second = (load("sam-b", tmp_path / "sam.safetensors", img_size=64) for _ in range(2))
    timms = {key for key in timm_network("sam-b").state_dict() if not key.startswith("head")}
    assert first.vit.state_dict().keys() == timms
    assert torch.equal(first(images()), second(images())) and first(images()).std() > 0
    table = model.vit.blocks[1].attn.rel_pos_h.parameter
    assert table.shape == (7, 16) and torch.equal(first.vit.state_dict()["blocks.1.attn.rel_pos_h"], table)


# Files of something else


def tokenizer_in_training() -> dict:
    keys = ("encoder.conv_in.weight", "decoder.conv_in.weight", "linear_proj.weight", "loss.logvar")
    return {key: torch.zeros(4) for key in (*keys, "foundation_model.model.norm.weight")}


def altered(name: str, **arguments) -> dict:
    return timm_network(name, **arguments).state_dict()


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("dinov2-s", lambda: altered("mae-b", patch_size=14), r"missing: blocks\.0\.ls1\.gamma"),
        ("mae-b", lambda: altered("dinov2-s", patch_size=16), r"unexpected: blocks\.0\.ls1\.gamma"),
        ("mae-b", lambda: altered("mae-h"), "patch_embed.proj.weight has patches of 14 × 14 pixels where .* 16 × 16"),
        ("mae-b", lambda: altered("mae-b", embed_dim=64), r"of another shape: cls_token \[1, 1, 64\] where .* 32\]"),
        ("mae-b", lambda: altered("mae-b", depth=3), r"unexpected: blocks\.2"),
        ("mae-b", lambda: altered("siglip2-b"), "timm cannot convert it|missing: cls_token"),
        ("sam-b", lambda: altered("mae-b"), r"missing: blocks\.0\.attn\.rel_pos_h"),
        ("eva02-b", lambda: altered("mae-b", patch_size=14), r"missing: .*q_proj"),
        ("dinov3-b", lambda: altered("clip-b"), r"missing: reg_token"),
        ("mae-b", tokenizer_in_training, r"missing: cls_token, pos_embed, .*unexpected: encoder\.conv_in\.weight"),
        ("mae-b", lambda: altered("mae-b") | {"norm.weight": torch.full((32,), torch.nan)}, "not finite: norm.weight"),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path, name, content, reason):
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {key: value.contiguous() for key, value in content().items()})
    with pytest.raises(WeightsError) as raised:
        load(name, path)
    message = str(raised.value)
    assert message.startswith(f"{path} as timm model {SHORT_NAMES[name]} (in timm's layout, or its authors')"), message
    assert re.search(reason, message), message


def test_a_file_that_is_missing_or_only_points_to_one_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"absent\.safetensors.* does not exist"):
        load("mae-b", tmp_path / "absent.safetensors")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(WeightsError, match=r"pointer\.safetensors .*(LFS|lfs)"):
        load("mae-b", tmp_path / "pointer.safetensors")


def test_weights_that_are_read_leave_the_callers_random_state(tmp_path):
    write_tensors(tmp_path / "weights.safetensors", timm_network("mae-b").state_dict())
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    load("mae-b", tmp_path / "weights.safetensors")
    FoundationModel.from_config(section("mae-b"), GRID, pretrained=False)
    assert torch.equal(torch.rand(1), want)
