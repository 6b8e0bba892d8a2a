"""Knows which members of a sample, columns of a table or fields of JSON hold the image and the label.

--image NAME, --label NAME ──▶ PartNames
JSON, a.b ──read_field──▶ label
what is there ──guess_use, describe_parts──▶ what would fit, and the line to type
"""

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pipeline.shards.labels import are_several

MAX_LABEL_LENGTH = 1000
MAX_LABEL_BYTES = 1 << 22
"""The limit for a member that holds the label."""

_PLAUSIBLE_LENGTH = 60
"""The length up to which an unknown text is taken for a label rather than a caption."""
_SHOWN = 5
"""The number of parts that are proposed."""
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")

NO_LABEL = "none"
"""What --label says where labels are not read."""

Use = Literal["image", "label", ""]
"""What a part would fit as; empty for neither."""


class PartNames(NamedTuple):
    """The parts as a user has named them; None stands for the usual names."""

    image: str | None = None
    """A column, or what follows the key in the names of members: jpg, input.jpg."""
    label: str | None = None
    """Likewise. PART:FIELD is a field of a JSON member, where FIELD may be a path such as a.b, and folder is the
    folder that the image lies in. NO_LABEL: labels are not read."""

    def image_parts(self, usual: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the extensions of members that are images."""
        return (_as_part(self.image),) if self.image else usual

    @property
    def label_part(self) -> str:
        """The extension of members that hold labels."""
        part, _, _ = (self.label or "cls").partition(":")
        return _as_part(part)


USUAL = PartNames()


def _as_part(name: str) -> str:
    return name.lower().removeprefix(".")


class BadLabelError(ValueError):
    """A label is missing or cannot be used. The message says why."""


def read_label(data: bytes, source: str) -> str:
    """Returns the label that a member holds; `source` is as PartNames.label. Raises BadLabelError."""
    part, _, field = source.partition(":")
    label = _read_field(data, part, field) if field else data.decode("utf-8", "replace").strip()
    if are_several(label):
        raise BadLabelError(f"label {label[:40]!r} is several numbers; a sample has one class")
    return check_label(label)


def check_label(label: str) -> str:
    if not label.isprintable() or not 0 < len(label) <= MAX_LABEL_LENGTH or "\ufffd" in label:
        raise BadLabelError(f"label {label[:40]!r}: neither a number nor a readable name")
    return label


def read_folder(key: str) -> str:
    """Returns the name of the folder that a sample lies in, its class. Raises BadLabelError."""
    path, _, _ = key.rpartition("/")
    _, _, label = path.rpartition("/")
    if label in ("", "."):
        raise BadLabelError("lies in no folder, from which its class could be taken")
    return check_label(label)


def _read_field(data: bytes, part: str, field: str) -> str:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadLabelError(f"its {part} part is not JSON: {error}") from error
    value = tree
    steps = [field] if isinstance(tree, dict) and field in tree else field.split(".")
    for step in steps:
        if not isinstance(value, dict) or step not in value:
            found = ", ".join(name for name, _ in _list_fields(tree)) or type(tree).__name__
            raise BadLabelError(f"its {part} part has no field {field!r}; found {found[:200]}")
        value = value[step]
    # A column with gaps becomes one of floats in pandas.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadLabelError(f"{field} is {json.dumps(value)[:40]}; a label is a number or a name")
    return str(value).strip()


def _list_fields(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields path and value of the fields of parsed JSON that hold no other fields."""
    if not isinstance(tree, dict):
        return
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _list_fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def guess_use(value: Any) -> Use:
    """Returns what the contents of a part or a column would fit as: its first bytes, or a number or text."""
    if isinstance(value, bytes):
        if value.startswith(_MAGIC):
            return "image"
        value = value.decode("utf-8", "replace").strip()
    if isinstance(value, str):
        is_label = 0 < len(value) <= _PLAUSIBLE_LENGTH and value.isprintable() and "\ufffd" not in value
    else:
        is_label = isinstance(value, int) and not isinstance(value, bool)
    return "label" if is_label else ""


def guess_uses(part: str, data: bytes) -> dict[str, Use]:
    """Returns what a member would fit as, by the name to give; a JSON member has one for each of its fields."""
    if not part.endswith("json"):
        return {part: guess_use(data)}
    uses: dict[str, Use] = {}
    with contextlib.suppress(ValueError, RecursionError):
        uses = {f"{part}:{field}": guess_use(value) for field, value in _list_fields(json.loads(data))}
    return uses or {part: ""}


def separator_behind(described: str) -> str:
    """Returns what comes between a description of parts and the rest of a message: a line to type ends its own line."""
    return "\n" if "\n" in described else "; "


def describe_parts(uses: Mapping[str, Use], command: str, names: PartNames) -> str:
    """Returns what is there, what of it would fit and, if anything does, the line to type: `command` with the names.

    What `names` has comes first if it is there.
    """
    images = [name for name, use in uses.items() if name == names.image or use == "image"]
    labels = [name for name, use in uses.items() if name == names.label or use == "label"]
    images.sort(key=lambda name: name != names.image)
    labels.sort(key=lambda name: name != names.label)
    found = f"found {', '.join(uses) or 'nothing'}"
    if not images or not labels:
        missing = " or ".join([*["an image"] * (not images), *["a label"] * (not labels)])
        return f"{found}, and nothing of it looks like {missing}"
    line = shlex.join(["--image", images[0], "--label", labels[0]])
    return (
        f"{found}; as image {' or '.join(images[:_SHOWN])} would fit, as label {' or '.join(labels[:_SHOWN])}:\n"
        f"  python launch/shards.py {command} {line}"
    )
