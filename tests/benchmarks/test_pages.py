"""Tables in pages."""

from tests.benchmarks.programs import program

pages = program("pages")


def test_only_the_tables_of_the_program_are_written_anew():
    page = "Before\n<!-- one: a -->\nold\n<!-- end -->\n<!-- two: a -->\nold\n<!-- end -->\nbehind"
    tables = {"a": pages.table(["x", "y"], [["1", "2"]])}
    filled = pages.fill(page, "one", tables)
    assert filled.splitlines() == [
        *("Before", "<!-- one: a -->", "", "| x | y |", "|---|---|", "| 1 | 2 |", "", "<!-- end -->"),
        *("<!-- two: a -->", "old", "<!-- end -->", "behind"),
    ]
    assert pages.fill(filled, "one", tables) == filled
