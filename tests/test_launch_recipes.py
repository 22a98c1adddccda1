"""The shipped recipes of tokenizers against the published files they stand for, and a plan of each of both."""

import re
from pathlib import Path

import pytest
import yaml

import vavae.cost
from launch.__main__ import main
from launch.config import VavaeRun, load
from launch.config_files import SHIPPED
from tests.published import FILES, STAGES, TOKENIZERS, kind_of
from vavae.config import loss_at

IMAGES = 1_281_167
RECIPES = {f"vavae_f16d{d}{'_' + vf if vf else ''}_50ep": (d, vf) for d, vf in TOKENIZERS}
THREE_STAGES, BASE = "vavae_f16d32_dinov2", "vavae_base"
FOUNDATIONS = {"dinov2": "vit_large_patch14_dinov2.lvd142m", "mae": "vit_large_patch16_224.mae"}
VF_KEYS = {"vf_weight", "adaptive_vf", "distmat_margin", "cos_margin", "reverse_proj"}
# SPEC of the published tokenizers (arXiv 2501.01423, table 2): rFID, PSNR, LPIPS, SSIM.
FIGURES = {
    (16, None): (0.49, 26.10, 0.132, 0.72),
    (32, None): (0.26, 28.59, 0.089, 0.80),
    (32, "dinov2"): (0.28, 27.96, 0.096, 0.79),
    (64, None): (0.17, 31.03, 0.055, 0.88),
    (64, "dinov2"): (0.14, 30.71, 0.055, 0.87),
}
VAVAE_README = Path(vavae.__file__).parent / "README.md"


def recipe(name: str) -> VavaeRun:
    return load(SHIPPED / f"{name}.yaml", kind="vavae")[0]


def parameters(channels: int, vf: str | None) -> int:
    """Of the autoencoder: those of f16d32, by the four convolutions that see the latents, and of VF's projection."""

    def at_the_latents(d: int) -> int:
        quant, post_quant = (2 * d + 1) * 2 * d, (d + 1) * d
        return (9 * 512 + 1) * 2 * d + quant + post_quant + (9 * d + 1) * 512

    return 69_836_067 - at_the_latents(32) + at_the_latents(channels) + (channels * 1024 if vf else 0)


@pytest.fixture(scope="module")
def costs() -> dict:
    return {}


@pytest.fixture
def plan(tmp_path, capsys, monkeypatch, costs):
    """`train vavae … --dry-run` on 32 GPUs → what it prints. A network's cost, a second each, is counted once."""
    count = vavae.cost.training_costs

    def training_costs(*sections, **options):
        key = repr((sections, options))
        if key not in costs:
            costs[key] = count(*sections, **options)
        return costs[key]

    monkeypatch.setattr(vavae.cost, "training_costs", training_costs)

    def plan(run: dict | str, *overrides: str) -> str:
        path = tmp_path / "run.yaml"
        if isinstance(run, dict):
            path.write_text(yaml.safe_dump(run))
        monkeypatch.chdir(tmp_path)
        assert main(["train", "vavae", str(path) if isinstance(run, dict) else run, *overrides, *DRY_RUN]) == 0
        return capsys.readouterr().out

    return plan


DRY_RUN = ("--dry-run", "--gpus", "32")


def assert_plans(text: str, channels: int, vf: str | None, epochs: int) -> None:
    count = parameters(channels, vf)
    assert f"  autoencoder: {count:,} parameters, {count:,} of them trained\n" in text
    assert "  discriminator: 2,765,633 parameters" in text
    steps = -(-epochs * IMAGES // 256)
    assert f"  {steps:,} steps = {steps * 256 / IMAGES:.1f} epochs of 1,281,167 images (assumed" in text
    assert "global batch 256 = 32 processes × micro-batch 8 × 1 accumulated" in text
    assert f"(float32 {channels}×16×16, two per image)" in text
    named = [name for name in FOUNDATIONS.values() if f"the weights of {name}" in text]
    assert named == ([FOUNDATIONS[vf]] if vf else [])


@pytest.mark.parametrize(("channels", "vf"), TOKENIZERS)
def test_every_published_tokenizer_is_planned(plan, channels, vf):
    assert_plans(plan(TOKENIZERS[channels, vf]), channels, vf, 50)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_stage_of_the_released_tokenizer_is_planned(plan, tmp_path, stage):
    weights = tmp_path / "before.ckpt"
    weights.write_bytes(b"weights")
    text = plan(STAGES[stage] if stage == 0 else {**STAGES[stage], "weight_init": str(weights)})
    assert_plans(text, 32, "dinov2", (100, 15, 15)[stage])


@pytest.mark.parametrize("name", [name for name in FILES if kind_of(name) == "vavae"])
def test_every_published_file_is_planned(plan, name):
    """With what it leaves open, and only that, as overrides."""
    open_keys = {
        "f16d32_vfdinov2_long": ["loss.vf_weight=0.5", "loss.disc_start=2501", "train.max_epochs=50"],
        "vavae_f16d32": ["data.data_path=/none", "train.max_epochs=50", "train.global_batch_size=256"],
        "vavae_experimentals": ["data.data_path=/none", "train.max_epochs=50", "train.global_batch_size=256"],
    }
    stem = Path(name).stem
    unaligned = stem == "vavae_experimentals"
    overrides = [*open_keys.get(stem, []), *(["loss.use_vf=false"] if unaligned else [])]
    assert_plans(plan(FILES[name], *overrides), 32, None if unaligned or stem == "f16d32_ldm" else "dinov2", 50)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_what_the_published_file_does(plan, tmp_path, name):
    channels, vf = RECIPES[name]
    assert_plans(plan(f"{name}.yaml"), channels, vf, 50)  # found by its name
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(TOKENIZERS[channels, vf]))
    ours, (published, _) = recipe(name), load(tmp_path / "published.yaml", kind="vavae")
    assert ours.preset == published.preset == "paper" and ours.stages == ()
    assert ours.model == published.model and ours.model.embed_dim == ours.model.z_channels == channels
    assert ours.features() == published.features() and (ours.foundation is None) is (vf is None)
    unread = {} if vf else VF_KEYS
    assert ours.loss.model_dump(exclude=unread) == published.loss.model_dump(exclude=unread)
    assert ours.loss.use_vf is (vf is not None) and ours.loss.disc_start == 2501
    assert ours.optimizer == published.optimizer
    unlike = {"data_path", "valid_path", "num_workers"}
    assert ours.images().model_dump(exclude=unlike) == published.images().model_dump(exclude=unlike)
    for key in ("max_epochs", "max_steps", "global_batch_size", "weight_init"):
        assert getattr(ours.train, key) == getattr(published.train, key), key


def test_three_stages_in_one_run_have_the_losses_of_the_three_published_runs(plan, tmp_path):
    assert_plans(plan(f"{THREE_STAGES}.yaml"), 32, "dinov2", 130)
    run, begin = recipe(THREE_STAGES), 0
    assert run.train.max_epochs == 130 and len(run.stages) == 3
    for number, document in enumerate(STAGES):
        (tmp_path / "stage.yaml").write_text(yaml.safe_dump(document))
        published, _ = load(tmp_path / "stage.yaml", kind="vavae")
        for epoch in (begin, begin + published.train.max_epochs - 0.01):
            loss = loss_at(run.loss, run.stages, epoch)
            assert loss.model_copy(update={"disc_start": None}) == published.loss.model_copy(
                update={"disc_start": None}
            )
        assert published.loss.disc_start == (2501, 1, 1)[number]  # in the one run it has started by then
        assert run.stages[number].epochs == published.train.max_epochs
        begin += published.train.max_epochs
    alike = recipe("vavae_f16d32_dinov2_50ep")
    for section in ("model", "foundation", "loss", "data", "optimizer", "deepspeed"):
        assert getattr(run, section) == getattr(alike, section), section


def test_the_base_alone_is_f16d32_without_vf(plan):
    assert_plans(plan(f"{BASE}.yaml"), 32, None, 50)
    assert recipe(BASE).loss.use_vf is False and recipe(BASE).foundation is None


def test_no_two_runs_share_a_folder_and_none_is_left_out():
    shipped = {path.stem for path in SHIPPED.glob("vavae_*.yaml")}
    assert shipped == {*RECIPES, THREE_STAGES, BASE}
    assert all(recipe(name).train.exp_name == name for name in shipped)


def test_the_figures_of_the_documents_are_the_papers():
    rows = re.findall(r"^\| `(vavae_\w+)\.yaml` \|[^|]*\|(.*)\|$", VAVAE_README.read_text(), re.M)
    table = {name: tuple(float(x) for x in figures.split("|") if x.strip()) for name, figures in rows}
    assert table.keys() == {*RECIPES, THREE_STAGES} and table[THREE_STAGES] == (0.28,)
    for name, tokenizer in RECIPES.items():
        comment = re.search(
            r"rFID (\S+), PSNR (\S+), LPIPS (\S+), SSIM (\S+)\.\n", (SHIPPED / f"{name}.yaml").read_text()
        )
        assert tuple(map(float, comment.groups())) == table[name], name
        assert FIGURES.get(tokenizer, table[name]) == table[name], name


def test_the_recipe_of_the_readme_loads(tmp_path):
    (example,) = re.findall(r"```yaml\n(extends: .*?)```", VAVAE_README.read_text(), re.S)
    (tmp_path / "mine.yaml").write_text(example)
    run, _ = load(tmp_path / "mine.yaml", kind="vavae")
    assert run.train.exp_name == "mine" and run.model.embed_dim == 64 and len(run.stages) == 2
    assert sum(stage.epochs for stage in run.stages) == run.train.max_epochs == 50
    assert [loss_at(run.loss, run.stages, epoch).vf_weight for epoch in (0, 41)] == [0.5, 0.1]
