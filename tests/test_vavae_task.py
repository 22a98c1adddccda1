"""The training step of both networks: what it minimises, logs and leaves alone, and when the GAN begins."""

import copy
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import kernels
from common.tensors import WeightsError, write_tensors
from tests.golden import G, J, close
from vavae.config import AutoencoderConfig, DataConfig, FoundationConfig, LossConfig, StageConfig
from vavae.data import ImageDataset
from vavae.foundation import FoundationModel
from vavae.images import psnr, to_uint8
from vavae.task import VavaeTask, build_networks

OPS = kernels.select("reference")
TINY = AutoencoderConfig(**J("04_vae_tiny")["tiny_config"])
VIT = {"img_size": 16, "patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 2}
LOSS = {"perceptual": "none", "disc_start": 2, "disc_ndf": 8, "disc_n_layers": 1}
GAN_LOGS = {"g_loss", "d_weight", "d_loss", "logits_real", "logits_fake"}
LATENT_LOGS = {"latent_std", "latent_std_min", "dead_channels"}
PLAIN_LOGS = {"loss", "rec", "nll", "kl", "vf_distmat", "vf_cos", "vf_weight"} | LATENT_LOGS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """12 smooth images of two classes, and a small vision transformer's weights."""
    root = tmp_path_factory.mktemp("vavae")
    rng = np.random.default_rng(0)
    for index in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        (root / f"images/{index % 2}").mkdir(parents=True, exist_ok=True)
        coarse.resize((16, 16), Image.Resampling.BILINEAR).save(root / f"images/{index % 2}/{index}.png")
    torch.manual_seed(0)
    FoundationModel.classifier(foundation(root), 8, 2).save(root / "vit.safetensors")
    return root


def foundation(root, **fields) -> FoundationConfig:
    weights = str(root / "vit.safetensors")
    return FoundationConfig(model_name="vit_tiny_patch16_224", model_args=VIT, **{"weights": weights, **fields})


def make(files, *, model=TINY, stages=(), seed=0, data=None, frozen_dtype=torch.float32, **loss) -> VavaeTask:
    data = DataConfig(**{"data_path": str(files / "images"), "image_size": 16, "decoder": "pil"} | (data or {}))
    return VavaeTask(
        model=model,
        foundation=foundation(files),
        loss=LossConfig(**{**LOSS, **loss}),
        data=data,
        ops=OPS,
        seed=seed,
        global_batch_size=4,
        stages=stages,
        frozen_dtype=frozen_dtype,
    )


def batch_of(task: VavaeTask, size: int = 4) -> dict[str, torch.Tensor]:
    return task.batches.batch(torch.zeros(size, dtype=torch.int64), torch.arange(size))


def step_once(task: VavaeTask, step: int, batch=None):
    """One step's gradients, without updates: logs, and the losses each network was given."""
    losses = {}

    def backward(name: str, loss: torch.Tensor) -> None:
        losses[name] = loss.detach()
        loss.backward()

    logs = task.train_step(task.networks, batch or batch_of(task), task.draw(step, 4, "cpu"), step, backward)
    return logs, losses


def gradients(module) -> dict[str, torch.Tensor]:
    return {k: p.grad for k, p in module.named_parameters() if p.grad is not None}


def assert_same_weights(networks, others) -> None:
    for name, network in networks.items():
        other = others[name].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in network.state_dict().items())


def test_plain_steps_lower_the_reconstruction_error(files):
    torch.manual_seed(0)
    task = make(files)
    optimizers = {name: torch.optim.Adam(net.parameters(), lr=1e-3) for name, net in task.networks.items()}
    errors, batch = [], batch_of(task)
    for step in range(1, 21):
        logs, losses = step_once(task, step, batch)
        errors.append(logs["rec"].item())
        for name in losses:
            optimizers[name].step()
            optimizers[name].zero_grad()
    assert errors[-1] < 0.7 * errors[0], errors


@pytest.mark.parametrize("step, gan", [(1, False), (2, False), (3, True)])
def test_gan_begins_after_disc_start_iterations(files, step, gan):
    task = make(files)
    seen = []
    task.networks["discriminator"].register_forward_hook(lambda *args: seen.append(1))
    logs, losses = step_once(task, step)
    assert set(logs) == PLAIN_LOGS | (GAN_LOGS if gan else set())
    assert set(losses) == {"autoencoder"} | ({"discriminator"} if gan else set())
    assert len(seen) == (3 if gan else 0)  # for the generator, then real, then fake
    assert all(value.ndim == 0 and not value.requires_grad for value in logs.values())
    network = task.networks["autoencoder"]
    assert set(gradients(network)) == {k for k, _ in network.named_parameters()}


def test_a_run_without_the_gan_term_trains_with_disc_start_null(files):
    """As a published file leaves it where it says nothing of it, and `loss.disc_weight=0` turns the term off."""
    logs, losses = step_once(make(files, disc_weight=0.0, disc_start=None), 3)
    assert set(logs) == PLAIN_LOGS and set(losses) == {"autoencoder"}


def test_generator_pass_leaves_no_gradient_in_the_discriminator(files):
    task = make(files)
    found = {}

    def backward(name: str, loss: torch.Tensor) -> None:
        loss.backward()
        generator = copy.deepcopy(gradients(task.networks["autoencoder"]))
        found[name] = (len(gradients(task.networks["discriminator"])), generator)

    task.train_step(task.networks, batch_of(task), task.draw(5, 4, "cpu"), 5, backward)
    count = len(list(task.networks["discriminator"].parameters()))
    assert found["autoencoder"][0] == 0 and found["discriminator"][0] == count
    for key, value in found["autoencoder"][1].items():  # nor does the discriminator's pass touch the autoencoder
        assert torch.equal(value, found["discriminator"][1][key])
    assert all(p.requires_grad for p in task.networks["discriminator"].parameters())


def test_discriminator_is_told_images_from_reconstructions(files):
    """Its loss is lowered by calling images real: the recorded hinge, on logits recomputed in the same order."""
    task, discriminator = make(files), copy.deepcopy(make(files).networks["discriminator"])
    batch, draws, net = batch_of(task), task.draw(5, 4, "cpu"), task.networks["autoencoder"]
    with torch.no_grad():
        reconstruction = net.decode(net.encode(batch["image"]).sample(noise=draws["noise"]))
        _, real, fake = (discriminator(x) for x in (reconstruction, batch["image"], reconstruction))
    logs, losses = step_once(task, 5)
    close("real", logs["logits_real"], real.mean(), atol=1e-5)
    close("fake", logs["logits_fake"], fake.mean(), atol=1e-5)
    close("loss", losses["discriminator"], 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean()), atol=1e-5)


def test_gradient_is_that_of_the_weighted_sum(files):
    """The balancing gradients leave no trace: the plain sum under the logged weights has the same gradient."""
    task = make(files)
    logs, _ = step_once(task, 5)
    got = copy.deepcopy(gradients(task.networks["autoencoder"]))
    net, discriminator = task.networks["autoencoder"], copy.deepcopy(make(files).networks["discriminator"])
    net.zero_grad()
    batch, draws = batch_of(task), task.draw(5, 4, "cpu")
    posterior = net.encode(batch["image"])
    z = posterior.mean + posterior.std * draws["noise"]
    reconstruction = net.decode(z)
    nll = (batch["image"] - reconstruction).abs().sum() / 4
    distmat, cos = OPS.vf_loss(net.linear_proj(z), task.foundation(batch["image"]), 0.25, 0.5)
    total = nll + 1e-6 * posterior.kl().mean() + logs["vf_weight"] * (distmat + cos)
    gan = -discriminator(reconstruction).mean()

    def norm(loss: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, layer, retain_graph=True)[0].norm()

    first, last = net.encoder.conv_out.weight, net.decoder.conv_out.weight
    close("vf_weight", logs["vf_weight"], 0.1 * norm(nll, first) / (norm(distmat + cos, first) + 1e-4), rtol=1e-4)
    close("d_weight", logs["d_weight"], 0.5 * norm(nll, last) / (norm(gan, last) + 1e-4), rtol=1e-4)
    (total + logs["d_weight"] * gan).backward()
    for key, value in gradients(net).items():
        close(key, got[key], value, atol=1e-5, rtol=1e-3)


def test_batch_and_draws_decide_a_step(files):
    first, second, other = make(files), make(files), make(files, seed=1)
    for step in (1, 5):
        logs = [step_once(task, step)[0] for task in (first, second, other)]
        assert all(torch.equal(value, logs[1][key]) for key, value in logs[0].items())
        assert not torch.equal(logs[0]["loss"], logs[2]["loss"])


def test_draws_are_of_seed_and_step_for_the_whole_batch(files):
    task = make(files)
    noise = task.draw(3, 6, "cpu")["noise"]
    assert noise.shape == (6, 4, 8, 8) and noise.dtype == torch.float32
    assert torch.equal(noise, make(files).draw(3, 6, "cpu")["noise"])
    for differs in (task.draw(4, 6, "cpu"), make(files, seed=1).draw(3, 6, "cpu"), task.draw(-1, 6, "cpu")):
        assert not torch.equal(noise, differs["noise"])
    buffer = task.draw(4, 6, "cpu")
    assert task.draw(3, 6, "cpu", out=buffer)["noise"] is buffer["noise"] and torch.equal(buffer["noise"], noise)
    many = task.draw(1, 400, "cpu")["noise"]
    assert abs(many.mean().item()) < 0.02 and abs(many.std().item() - 1) < 0.02


def test_stages_change_the_loss_with_the_epochs(files):
    stages = [StageConfig(epochs=2, loss={"vf_weight": 0.5, "distmat_margin": 0.0}), StageConfig(epochs=1)]
    task = make(files, stages=stages)  # 12 images, 4 a step: 3 steps an epoch
    assert [task.loss_at(step).vf_weight for step in (1, 6, 7, 99)] == [0.5, 0.5, 0.1, 0.1]
    weights = [step_once(task, step)[0] for step in (1, 7)]
    assert weights[0]["vf_distmat"] > weights[1]["vf_distmat"]


def test_weights_have_the_published_names_and_start_from_the_seed(files):
    task = make(files)
    tops = {key.split(".")[0] for key in task.networks["autoencoder"].state_dict()}
    assert tops == {"encoder", "decoder", "quant_conv", "post_quant_conv", "linear_proj"}
    assert task.networks["autoencoder"].linear_proj.weight.shape == (24, 4, 1, 1)
    assert task.networks["autoencoder"].linear_proj.bias is None
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = make(files).networks
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_weights(task.networks, again)
    for name, network in make(files, seed=1).networks.items():
        assert not torch.equal(next(network.parameters()), next(again[name].parameters()))


def test_features_can_be_projected_instead_and_the_projection_fixed(files):
    task = make(files, reverse_proj=False, proj_fix=True)
    projection = task.networks["autoencoder"].linear_proj
    assert projection.weight.shape == (4, 24, 1, 1) and projection.bias.shape == (4,)
    before = {k: v.clone() for k, v in projection.state_dict().items()}
    step_once(task, 1)
    assert all(p.grad is None for p in projection.parameters())
    assert all(torch.equal(value, before[key]) for key, value in projection.state_dict().items())


def test_without_vf_and_gan_there_is_neither_projection_nor_discriminator(files):
    task = make(files, use_vf=False, disc_weight=0.0)
    assert set(task.networks) == {"autoencoder"} and not hasattr(task.networks["autoencoder"], "linear_proj")
    logs, losses = step_once(task, 99)
    assert set(logs) == {"loss", "rec", "nll", "kl"} | LATENT_LOGS and set(losses) == {"autoencoder"}


def test_validation_measures_without_gradients(files):
    task = make(files)
    batch, draws = batch_of(task), task.draw(-1, 4, "cpu")
    logs = task.validate(task.networks, batch, draws)
    assert set(logs) == {"rec", "nll", "kl", "vf_distmat", "vf_cos", "psnr", "ssim"} | LATENT_LOGS
    with torch.no_grad():
        net = task.networks["autoencoder"]
        reconstruction = net.decode(net.encode(batch["image"]).sample(noise=draws["noise"]))
    close("psnr", logs["psnr"], psnr(to_uint8(batch["image"]), to_uint8(reconstruction)).mean(), atol=1e-6)
    close("rec", logs["rec"], (batch["image"] - reconstruction).abs().mean(), atol=1e-6)
    assert not gradients(task.networks["autoencoder"])


def test_bfloat16_networks_train_with_losses_in_float32(files):
    task = make(files)
    for network in task.networks.values():
        network.bfloat16()
    logs, _ = step_once(task, 5)
    exact, _ = step_once(make(files), 5)
    assert {value.dtype for value in logs.values()} == {torch.float32}
    close("rec", logs["rec"], exact["rec"], atol=0, rtol=0.02)
    assert all(value.isfinite().all() for value in gradients(task.networks["autoencoder"]).values())


def test_skipped_images_are_counted_in_the_log(files, tmp_path):
    (tmp_path / "a").mkdir()
    for index in range(4):
        Image.new("RGB", (16, 16), (60 * index, 0, 0)).save(tmp_path / f"a/{index}.png")
    (tmp_path / "a/2.png").write_bytes(b"broken")
    task = make(files)
    task.batches = ImageDataset(
        DataConfig(data_path=str(tmp_path), image_size=16, decoder="pil", on_unreadable="skip", max_unreadable=0.5),
        seed=0,
    )
    skipped = step_once(task, 1)[0]["unreadable"]
    assert skipped == 1 and not skipped.is_floating_point()  # a count, to be added up and not averaged


def test_weights_of_a_published_training_checkpoint_are_taken(files, tmp_path):
    source, task = make(files, seed=3), make(files)
    tensors = dict(source.networks["autoencoder"].state_dict())
    tensors |= {f"loss.discriminator.{k}": v for k, v in source.networks["discriminator"].state_dict().items()}
    tensors["foundation_model.model.norm.weight"] = torch.zeros(24)
    write_tensors(tmp_path / "vae.safetensors", tensors)
    task.load_weights(str(tmp_path / "vae.safetensors"))
    assert_same_weights(task.networks, source.networks)
    for key in ("decoder.conv_in.bias", "linear_proj.bias"):
        odd = {k: v for k, v in tensors.items() if k != key} | ({key: torch.zeros(24)} if key not in tensors else {})
        write_tensors(tmp_path / "odd.safetensors", odd)
        with pytest.raises(WeightsError, match=f"(missing|unexpected): {key}"):
            task.load_weights(str(tmp_path / "odd.safetensors"))


def test_a_projection_begins_and_ends_with_the_vf_term(files, tmp_path, caplog):
    """A file without one starts a run with VF by its own, and says so; one with it starts a run without VF."""
    source = dict(make(files, seed=3).networks["autoencoder"].state_dict())
    bare = {k: v for k, v in source.items() if not k.startswith("linear_proj")}
    write_tensors(tmp_path / "bare.safetensors", bare)
    write_tensors(tmp_path / "aligned.safetensors", source)
    task, own = make(files), make(files).networks["autoencoder"].linear_proj.weight
    caplog.clear()
    task.load_weights(str(tmp_path / "bare.safetensors"))
    assert ["starts as initialised" in text for text in warnings(caplog)] == [True]
    assert torch.equal(task.networks["autoencoder"].linear_proj.weight, own)
    without = make(files, use_vf=False)
    without.load_weights(str(tmp_path / "aligned.safetensors"))
    for found in (task, without):
        state = found.networks["autoencoder"].state_dict()
        assert all(torch.equal(state[key], value) for key, value in bare.items())


def test_the_foundation_model_runs_where_its_features_are_used(files):
    calls = []
    for task in (make(files), make(files, vf_weight=0.0)):
        task.foundation.register_forward_hook(lambda *args: calls.append(1))
        batch, draws = batch_of(task), task.draw(0, 4, "cpu")
        step_once(task, 1)
        task.validate(task.networks, batch, draws)
        task.pictures(task.networks, batch, draws)
    assert len(calls) == 2, "training and validation of the first"


def test_the_foundation_model_is_in_no_checkpoint(files):
    """A checkpoint holds the state of `networks`, and `state_dict`."""
    task = make(files, perceptual="none")
    assert task.foundation is not None and sum(1 for _ in task.foundation.parameters()) > 10
    own = {id(value) for network in task.networks.values() for value in (*network.parameters(), *network.buffers())}
    assert own and not own & {id(value) for value in (*task.foundation.parameters(), *task.foundation.buffers())}
    kept = [key for network in task.networks.values() for key in network.state_dict()]
    assert not [key for key in kept if key.startswith(("foundation", "vit")) or "patch_embed" in key]
    assert task.state_dict().keys() == {"classes", "images"}


def test_a_checkpoint_of_other_classes_is_refused(files):
    task = make(files)
    task.load_state_dict(task.state_dict())
    task.load_state_dict({})  # as one that names none
    with pytest.raises(ValueError, match=r"trained on 2 other classes \(cat, dog\) than the \d+ of "):
        task.load_state_dict({"classes": ["cat", "dog"]})


@pytest.mark.parametrize(
    "change, error",
    [
        ({"data": {"num_classes": 3}}, "data.num_classes is 3, but .* has 2 class folders"),
        (
            {"model": AutoencoderConfig(ch=32, ch_mult=(1,) * 6, attn_resolutions=())},
            r"data.image_size 16 is not a multiple of the tokenizer's down-sampling 32",
        ),
        ({"model": TINY.model_copy(update={"in_channels": 1})}, "in_channels 1 .* images have 3"),
    ],
)
def test_sections_that_contradict_each_other_are_named(files, change, error):
    with pytest.raises(ValueError, match=error):
        make(files, **change)


def test_foundation_models_input_must_be_whole_patches(files):
    section = foundation(files, input_size=33)
    data = DataConfig(data_path=str(files / "images"), image_size=16)
    common = {"model": TINY, "loss": LossConfig(**LOSS), "data": data, "ops": OPS, "seed": 0, "global_batch_size": 4}
    with pytest.raises(ValueError, match=r"input_size 33 is no multiple of the patch"):
        VavaeTask(foundation=section, **common)
    with pytest.raises(ValueError, match="use_vf is true, but the run has no foundation section"):
        VavaeTask(foundation=None, **common)


def test_golden_tokenizer_is_what_the_task_trains():
    """The wrapper adds nothing to the recorded autoencoder but its projection."""
    golden = G("04_vae_tiny")
    net = build_networks(TINY, LossConfig(), OPS, 0, 24)["autoencoder"]
    assert set(net.state_dict()) - set(golden.group("param/")) == {"linear_proj.weight"}
    net.load_state_dict(golden.group("param/"), strict=False)
    close("moments", net.moments(golden["in/x"]), golden["out/moments"], atol=2e-5)


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_other_images_than_the_checkpoints_are_warned_of(files, tmp_path, caplog):
    """Of the same number and classes: a name or a label is another, so that indices mean others."""
    state = make(files).state_dict()
    make(files).load_state_dict(state)
    make(files).load_state_dict({"classes": state["classes"]})  # of an earlier version
    assert not warnings(caplog)
    shutil.copytree(files / "images", tmp_path / "images")
    make(files, data={"data_path": str(tmp_path / "images")}).load_state_dict(state)
    assert not warnings(caplog)  # the same, elsewhere
    first = min((tmp_path / "images").rglob("*.png"))
    first.rename(first.with_name("zz.png"))
    make(files, data={"data_path": str(tmp_path / "images")}).load_state_dict(state)
    assert "images holds other images, or labels, than the checkpoint was trained on" in caplog.text
