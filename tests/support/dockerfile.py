"""Rehearses a Dockerfile without Docker: its context by .dockerignore, its files into a folder, its pip steps for real.

What a step writes to absolute paths goes below the folder instead. Steps of the operating system are named and passed
over; a step that is not known fails the rehearsal, so that no command of a Dockerfile runs on this machine unseen.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from fnmatch import translate
from pathlib import Path

STEP_TIMEOUT_S = 300
# What the base image's package manager and its users are: nothing of ours is in them.
OF_THE_SYSTEM = re.compile(r"(apt-get (update|install)\b|useradd\b|rm -rf /var/lib/apt/lists/\*$)")
OURS = re.compile(r"(pip (install|wheel)|python3? k8s/docker/requirements\.py|python3 -m venv /opt/venv)\b")
ROOTED = re.compile(r"(?<![\w./*-])/(build|wheels|opt|tmp)\b")


@dataclass
class Stage:
    """What one FROM begins: a folder that stands for its file system."""

    root: Path
    workdir: str = "/"
    environment: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def path(self, name: str) -> Path:
        """Where `name` of the image lies."""
        return self.root / os.path.normpath(os.path.join(self.workdir, name)).lstrip("/")


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, rest) in their order, continued lines joined, comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


def context(root: Path, ignore: Path, files: list[Path]) -> list[Path]:
    """Those of `files` that Docker would send. Of .dockerignore's patterns the last that fits decides."""
    rules = []
    for line in filter(None, map(str.strip, ignore.read_text().splitlines())):
        pattern = line.removeprefix("!").removeprefix("**/")
        rules.append((re.compile(translate(pattern)), line.startswith("!"), line.lstrip("!").startswith("**/")))

    def is_sent(path: Path) -> bool:
        sent, parts = True, path.relative_to(root).parts
        for rule, negated, anywhere in rules:
            starts = range(len(parts)) if anywhere else (0,)
            spans = ("/".join(parts[i:j]) for i in starts for j in range(i + 1, len(parts) + 1))
            if any(rule.match(span) for span in spans):
                sent = negated
        return sent

    return [path for path in files if is_sent(path)]


class Rehearsal:
    """Runs the instructions of `dockerfile`, over `files` of the project at `project`, below `folder`."""

    def __init__(self, dockerfile: Path, project: Path, files: list[Path], folder: Path) -> None:
        self._project, self._folder = project, folder
        self._sent = context(project, project / ".dockerignore", files)
        self._stages: dict[str, Stage] = {}
        self._python = _fresh_environment(folder / "environment")
        for name, rest in instructions(dockerfile):
            self._do(name, rest)

    @property
    def last(self) -> Stage:
        return list(self._stages.values())[-1]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`python ARGUMENTS` in the image's working directory."""
        return self._execute([str(self._python), *arguments])

    def _do(self, name: str, rest: str) -> None:
        if name == "FROM":
            stage = rest.split(" AS ")[1] if " AS " in rest else str(len(self._stages))
            self._stages[stage] = Stage(self._folder / f"stage-{stage}")
            self._stages[stage].root.mkdir()
        elif name == "WORKDIR":
            self.last.workdir = rest
            self.last.path(".").mkdir(parents=True, exist_ok=True)
        elif name == "ENV":
            pairs = (pair.split("=", 1) for pair in rest.split())
            self.last.environment |= {key: value for key, value in pairs if key not in ("PATH", "HOME")}
        elif name == "COPY":
            self._copy(rest.split())
        elif name == "RUN":
            for command in map(str.strip, rest.split("&&")):
                self._run_step(command)
        else:
            assert name in ("ARG", "USER", "CMD"), f"an instruction that the rehearsal does not know: {name} {rest}"

    def _copy(self, words: list[str]) -> None:
        if words[0].startswith("--from="):
            source = self._stages[words[0].removeprefix("--from=")].path(words[1])
            shutil.copytree(source, self.last.path(words[2]), dirs_exist_ok=True)
            return
        *names, target = words
        for name in names:
            chosen = [
                path for path in self._sent if path == self._project / name or self._project / name in path.parents
            ]
            assert chosen, f"COPY {name}: the context has no such file; .dockerignore leaves it out"
            for path in chosen:
                inside = path.relative_to(self._project / name)
                place = self.last.path(target) / (inside if inside.parts else path.name)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)

    def _run_step(self, command: str) -> None:
        if OF_THE_SYSTEM.match(command) or command.startswith("python3 -m venv"):
            self.last.skipped.append(command)
            return
        assert OURS.match(command), f"a step that the rehearsal does not know: {command}"
        if re.match(r"pip install .*(--requirement|grep '\^torch')", command):
            self.last.skipped.append(command)  # what is installed here already; `requirements` says what
            return
        rooted = ROOTED.sub(lambda found: f"{self.last.root}/{found[1]}", command)
        (self.last.root / "tmp").mkdir(exist_ok=True)
        done = self._execute(["bash", "-c", f'pip() {{ "{self._python}" -m pip "$@"; }}; set -e; {rooted}'])
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"

    def _execute(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        environment = {
            **kept,
            **self.last.environment,
            "PATH": f"{self._python.parent}:{os.environ['PATH']}",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say: build with the setuptools that is here
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            # The kernels are optional and take a minute to compile; the installation of the project itself tries them.
            "CC": "false",
        }
        return subprocess.run(
            command,
            cwd=self.last.path("."),
            env=environment,
            capture_output=True,
            text=True,
            timeout=STEP_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )


def _fresh_environment(folder: Path) -> Path:
    """The interpreter of a new virtual environment that has all packages of this one but the project itself."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=STEP_TIMEOUT_S)
    links = folder / "others"
    links.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not re.match(r"_*(editable__*)?chorus", path.name, re.IGNORECASE) and "editable" not in path.name:
            (links / path.name).symlink_to(path)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{links}\n")
    return folder / "bin" / "python"
