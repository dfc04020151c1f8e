"""The table of methods has one row for each, with what it says of itself."""

from rotate_edit.edits.methods import declaration, method_names
from rotate_edit.edits.methods.table import method_table


def test_every_method_has_one_row_of_its_own_words() -> None:
    head, rule, *rows = method_table().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, rule, *rows)]
    assert len({len(row) for row in cells}) == 1
    found = {row[0].strip("`"): row for row in cells[2:]}
    assert list(found) == sorted(method_names())
    for name, (_, title, reads, writes, unit) in found.items():
        about = declaration(name)
        assert title.startswith(about.title)
        assert ("runs only" in title) == about.live
        assert set(writes.split(", ")) == about.writes
        assert unit == about.unit
        assert {need.replace(" ", "_") for need in reads.split(", ")} == (about.reads or {"weights"})
