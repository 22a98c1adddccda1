"""All mistakes by name, `<package>/<mistake>`."""

from tests.mutations import (
    KernelMistake,
    Mistake,
    bench,
    common,
    csrc,
    kernels,
    launch,
    launch_device_batches,
    launch_evaluation,
    launch_exporting,
    launch_extraction,
    launch_faults,
    launch_gallery,
    launch_incidents,
    launch_planning,
    launch_programs,
    launch_run_files,
    launch_sampling,
    launch_saving,
    launch_sight,
    launch_sweeps,
    lightningdit,
    meanflow,
    sampling,
    vavae,
)  # fmt: skip

PACKAGES = {
    "csrc": (csrc,), "kernels": (kernels,), "common": (common,), "vavae": (vavae,),
    "lightningdit": (lightningdit, meanflow, sampling),
    "launch": (
        launch, launch_device_batches, launch_evaluation, launch_exporting, launch_extraction, launch_faults,
        launch_gallery, launch_incidents, launch_planning, launch_programs, launch_run_files, launch_sampling,
        launch_saving, launch_sight, launch_sweeps,
    ),
    "bench": (bench,),
}  # fmt: skip
MISTAKES: dict[str, Mistake | KernelMistake] = {
    f"{package}/{name}": mistake
    for package, modules in PACKAGES.items()
    for module in modules
    for name, mistake in module.MISTAKES.items()
}
