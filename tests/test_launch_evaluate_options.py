"""Options of the evaluation program that change nothing, and where its result may go."""

import os

import pytest

from launch import evaluate

SAMPLES = ["--samples", "a", "--reference", "b"]
PAIRS = ["--originals", "a", "--reconstructions", "b"]
DECODED = ["--originals", "a", "--tokenizer", "t"]
LATENTS = ["--latents", "a"]
WRITE = ["--write-reference", "a.npz", "--reference", "b"]
UNUSED = [
    *(
        (question, option, "changes nothing")
        for question, options in (
            (
                SAMPLES,
                (
                    "--reconstructions x",
                    "--tokenizer x",
                    "--posterior mode",
                    "--seed 1",
                    "--vectors 9",
                    "--repeats 2",
                    "--lpips-weights x",
                    "--crop published_eval",
                    "--inception-weights x --foundation y",
                    "--inception-sha256 ab",
                    "--reference-images 9",
                    "run.yaml",
                ),
            ),
            (
                PAIRS,
                (
                    "--reference x",
                    "--vectors 9",
                    "--repeats 2",
                    "--posterior mode",
                    "--seed 1",
                    "--crop published_eval",
                    "--decoder dali",
                    "--inception-weights x --foundation y",
                ),
            ),
            (DECODED, ("--reference x", "--vectors 9", "--repeats 2", "--decoder dali", "--crop published_eval")),
            (
                LATENTS,
                (
                    "--reference x",
                    "--reconstructions x",
                    "--tokenizer x",
                    "--image-size 8",
                    "--crop published_eval",
                    "--decoder dali",
                    "--posterior mode",
                    "--inception-weights x",
                    "--foundation x",
                    "--lpips-weights x",
                    "--batch-size 8",
                    "--allow-few",
                    "--expect 9",
                    "--num-classes 9",
                    "--dinov2-weights x",
                    "--download",
                ),
            ),
        )
        for option in options
    ),
    *(
        (WRITE, option, "changes nothing")
        for option in ("--allow-few", "--num-classes 9", "--seed 1", "--set a=1", "--output x", "--metadata x")
    ),
    (DECODED, "--reconstructions x", "needs either --reconstructions or --tokenizer"),
]


@pytest.mark.parametrize(("question", "option", "message"), UNUSED)
def test_an_option_that_would_change_nothing_is_refused(question, option, message):
    given = option.split()[0]
    with pytest.raises(ValueError, match=message) as error:
        evaluate.main([*question, *option.split()])
    assert ("CONFIG" if given == "run.yaml" else given) in str(error.value)


@pytest.fixture
def unmeasured(monkeypatch):
    """Whatever is asked, it must not come to measuring."""
    for name in ("_samples", "_reconstructions", "_latents"):
        monkeypatch.setattr(evaluate, name, None)


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("folder", "cannot write {here}/folder: it is a directory"),
        ("file/r.json", "cannot write {here}/file: File exists"),
        ("pipe", "cannot write {here}/pipe: it is a named pipe"),
        ("file", "--output {here}/file is already there and is no result of evaluate"),
        ("facts.json", "--output {here}/facts.json is already there and is no result of evaluate"),
    ],
)
@pytest.mark.parametrize("question", [SAMPLES, PAIRS, LATENTS])
def test_where_a_result_cannot_go_is_said_before_it_is_measured(tmp_path, unmeasured, question, output, why):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "facts.json").write_text('{"solver": "euler"}')
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((ValueError, OSError), match=why.format(here=tmp_path)):
        evaluate.main([*question, "--output", str(tmp_path / output)])
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 4


def test_a_result_of_an_earlier_version_and_what_a_link_leads_to_are_replaced(tmp_path, monkeypatch):
    """Earlier versions wrote infinity for the PSNR of equal images."""
    (tmp_path / "result.json").write_text('{"metrics": {"psnr": Infinity}}')
    (tmp_path / "link.json").symlink_to("result.json")
    monkeypatch.setattr(evaluate, "_latents", lambda args: {"metrics": {"gini": 0.5}, "skipped": {}, "notes": []})
    assert evaluate.main([*LATENTS, "--output", str(tmp_path / "link.json")]) == 0
    assert (tmp_path / "link.json").is_symlink() and "gini" in (tmp_path / "result.json").read_text()
