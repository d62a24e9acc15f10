"""Write the tables of a record into a page of the documentation."""

from pathlib import Path


def write_page(page: Path, mark: str, tables: str) -> None:
    """Replace what is between the two marks of a page. Raise ValueError if there are not two."""
    before, _, after = page.read_text("utf-8").split(mark)
    page.write_text(f"{before}{mark}\n\n{tables}\n\n{mark}{after}", "utf-8")
