"""Files that people write: strict YAML to a frozen value, every fault at once, each with its line.

`Spec` is the base of every section. `load_document` reads YAML and remembers where each key stands,
`check_document` turns the document into a Spec or returns the faults, with "did you mean".
"""

from __future__ import annotations

import difflib
import json
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.errors import Fault, RecipeError

Key = tuple[str | int, ...]
T = TypeVar("T", bound="Spec")


class Spec(BaseModel):
    """A section of a file that a person writes: frozen, typed strictly, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Document:
    """What a YAML file says (`data`) and where each key of it stands (`where`: key path → file:line)."""

    path: str
    data: dict[str, Any]
    where: dict[Key, str] = field(default_factory=dict)

    def locate(self, key: Key) -> str:
        """file:line of the key, or of the nearest section around it."""
        for end in range(len(key), -1, -1):
            if key[:end] in self.where:
                return self.where[key[:end]]
        return f"{self.path}:1"


def load_document(path: Path, overrides: tuple[str, ...] = (), *, tagged: frozenset[Key] = frozenset()) -> Document:
    """Read a YAML 1.2 file, the files it `extends`, and `section.key=value` overrides, in that order.

    `tagged` are the keys of sections that `kind` tells apart (`find_tagged`): where it changes, the base's keys make no sense.
    """
    document = _load_file(path, (), tagged)
    for override in overrides:
        document = _apply_override(document, override)
    return document


def _load_file(path: Path, extended_by: tuple[Path, ...], tagged: frozenset[Key]) -> Document:
    if path.resolve() in extended_by:
        chain = " → ".join(str(p) for p in (*extended_by, path.resolve()))
        raise RecipeError([Fault(f"{path}:1", "extends", f"a file extends itself: {chain}", "break the circle")])
    data, where = _parse_yaml(path)
    base_name = data.pop("extends", None)
    if base_name is None:
        return Document(str(path), data, where)
    line = where.pop(("extends",))
    if not isinstance(base_name, str):
        raise RecipeError([Fault(line, "extends", f"{base_name!r} is not a path", "name one YAML file")])
    base_path = path.parent / base_name
    if not base_path.is_file():
        raise RecipeError([Fault(line, "extends", f"no file {base_path}", "the path is relative to this recipe")])
    base = _load_file(base_path, (*extended_by, path.resolve()), tagged)
    return Document(str(path), *_merge(base, data, where, tagged))


def _merge(base: Document, data: dict[str, Any], where: dict[Key, str], tagged: frozenset[Key]) -> tuple[dict[str, Any], dict[Key, str]]:
    """`data` laid over `base`, mapping by mapping; a tagged section whose `kind` changes is replaced whole."""
    merged_where = dict(base.where)

    def overlay(old: Any, new: Any, key: Key) -> Any:
        both = isinstance(old, dict) and isinstance(new, dict)
        if not both or (key in tagged and new.get("kind", old.get("kind")) != old.get("kind")):
            for stale in [k for k in merged_where if k[: len(key)] == key]:
                del merged_where[stale]
            return new
        return old | {name: overlay(old.get(name), value, (*key, name)) for name, value in new.items()}

    merged = overlay(base.data, data, ())
    return merged, merged_where | where


def _parse_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError([Fault(str(path), "", "no such file", "lepton-launch recipes lists those that ship")]) from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise RecipeError([Fault(str(path), "", f"not a YAML text file ({type(error).__name__})")]) from None
    yaml = YAML(typ="rt", pure=True)
    try:
        tree = yaml.load(text)
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        remedy = "keep one of the two" if isinstance(error, DuplicateKeyError) else "check indentation, colons and quotes"
        raise RecipeError([Fault(f"{path}:{mark.line + 1 if mark else 1}", "", f"not YAML: {_problem_of(error)}", remedy)]) from None
    if not isinstance(tree, dict) or not tree:
        what = "empty" if tree is None or tree == {} else f"{_yaml_kind(tree)}, not a mapping of sections"
        raise RecipeError([Fault(f"{path}:1", "", f"the file is {what}", "start from: lepton-launch recipes show quickstart")])
    where: dict[Key, str] = {(): f"{path}:1"}
    return _plain(tree, (), where, path), where


def _problem_of(error: Any) -> str:
    """What a YAML error complains of, in one line."""
    from ruamel.yaml.error import MarkedYAMLError

    problem = error.problem if isinstance(error, MarkedYAMLError) else None
    return " ".join((problem or str(error) or "syntax error").split())


def _yaml_kind(value: Any) -> str:
    for kind, name in ((list, "a list"), (bool, "a boolean"), (int, "a number"), (float, "a number")):
        if isinstance(value, kind):
            return name
    return "text"


def _plain(node: Any, key: Key, where: dict[Key, str], path: Path) -> Any:
    """ruamel's round-trip tree as plain dicts and lists, noting each key's line."""
    children: list[tuple[str | int, int, Any]] = []
    if isinstance(node, dict):
        lines = node.lc.data or {}  # type: ignore[attr-defined]  # a key that a merge (<<) brought in has none
        children = [(str(name), lines.get(name, (node.lc.line,))[0], value) for name, value in node.items()]  # type: ignore[attr-defined]
    elif isinstance(node, list):
        children = [(index, node.lc.item(index)[0], value) for index, value in enumerate(node)]  # type: ignore[attr-defined]
    plain = []
    for name, line, value in children:
        below: Key = (*key, name)
        where[below] = f"{path}:{line + 1}"
        plain.append((name, _plain(value, below, where, path)))
    if isinstance(node, dict):
        return dict(plain)
    if isinstance(node, list):
        return [value for _, value in plain]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)  # drops ruamel's ScalarFloat and the like
    return node if node is None else str(node)


def _apply_override(document: Document, override: str) -> Document:
    """`section.key=value` laid over the document; the value is YAML."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    name, equals, text = override.partition("=")
    where = "command line"
    if not equals or not all(name.split(".")):
        raise RecipeError([Fault(where, override, "not an override", "write section.key=value, such as optim.lr=1e-4")])
    try:
        value = _plain(YAML(typ="rt", pure=True).load(text), (), {}, Path(where))
    except YAMLError as error:
        raise RecipeError([Fault(where, name, f"{text!r} is not YAML: {_problem_of(error)}", "quote it twice: 'key=\"value\"'")]) from None
    key: Key = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    data = _with_value(document.data, key, value, ())
    kept = {k: v for k, v in document.where.items() if k[: len(key)] != key}
    return Document(document.path, data, kept | {key: where})


def _with_value(node: Any, key: Key, value: Any, above: Key) -> Any:
    """`node`, which stands at `above`, with the value at `key` below it. Raises RecipeError where there is no such place."""
    if not key:
        return value
    head, rest = key[0], key[1:]
    here, wanted = ".".join(map(str, above)), ".".join(map(str, (*above, *key)))
    if isinstance(node, list):
        if not isinstance(head, int) or head >= len(node):
            numbers = f"its items are {here}.0 to {here}.{len(node) - 1}; " if node else ""
            problem = f"{here} is a list of {len(node)}, and {head!r} is none of its items"
            raise RecipeError([Fault("command line", wanted, problem, f"{numbers}{here}=[...] replaces it")])
        return [*node[:head], _with_value(node[head], rest, value, (*above, head)), *node[head + 1 :]]
    if node is not None and not isinstance(node, dict):
        raise RecipeError([Fault("command line", wanted, f"{here} is {_show(node)}, which has no keys", f"{here}=VALUE replaces it")])
    below = node or {}
    return below | {str(head): _with_value(below.get(str(head)), rest, value, (*above, head))}


def check_document(spec: type[T], document: Document) -> tuple[T | None, list[Fault]]:
    """The document as a `spec`, or None and every fault in it."""
    try:
        # JSON mode keeps types strict (no "3" for 3) and still reads lists into tuples.
        return spec.model_validate_json(json.dumps(document.data)), []
    except ValidationError as error:
        return None, _collect_faults(spec, document, error)


def _collect_faults(spec: type[Spec], document: Document, error: ValidationError) -> list[Fault]:
    """One fault a key; the branches of a union that failed are joined by "or". Where something deeper is wrong, that counts."""
    by_key: dict[Key, list[Any]] = {}
    for item in error.errors(include_url=False):
        by_key.setdefault(_data_key(item["loc"], document.data, item["type"]), []).append(item)
    deepest = [key for key in by_key if not any(len(other) > len(key) and other[: len(key)] == key for other in by_key)]
    return [_make_fault(spec, document, key, by_key[key]) for key in deepest]


def _data_key(loc: Key, data: Any, kind: str) -> Key:
    """pydantic's location without the names of union branches, so that it is a path in the file."""
    key: list[str | int] = []
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(data, dict) and (part in data or (last and kind in ("missing", "extra_forbidden"))):
            key.append(part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            key.append(part)
            data = data[part]
    return tuple(key)


def _make_fault(spec: type[Spec], document: Document, key: Key, items: list[Any]) -> Fault:
    dotted = ".".join(map(str, key))
    where = document.locate(key)
    kinds = {item["type"] for item in items}
    if "extra_forbidden" in kinds:
        return Fault(where, dotted, "unknown key", _suggest(spec, document, key))
    value = items[0]["input"]
    if kinds == {"missing"}:
        if isinstance(items[0]["loc"][-1], int):
            return Fault(where, dotted, "has too few values", _describe(spec, document, key))
        return Fault(where, dotted, "is needed and is not there", _describe(spec, document, key))
    if "union_tag_not_found" in kinds:
        return Fault(where, f"{dotted}.kind", "is needed and is not there", f"one of: {_kinds(spec, document, key)}")
    if "union_tag_invalid" in kinds:
        tag = items[0]["ctx"]["tag"]
        near = difflib.get_close_matches(tag, _kinds(spec, document, key).split(", "), 1)
        hint = f"did you mean {near[0]}?" if near else ""
        return Fault(document.locate((*key, "kind")), f"{dotted}.kind", f"{tag!r} is not one of {_kinds(spec, document, key)}", hint)
    wants = " or ".join(dict.fromkeys(_want(item) for item in items))
    remedy = ""
    if kinds & {"model_type", "model_attributes_type", "dict_type"}:
        wants = "should be a mapping of keys"
        remedy = f"write {dotted}: {{kind: {value}}}" if value and value in _kinds(spec, document, key).split(", ") else ""
    choices = [c for item in items if item["type"] == "literal_error" for c in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]
    near = difflib.get_close_matches(str(value), [c.strip("'") for c in choices], 1)
    if near:
        remedy = f"did you mean {near[0]}?"
    return Fault(where, dotted, f"{_show(value)} {wants}", remedy or _describe(spec, document, key))


def _show(value: Any) -> str:
    """A value as its YAML says it; what holds others by its kind."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return "a mapping" if isinstance(value, dict) else repr(value)


def _want(item: Any) -> str:
    if item["type"] == "literal_error":
        return f"should be {item['ctx']['expected']}"
    if item["type"] in ("too_short", "too_long"):
        limit = item["ctx"].get("min_length", item["ctx"].get("max_length"))
        return f"should have at {'least' if item['type'] == 'too_short' else 'most'} {limit} value{'s' if limit != 1 else ''}"
    message: str = item["msg"].replace("a valid array", "a list")
    return message[max(message.find("should"), 0) :].removeprefix("Value error, ")


def _members(annotation: Any) -> list[Any]:
    """The types a field may hold, unions and containers opened."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType) or origin in (tuple, list):
        return [member for arg in get_args(annotation) if arg is not Ellipsis for member in _members(arg)]
    return [annotation]


def _specs_at(spec: type[Spec], data: Any, key: Key) -> list[type[Spec]]:
    """The sections that may stand at a key; a tagged one is picked by the `kind` the file gives."""
    found = [spec]
    for part in key:
        annotations = [s.model_fields[part].annotation for s in found if part in s.model_fields] if isinstance(part, str) else []
        if isinstance(part, str):
            data = data.get(part) if isinstance(data, dict) else None
            found = [m for a in annotations for m in _members(a) if isinstance(m, type) and issubclass(m, Spec)]
        else:
            data = data[part] if isinstance(data, list) and part < len(data) else None
        kind = data.get("kind") if isinstance(data, dict) else None
        tagged = [s for s in found if "kind" in s.model_fields and kind in get_args(s.model_fields["kind"].annotation)]
        found = tagged or found
    return found


def _kinds(spec: type[Spec], document: Document, key: Key) -> str:
    specs = _specs_at(spec, {}, key)
    return ", ".join(str(kind) for s in specs if "kind" in s.model_fields for kind in get_args(s.model_fields["kind"].annotation))


def _describe(spec: type[Spec], document: Document, key: Key) -> str:
    """The docstring of the field at a key."""
    for section in _specs_at(spec, document.data, key[:-1]):
        info = section.model_fields.get(str(key[-1])) if key else None
        if info is not None and info.description:
            return " ".join(info.description.split())
        if info is not None and isinstance(info.annotation, type) and issubclass(info.annotation, Spec):
            return (info.annotation.__doc__ or "").split("\n")[0]
    return ""


def _suggest(spec: type[Spec], document: Document, key: Key) -> str:
    """The kinds of this section that have the key, else the nearest key here, else the section that has it, else all keys."""
    name, section_key = str(key[-1]), key[:-1]
    sections = _specs_at(spec, document.data, section_key)
    here = sorted({field for section in sections for field in section.model_fields})
    if len(sections) == 1 and "kind" in here:
        others = [s for s in _specs_at(spec, {}, section_key) if s is not sections[0] and name in s.model_fields]
        kinds = [str(kind) for s in others for kind in get_args(s.model_fields["kind"].annotation)]
        if kinds:
            return f"it is a key of {' and '.join(kinds)}; keys of this kind: {', '.join(here)}"
    near = difflib.get_close_matches(name, here, 1)
    if near:
        return f"did you mean {near[0]}?"
    elsewhere = [dotted for dotted in dotted_keys(spec) if dotted.split(".")[-1] == name]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"keys here: {', '.join(here)}"


def find_tagged(spec: type[Spec], prefix: Key = ()) -> frozenset[Key]:
    """The keys of the sections that are one of several, told apart by their `kind`."""
    found = {(*prefix, name) for name, info in spec.model_fields.items() if info.discriminator}
    for name, info in spec.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Spec):
            found |= find_tagged(info.annotation, (*prefix, name))
    return frozenset(found)


def dotted_keys(spec: type[Spec], prefix: str = "") -> list[str]:
    """Every key a file of this kind may have, dotted."""
    keys: list[str] = []
    for name, info in spec.model_fields.items():
        keys.append(prefix + name)
        for member in _members(info.annotation):
            if isinstance(member, type) and issubclass(member, Spec):
                keys += [k for k in dotted_keys(member, f"{prefix}{name}.") if k not in keys]
    return keys
