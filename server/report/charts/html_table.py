"""Tables in HTML, and behind a disclosure: the other form of every chart."""

from collections.abc import Iterable, Sequence

from fedbasin.server.report.charts.markup import Html, tag


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """A table whose first column names the row; the others are numbers, right-aligned."""
    body = (
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    )
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
        tag("tbody", *body),
    )


def scrolled(content: Html, name: str) -> Html:
    """What may be larger than its place: it scrolls, by keyboard too."""
    return tag("div", content, class_="scroll", role="region", aria_label=name, tabindex=0)


def disclosed(content: Html, name: str) -> Html:
    """A chart's numbers, closed until asked for."""
    return tag("details", tag("summary", "As a table"), scrolled(content, name))
