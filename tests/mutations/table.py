"""All mistakes by name, `<package>/<mistake>`."""

from tests.mutations import KernelMistake, Mistake, bench, common, csrc, kernels, launch, lightningdit, vavae

PACKAGES = {
    "csrc": csrc, "kernels": kernels, "common": common, "lightningdit": lightningdit, "vavae": vavae, "launch": launch,
    "bench": bench,
}  # fmt: skip
MISTAKES: dict[str, Mistake | KernelMistake] = {
    f"{package}/{name}": mistake for package, module in PACKAGES.items() for name, mistake in module.MISTAKES.items()
}
