"""What scripts share: how they start and end, a folder that belongs to one run, the state of a training, the flags of a card."""

import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import optax
from absl import app, flags
from jaxtyping import Float, Int
from ml_collections import ConfigDict, config_flags

from jaxcomp.io.files import read_json, replacing, write_json

RESULTS = pathlib.Path(__file__).parent / "results"


class State(NamedTuple):
    """All that a resumed run needs; batches and noise follow from `step`. `seconds` of training so far."""

    params: dict
    average: dict
    opt_state: optax.OptState
    step: Int[np.ndarray, ""]
    seconds: Float[np.ndarray, ""]


def launch(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a script: what its user can mend ends it with one line that names the script, Ctrl-C with status 130."""

    def run(arguments: Sequence[str]) -> None:
        name = pathlib.Path(sys.argv[0]).stem
        try:
            main(arguments)
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            sys.exit(130)
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"{name}: {error}")

    app.run(run)


def define_card_flags(config: pathlib.Path, out: str) -> None:
    """Flags of a script that runs a config, records what is done, and writes a card: config, out, results, overwrite."""
    config_flags.DEFINE_config_file("config", str(config), "What to run.", lock_config=True)
    flags.DEFINE_string("out", out, "Where finished runs are recorded.")
    flags.DEFINE_string("results", str(RESULTS), "Where the card goes.")
    flags.DEFINE_boolean("overwrite", False, "Discard what a run with other settings left in --out.")


def claim(workdir: str | pathlib.Path, config: ConfigDict) -> pathlib.Path:
    """Creates `workdir` for a run, or checks that it is this run's; returns it, absolute.

    Raises:
      ValueError: the settings of the run in it differ.
    """
    workdir = pathlib.Path(workdir).resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    file, wanted = workdir / "config.json", json.loads(config.to_json())
    if not file.exists():
        with replacing(file) as temporary:
            write_json(temporary, wanted)
    found = read_json(file)
    differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differ:
        raise ValueError(f"{file}: the run in this folder has another {', '.join(differ)}; choose another workdir")
    return workdir
