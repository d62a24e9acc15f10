"""Text of a run cannot become markup of its report. A parser sees the same elements as without."""

from html.parser import HTMLParser

import pytest

from tests.tracking.test_report import make_run
from textpolicy.tracking.report import write_report

MARKUP = [
    "<script>document.title = 'taken'</script>",
    "</script><script>document.title = 'taken'</script>",
    "</ScRiPt ><script>x</script>",
    "<!--<script>",
    "--><b>",
    '"><img src=x onerror="x">',
    "'><svg onload=x>",
    "javascript:alert(1)",
    "<a href='javascript:x'>y</a>",
    "<iframe src=//evil.example></iframe>",
    "<style>@import '//evil.example'</style>",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "&lt;script&gt;",
    "\u003cscript\u003e",
    "{{SCRIPT}} {{POLICY}} {{DATA}}",
    "]]><script>x</script>",
    "\x00<script>x</script>",
    "<template><script>x</script></template>",
]


class Elements(HTMLParser):
    """The tags and attributes of a page, in order."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        shown = [(name, value) for name, value in attrs if (tag, name) != ("meta", "content")]
        self.found.append((tag, *shown))


def elements_of(folder, name, text):
    return Elements(write_report([make_run(folder / name, steps=2, text=text)]).read_text()).found


@pytest.mark.proves("S11")
@pytest.mark.parametrize("text", MARKUP)
def test_markup_in_a_completion_makes_no_element(tmp_path, text):
    plain = elements_of(tmp_path, "plain", "935")
    assert len(plain) > 10
    assert elements_of(tmp_path, "hostile", text) == plain


@pytest.mark.proves("S11")
def test_markup_in_the_name_and_the_settings_of_a_run_makes_no_element(tmp_path, attempts):
    plain = elements_of(tmp_path, "plain", "935")
    for number, text in enumerate(MARKUP):
        name = f"{number}{text}".replace("/", "|").replace("\x00", "")
        assert elements_of(tmp_path, name, "935") == plain
        attempts.add()
