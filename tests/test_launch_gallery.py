"""The page of `gallery` as text: what it says of runs, what it leaves out, what it costs, what cannot get into it."""

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from common.files import read_json, write_json
from launch.__main__ import main
from launch.config import load
from launch.config_files import ConfigError
from launch.gallery_page import media, viewers
from launch.gallery_page.configs import config_tables, defaults, differing, flat, nearest_recipe
from launch.gallery_page.curves import BUCKETS, curves, thin
from launch.gallery_page.media import Embedder, PageFull
from launch.gallery_page.page import build
from launch.gallery_page.results import result_tables
from launch.gallery_page.sources import find_sources
from launch.run_directory.rows import read_rows
from tests.gallery_runs import CLASSES, SCRIPT, a_run, whole_directory, write_log, write_picture, write_samples


class Page(HTMLParser):
    """What of a page a reader sees, and what it would run or fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.images, self.links, self.scripts, self.ids = "", [], [], [], []
        self._within: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self._within += [] if tag in ("img", "meta", "input", "br", "link") else [tag]
        self.images += [attrs] if tag == "img" else []
        self.scripts += [attrs] if tag == "script" else []
        self.links += [value for name, value in attrs.items() if name in ("src", "href", "action", "srcset", "data")]
        self.ids += [attrs["id"]] if "id" in attrs else []

    def handle_endtag(self, tag):
        assert self._within.pop() == tag, f"{tag} ends out of turn"

    def handle_data(self, data):
        if self._within and self._within[-1] not in ("script", "style"):
            self.text += f" {data}"

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def decoded(attrs: dict) -> np.ndarray:
    kind, _, content = attrs["src"].partition(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return whole_directory(tmp_path_factory.mktemp("gallery") / "work")


@pytest.fixture(scope="module")
def text(directory) -> str:
    return build([directory])


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_the_page_has_every_section_and_needs_nothing_from_elsewhere(page, text):
    assert {"pictures", "curves", "evaluation", "config", "ops", "provenance"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    outside = [link for link in page.links if not link.startswith(("data:image/webp;base64,", "#"))]
    assert outside == [] and "default-src 'none'" in text and "url(" not in text[: text.index("</style>")]


def test_pictures_are_those_of_the_run_with_words_for_them(page):
    by_alt = {attrs["alt"]: attrs for attrs in page.images}
    assert all(attrs["alt"] for attrs in page.images)
    preview = decoded(by_alt["previews of first at step 300"])
    assert preview.shape == (60, 120, 3) and (preview == (80, 40, 140)).all()
    sample = decoded(by_alt[f"sample 4 of class 1: {CLASSES[1]}"])  # the later of two sets, exact
    assert (sample == (600 % 256, 4, 80)).all()
    assert decoded(by_alt["reconstructions.png"]).any()


def test_each_class_has_its_first_images(page):
    of_class = [attrs["alt"] for attrs in page.images if attrs["alt"].endswith(" of class 0: zero")]
    once = [f"sample {i} of class 0: zero" for i in range(0, 24, 3)]
    assert of_class == once * 2


def test_text_of_a_run_is_text(page, text):
    assert len(page.scripts) == 3 and SCRIPT not in text
    assert f"class 1: {CLASSES[1]}" in page.text and f"class 2: {CLASSES[2]}" in page.text
    assert f"checkpoint of {SCRIPT}" in page.text and f"name {SCRIPT}" in page.text and "few <i>" in page.text


def test_figures_stand_beside_what_they_were_measured_of(page):
    for word in ("12.35", "0.71", "0.51", "50,000", "ODE dopri5", "scale 4.5", "inception", "a1b2a1b2a1b2", "9a8b9a8b"):
        assert word in page.words
    assert "no sfid: no spatial" in page.words


def test_results_without_a_common_figure_are_tables_of_their_own_and_networks_tell_their_hashes():
    results = {n: {"metrics": dict.fromkeys(m, 1.0)} for n, m in {"a": "xy", "b": "z", "c": "yw", "d": "wz"}.items()}
    assert [[row["name"] for row in table["rows"]] for table in result_tables(results)] == [["a", "b", "c", "d"]]
    results.pop("d")
    networks = [{"name": "inception", "sha256": "12ab" * 16}]
    (table,) = result_tables({"x": {"metrics": {"fid": 1}, "networks": networks, "guidance_interval": [0.1, 1.0]}})
    assert table["rows"][0]["beside"] == [("interval", "[0.1, 1]")]
    assert table["rows"][0]["hashes"] == [("networks.inception", "12ab12ab12ab", "12ab" * 16)]
    assert [table["figures"] for table in result_tables(results)] == [["z"], ["x", "y", "w"]]


def test_runs_of_a_kind_are_compared_by_their_files(page):
    assert "Keys in which these runs (lightningdit) differ" in page.words
    assert "optimizer.lr 0.002 0.001" in page.words


def test_one_run_is_compared_with_the_nearest_file_and_the_defaults(tmp_path):
    words = Page(build([a_run(tmp_path / "alone", lr=5e-4)])).words
    assert "keys that differ from digits.yaml" in words and "optimizer.lr 0.0005 0.002 0.0002" in words
    assert "keys as in digits.yaml that differ from the defaults" in words and "data.image_size 32 32 256" in words
    config = flat({"model": {"depth": 6}, "train": {"exp_name": "a", "max_steps": None}})
    assert differing([config, {**config, "train.exp_name": "b", "model.depth": 7}]) == ["model.depth"]
    assert differing([{"a": None}, {}]) == ["a"]


def test_a_key_that_a_run_of_an_earlier_version_lacks_means_its_default():
    now = load("digits.yaml", kind="lightningdit")[0].model_dump(mode="json")
    model = {key: value for key, value in now["model"].items() if key != "wo_shift"}
    earlier = {key: value for key, value in now.items() if key != "deepspeed"} | {"model": model, "removed": 5}
    (table,) = config_tables({"now": ("lightningdit", now), "earlier": ("lightningdit", earlier)})
    assert table["rows"] == [["removed", "–", "5"]]
    assert [row[2] for row in table["whole"]["rows"] if row[0] == "model.wo_shift"] == ["–"]
    del earlier["removed"]
    (table,) = config_tables({"earlier": ("lightningdit", earlier)})
    assert table["rows"] == [] and "digits.yaml" in table["title"]


def test_every_shipped_file_is_nearest_to_itself():
    for name, kind in (("lightningdit_xl_64ep.yaml", "lightningdit"), ("vavae_f16d32_dinov2.yaml", "vavae")):
        config = flat(load(name, kind=kind)[0].model_dump(mode="json"))
        assert nearest_recipe(config, kind)[0] == name
        assert (
            defaults(kind)["train.max_steps"] is None
            and "stages" not in differing([{"stages": []}, defaults(kind)])[:0]
        )


def test_ops_events_and_provenance(page):
    assert "swiglu triton first choice" in page.words and "vf_loss reference" in page.words
    assert "2027-01-15 09:00 UTC 100 resumed" in page.words and "rollback" in page.words
    assert "Checkpoints saved: 1." in page.words and "version of torch 2.11.0" in page.words
    assert "started 2027-01-15 08:00 UTC" in page.words and "SHA-256 of model.ema.safetensors" in page.words


def test_equal_files_give_an_equal_page(directory, text, tmp_path):
    shutil.copytree(directory, tmp_path / "work")
    assert build([tmp_path / "work"]) == text


def chart_data(text: str) -> dict:
    return json.loads(re.search(r'id="curves-data">(.*?)</script>', text)[1])


def test_curves_are_the_values_of_the_log(directory, text):
    data, rows = chart_data(text), read_rows(directory / "second" / "metrics.jsonl")
    assert data["runs"] == ["first", "second"] and [c["name"] for c in data["charts"]] == ["loss", "speed", "other"]
    assert data["charts"][0]["keys"] == ["mse", "loss"] and data["charts"][2]["keys"] == ["grad_norm", "lr"]
    (mse,) = [s for s in data["series"]["mse"] if s["run"] == 1 and not s["variant"]]
    assert mse["x"] == rows.steps().tolist() and mse["y"] == pytest.approx(rows.series("mse"), rel=1e-5)
    (valid,) = [s for s in data["series"]["mse"] if s["run"] == 1 and s["variant"] == "valid_ema"]
    assert (valid["x"], valid["y"]) == ([300], [1.2]) and data["time_unit"] == "minutes"
    assert valid["h"] == pytest.approx([60 * 0.3]) and {e["event"] for e in data["events"]} == {"resumed", "rollback"}


def test_thinning_keeps_extremes_ends_and_gaps():
    values = np.random.default_rng(0).normal(size=100_003)
    values[[777, 50_000]] = 99.0, -99.0
    values[60_000:61_000] = np.nan
    kept = thin(values, BUCKETS)
    assert len(kept) <= 2 * BUCKETS + 2 and (np.diff(kept) > 0).all()
    assert {0, 777, 50_000, 100_002} <= set(kept.tolist()) and np.isnan(values[kept]).any()
    for part in np.array_split(np.arange(len(values)), BUCKETS):
        inside = values[kept[(kept >= part[0]) & (kept <= part[-1])]]
        if np.isfinite(values[part]).any():
            assert np.nanmin(inside) == np.nanmin(values[part]) and np.nanmax(inside) == np.nanmax(values[part])
    assert thin(values[:1000], BUCKETS).tolist() == list(range(1000))


def test_a_long_log_makes_no_large_page(tmp_path):
    write_log(tmp_path / "metrics.jsonl", 6_000, 1.0)
    found = curves({"run": read_rows(tmp_path / "metrics.jsonl")})
    assert all(len(s["x"]) <= 2 * BUCKETS + 2 for each in found["series"].values() for s in each)
    assert len(json.dumps(found)) < 400_000 < 2 * (tmp_path / "metrics.jsonl").stat().st_size


def test_pictures_are_bounded_one_by_one_and_together():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 2600, 3), dtype=np.uint8))
    embedder = Embedder(most_bytes=100_000)
    assert (found := embedder.embed(noise))["width"] == media.LONGEST_SIDE and found["height"] == 20
    with pytest.raises(PageFull):
        for _ in range(10):
            embedder.embed(noise)


def test_no_more_positions_and_classes_than_a_page_takes(tmp_path):
    run = tmp_path / "run"
    for step in range(1, 61):
        write_picture(run / "previews" / f"step_{step:07d}.png", (step, 0, 0), (8, 8))
    (view,) = viewers.training_views({"run": run}, Embedder(), {})
    assert len(view["labels"]) == viewers.MOST_POSITIONS and view["of"] == 60
    assert (view["labels"][0], view["labels"][-1]) == ("1", "60")
    items = viewers.spread(range(1000), viewers.MOST_CLASSES)
    assert len(items) == viewers.MOST_CLASSES and (items[0], items[-1]) == (0, 999)


def test_a_position_shows_of_each_run_what_was_last_made(tmp_path):
    for name, steps in (("a", (10, 30)), ("b", (20,))):
        for step in steps:
            write_picture(tmp_path / name / "previews" / f"step_{step:07d}.png", (step, 0, 0), (8, 8))
    (view,) = viewers.training_views({name: tmp_path / name for name in "ab"}, Embedder(), {})
    assert view["labels"] == ["10", "20", "30"]
    assert [[(i["at"], i["step"]) for i in track["items"]] for track in view["tracks"]] == [
        [(0, 10), (2, 30)],
        [(1, 20)],
    ]


def test_what_is_damaged_or_half_written_is_named_and_left_out(tmp_path):
    run = a_run(tmp_path / "run")
    (run / "previews" / "step_0000300.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"no step": 1}\n{"step": 7000, "mse": 0.')
    state = next((run / "checkpoints").iterdir()) / "state.json"
    state.write_text(state.read_text()[:50])
    (run / "broken.json").write_text('{"metrics": {"fid": NaN}}')
    npz = write_samples(run / "samples", 600) / "samples.npz"
    npz.write_bytes(npz.read_bytes()[:700])
    write_samples(run / "begun" / "parts", 600)
    page = Page(build([run]))
    left = page.words[page.words.index("Left out") : page.words.index("Pictures", page.words.index("Left out"))]
    for name in (
        "previews/step_0000300.png",
        "metrics.jsonl : 1 of its lines",
        "step_0000600",
        "checkpoints : holds no whole checkpoint",
        "broken.json",
        "samples :",
        "begun",
    ):
        assert name in left, name
    assert "previews of run at step 100" in {attrs["alt"] for attrs in page.images} and "Ops" not in page.words
    assert str(tmp_path) not in left


def a_view_of_sets(tmp_path, left_out: dict) -> dict:
    sources = find_sources([tmp_path])
    view = viewers.samples_view(sources, {folder: folder.name for folder in sources.samples}, Embedder())
    left_out |= {path.name: why for path, why in sources.left_out.items()}
    return view


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("labels", [np.zeros((4, 1)), np.array([0, 1, math.nan, 1]), np.array([math.inf, 0, 0, 0])])
def test_labels_that_are_none_are_named_and_thin_nothing_out(tmp_path, labels):
    write_samples(tmp_path / "whole", 5, count=4)
    path = write_samples(tmp_path / "odd", 6, count=4) / "samples.npz"
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3), np.uint8), arr_1=labels)
    view = a_view_of_sets(tmp_path, left_out := {})
    assert left_out.keys() == {"odd"} and "samples.npz: arr_1 must be labels [N], it is [4" in left_out["odd"]
    assert view["labels"] == ["whole, step 5"] and view["of"] == 1


def test_a_set_of_latents_is_no_set_that_cannot_be_read(tmp_path, monkeypatch):
    folder = write_samples(tmp_path / "latents", 5, count=4)
    (folder / "samples.npz").unlink()
    write_json(folder / "samples.json", read_json(folder / "samples.json") | {"latents_manifest": {"sha256": "0" * 64}})
    left_out = {}
    assert a_view_of_sets(tmp_path, left_out) is None and left_out == {}
    monkeypatch.setattr(viewers, "MOST_POSITIONS", 2)
    for step in range(3):
        write_samples(tmp_path / str(step), step, count=4)
    view = a_view_of_sets(tmp_path, left_out)
    assert view["labels"] == ["0, step 0", "2, step 2"] and view["of"] == 3 and left_out == {}


@pytest.mark.parametrize("by_class", [False, True])
def test_samples_in_a_folder_of_images(tmp_path, by_class):
    """As `sample` writes them: named by index, also in folders of classes, the labels beside."""
    folder, labels = write_samples(tmp_path / "samples", 5, count=4), [2, 0, 0, 2]
    images = np.load(folder / "samples.npz")["arr_0"]
    for i, image in enumerate(images):
        path = folder / "images" / (str(labels[i]) if by_class else "") / f"{i:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (folder / "samples.npz").unlink()
    facts = read_json(folder / "samples.json")
    if by_class:
        np.save(folder / "labels.npy", np.array(labels))
    rows, total = viewers._by_class(folder, facts if by_class else facts | {"labels": labels}, Embedder())
    shown = [[cell["alt"].split()[1] for cell in row["cells"]] for row in rows]
    assert total == 2 and shown == [["1", "2"], ["0", "3"]]
    assert (decoded(rows[1]["cells"][1]["picture"]) == images[3]).all()
    without = viewers._by_class(folder, {"labels": labels[:3]} if not by_class else facts, Embedder())[0]
    assert [len(row["cells"]) for row in without] == ([2, 2] if by_class else [4])


def test_the_program_writes_beside_the_run_and_replaces_only_its_own_page(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = a_run(tmp_path / "run")
    assert main(["gallery", str(run)]) == 0 and "gallery.html: 4.9 MB" in capsys.readouterr().out
    assert main(["gallery", str(run), str(directory)]) == 0 and (tmp_path / "gallery.html").is_file()
    words = Page((tmp_path / "gallery.html").read_text()).words
    assert "work/first" in words and "run, work" in words
    assert main(["gallery", str(run)]) == 0  # its own is replaced
    (tmp_path / "mine.html").write_text("<p>mine")
    for argv, message in (
        ([run, "--output", tmp_path / "mine.html"], "is no page of gallery"),
        ([tmp_path / "absent"], "does not exist"),
        ([run, tmp_path / "run" / "."], "is given twice"),
        ([tmp_path / "run" / "previews"], "no run, samples or results"),
    ):
        assert main(["gallery", *map(str, argv)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "<p>mine"


def test_nothing_to_show_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no run, samples or results"):
        build([tmp_path])
