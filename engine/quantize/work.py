"""The folder in which a checkpoint grows: `OUT.unfinished`, one shard per decoder layer, and how far it is.

Every file is written under another name and renamed when it is on disk, so a name that exists is whole. A layer is
done when state.json says so. OUT itself appears at the end, by one rename: half a checkpoint never has its name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import ConfigError

_STATE, _LOCK = "state.json", "lock"
INDEX = "model.safetensors.index.json"
REPORT = "quantization_report.json"
_COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken")  # tokenizer, chat template, generation config, licence
_OWN = (INDEX, REPORT, "config.json")


@dataclass(frozen=True, slots=True)
class Work:
    """Unfinished work on `out`. `done`: what each finished unit has to tell (JSON), by its number."""

    out: Path
    folder: Path
    num_units: int
    identity: Mapping[str, Any]
    done: dict[int, Any] = field(default_factory=dict)

    def shard(self, unit: int) -> Path:
        return self.folder / f"model-{unit + 1:05d}-of-{self.num_units:05d}.safetensors"

    def finish_unit(self, unit: int, tensors: Mapping[str, Tensor], about: Any = None) -> None:
        """Write the shard of a unit; from now on it is done. `about`: what to remember of it, as JSON."""

        def write(path: Path) -> None:
            # safetensors writes in an order of its own, so equal tensors give equal bytes.
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})

        with _disk_full_is_told(self.folder):
            _replace(self.shard(unit), write)
            self.done[unit] = about
            self._write_json(_STATE, {"identity": dict(self.identity), "done": self.done})

    def publish(self, source: Path, config: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """The index is written: add what else makes it a checkpoint and give it its name."""
        with _disk_full_is_told(self.folder):
            for path in source.iterdir():
                if path.is_file() and path.suffix in _COPIED and path.name not in _OWN:
                    _replace(self.folder / path.name, partial(shutil.copyfile, path))
            self._write_json(REPORT, report)
            self._write_json("config.json", config)
        self.folder.rename(self.out)  # on an empty folder too
        _sync(self.out.parent)
        (self.out / _STATE).unlink()
        (self.out / _LOCK).unlink()

    def write_index(self) -> None:
        """All units are done: from now on the folder's weights can be read."""
        weight_map: dict[str, str] = {}
        total_bytes = 0
        for path in (self.shard(unit) for unit in range(self.num_units)):
            with safe_open(path, "pt") as file:
                weight_map |= dict.fromkeys(file.keys(), path.name)
            with path.open("rb") as raw:
                total_bytes += path.stat().st_size - 8 - int.from_bytes(raw.read(8), "little")
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        with _disk_full_is_told(self.folder):
            self._write_json(INDEX, index)

    def _write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2) + "\n"
        _replace(self.folder / name, lambda path: path.write_text(text))


@contextmanager
def open_work(
    out: Path, num_units: int, identity: Mapping[str, Any], needed_bytes: int, *, resume: bool = True
) -> Iterator[Work]:
    """The work on `out`: begun before, if there is any and it is the same work, else new.

    Raises: ConfigError if `out` is taken, if the unfinished work is of other arguments or another model, if somebody
    else is at it, if the disk has no room for `needed_bytes`.
    """
    check_out(out)
    folder = out.with_name(out.name + ".unfinished")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise ConfigError(f"{str(folder)!r} cannot be written: {error.strerror}; give another OUT") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process is at work in {str(folder)!r}; wait for it, or give another OUT"
            ) from error
        if not resume:
            for path in folder.iterdir():
                if path.name != _LOCK:
                    path.unlink()
        done = _read_done(folder, identity, num_units)
        work = Work(out, folder, num_units, identity, done)
        _check_space(folder, needed_bytes * (num_units - len(done)) // num_units)
        yield work


def check_out(out: Path) -> None:
    """Raises: ConfigError unless `out` is free, absent or an empty folder, and can be given a folder's name."""
    if os.path.ismount(out):
        raise ConfigError(f"OUT={str(out)!r} is where a disk is mounted; give a folder below it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT={str(out)!r} is not empty; give a folder that does not exist, or empty it")


def _read_done(folder: Path, identity: Mapping[str, Any], num_units: int) -> dict[int, Any]:
    path = folder / _STATE
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text())
        before, done = dict(state["identity"]), {int(unit): about for unit, about in state["done"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; start over with --no-resume") from error
    differs = [key for key in {**before, **identity} if before.get(key) != identity.get(key)]
    if differs:
        told = ", ".join(f"{key} was {before.get(key)!r} and is {identity.get(key)!r}" for key in sorted(differs))
        raise ConfigError(
            f"{str(folder)!r} holds {len(done)} of {num_units} parts of other work: {told}; give the same as before, "
            "or discard it with --no-resume"
        )
    return done


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ConfigError(
            f"the disk of {str(folder)!r} has {free >> 20} MiB free and about {needed_bytes >> 20} MiB are needed; "
            "make room, or give an OUT on another disk"
        )


@contextmanager
def _disk_full_is_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors wraps the system's errors in its own
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or "No space left" in str(error) or "File too large" in str(error):
            raise ConfigError(
                f"no space is left for {str(folder)!r}; make room and run it again, it goes on behind the last layer"
            ) from error
        raise


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    half = path.with_name(path.name + ".partial")
    write(half)
    with half.open("rb") as file:
        os.fsync(file.fileno())
    half.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """A rename is on disk when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
