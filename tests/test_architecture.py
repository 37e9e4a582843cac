"""Who may import whom. One table of arrows, read by ast; and two fresh interpreters that prove what stays unloaded.

An arrow of the table covers the modules below it; the longest matching name decides.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("engine", "adapter_store", "deployments", "demo")

SEAMS = (
    "engine.errors",
    "engine.pooling",
    "engine.grammar.spec",
    "engine.request",
    "engine.image_spec",
    "engine.config",
    "engine.stats",
    "engine.gc_pause",
    "engine.model_folder",
    "engine.sizing",
)
PARTS = ("engine.checkpoint", "engine.model", "engine.kv", "engine.lora", "engine.quant")
KERNELS = ("engine.native", "engine.triton_kernels", "engine.to_device")  # know tensors and nothing of the engine
STORE_SEAMS = ("adapter_store.errors", "adapter_store.records")
STORE_FLOORS = tuple(f"adapter_store.{folder}" for folder in ("image", "sources", "names", "fetch", "tiers"))
SERVE_SEAMS = tuple(f"deployments.{name}" for name in ("calls", "frames", "asks", "errors", "losses", "reports"))
ARROWS: dict[str, tuple[str, ...]] = {
    # The seams: plain data that every layer may name.
    "engine.errors": (),
    "engine.image_spec": (),
    "engine.stats": ("engine.sizing.room",),
    "engine.gc_pause": (),
    "engine.config": ("engine.errors",),
    "engine.model_folder": ("engine.errors",),
    "engine.sizing": ("engine.errors", "engine.config", "engine.sizing"),
    "engine.pooling": ("engine.errors",),
    "engine.grammar.spec": ("engine.errors",),
    "engine.request": ("engine.errors", "engine.pooling", "engine.grammar.spec"),
    # Policy. Of its own, the parts below the runner may know the plan only.
    "engine.core": (*SEAMS, "engine.core"),
    "engine.native": ("engine.native",),
    "engine.triton_kernels": ("engine.triton_kernels",),
    "engine.to_device": (),
    "engine.kv": (*SEAMS, "engine.core.plan", "engine.kv", *KERNELS),
    "engine.lora": (*SEAMS, "engine.core.plan", "engine.lora", *KERNELS),
    "engine.quant": (*SEAMS, "engine.quant"),
    # A program beside the engine.
    "engine.quantize": ("engine.errors", "engine.checkpoint", "engine.model", "engine.quant", "engine.quantize"),
    "engine.checkpoint": (*SEAMS, "engine.quant", "engine.checkpoint"),
    "engine.model": (*SEAMS, "engine.core.plan", *PARTS, *KERNELS),
    "engine.runner": (*SEAMS, "engine.core.plan", "engine.grammar", *PARTS, *KERNELS, "engine.runner"),
    "engine.text": (*SEAMS, "engine.text"),
    "engine.grammar": (*SEAMS, "engine.text", "engine.grammar"),
    "engine.output": (*SEAMS, "engine.core.sequence", "engine.text"),
    "engine.assembly": (
        *SEAMS, "engine.core", "engine.checkpoint", "engine.grammar", "engine.model", "engine.runner", "engine.text",
    ),
    "engine.engine": (
        *SEAMS, "engine.core", *PARTS, "engine.grammar", "engine.runner", "engine.output", "engine.text",
        "engine.assembly",
    ),
    "engine.aio": (*SEAMS, "engine.core", *PARTS, "engine.output", "engine.engine", "engine.aio"),
    "engine.offline": (*SEAMS, "engine.lora", "engine.output"),
    # The one arrow out of the engine: docs/decisions/0001-llm-is-the-offline-composition-root.md
    "engine.llm": (
        *SEAMS, "engine.checkpoint", "engine.lora", "engine.output", "engine.offline", "engine.engine",
        "adapter_store.image.packing", "adapter_store.errors",
    ),
    "engine": ("engine",),
    # The store, floor by floor: a name, its version, the version's bytes, an image, what is kept of it.
    "adapter_store": ("adapter_store",),
    "adapter_store.errors": (),
    "adapter_store.records": ("adapter_store.errors",),
    **{folder: (*STORE_SEAMS, *STORE_FLOORS[: floor + 1]) for floor, folder in enumerate(STORE_FLOORS)},
    "adapter_store.reports": (*STORE_SEAMS, *STORE_FLOORS),
    "adapter_store.store": (*STORE_SEAMS, *STORE_FLOORS, "adapter_store.reports"),
    # Ray Serve's side. `app` and `ingress` put it together.
    "deployments": ("engine", "adapter_store", "deployments"),
    "deployments.calls": (*SEAMS, *STORE_SEAMS),
    "deployments.frames": (*SEAMS, "deployments.calls"),
    "deployments.asks": (*SEAMS, "deployments.calls"),
    "deployments.errors": (*SEAMS, *STORE_SEAMS, "deployments.calls"),
    "deployments.losses": (),
    "deployments.reports": (),
    "deployments.listener": (),
    "deployments.dialects": ("deployments.dialects",),
    "deployments.kept": (*SEAMS, "deployments.calls", "deployments.kept"),
    "deployments.settings": (*SEAMS, "adapter_store", "deployments.dialects", "deployments.settings"),
    "deployments.store": ("adapter_store", *SERVE_SEAMS, "deployments.settings", "deployments.store"),
    "deployments.router": (
        *SEAMS, "engine.text", "engine.output", *STORE_SEAMS,
        *SERVE_SEAMS, "deployments.settings", "deployments.kept", "deployments.dialects", "deployments.router",
    ),
    "deployments.http": (
        *SEAMS, *STORE_SEAMS,
        *SERVE_SEAMS, "deployments.settings", "deployments.dialects", "deployments.router", "deployments.http",
    ),
    "deployments.replica": (
        "engine", "adapter_store", *SERVE_SEAMS, "deployments.settings", "deployments.store", "deployments.replica",
        "deployments.listener",
    ),
    "demo": ("demo",),
}  # fmt: skip

EXTRAS = ("awq", "gptqmodel")  # of autoawq and gptqmodel, imported when they are asked for
_TORCH = ("torch", "triton", "numpy", "transformers", "safetensors", "tqdm")
THIRD_PARTY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*SEAMS, "engine.core", "engine.output", "engine.aio"), ()),
    "engine.text": ("transformers", "tokenizers", "jinja2"),
    "engine.grammar": ("numpy", "llguidance"),
    "engine": _TORCH,
    "engine.quantize": ("torch", "transformers", "safetensors", "tqdm", *EXTRAS),
    "adapter_store": ("numpy", "boto3", "botocore", "urllib3", "httpx"),
    "adapter_store.names": ("cryptography",),
    "adapter_store.actor": ("ray",),
    "adapter_store.cluster": ("numpy", "ray"),
    "deployments": (
        "ray",
        "grpc",
        "fastapi",
        "fastapi_offline",
        "prometheus_client",
        "starlette",
        "pydantic",
        "pydantic_core",
        "numpy",
        "yaml",
    ),
    "demo": (*_TORCH, "peft", "tokenizers"),
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """Every module that `module` imports, wherever in the file and for whatever reason, as `package.module`."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively; name the module in full"
            origin = node.module or ""
            for alias in node.names:
                yield name if (name := f"{origin}.{alias.name}") in MODULES else origin


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def rule(table: dict[str, tuple[str, ...]], module: str) -> tuple[str, ...]:
    return table[max((prefix for prefix in table if is_below(module, prefix)), key=len)]


def test_imports_follow_the_arrows() -> None:
    """Exempt: `engine/__init__.py`, which names what it exports lazily."""
    wrong = [
        f"{module} -> {name}"
        for module in MODULES
        if module != "engine"
        for name in imports(module)
        if name.split(".")[0] in PACKAGES and not any(is_below(name, allowed) for allowed in rule(ARROWS, module))
    ]
    assert wrong == []


def test_each_part_uses_only_the_libraries_it_may() -> None:
    """The policy uses the standard library only; torch stays in the engine, Ray in the deployments and one actor."""
    wrong = [
        f"{module} -> {name}"
        for module in MODULES
        for name in imports(module)
        if (root := name.split(".")[0]) not in PACKAGES
        and root not in sys.stdlib_module_names
        and root not in rule(THIRD_PARTY, module)
    ]
    assert wrong == []


def test_every_library_that_is_used_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w.-]+", requirement)[0].replace("-", "_") for requirement in declared}  # type: ignore[index]
    # Parts of what is declared: ray[serve] brings FastAPI, boto3 botocore, each in the version it was tested with.
    names |= {"botocore", "urllib3", "pydantic_core", "fastapi", "starlette", "grpc"}
    names |= {"yaml"}  # pyyaml's
    names |= {"triton"}  # comes with torch's builds for CUDA, and is used on no other
    names |= {*EXTRAS}
    assert {lib for package in PACKAGES if package != "demo" for lib in rule(THIRD_PARTY, package)} <= names


def loaded_after_importing(modules: list[str]) -> set[str]:
    """The top-level names in sys.modules of a fresh interpreter that imported these."""
    program = f"import sys, {', '.join(modules)}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_policy_loads_without_torch_numpy_or_ray() -> None:
    policy = [module for module in MODULES if is_below(module, "engine.core")]
    assert "engine.core.scheduler" in policy
    loaded = loaded_after_importing([*policy, *SEAMS])
    assert loaded & {"torch", "numpy", "transformers", "ray", "adapter_store"} == set()


def test_the_router_and_the_store_load_without_torch() -> None:
    """So that a router starts fast and stays small; the model's process alone pays for torch."""
    of_the_replica = ("deployments.replica.replica", "deployments.direct", "deployments.app")
    apart = [m for m in MODULES if is_below(m, "deployments") and m not in of_the_replica]
    store = [m for m in MODULES if is_below(m, "adapter_store")]
    assert "deployments.ingress" in apart
    assert "torch" not in loaded_after_importing([*apart, *store, "engine.text.tokenizer", "engine.runner.protocol"])


def test_the_store_loads_without_ray() -> None:
    on_ray = ("adapter_store.actor", "adapter_store.cluster")
    store = [m for m in MODULES if is_below(m, "adapter_store") and m not in on_ray]
    assert loaded_after_importing(store) & {"ray", "torch", "engine"} == set()


def test_every_folder_with_modules_is_a_package() -> None:
    """Without an `__init__.py` the folder is a namespace: import-linter does not see it, a build may leave it out."""
    folders = {path.parent for path in MODULES.values()}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(("module", "name"), [("engine.core.plan", "engine.runner"), ("engine.lora.image", "ray")])
def test_a_wrong_arrow_would_be_found(module: str, name: str) -> None:
    assert not any(is_below(name, allowed) for allowed in (*rule(ARROWS, module), *rule(THIRD_PARTY, module)))
