"""The training task: what each step draws, what it minimises, and that it learns."""

import json

import pytest
import torch
from scipy import stats

import kernels
from lightningdit.config import DataConfig, ModelConfig, SampleConfig, TransportConfig
from lightningdit.data import LatentDataset
from lightningdit.flow import Transport
from lightningdit.latents_writer import LatentsWriter, finish
from lightningdit.sampler import sample
from lightningdit.task import LightningDiTTask, check_classes
from lightningdit.weights import save_published
from tests import toy

MODEL = ModelConfig(
    input_size=4,
    patch_size=1,
    in_channels=4,
    hidden_size=48,
    depth=2,
    num_heads=2,
    num_classes=3,
    use_swiglu=True,
    use_rope=True,
    use_rmsnorm=True,
)
PAPER = TransportConfig(use_cosine_loss=True, use_lognorm=True)
PAIRED = MODEL.model_copy(update={"time_pairs": True})
MEAN = TransportConfig(objective="meanflow")
GUIDED = TransportConfig(objective="improved_meanflow", equal_times=0.5, guidance_scale=1.5)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Sixty latents of three classes, each class a constant of its own plus a little noise."""
    directory, g = tmp_path_factory.mktemp("latents"), torch.Generator().manual_seed(0)
    writer, y = LatentsWriter(directory), torch.arange(60) % 3
    x = (y.float() - 1).view(-1, 1, 1, 1) * 4 + 0.1 * torch.randn(60, 4, 4, 4, generator=g)
    writer.add(x, x, y)
    writer.close()
    finish(directory)
    return directory


@pytest.fixture(scope="module")
def ops():
    return kernels.select("reference")


def task(latents, ops, model=MODEL, transport=PAPER, seed=0):
    data = DataConfig(data_path=str(latents), num_classes=3)
    return LightningDiTTask(model, transport, data, ops, seed=seed)


def one_step(t, step=1, size=16, networks=None):
    """(logged scalars, the loss handed to backward) of one step on the first `size` samples."""
    handed = {}

    def backward(name, loss):
        handed[name] = loss
        loss.backward()

    batch = t.batches.batch(torch.zeros(size), torch.arange(size))
    logged = t.train_step(networks or t.networks, batch, t.draw(step, size, "cpu"), step, backward)
    assert list(handed) == ["model"]
    return logged, handed["model"]


def test_initial_weights_are_of_the_seed_alone(latents, ops):
    before = torch.get_rng_state()
    a = task(latents, ops).networks["model"].state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    b, c = (task(latents, ops, seed=seed).networks["model"].state_dict() for seed in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["blocks.0.attn.qkv.weight"], c["blocks.0.attn.qkv.weight"])
    assert all(value.dtype == torch.float32 for value in a.values())


def test_draws_are_of_seed_and_step_alone(latents, ops):
    t = task(latents, ops)
    first, other = t.draw(5, 8, "cpu"), t.draw(6, 8, "cpu")
    again, seeded = t.draw(5, 8, "cpu"), task(latents, ops, seed=1).draw(5, 8, "cpu")
    for name, shape in (("noise", (8, 4, 4, 4)), ("t", (8,)), ("drop", (8,))):
        assert first[name].shape == shape and torch.equal(first[name], again[name])
    rewritten = t.draw(6, 8, "cpu", out=again)
    assert all(rewritten[name] is again[name] for name in ("noise", "t", "drop"))
    assert all(torch.equal(rewritten[name], value) for name, value in other.items())
    for different in (other, seeded):
        assert not torch.equal(first["noise"], different["noise"]) and not torch.equal(first["t"], different["t"])


def test_draws_have_their_distributions(latents, ops):
    draws = task(latents, ops).draw(1, 20_000, "cpu")
    assert stats.kstest(draws["noise"][:500].flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest(draws["t"].logit().numpy(), "norm").pvalue > 0.01
    assert draws["drop"].float().mean().item() == pytest.approx(0.1, abs=0.01)
    together = torch.stack([draws["noise"].flatten()[:20_000], draws["t"].logit(), draws["drop"].float()])
    assert (together.corrcoef() - torch.eye(3)).abs().max() < 0.03  # streams of their own
    without = task(latents, ops, MODEL.model_copy(update={"class_dropout_prob": 0.0}))
    assert not without.draw(1, 1000, "cpu")["drop"].any()


def test_logit_normal_ends_after_its_step(latents, ops):
    t = task(latents, ops, transport=PAPER.model_copy(update={"lognorm_until_step": 7}))
    for step, uniform in ((7, False), (8, True), (600_001, True)):
        pvalue = stats.kstest(t.draw(step, 5000, "cpu")["t"].numpy(), "uniform").pvalue
        assert (pvalue > 0.01) == uniform
    never = task(latents, ops, transport=TransportConfig())
    assert stats.kstest(never.draw(1, 5000, "cpu")["t"].numpy(), "uniform").pvalue > 0.01


def test_step_minimises_both_terms_and_logs_them_apart(latents, ops):
    t = task(latents, ops)
    logged, loss = one_step(t)
    assert set(logged) == {"loss", "mse", "cos_loss"} and not any(v.requires_grad for v in logged.values())
    assert loss.item() == pytest.approx(float(logged["mse"]) + float(logged["cos_loss"]))
    assert float(logged["cos_loss"]) == pytest.approx(1.0)  # a new network predicts zero, of no direction
    batch, draws = t.batches.batch(torch.zeros(16), torch.arange(16)), t.draw(1, 16, "cpu")
    assert float(logged["mse"]) == pytest.approx(float((batch["x"] - draws["noise"]).square().mean()), rel=1e-5)
    logged, loss = one_step(task(latents, ops, transport=TransportConfig()))
    assert set(logged) == {"loss", "mse"} and loss.item() == float(logged["mse"])


def test_labels_are_dropped_in_training_alone(latents, ops):
    t, seen = task(latents, ops), []

    def network(x, times, y):
        seen.append(y)
        return x * 0 + torch.zeros((), requires_grad=True)

    batch = t.batches.batch(torch.zeros(60), torch.arange(60))
    draws = t.draw(1, 60, "cpu")
    assert draws["drop"].any()
    t.train_step({"model": network}, batch, draws, 1, lambda name, loss: None)
    t.validate({"model": network}, batch, draws)
    assert torch.equal(seen[0], torch.where(draws["drop"], 3, batch["y"])) and torch.equal(seen[1], batch["y"])


@pytest.mark.parametrize(("model", "transport"), [(MODEL, PAPER), (PAIRED, MEAN), (PAIRED, GUIDED)])
def test_halves_of_a_batch_average_to_the_whole(latents, ops, model, transport):
    """What slicing by process and micro-batch relies on."""
    t = task(latents, ops, model, transport)
    batch, draws = t.batches.batch(torch.zeros(16), torch.arange(16)), t.draw(3, 16, "cpu")

    def gradient(*slices):
        t.networks["model"].zero_grad()
        for part in slices:
            pieces = [{k: v[part] for k, v in d.items()} for d in (batch, draws)]
            t.train_step(t.networks, *pieces, 3, lambda name, loss: (loss / len(slices)).backward())
        return t.networks["model"].final_layer.linear.weight.grad.clone()

    whole, halves = gradient(slice(0, 16)), gradient(slice(0, 8), slice(8, 16))
    assert whole.abs().max() > 0
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-6)


def test_draws_of_average_velocities(latents, ops):
    """Two times of each sample, t before r."""
    t = task(latents, ops, PAIRED, MEAN.model_copy(update={"use_lognorm": True}))
    first, other, again = t.draw(5, 64, "cpu"), t.draw(6, 64, "cpu"), t.draw(5, 64, "cpu")
    assert first.keys() == {"noise", "t", "drop", "r"} and bool((first["t"] <= first["r"]).all())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["r"], other["r"])
    places = {name: again[name].data_ptr() for name in ("noise", "t", "drop", "r")}
    rewritten = t.draw(6, 64, "cpu", out=again)
    assert all(rewritten[name].data_ptr() == place for name, place in places.items()), "graphs find them there"
    assert all(torch.equal(rewritten[name], value) for name, value in other.items())
    drawn = t.draw(1, 20_000, "cpu")
    normal = stats.norm.cdf(drawn["t"].logit()), stats.norm.cdf(drawn["r"].logit())
    assert stats.kstest(normal[0], lambda x: 1 - (1 - x) ** 2).pvalue > 0.01
    assert stats.kstest(normal[1], lambda x: x**2).pvalue > 0.01


@pytest.mark.parametrize("transport", [MEAN, GUIDED])
def test_a_step_of_average_velocities_and_what_it_logs(latents, ops, transport):
    t = task(latents, ops, PAIRED, transport)
    logged, loss = one_step(t)
    assert set(logged) == {"loss", "mse"} and not any(v.requires_grad for v in logged.values())
    assert loss.item() == pytest.approx(1.0, abs=1e-3), "p = 1: the sum of squares over itself"
    batch, draws = t.batches.batch(torch.zeros(16), torch.arange(16)), t.draw(1, 16, "cpu")
    # A new network predicts zero, and so do its tangents: what is left is the velocity.
    assert float(logged["mse"]) == pytest.approx(float((batch["x"] - draws["noise"]).square().mean()), rel=1e-5)


def test_validation_of_average_velocities(latents, ops):
    """The same times and samples of two times in any batches, as quantiles; without gradients and label drops."""
    t = task(latents, ops, PAIRED, GUIDED)
    parts = [t.validation_draws(number, 10, "cpu") for number in range(10)]
    times, ends = (torch.cat([part[name] for part in parts]) for name in ("t", "r"))
    whole = t.validation_draws(0, 100, "cpu")
    assert torch.allclose(times, whole["t"]) and torch.allclose(ends, whole["r"])
    assert bool((times <= ends).all())
    assert stats.kstest(times.double().numpy(), lambda x: 1 - (1 - x) ** 2).statistic < 0.03
    assert stats.kstest(ends.double().numpy(), lambda x: x**2).statistic < 0.05
    batch = t.batches.batch(torch.zeros(10), torch.arange(10))
    logged = t.validate(t.networks, batch, parts[0])
    assert not any(v.requires_grad for v in logged.values())
    dropped = t.validate(t.networks, batch, parts[0] | {"drop": torch.ones(10, dtype=torch.bool)})
    assert torch.equal(logged["mse"], dropped["mse"]) and logged["loss_t0.1"].isfinite().any()
    total = torch.stack([logged[f"loss_t{t}"] for t in (0.1, 0.3, 0.5, 0.7, 0.9)]).nansum(0)
    assert float(total.mean()) == pytest.approx(float(logged["mse"]), rel=1e-5)


def test_watched_figures_are_those_of_all_passes(latents, ops):
    """The largest activation is that of the sample with two times, whose pass is the first of three."""
    t = task(latents, ops, PAIRED, GUIDED)
    batch, draws = t.batches.batch(torch.zeros(4), torch.arange(4)), t.draw(1, 4, "cpu")
    first = t.transport.paired(4).index(True)
    batch["x"][first] *= 1e4
    found = t.measure(("activation_norms",), t.networks, batch, draws)
    batch["x"][first] *= 1e-4
    usual = t.measure(("activation_norms",), t.networks, batch, draws)
    assert found["activation_norm_max/blocks.0"] > 100 * usual["activation_norm_max/blocks.0"]


def test_an_objective_that_the_model_does_not_fit_is_refused(latents, ops):
    with pytest.raises(ValueError, match=r"transport\.objective meanflow needs model\.time_pairs: true"):
        task(latents, ops, MODEL, MEAN)
    with pytest.raises(ValueError, match=r"guidance_scale 1\.5 needs a null label; set model\.class_dropout_prob"):
        task(latents, ops, PAIRED.model_copy(update={"class_dropout_prob": 0.0}), GUIDED)


def test_it_learns_its_classes_in_one_step(latents, ops):
    """Adam on improved MeanFlow, then one evaluation lands on the class asked for."""
    t = task(latents, ops, PAIRED, TransportConfig(objective="improved_meanflow", equal_times=0.5))
    network = t.networks["model"].train()
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for step in range(1, 121):
        optimizer.zero_grad()
        one_step(t, step, 60)
        optimizer.step()
    y, config = torch.tensor([0, 1, 2]), SampleConfig(mode="meanflow")
    made = sample(network.eval(), Transport(), config, y, [0, 1, 2], shape=(4, 4, 4), null_label=3)
    means = t.batches.statistics.denormalise(made.latents).mean((1, 2, 3))
    assert made.nfe == 1 and (means - torch.tensor([-4.0, 0.0, 4.0])).abs().max() < 1.5


def test_a_network_of_one_time_is_gone_on_from(latents, ops, tmp_path):
    """Its weights, and a second time that adds nothing; half of those of a second time are no such file."""
    flow, t = task(latents, ops), task(latents, ops, PAIRED, MEAN, seed=1)
    state = {k: v.detach() + 0.01 for k, v in flow.networks["model"].state_dict().items()}
    save_published(tmp_path / "flow.pt", state, state)
    t.load_weights(str(tmp_path / "flow.pt"))
    found = t.networks["model"].state_dict()
    assert all(torch.equal(found[k], v) for k, v in state.items()) and not found["r_embedder.mlp.2.weight"].any()
    state |= {"r_embedder.mlp.0.bias": found["r_embedder.mlp.0.bias"]}
    save_published(tmp_path / "half.pt", state, state)
    with pytest.raises(ValueError, match=r"r_embedder\.mlp\.0\.weight"):
        t.load_weights(str(tmp_path / "half.pt"))


def test_validation_has_no_gradient(latents, ops):
    t = task(latents, ops)
    batch = t.batches.batch(torch.zeros(8), torch.arange(8))
    logged = t.validate(t.networks, batch, t.draw(1, 8, "cpu"))
    assert {"loss", "mse", "cos_loss"} < set(logged) and not any(v.requires_grad for v in logged.values())


@pytest.mark.parametrize("lognorm", [True, False])
def test_times_of_validation_are_quantiles_spread_evenly_in_any_batches(latents, ops, lognorm):
    """Of the distribution that training draws from, by SciPy; noise is new in every batch, and all of it fixed."""
    t = task(latents, ops, transport=TransportConfig(use_lognorm=lognorm))
    times = torch.cat([t.validation_draws(number, 10, "cpu")["t"] for number in range(10)])
    shares = stats.norm.cdf(torch.logit(times.double())) if lognorm else times.double().numpy()
    for count in (20, 50, 100):
        for tenth in range(10):
            inside = (shares[:count] * 10).astype(int) == tenth
            assert abs(inside.sum() - count / 10) < 2, (count, tenth)
    assert torch.equal(torch.cat([t.validation_draws(number, 25, "cpu")["t"] for number in range(4)]), times)
    first, again, second = (t.validation_draws(number, 4, "cpu")["noise"] for number in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_validation_tells_losses_by_time_apart(latents, ops):
    """A sample's loss counts around its own time alone; together they make up the loss."""
    t = task(latents, ops)
    batch, draws = t.batches.batch(torch.zeros(6), torch.arange(6)), t.validation_draws(0, 6, "cpu")
    draws["t"] = torch.tensor([0.05, 0.3, 0.35, 0.5, 0.999, 1.0])
    found = t.validate(t.networks, batch, draws)
    alone = [
        t.validate(t.networks, *({k: v[i : i + 1] for k, v in each.items()} for each in (batch, draws)))["loss"]
        for i in range(6)
    ]
    for middle, samples in {"0.1": [0], "0.3": [1, 2], "0.5": [3], "0.7": [], "0.9": [4, 5]}.items():
        by_time = found[f"loss_t{middle}"]
        assert by_time.isfinite().nonzero().flatten().tolist() == samples
        assert by_time[samples].tolist() == pytest.approx([alone[i].item() for i in samples], rel=1e-5)
    assert found["loss"].item() == pytest.approx(sum(x.item() for x in alone) / 6, rel=1e-5)


def test_bfloat16_networks_take_float32_batches(latents, ops):
    t = task(latents, ops)
    t.networks["model"].bfloat16()
    logged, _ = one_step(t)
    assert logged["loss"].dtype == torch.float32
    assert t.networks["model"].final_layer.linear.weight.grad.dtype == torch.bfloat16


def test_it_learns_its_classes(latents, ops):
    """Sixty steps of Adam, then guided samples land on the class asked for."""
    t = task(latents, ops)
    network = t.networks["model"].train()
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    losses = []
    for step in range(1, 61):
        optimizer.zero_grad()
        losses.append(float(one_step(t, step, 60)[0]["loss"]))
        optimizer.step()
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    y = torch.tensor([0, 1, 2])
    config = SampleConfig(num_sampling_steps=20, cfg_scale=1.5, timestep_shift=0.0)
    x = sample(network.eval(), Transport(), config, y, [0, 1, 2], shape=(4, 4, 4), null_label=3).latents
    means = t.batches.statistics.denormalise(x).mean((1, 2, 3))
    assert (means - torch.tensor([-4.0, 0.0, 4.0])).abs().max() < 1.5


def test_state_names_other_latents(latents, ops, tmp_path):
    t = task(latents, ops)
    state = t.state_dict()
    assert state["num_images"] == 60 and len(state["latents"]["mean"]) == 4
    t.load_state_dict(state)
    wrong = state | {"latents": state["latents"] | {"multiplier": 0.5}}
    with pytest.raises(ValueError, match=r"other latents than .*'multiplier': 0.5.* there"):
        t.load_state_dict(wrong)
    with pytest.raises(ValueError, match="num_images: None there, 60 here"):
        t.load_state_dict({"latents": state["latents"]})


NAMED = {"none": None, "abc": ("a", "b", "c"), "abd": ("a", "b", "d")}


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """The same latents under several names of their classes, or none."""
    root = tmp_path_factory.mktemp("named")
    return {key: toy.write_latents(root / key, classes=classes) for key, classes in NAMED.items()}


@pytest.mark.parametrize(
    ("there", "here", "same"),
    [
        ("abc", "abc", True),
        ("abc", "abd", False),
        ("none", "none", True),
        ("none", "abc", True),
        ("abc", "none", True),  # names that only one of them has are no difference
    ],
)
def test_names_of_classes_are_kept_and_compared_where_both_are_known(named, ops, there, here, same):
    state = json.loads(json.dumps(task(named[there], ops).state_dict()))  # as a checkpoint holds it
    assert state.get("classes") == (None if there == "none" else list(NAMED[there]))
    if same:
        task(named[here], ops).load_state_dict(state)
    else:
        with pytest.raises(ValueError, match=r"other latents than .*classes: \['a', 'b', 'c'\] there"):
            task(named[here], ops).load_state_dict(state)


def test_validation_must_have_the_same_classes(named, tmp_path):
    a, b, none = (LatentDataset(named[key]) for key in ("abc", "abd", "none"))
    for pair in ((a, a), (a, none), (none, b)):
        check_classes(*pair)
    with pytest.raises(ValueError, match=r"abc and .*abd are of other classes: 'c' and 'd' for label 2"):
        check_classes(a, b)
    more = LatentDataset(toy.write_latents(tmp_path / "more", classes=("a", "b", "c", "d")))
    with pytest.raises(ValueError, match=r"are of other classes: 3 and 4 classes"):
        check_classes(a, more)


@pytest.mark.parametrize(("key", "want"), [("none", "20 latents"), ("abc", "20 latents of 3 classes (a, b, c)")])
def test_what_is_trained_on_is_said(named, caplog, key, want):
    with caplog.at_level("INFO", "lightningdit"):
        LatentDataset.from_config(DataConfig(data_path=str(named[key]), num_classes=3), seed=0)
    assert caplog.messages == [f"{named[key]}: {want}"]


def test_data_must_fit_the_model(latents, ops):
    with pytest.raises(ValueError, match=r"latents of \(4, 4, 4\); the model takes \(C, H, W\) = \(4, 8, 8\)"):
        task(latents, ops, MODEL.model_copy(update={"input_size": 8}))
    with pytest.raises(ValueError, match=r"data\.num_classes is 3, the model's num_classes 2"):
        task(latents, ops, MODEL.model_copy(update={"num_classes": 2}))


def test_starting_from_weights(latents, ops, tmp_path):
    source, t = task(latents, ops, seed=1).networks["model"].state_dict(), task(latents, ops)
    save_published(tmp_path / "w.pt", {}, source)
    t.load_weights(str(tmp_path / "w.pt"))
    assert all(torch.equal(source[k], v) for k, v in t.networks["model"].state_dict().items())
    smaller = task(latents, ops, MODEL.model_copy(update={"depth": 1}))
    with pytest.raises(ValueError, match=r"w\.pt does not fit: 12 unexpected: blocks\.1"):
        smaller.load_weights(str(tmp_path / "w.pt"))
