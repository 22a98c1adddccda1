"""`python -m launch sweep CONFIG sample.cfg_scale=1,2,4 sample.cfg_interval_start=0,0.1 …`: which settings sample best.

A key of `sample` with several values is an axis; the settings are the product of all axes. Each is sampled with the
same seed and labels, on few samples, and judged by a figure; any other `key=value` is an override as elsewhere. In DIR:
sweep.md (the table, best first), sweep.png (a curve, or heat maps), results.json, best.yaml (a run file for `sample`),
and a file for each finished setting. Under a launcher the settings are shared out among the processes, each of which
loads the networks once (on a CPU each computes by one thread: start one for each core). Started again, with any number
of processes, it goes on with the settings that lack; with more values on an axis it adds them to what is there.

    sweep digits.yaml sample.cfg_scale=1,1.5,2 sample.cfg_interval_start=0,0.2 --figure recognised
    sweep CONFIG sample.cfg_scale=2,4,8 --samples 5000 --figure fid,recall --reference real.npz --inception-weights FILE

The first figure ranks, the others stand beside it: {figures}.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.files import write_json, write_text
from common.text import printable
from launch.arguments import local_path
from launch.config import LightningDiTRun, load
from launch.config_files import ConfigError
from launch.evaluation.figures import FIGURES, choose_figures
from launch.evaluation.judge import Judge, JudgeSource, pixels_hash
from launch.runtime import launcher
from launch.runtime.processes import Processes
from launch.runtime.run_lock import lock_directory
from launch.sweeping import finished, picture, report
from launch.sweeping.axes import Axis, Setting, as_document, load_settings, load_with, split_overrides
from launch.sweeping.networks import SharedNetworks, labels_of
from launch.sweeping.share import shares

REFERENCE = "reference"  # directory of its features


@dataclass(frozen=True)
class Sweep:
    """A sweep as its command line says it. single: the overrides that are no axes."""

    config: Path
    run: LightningDiTRun
    axes: Sequence[Axis]
    single: Sequence[str]
    settings: Sequence[Setting]
    source: JudgeSource

    @property
    def num_samples(self) -> int:
        return self.settings[0].sample.fid_num


def main(argv: list[str]) -> int:
    """Sample, judge and rank; returns the exit status."""
    args = _parse(argv)
    axes, single = split_overrides(args.overrides)
    run, settings, notes = load_settings(args.config, axes, single, args.samples)
    if launcher.rank() == 0:
        for note in notes:
            print(f"{args.config}: {note}")
    figures = choose_figures(args.figure.split(","))
    wanted = any(figure.needs != "nothing" for figure in figures)
    default = Path(run.data.fid_reference_file) if wanted and run.data.fid_reference_file else None
    source = JudgeSource(
        figures,
        args.reference or default,
        run.data.image_size,
        args.inception_weights,
        args.download,
        args.foundation,
        args.batch_size,
        args.dinov2_weights,
        args.inception_sha256,
    )
    execute(Sweep(args.config, run, axes, single, settings, source), args.output or run.train.directory / "sweep")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch sweep",
        description=(__doc__ or "").format(figures=", ".join(FIGURES)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=local_path, help="LightningDiT file, as `sample` takes it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="sample.KEY=A,B,… is an axis")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="of each setting (default: sample.fid_num, at most 1,000)"
    )
    parser.add_argument("--figure", default="fid", metavar="NAME,…", help="of these the first ranks (default: fid)")
    parser.add_argument("--reference", type=local_path, help="real images, or their statistics (default: the config's)")
    parser.add_argument("--inception-weights", type=local_path, metavar="FILE", help="torch-fidelity's file")
    parser.add_argument("--download", action="store_true", help="let torch-fidelity download Inception's weights")
    parser.add_argument("--foundation", type=local_path, metavar="FILE", help="a foundation model in Inception's place")
    parser.add_argument("--dinov2-weights", type=local_path, metavar="FILE", help="DINOv2 ViT-L/14, for fdd")
    parser.add_argument("--inception-sha256", metavar="HASH", help="of another file that is accepted as Inception's")
    parser.add_argument("--batch-size", type=int, default=64, help="of the networks that judge (default: 64)")
    parser.add_argument("--output", type=local_path, metavar="DIR", help="default: sweep/ in the run's directory")
    args = parser.parse_intermixed_args(argv)
    for name, least in (("samples", 2), ("batch_size", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    return args


def execute(sweep: Sweep, output: Path) -> None:
    """Make what lacks of a sweep in `output`, and its report; all processes of a launcher call it.

    Raises ValueError where weights are missing or do not fit, `output` holds another sweep, or no setting has samples.
    """
    # Imports DeepSpeed: seconds that a mistake in the config need not wait.
    from launch.training.engine import start_processes

    processes = start_processes(timeout_minutes=24 * 60)  # processes wait for the slowest at the end
    networks = SharedNetworks(sweep.run, processes.device, [setting.sample for setting in sweep.settings])
    with lock_directory(output, processes), one_thread(processes.device):
        facts = processes.on_main(lambda: _facts(sweep, networks.facts))
        processes.on_main(lambda: finished.claim(output, facts))
        lacking = processes.on_main(lambda: _lacking(sweep, output, facts))
        if lacking:
            judge = _open_judge(sweep.source, output, processes)
            own = shares(lacking, processes.world_size)[processes.rank]
            for number, setting in enumerate(own, start=1):
                labels = labels_of(setting.sample, sweep.run.data.num_classes)
                done = make(setting, networks, judge, labels)
                finished.write_finished(output, setting, done)
                _say(setting, done, processes, f"{number}/{len(own)}")
        processes.barrier()
        processes.on_main(lambda: _report(sweep, output, facts))
        processes.barrier()


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU compute by one thread: launchers set how many, and sums in another order would be other files."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if device.type == "cpu" else before)
        yield
    finally:
        torch.set_num_threads(before)


def _facts(sweep: Sweep, of_networks: dict) -> dict:
    """What all settings share, as sweep.json has it."""
    facts = {"num_samples": sweep.num_samples, "labels": sweep.run.sample.labels}
    facts |= {"num_classes": sweep.run.data.num_classes, **of_networks, **sweep.source.facts}
    return finished.shared_facts(sweep.settings, **facts)


def _lacking(sweep: Sweep, output: Path, facts: dict) -> list[Setting]:
    """The settings to make, of those that make the same images one."""
    distinct = {setting.key: setting for setting in sweep.settings}
    lacking = [s for s in distinct.values() if finished.read_finished(output, s, facts) is None]
    print(f"{len(sweep.settings)} settings: {len(distinct) - len(lacking)} are there, {len(lacking)} to make")
    return lacking


def _open_judge(source: JudgeSource, output: Path, processes: Processes) -> Judge:
    """The judge on every process; the main one measures the reference, the others read what it kept."""
    judge = source.open(device=processes.device, cache=output / REFERENCE) if processes.is_main else None
    processes.barrier()
    return judge or source.open(device=processes.device, cache=output / REFERENCE)


def make(setting: Setting, networks: SharedNetworks, judge: Judge, labels: Sequence[int]) -> finished.Finished:
    """Sample one setting and judge it; samples that are not finite are an outcome, too."""
    facts: dict[str, Any] = {"sample": setting.effective(), "num_samples": len(labels), "versions": networks.versions}
    facts |= {"hashes": networks.facts["hashes"]}
    try:
        made = networks.sample(setting.sample, labels)
    except ValueError as e:
        nothing: dict[str, Any] = {"figures": {}, "nfe": 0.0, "guided_nfe": 0.0, "images_sha256": ""}
        return finished.Finished(**facts, **nothing, failed=str(e))
    counts: dict[str, Any] = {"nfe": made.nfe, "guided_nfe": made.guided_nfe}
    counts |= {"figures": judge.measure(made.images, torch.tensor(labels)), "images_sha256": pixels_hash(made.images)}
    return finished.Finished(**facts, **counts, failed=None)


def _say(setting: Setting, done: finished.Finished, processes: Processes, progress: str) -> None:
    outcome = (
        f"no samples: {done.failed}" if done.failed else ", ".join(f"{k} {v:.6g}" for k, v in done.figures.items())
    )
    who = f"[{processes.rank}] " if processes.world_size > 1 else ""
    print(printable(f"{who}{progress}  {setting.name}  {outcome}"), flush=True)


def _report(sweep: Sweep, output: Path, facts: dict) -> None:
    """Rank all settings and write what the sweep came to."""
    outcomes = []
    for setting in sweep.settings:
        done = finished.read_finished(output, setting, facts)
        if done is None:
            raise ValueError(f"{finished.setting_path(output, setting)} was made, and is not there any more")
        outcomes.append(done)
    figures = sweep.source.figures
    ranked = report.rank(sweep.settings, outcomes, figures[0])
    best = ranked[0]
    if best.value is None:
        raise ValueError(f"no setting has samples; {best.setting.name}: {best.finished.failed}")
    facts = facts | {"notes": _notes(sweep, facts)}
    if sweep.source.reference is not None:
        facts["reference"] = sweep.source.kept_facts(output / REFERENCE) | facts["reference"]
    text = report.table(ranked, sweep.axes, figures, facts)
    remarks = report.remarks(best, figures[0], facts, len(ranked))
    picture.draw(ranked, sweep.axes, figures[0], output / "sweep.png")
    write_text(output / "sweep.md", text)
    write_best(output / "best.yaml", sweep.config, sweep.single, best.setting, remarks)
    write_json(output / "results.json", report.results(ranked, sweep.axes, figures, facts))
    print(text)
    print(f"written: {output / 'sweep.md'}, sweep.png, results.json, best.yaml")


def write_best(path: Path, config: Path, single: Sequence[str], best: Setting, remarks: Sequence[str]) -> None:
    """The best setting as a run file that extends `config`, or says all where that would read otherwise."""
    run, _ = load_with(config, single, best.values)
    write_text(path, report.run_file(as_document(single, best.values), remarks, extends=config))
    if load(path, kind="lightningdit")[0] != run:  # a section that an override empties, say
        write_text(path, report.run_file(run.model_dump(mode="json"), remarks))


def _notes(sweep: Sweep, facts: dict) -> list[str]:
    """What keeps a figure from saying much."""
    count, classes = facts["num_samples"], facts["num_classes"]
    found = []
    if count % classes:
        found.append(
            f"{count:,} samples are no multiple of {classes:,} classes: some classes have more than others, or none"
        )
    if any(figure.name in ("fid", "sfid", "fdd") for figure in sweep.source.figures):
        found.append(
            f"Fréchet distances of {count:,} samples rank settings; they do not compare with those of another N"
        )
    return found
