"""Tiny LoRA adapters and the checkpoints that they are for, written once per run: the cases of tests/goldens/adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support.goldens import adapter_cases, tiny_adapters, tiny_directories

CASES = {case.name: case for case in adapter_cases.CASES}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Folder:
    """A folder with the requested directories, and the digest of each."""

    def __init__(self, path: Path) -> None:
        self.path, self.digests = path, {}

    def __call__(self, spec: tiny_directories.Spec | tiny_adapters.Spec) -> Path:
        path = self.path / spec.name
        if spec.name not in self.digests:
            write = tiny_adapters.write if isinstance(spec, tiny_adapters.Spec) else tiny_directories.write
            self.digests[spec.name] = write(spec, path)
        return path

    def golden(self, case: tiny_adapters.Spec) -> dict[str, np.ndarray]:
        """The arrays of a case; the digest ties both directories to the numbers."""
        self(case.base), self(case)
        with np.load(adapter_cases.HERE / f"{case.name}.npz") as file:
            golden = dict(file)
        assert str(golden["digest"]) == f"{self.digests[case.base.name]}+{self.digests[case.name]}"
        return golden

    def beside(self, base: tiny_directories.Spec) -> dict[str, Path]:
        """All adapters of a checkpoint: those of the cases and the extra one, if there is one."""
        specs = [case for case in CASES.values() if case.base is base]
        specs += [extra for name, extra in adapter_cases.EXTRA.items() if name == base.name]
        return {spec.name: self(spec) for spec in specs}
