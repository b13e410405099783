"""Reading the HTML pages as a browser does, for tests."""

from html.parser import HTMLParser

HOSTILE = "</pre></details><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='alert(3)"
VOID = {"meta", "input", "br", "img", "link"}
# Elements of SVG that this page writes self-closed.
SELF_CLOSED = {"path", "line", "rect"}


class Page(HTMLParser):
    """Reads a document as a browser does and records what a test asks for; fails on a tag that does not match."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.feed(document)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"attribute twice in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
            self.text += " "
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_startendtag(self, tag, attrs):
        assert tag in SELF_CLOSED, f"<{tag}/> stays open in HTML"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag, f"</{tag}> does not match"

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.scripts[-1] += data
        elif self.stack and self.stack[-1] == "style":
            self.styles[-1] += data
        else:
            self.text += data

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.elements if name in attrs]

    @property
    def words(self):
        return " ".join(self.text.split())
