"""Recipe files as nested values: reading, `extends`, overrides; and what is wrong with them, in words."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from poweropd import objectives
from poweropd.errors import ConfigError

WHOLE = {"sources", "teachers"}  # what sums to 1 is one value: `extends` replaces it, and never adds to it
SUM_TOLERANCE = 1e-6
NOT_NAMES = {"[key]", "one section", "several sections"}  # of pydantic, in the location of a problem


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML takes the last in silence, and reads 1e-3 as a number."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe file, merged into those of its `extends:` parents.

    Raises:
        ConfigError: a file cannot be read, is not YAML, holds no sections, or extends itself.
    """
    if path.resolve() in seen:
        raise ConfigError(f"{path}: its extends chain comes back to itself")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"recipe {path} holds a {type(values).__name__}; sections such as student, teacher, data are needed"
        )
    parent = values.pop("extends", None)
    if parent is None:
        return values
    below = read(path.parent / parent, (*seen, path.resolve()))
    objective = values.get("objective")
    name = objective.get("name") if isinstance(objective, dict) else objective
    return _merge(below if name is None else _without_settings_of_other_objective(below, name), values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merge(below[key], value)
        if isinstance(value, dict) and isinstance(below.get(key), dict) and key not in WHOLE
        else value
        for key, value in above.items()
    }
    return {**below, **both}


def override(values: dict[str, Any], setting: str) -> dict[str, Any]:
    """The values with one setting, `a.b=c`, changed. In a list, the key is a place: `data.0.limit=20`.

    Raises:
        ConfigError: it is not of that form, or there is no such place.
    """
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {setting!r}: give it as section.key=value, for example train.steps=20")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {setting!r}: the value is not valid YAML") from None
    if key == "objective.name":
        values = _without_settings_of_other_objective(values, value)
    return _with(values, key.split("."), value, ())


def _with(values: Any, keys: list[str], value: Any, above: tuple[str, ...]) -> Any:
    """A copy with one value changed: YAML's aliases share what they stand for."""
    if not keys:
        return value
    key, *rest = keys
    if isinstance(values, list):
        places = [str(place) for place in range(len(values))]
        if key not in places:
            where = ".".join(above)
            raise ConfigError(
                f"--set {'.'.join((*above, *keys))}: {where} is a list of {len(values)}; say which, "
                f"for example {where}.0.{'.'.join(keys)}"
            )
        return [
            _with(item, rest, value, (*above, key)) if key == place else item
            for place, item in zip(places, values, strict=True)
        ]
    if isinstance(values, str) and above == ("objective",):
        values = {"name": values}
    below = values if isinstance(values, dict) else {}
    return {**below, key: _with(below.get(key), rest, value, (*above, key))}


def _without_settings_of_other_objective(values: dict[str, Any], name: Any) -> dict[str, Any]:
    """A setting of one objective means nothing to another: a new name starts from a bare section."""
    section = values.get("objective")
    if not isinstance(section, dict) or section.get("name", "power") == name:
        return values
    common = ("end_token", "masked_tokens", *objectives.STABILITY)
    return {**values, "objective": {key: section[key] for key in common if key in section}}


def flow(values: Mapping[Any, float]) -> str:
    """Numbers as a recipe writes them: `{student: 0.5, golden: 0.5}`."""
    return "{" + ", ".join(f"{key}: {value:.10g}" for key, value in values.items()) + "}"


def check_sum(what: str, shares: Mapping[Any, float], advice: str) -> None:
    """Raises ValueError unless the shares sum to 1."""
    total = sum(shares.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise ValueError(f"{what} must sum to 1, got {flow(shares)}, which sum to {total:.10g}; {advice}")


def check_judges(weights: Mapping[str, float | None], asked: Mapping[str, str | None]) -> None:
    """Raises ValueError unless it is clear which teachers judge what.

    Args:
        weights: of every teacher, by name.
        asked: the teacher that each data section names, by the section's key.
    """
    given = {name: weight for name, weight in weights.items() if weight is not None}
    for key, name in asked.items():
        if name is None and len(weights) > 1 and not given:
            raise ValueError(
                f"{key}.teacher: missing; name the one of {', '.join(weights)} that judges the answers to these prompts, "
                "or give every teacher a weight, to mix them"
            )
        if name is not None and given:
            raise ValueError(f"{key}.teacher: got {name!r}, but teachers with weights judge together; leave it out")
        if name is not None and name not in weights:
            raise ValueError(f"{key}.teacher: unknown teacher {name!r}; {nearest(name, list(weights))}")
    for name in weights:
        if given and name not in given:
            raise ValueError(
                f"teachers.{name}.weight: missing, where others have one ({flow(given)}); weigh all or none"
            )
        if len(weights) > 1 and not given and name not in asked.values():
            raise ValueError(f"teachers.{name}: judges nothing; name it in a section of data, or leave it out")
    if given:
        check_sum("teachers: the weights", given, "give every teacher its share of the mixture")


def nearest(name: str, known: list[str]) -> str:
    """`did you mean 'steps'?`, or all that is known where nothing is near."""
    match = get_close_matches(name, known, n=1)
    return f"did you mean {match[0]!r}?" if match else f"known here: {', '.join(known)}"


def in_words(problem: Any, root: type[BaseModel]) -> str:
    """One validation problem of `root` in a line: where, what is wrong, what was received, what is accepted."""
    location = [str(part) for part in problem["loc"] if part not in NOT_NAMES]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown key; {nearest(location[-1], list(_section_at(location[:-1], root).model_fields))}"
    if problem["type"] == "missing":
        return f"{name}: missing, and it has no default"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        return message if not name or message.startswith(f"{name}.") else f"{name}: {message}"
    if problem["type"] == "model_type":
        return f"{name}: a section of settings is needed, got {problem['input']!r}; leave it out for its defaults"
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{name}: {message}, got {problem['input']!r}"


def _section_at(location: list[str], root: type[BaseModel]) -> type[BaseModel]:
    """The class of the section at `location`; places in a list and names in a mapping lead to what these hold."""
    section = root
    for part in location:
        if part in section.model_fields:
            section = section_in(section.model_fields[part].annotation) or section
    return section


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a setting of this type is, or holds; None: a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for part in get_args(annotation) if (section := section_in(part)) is not None), None)
