"""What training scripts share: a folder that belongs to one run."""

import json
import pathlib

from ml_collections import ConfigDict

from jaxcomp.io.files import read_json, replacing, write_json


def claim(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Creates `workdir` for a run, or checks that it is this run's. Raises ValueError if the settings differ."""
    workdir.mkdir(parents=True, exist_ok=True)
    file, wanted = workdir / "config.json", json.loads(config.to_json())
    if not file.exists():
        with replacing(file) as temporary:
            write_json(temporary, wanted)
    found = read_json(file)
    differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differ:
        raise ValueError(f"{file}: the run in this folder has another {', '.join(differ)}; choose another workdir")
