"""Tables in HTML: behind a disclosure, they show the numbers of every chart."""

from collections.abc import Iterable, Sequence

from fedbasin.server.report.charts.markup import Html, tag


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table whose first column names the row; the others are numbers, right-aligned."""
    body = (tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows)
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
        tag("tbody", *body),
    )


def scroll_box(content: Html, name: str) -> Html:
    """Return a box in which large content scrolls, also by keyboard."""
    return tag("div", content, class_="scroll", role="region", aria_label=name, tabindex=0)


def disclose(content: Html, name: str) -> Html:
    """Return a disclosure with the numbers of a chart, closed at first."""
    return tag("details", tag("summary", "As a table"), scroll_box(content, name))
