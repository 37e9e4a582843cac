"""The little of kustomize that k8s/ uses, so that its manifests can be read where kubectl is missing.

Resources, images, merge patches and JSON patches (add, replace). Anything else is refused, so that nothing is skipped.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
_KNOWN = {"apiVersion", "kind", "resources", "images", "patches"}


def load_all(path: Path) -> list[Object]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def render(folder: Path) -> list[Object]:
    """The objects of an overlay or a base. Raises: ValueError for what this file does not know."""
    kustomization = load_all(folder / "kustomization.yaml")[0]
    if unknown := kustomization.keys() - _KNOWN:
        raise ValueError(f"{folder}: {sorted(unknown)} are not known here; teach tests/support/kustomize.py")
    objects: list[Object] = []
    for name in kustomization.get("resources", ()):
        path = folder / name
        # A deep copy through text: YAML aliases would make one object of two places, and a patch would hit both.
        objects += render(path) if path.is_dir() else [_unshared(document) for document in load_all(path)]
    for patch in kustomization.get("patches", ()):
        _apply(objects, patch.get("target"), load_all(folder / patch["path"])[0])
    for image in kustomization.get("images", ()):
        for found in objects:
            _tag_images(found, image["name"], image["newTag"])
    return objects


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _apply(objects: list[Object], target: Object | None, patch: Any) -> None:
    wanted = target or {"kind": patch["kind"], "name": patch["metadata"]["name"]}
    hit = [o for o in objects if (o["kind"], o["metadata"]["name"]) == (wanted["kind"], wanted["name"])]
    if len(hit) != 1:
        raise ValueError(f"a patch for {wanted} meets {len(hit)} objects")
    if isinstance(patch, list):
        for operation in patch:
            _apply_operation(hit[0], operation)
    else:
        _merge(hit[0], patch)


def _merge(into: Object, patch: Object) -> None:
    """RFC 7386, which is what kustomize does with kinds whose schema it does not know."""
    for key, value in patch.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def _apply_operation(document: Any, operation: Object) -> None:
    """RFC 6902, add and replace."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place = document
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    value = copy.deepcopy(operation["value"])
    match operation["op"], place:
        case "add", list():
            place.insert(len(place) if last == "-" else int(last), value)
        case "add", dict():
            place[last] = value
        case "replace", list():
            place[int(last)] = value
        case "replace", dict() if last in place:
            place[last] = value
        case _:
            raise ValueError(f"cannot {operation['op']} at {operation['path']}")


def _tag_images(value: Any, name: str, tag: str) -> None:
    if isinstance(value, dict):
        if value.get("image") == name:
            value["image"] = f"{name}:{tag}"
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _tag_images(item, name, tag)
