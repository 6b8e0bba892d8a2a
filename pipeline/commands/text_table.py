"""Tables for people, on standard error."""

from collections.abc import Collection, Mapping, Sequence


def align_columns(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Returns a line for each row, whose cells are padded to the width of their column, without columns that are empty.
    The columns with indices in `right` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for index, cell in enumerate(row):
            width = widths[index]
            if width:
                cells.append(cell.rjust(width) if index in right else cell.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return lines


def list_values(title: str, values: Mapping[str, object]) -> list[str]:
    """Returns a title and an indented line for each name and value."""
    rows = [(name, str(value)) for name, value in values.items()]
    return [title, *(f"  {line}" for line in align_columns(rows))]
