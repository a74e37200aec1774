"""Settings as people write them: recipes, command lines, run folders, mistakes and help.

A recipe (YAML), the recipe it starts from (``base``) and the command line (``--section.key VALUE``) are laid over each other as plain
dictionaries and validated once, so a misspelt key or a wrong type reads the same wherever it was written.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import textwrap
import types
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from massl_fast.config.sections import LOADERS, Section
from massl_fast.config.whole import DEFAULT_OBJECTIVE, SETTINGS, Config, ObjectiveSettings
from massl_fast.plugins import load_plugins
from massl_fast.registry import shortened

RENAMED = {"train.device_batch": "train.micro_batch"}
"""Settings that have another name since the last version: old name, new name. The old one is taken for one version, with a note."""

Layer = list[tuple[tuple[str, ...], Any]]
"""Settings of one origin in their order: (path of the key, value)."""


def recipe_names() -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in resources.files("massl_fast.recipes").iterdir() if p.name.endswith(".yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The recipe's settings with the command line's on top, validated. Imports the files that ``run.plugins`` names.

    Raises ValueError naming every key that is unknown, of the wrong type or out of range, with the choices.
    """
    name, settings, notes = _settings_of(recipe, overrides)
    config = validated(settings, f"recipe {name}{' and the command line' if overrides else ''}")
    config.notes.extend(notes)
    if not config.run.folder:
        config.run.folder = f"runs/{name}"
    return config


def read_config(path: Path) -> Config:
    """The resolved configuration that a run wrote into its folder, with its plugins imported: for folders of one's own."""
    settings: dict[str, Any] = {}
    stored = _mapping_of(Path(path).read_text(encoding="utf-8"), str(path))
    notes = _lay_over(settings, _layer(stored, str(path), folder=Path()), str(path))
    config = validated(settings, str(path))
    config.notes.extend(notes)
    return config


def write_config(config: Config, path: Path) -> None:
    path.write_text(config_text(config), encoding="utf-8")


def config_text(config: Config) -> str:
    """All settings as YAML, as ``read_config`` reads them."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def validated(settings: dict[str, Any], origin: str) -> Config:
    """``settings`` as a Config; imports nothing. Raises ValueError with a sentence per problem, and one on the settings' ``origin``."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ValueError(
            "\n".join(_sentence(problem, settings) for problem in error.errors()) + f"\nThe settings come from {origin}."
        ) from None


def chosen_objective(recipe: str, overrides: Sequence[str]) -> str:
    """``objective.name`` of a recipe ("": the default) and a command line; raises ValueError for one that does not exist."""
    _, settings, _ = _settings_of(recipe, overrides)
    name = settings.get("objective", {}).get("name", DEFAULT_OBJECTIVE)
    SETTINGS.chosen(name)
    return name


def parse_overrides(arguments: Sequence[str]) -> Layer:
    """``["--train.steps", "10", "--model.model_args.depth=4"]`` → ``[(("train", "steps"), 10), (("model", "model_args", "depth"), 4)]``."""
    overrides: Layer = []
    waiting = iter(arguments)
    for argument in waiting:
        key, equals, value = argument.partition("=")
        path = tuple(key[2:].replace("-", "_").split("."))
        if not key.startswith("--") or len(path) < 2 or not all(path):
            raise ValueError(
                f"'{shortened(key)}' is not a setting. Settings are written --section.key VALUE, for example --train.steps 100."
            )
        if not equals:
            value = next(waiting, None)
            if value is None:
                raise ValueError(f"{key} has no value. Settings are written --section.key VALUE.")
        origin = f"The value of {key}, '{shortened(value)}',"
        overrides.append((path, _text(value, origin) if _is_text(path) else parsed_yaml(value, origin) if value else ""))
    return overrides


def _text(value: str, origin: str) -> Any:
    """What is typed for a setting that is text: YAML takes off quotes, and makes no number, date or truth value of it."""
    with contextlib.suppress(ValueError):
        parsed = parsed_yaml(value, origin)
        return parsed if isinstance(parsed, (str, list, dict)) else value
    return value


def _is_text(path: tuple[str, ...]) -> bool:
    """Whether a setting that every run has takes text."""
    field = Config.model_fields.get(path[0])
    model = field.annotation if field and len(path) == 2 else None
    setting = model.model_fields.get(path[1]) if isinstance(model, type) and issubclass(model, Section) else None
    return setting is not None and setting.annotation is str


def with_new_names(layer: Layer, origin: str, renamed: Mapping[str, str] = RENAMED) -> tuple[Layer, list[str]]:
    """(``layer`` with the new name for every old one, a note for each); raises ValueError where it has a setting under both names."""
    keys = {".".join(path) for path, _ in layer}
    old_names = sorted(keys & renamed.keys())
    for old in old_names:
        if renamed[old] in keys:
            raise ValueError(f"{origin}: {old} is the old name of {renamed[old]}, and both are set. Remove {old}.")
    notes = [f"{old} is called {renamed[old]} now; the next version knows the new name only." for old in old_names]
    return [(tuple(renamed.get(".".join(path), ".".join(path)).split(".")), value) for path, value in layer], notes


def _settings_of(recipe: str, overrides: Sequence[str]) -> tuple[str, dict[str, Any], list[str]]:
    """(the recipe's name, settings with ``overrides`` on top, notes); plugins are imported."""
    given = parse_overrides(overrides)
    name, settings, notes = _recipe(recipe, ()) if recipe else ("", {}, [])
    return name, settings, notes + _lay_over(settings, given, "The command line", by_hand=True)


def _recipe(recipe: str, inheriting: tuple[str, ...], folder: Path = Path()) -> tuple[str, dict[str, Any], list[str]]:
    """(name, settings, notes) of a shipped recipe or a file, with those of its base below. ``inheriting``: the recipes that led here."""
    name, text, place = _recipe_text(recipe, folder)
    origin = f"Recipe {recipe}"
    identity = str(place.resolve()) if place else name
    if identity in inheriting:
        raise ValueError(f"{origin} is its own base, by way of {' and '.join(inheriting[inheriting.index(identity) :])}. Remove one base.")
    own = _mapping_of(text, origin)
    base = own.pop("base", "")
    if not isinstance(base, str):
        raise ValueError(f"{origin}: base is {base!r}; it must be the name of a shipped recipe or the path of a YAML file.")
    here = place.parent if place else Path()
    _, settings, notes = _recipe(base, (*inheriting, identity), here) if base else ("", {}, [])
    return name, settings, notes + _lay_over(settings, _layer(own, origin, here), origin)


def _recipe_text(recipe: str, folder: Path) -> tuple[str, str, Path | None]:
    """(name, YAML text, its file if it is none of ours) of a shipped recipe's name or a file's path, seen from ``folder``."""
    if recipe in recipe_names():
        return recipe, resources.files("massl_fast.recipes").joinpath(f"{recipe}.yaml").read_text(encoding="utf-8"), None
    path = folder / recipe
    try:
        if path.is_file():
            return path.stem, path.read_text(encoding="utf-8"), path
    except (OSError, ValueError) as error:  # not ours to read, not text, or a name that no file can have
        raise ValueError(f"Recipe {recipe} cannot be read: {error}.") from None
    near = difflib.get_close_matches(recipe, recipe_names(), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"There is no recipe '{recipe}'.{hint} Shipped recipes: {', '.join(recipe_names())}; or give the path of a YAML file.")


def _layer(settings: dict[str, Any], origin: str, folder: Path) -> Layer:
    """A recipe's settings key by key; plugins, which it names as seen from its own ``folder``, as seen from here."""
    layer: Layer = []
    for section, values in settings.items():
        if not isinstance(section, str):
            raise ValueError(f"{origin}: {section!r} is no section of settings. Sections: {', '.join(Config.model_fields)}.")
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ValueError(f"{origin}: {section} holds no keys; it must be a section of settings.")
        for key, value in values.items():
            if (section, key) == ("run", "plugins"):
                value = _plugin_paths(value, folder) or value
            layer.append(((section, str(key)), value))
    return layer


def _lay_over(settings: dict[str, Any], layer: Layer, origin: str, *, by_hand: bool = False) -> list[str]:
    """Put ``layer`` over ``settings``; returns notes.

    Plugins come first, as they say which objectives there are. Where the layer names another objective than the settings below it, keys
    that only the other objective has are left out; a note says so where that was done ``by_hand`` rather than by a recipe's author.
    """
    layer, notes = with_new_names(layer, origin)
    for path, value in layer:
        if path == ("run", "plugins"):
            load_plugins(_plugin_paths(value) or [])
    named = [value for path, value in layer if path == ("objective", "name")]
    below = settings.get("objective", {})
    before = below.get("name", DEFAULT_OBJECTIVE)
    if named and isinstance(named[-1], str) and named[-1] != before and named[-1] in SETTINGS:
        left_out = [key for key in below if key not in SETTINGS[named[-1]].model_fields]
        for key in left_out:
            del below[key]
        if left_out and by_hand:
            notes.append(f"objective.name is {named[-1]}: {', '.join(left_out)}, which the recipe sets for {before}, are left out.")
    for path, value in layer:
        place = settings
        for depth, part in enumerate(path[:-1]):
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"{origin}: {'.'.join(path[: depth + 1])} holds no keys, so there is no {'.'.join(path)}.")
        place[path[-1]] = (_plugin_paths(value) or value) if path == ("run", "plugins") else value
    return notes


def _plugin_paths(value: Any, folder: Path = Path()) -> list[str] | None:
    """The files that a value of run.plugins names, as seen from ``folder``, as absolute paths; None where it is no list of text."""
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        return None
    return [str((folder / path).absolute()) for path in paths]


def _mapping_of(text: str, origin: str) -> dict[str, Any]:
    settings = parsed_yaml(text, origin) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{origin} must be a mapping of sections to settings; found {type(settings).__name__}.")
    return settings


WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$")
NUMBER = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """What text without quotes is, by its first character: as in YAML 1.1, but 1e-5 is a number, and neither 2026-11-21, 010 nor 12:30 is
    anything but text: no setting is a date, and octal and sexagesimal numbers are nobody's intention."""
    numbers = {"tag:yaml.org,2002:int": WHOLE, "tag:yaml.org,2002:float": NUMBER}
    found = {
        first: [(tag, numbers.get(tag, pattern)) for tag, pattern in choices if tag != "tag:yaml.org,2002:timestamp"]
        for first, choices in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    # A number is asked last: whole numbers are numbers, too.
    return {first: sorted(choices, key=lambda choice: choice[1] is NUMBER) for first, choices in found.items()}


class _Loader(yaml.SafeLoader):
    """YAML's plain values. A key that stands twice in a mapping is an error: YAML would take the last and forget the first."""

    yaml_implicit_resolvers = _resolvers()

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice in one mapping", problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that YAML 1.1 or ``_Loader`` would take for something else."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def parsed_yaml(text: str, origin: str) -> Any:
    """Plain values of a YAML ``text``. ``origin`` begins the sentence of the ValueError for a text that is none."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        reason = f"{error.problem or error.context}{place}"
    except RecursionError:
        reason = "it is nested too deep"
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a month 13, a number of thousands of digits
        reason = str(error).replace("\n", " ")
    except (AttributeError, LookupError, TypeError) as error:  # what PyYAML raises where a tag (!!int, !!bool, !!timestamp) does not fit
        reason = f"a value does not fit its tag ({type(error).__name__}: {error})"
    raise ValueError(f"{origin} is not valid YAML: {shortened(reason).removesuffix('.')}.")


def _models(objective: str) -> dict[str, type[Section]]:
    """The sections with the model of each, of a run that trains with ``objective``."""
    models: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    return {**models, "objective": SETTINGS.get(objective, ObjectiveSettings)}


def _sentence(problem: ErrorDetails, settings: dict[str, Any]) -> str:
    """One pydantic problem as a sentence that names the key, what was found and what would do."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return _unknown(location, settings)
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        return message if not key or message.startswith(key) else f"{key}: {message}"
    return f"{key} is {shortened(repr(problem['input']))}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


def _unknown(location: list[str], settings: dict[str, Any]) -> str:
    objective = settings["objective"].get("name", DEFAULT_OBJECTIVE) if isinstance(settings.get("objective"), dict) else DEFAULT_OBJECTIVE
    models, name = _models(objective), location[-1]
    key = ".".join(location)
    if location[0] == "objective":
        owners = [other for other, model in SETTINGS.items() if name in model.model_fields]
        if owners:
            return f"{key} is a setting of {', '.join(owners)}, but objective.name is {objective}."
    if location[:2] == ["data", "loader_settings"]:
        choices = list(LOADERS.get(settings["data"].get("loader", "auto"), Section).model_fields)
    else:
        choices = list(models[location[0]].model_fields) if len(location) > 1 else list(models)
    near = difflib.get_close_matches(name, choices, n=1)
    elsewhere = [f"{section}.{name}" for section, model in models.items() if name in model.model_fields]
    hint = f" Did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f" Did you mean {elsewhere[0]}?" if elsewhere else ""
    group = "Sections" if len(location) == 1 else f"Settings of {'.'.join(location[:-1])}"
    return f"There is no setting {key}.{hint} {group}: {', '.join(choices) or 'none'}."


def describe_settings(objective: str = DEFAULT_OBJECTIVE) -> str:
    """All settings of a run with ``objective``, with defaults and meaning, and the other objectives, for ``massl-fast train --help``."""
    lines = []
    for section, model in _models(objective).items():
        lines.append(f"\n{section}:")
        if section == "objective":
            lines += _objectives_but(objective)
        lines += _described(section, model)
    return "\n".join(lines)


def describe_section(name: str) -> str:
    """The settings of one section, or of the objective of that name. Raises ValueError with the choices where there is neither."""
    models = _models(name if name in SETTINGS else DEFAULT_OBJECTIVE)
    section = "objective" if name in SETTINGS else name
    if section not in models:
        raise ValueError(
            f"There is no section of settings '{shortened(name)}'. Sections: {', '.join(models)}; objectives: {', '.join(SETTINGS)}."
        )
    chosen = [] if section != "objective" else _objectives_but(name if name in SETTINGS else DEFAULT_OBJECTIVE)
    return "\n".join([f"{section}:", *chosen, *_described(section, models[section])])


def _described(section: str, model: type[Section]) -> list[str]:
    lines = []
    for name, setting in model.model_fields.items():
        if setting.is_required():
            shown = "must be set"
        else:
            default = setting.get_default(call_default_factory=True)
            shown = f"default {'none' if isinstance(default, Section) else repr(list(default) if isinstance(default, tuple) else default)}"
        lines.append(f"  --{section}.{name} ({_kind(setting.annotation)}, {shown})")
        lines += textwrap.wrap(setting.description or "", width=114, initial_indent=6 * " ", subsequent_indent=6 * " ")
    return lines


def _objectives_but(shown: str) -> list[str]:
    lines = [f"  Below are the settings of {shown}. There are other objectives:"]
    for name, model in SETTINGS.items():
        if name != shown:
            summary = (model.__doc__ or "").strip().split("\n")[0]
            lines += textwrap.wrap(f"{name}: {summary}", width=114, initial_indent=2 * " ", subsequent_indent=6 * " ")
    if len(lines) > 1:
        lines.append("  --objective.name NAME --help shows the settings of another.")
    return lines


KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", dict: "mapping"}


def _kind(annotation: Any) -> str:
    """What a setting takes, in words."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if get_origin(annotation) is Annotated:
        return _kind(arguments[0])
    if get_origin(annotation) is tuple:
        some = f"{_kind(arguments[0])}s"
        return f"list of {some}" if arguments[-1] is Ellipsis else f"{len(arguments)} {some}"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys("none" if kind is type(None) else _kind(kind) for kind in arguments))
    if get_origin(annotation) is list:
        return f"list of {_kind(arguments[0])}s"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "settings"
    # What only a plugin's settings have is called as Python calls it.
    return KINDS.get(get_origin(annotation) or annotation) or str(getattr(annotation, "__name__", annotation))
