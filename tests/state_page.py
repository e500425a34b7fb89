"""Reading the tables of states that a page of the documents shows."""

import re


def table_with(page, header):
    """Return the cells of the page's table whose header is this, a list a row."""
    _, _, rest = page.partition(f"| {header} |\n")
    rows = rest.partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def read_cell(state, cell):
    """Return the target and the actions that a cell of the page names."""
    match = re.fullmatch(r"(?:→ (\w+))? ?(?:\((.*)\))?", "" if cell == "·" else cell)
    return match[1] or state, tuple(match[2].split(", ")) if match[2] else ()
