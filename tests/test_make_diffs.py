"""docs/diffs.html: it is current, its alignment keeps every line, and a browser shows what it should."""

import base64
import io
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import time
import tokenize
import urllib.request
from pathlib import Path

import copies
import pytest

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "docs"))

import make_diffs  # noqa: E402

TEXTS = make_diffs.read()
PAIRS = list(itertools.combinations(make_diffs.SCRIPTS, 2))
HOSTILE = '</script><img src="x" onerror="document.title = 1"><!-- \U0001f600 &lt; {{data}} \\u003c'
CHROME = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
KEYS = {"up": "\ue013", "down": "\ue015", "enter": "\ue007"}


def test_the_committed_page_is_current():
    page = (make_diffs.DOCS / "diffs.html").read_text(encoding="utf-8")
    assert page == make_diffs.page(TEXTS), "run python docs/make_diffs.py"
    assert len(page) < 600_000


def test_the_page_has_all_scripts_and_a_way_to_each():
    assert make_diffs.SCRIPTS == copies.SCRIPTS
    assert {name for pair in make_diffs.LADDER for name in pair} == set(make_diffs.SCRIPTS)
    assert make_diffs.FIRST in make_diffs.LADDER


def scrambled(seed: int) -> str:
    """A small script: some of four functions in some order, of lines that come again and again."""
    generator = random.Random(seed)
    lines = ["    x = 1\n", "    y = x + 1\n", "    call(x, y)\n", "\n"]
    functions = [
        "@once\n" * generator.randint(0, 1)
        + f"def {name}(x):\n"
        + "".join(generator.choices(lines, k=6))
        + "    end()\n\n\n"
        for name in generator.sample("abcd", generator.randint(0, 4))
    ]
    return "import one\n\n\n" + "".join(functions) + "main()\n" * generator.randint(0, 1)


SOME = [*((TEXTS[a], TEXTS[b]) for a, b in PAIRS), *((scrambled(i), scrambled(i + 1)) for i in range(40))]


@pytest.mark.parametrize("left, right", SOME, ids=["~".join(pair) for pair in PAIRS] + list(map(str, range(40))))
class TestTwoScripts:
    def test_every_line_has_its_row(self, left, right):
        rows = make_diffs.rows(left, right)
        assert [row.left for row in rows if row.left is not None] == list(range(len(make_diffs.split(left))))
        assert [row.right for row in rows if row.right is not None] == list(range(len(make_diffs.split(right))))
        assert (None, None) not in rows

    def test_functions_of_one_name_begin_in_one_row(self, left, right):
        rows = make_diffs.rows(left, right)
        left_pieces, right_pieces = make_diffs.pieces(left), make_diffs.pieces(right)
        order = [
            [p.name for p in pieces if p.name in {q.name for q in others}]
            for pieces, others in ((left_pieces, right_pieces), (right_pieces, left_pieces))
        ]
        if order[0] == order[1]:  # as it is in all scripts
            for a, b in itertools.product(left_pieces, right_pieces):
                assert a.name != b.name or (a.definition, b.definition) in rows

    def test_what_is_drawn_is_both_scripts_and_nothing_that_differs_is_folded(self, left, right):
        """Read the stretches as the page does."""
        left_lines, right_lines = iter(make_diffs.split(left)), iter(make_diffs.split(right))
        stretches = make_diffs.stretches(left, right)
        for before, after in itertools.pairwise(stretches):
            assert ("parts" in before) != ("parts" in after)
        for stretch in stretches:
            for part in stretch.get("parts", [stretch]):
                if "equal" in part:
                    drawn = [(next(left_lines), next(right_lines)) for _ in range(part["equal"])]
                    assert all(a == b for a, b in drawn)
                    assert part is stretch or not any(a for a, _ in drawn)
                    if "fold" in part:
                        first, end, _ = part["fold"]
                        assert 0 <= first <= end - make_diffs.LEAST_FOLD and end <= part["equal"]
                elif "changed" in part:
                    a, b = next(left_lines), next(right_lines)
                    assert a != b and without(a, part["changed"][0]) == without(b, part["changed"][1])
                else:
                    for lines, count in zip((left_lines, right_lines), part["only"]):
                        assert len(list(itertools.islice(lines, count))) == count
        assert not list(left_lines) and not list(right_lines)


def without(line: str, spans: list) -> str:
    """The line without its marked characters; spans are ascending and apart."""
    assert all(a < b for a, b in itertools.pairwise(itertools.chain([-1], *spans)))
    return "".join(c for at, c in enumerate(line) if not any(start <= at < end for start, end in spans))


def test_of_functions_that_changed_places_one_is_aligned():
    left, right = "def a(): 1\ndef b(): 2\n", "def b(): 2\ndef a(): 1\n"
    assert make_diffs.rows(left, right) == [(0, None), (1, 0), (None, 1)]


def test_similar_lines_go_together_not_the_first_with_the_first():
    left = "total = sum(rewards)\nmean = total / len(rewards)\n"
    right = "print()\nother = call(a, b)\ntotal = sum(scores)\nmean = total / len(scores)\n"
    assert make_diffs.rows(left, right) == [(None, 0), (None, 1), (0, 2), (1, 3)]


def test_lines_that_share_little_do_not_go_together():
    assert make_diffs.rows("a = first(one)\n", "call(a, others)\n") == [(0, None), (None, 0)]


def test_blank_lines_end_no_difference():
    changed = {"changed": ([[4, 5]], [[4, 5]])}
    stretches = make_diffs.stretches("x = 1\n\ny = 2\nz = 3\n", "x = 4\n\ny = 5\nz = 3\n")
    assert stretches == [{"parts": [changed, {"equal": 1}, changed]}, {"equal": 1}]


def test_a_new_function_stands_alone():
    left = "def a():\n    return 1\n\n\ndef c():\n    return 3\n"
    right = "def a():\n    return 1\n\n\ndef b():\n    return 1\n\n\ndef c():\n    return 3\n"
    alone = [row for row in make_diffs.rows(left, right) if None in row]
    assert alone == [(None, 4), (None, 5), (None, 6), (None, 7)]


def test_a_new_constant_parts_no_blank_line_from_the_function_after_it():
    rows = make_diffs.rows("A = 1\n\n\ndef f(): 1\n", "A = 1\n\nB = other(2)\n\n\ndef f(): 1\n")
    assert rows == [(0, 0), (1, 1), (None, 2), (None, 3), (2, 4), (3, 5)]


@pytest.mark.parametrize(
    "left, right",
    [
        ("f(a)", "f(a[, b])"),
        ("x = [old]", "x = [new]"),
        ("        x = 1", "        [    ]x = 1"),
        ("say [one thing] here", "say [another word] here"),
        ('{"a": 0.0, "b": 0.0}', '{"a": 0.0, ["c": 0.0, ]"b": 0.0}'),  # one gap, and behind a blank
        ("rate = [1e-4]", "rate = [5e-5]"),
        ("[a]", "[b]"),
        ("\U0001f600 [x]", "\U0001f600 [y]"),
    ],
)
def test_marks(left, right):
    def bare(text):
        return re.sub(r"\[(.*?)\]", r"\1", text)

    def marked(text, spans):
        for start, end in reversed(spans):
            text = f"{text[:start]}[{text[start:end]}]{text[end:]}"
        return text

    spans = make_diffs.marks(bare(left), bare(right))
    assert (marked(bare(left), spans[0]), marked(bare(right), spans[1])) == (left, right)


def test_a_fold_says_what_is_in_it():
    body = "    x = 1\n" * 5
    left = f"import a\n\n\ndef one():\n{body}\n\n@once\ndef two():\n{body}\n\ndef three():\n    return 1\n"
    stretches = make_diffs.stretches(left, left.replace("return 1", "return 2"))
    assert stretches[0] == {"equal": 21, "fold": [0, 18, "one, two"]}
    assert stretches[1] == {"parts": [{"changed": ([[11, 12]], [[11, 12]])}]}


@pytest.mark.parametrize("name", make_diffs.SCRIPTS)
def test_colours_are_those_of_the_language(name):
    """Comments and keywords where Python finds them, and all else that is coloured inside its line, in order."""
    found = {"comment": set(), "keyword": set()}
    lines = make_diffs.coloured(TEXTS[name])
    assert [line for line, _ in lines] == make_diffs.split(TEXTS[name])
    for number, (line, spans) in enumerate(lines, 1):
        assert all(0 <= start < end <= len(line) for start, end, _ in spans)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        for start, end, kind in spans:
            found.setdefault(kind, set()).add((number, start, line[start:end]))
    tokens = list(tokenize.generate_tokens(io.StringIO(TEXTS[name]).readline))
    comments = {(*token.start, token.string) for token in tokens if token.type == tokenize.COMMENT}
    assert found["comment"] == comments
    names = {(*token.start, token.string) for token in tokens if token.type == tokenize.NAME}
    assert found["keyword"] | found["name"] <= names
    assert {text for _, _, text in found["name"]} >= {piece.name for piece in make_diffs.pieces(TEXTS[name])}


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(part * c for part, c in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(theme):
    template = (make_diffs.DOCS / "diffs_template.html").read_text(encoding="utf-8")
    colours = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", template)}
    grounds = ["page", "panel"] + [f"{side}-{kind}" for side in ("left", "right") for kind in ("line", "faint", "mark")]
    for text, ground in itertools.product(["text", "keyword", "string", "doc", "comment", "name", "quiet"], grounds):
        if text == "quiet" and ground.endswith("mark"):  # line numbers stand beside the marks
            continue
        low, high = sorted(luminance(colours[name][theme]) for name in (text, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


class Browser:
    """Chromium without a window, by the WebDriver protocol."""

    def __init__(self, port: str, folder: Path):
        self.session = f"http://127.0.0.1:{port}/session"
        arguments = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        arguments = [f"--{a}" for a in f"{arguments} disable-component-update disable-sync".split()]
        options = {"binary": CHROME, "args": [*arguments, f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.session += "/" + self.call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, path: str, body: dict | None = None, method: str | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.session + path, data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["value"]

    def run(self, script: str, *arguments):
        return self.call("/execute/sync", {"script": script, "args": arguments})

    def becomes(self, script: str, expected: list) -> bool:
        """Whether the script comes to return this: links and history are followed a moment after the key."""
        return any(self.run(script) == expected or time.sleep(0.1) for _ in range(100))

    def devtools(self, command: str, **parameters) -> None:
        self.call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, page: Path, pair: str = "", *, width: int = 1440, height: int = 900, scheme: str = "light") -> None:
        """The page on a screen of this size, a phone's below 800, without what was shown before."""
        phone = width < 800
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        self.devtools("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("/url", {"url": "about:blank"})
        self.call("/url", {"url": page.as_uri() + pair})

    def press(self, selector: str, *keys: str) -> None:
        element = self.call("/element", {"using": "css selector", "value": selector})
        text = "".join(KEYS.get(key, key) for key in keys)
        self.call(f"/element/{next(iter(element.values()))}/value", {"text": text})

    def photograph(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("/screenshot")))
        assert path.stat().st_size > 20_000  # an empty page has a tenth of that

    def log(self, kind: str) -> list[str]:
        return [entry["message"] for entry in self.call("/se/log", {"type": kind})]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not (CHROME and DRIVER):
        pytest.skip("no browser: apt-get install --no-install-recommends chromium chromium-driver")
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            ports = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)
            browser = Browser(next(filter(None, ports))[1], tmp_path_factory.mktemp("chromium"))
            browser.call("/url", {"url": "about:blank"})
            browser.log("performance")  # what the browser loaded for its own first tab
            yield browser
            browser.call("", method="DELETE")
        finally:
            driver.terminate()


@pytest.fixture
def browser(chromium):
    """Whatever a test does with the page: nothing is fetched, nothing is complained about."""
    yield chromium
    assert chromium.log("browser") == []
    events = [json.loads(message)["message"] for message in chromium.log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert requests and all(url.startswith(("file:", "data:")) for url in requests)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "diffs.html"
    path.write_text(make_diffs.page(TEXTS), encoding="utf-8")
    return path


LINES = "[...document.querySelectorAll(`.${side}.line`)].map((line) => line.textContent)"
PAIR = "return [location.hash, $('left').value, $('right').value]"
STATE = "return [location.hash, $('left').value, $('right').value, $('count').textContent]"


def test_it_shows_every_pair_whole_both_ways(browser, page):
    browser.open(page)
    pairs = list(itertools.permutations(make_diffs.SCRIPTS, 2))
    drawn = browser.run(
        f"""return arguments[0].map(([left, right]) => {{
            go(left, right);
            const lines = ['left', 'right'].map((side) => {LINES}.join(''));
            const equal = document.querySelectorAll('.row.equal').length;
            return [...lines, equal, $('share').textContent];
        }})""",
        pairs,
    )
    for (left, right), (left_text, right_text, equal, share) in zip(pairs, drawn, strict=True):
        assert (left_text, right_text) == (TEXTS[left], TEXTS[right])
        percent = 100 * equal // len(make_diffs.split(TEXTS[right]))
        assert share == f"{percent} % of {right}.py's lines are in {left}.py"
    seconds = (
        browser.run("const start = performance.now(); draw('grape', 'trpo'); return performance.now() - start") / 1000
    )
    assert seconds < 1  # a twentieth of that where nothing else runs


def test_marks_and_numbers_stand_on_their_own_sides(browser, page):
    """What is marked on each side is what make_diffs marked, in the order of the data and reversed."""
    parts = [part for stretch in make_diffs.stretches(TEXTS["sft"], TEXTS["dpo"]) for part in stretch.get("parts", [])]
    spans = [part["changed"] for part in parts if "changed" in part]
    lengths = [sum(end - start for both in spans for start, end in both[side]) for side in (0, 1)]
    browser.open(page)
    for pair, expected in (("sft~dpo", lengths), ("dpo~sft", lengths[::-1])):
        browser.run("go(...arguments[0].split('~'))", pair)
        marked = "[...document.querySelectorAll(`.${side} mark`)].map((mark) => mark.textContent).join('').length"
        assert browser.run(f"return ['left', 'right'].map((side) => {marked})") == expected
        numbers = "[...document.querySelectorAll(`.${side}.line`)].every((line, at) => line.dataset.number == at + 1)"
        assert browser.run(f"return ['left', 'right'].map((side) => {numbers})") == [True, True]


def test_the_address_names_the_pair(browser, page):
    for address, left, right in (
        ("#sft~dpo", "sft", "dpo"),
        ("#sft~sft", "reinforce", "grpo"),
        ("#x", "reinforce", "grpo"),
    ):
        browser.open(page, address)
        assert browser.run(STATE)[1:3] == [left, right]


def test_the_keyboard_does_everything(browser, page):
    browser.open(page)
    total = browser.run("return differences.length")
    assert browser.run(STATE) == ["", "reinforce", "grpo", f"0 / {total}"]
    browser.press("body", "n", "j")
    assert browser.run(STATE)[3] == f"2 / {total}"
    assert browser.run("return document.activeElement === differences[1]")
    browser.press("body", "k")
    assert browser.run(STATE)[3] == f"1 / {total}"
    assert browser.run("next(); return $('count').textContent") == f"2 / {total}"  # at once, not when it has scrolled
    browser.press("body", *"n" * (total + 3))
    assert browser.run(STATE)[3] == f"{total} / {total}"  # each has its turn, the last lines of the page too

    browser.press("#left", "down")
    assert browser.becomes(PAIR, ["#trpo~grpo", "trpo", "grpo"])
    browser.press("body", "s")
    assert browser.becomes(PAIR, ["#grpo~trpo", "grpo", "trpo"])
    browser.press("#swap", "enter")
    assert browser.becomes(PAIR, ["#trpo~grpo", "trpo", "grpo"])
    browser.call("/back", {})
    assert browser.becomes(PAIR, ["#grpo~trpo", "grpo", "trpo"])
    browser.call("/forward", {})
    assert browser.becomes(PAIR, ["#trpo~grpo", "trpo", "grpo"])
    browser.press("#ladder [href='#grpo~grape']", "enter")
    assert browser.becomes(PAIR, ["#grpo~grape", "grpo", "grape"])
    assert browser.becomes("return [document.querySelector('[aria-current]').hash]", ["#grpo~grape"])
    browser.press("#right", "up", "up")  # over dpo to grpo, which is on the left: they change places
    assert browser.becomes(PAIR, ["#dpo~grpo", "dpo", "grpo"])

    browser.press(".skip", "enter")
    assert browser.becomes("return [document.activeElement.id, location.hash]", ["lines", "#dpo~grpo"])
    browser.run("$('keys').click()")
    browser.press("body", "s", "n")  # single keys do nothing now
    assert browser.run(PAIR) == ["#dpo~grpo", "dpo", "grpo"]
    assert not browser.run("return differences.includes(document.activeElement)")


def test_folds_open_and_close(browser, page):
    def seen():
        return browser.run(
            "return [...document.querySelectorAll('.row.equal')].filter((row) => row.checkVisibility()).length"
        )

    browser.open(page)
    stretches = make_diffs.stretches(TEXTS["reinforce"], TEXTS["grpo"])
    equal = sum(part.get("equal", 0) for stretch in stretches for part in stretch.get("parts", [stretch]))
    folds = [stretch["fold"] for stretch in stretches if "fold" in stretch]
    first, end, names = folds[0]
    hidden = sum(end - first for first, end, _ in folds)
    assert browser.run("return document.querySelector('.fold').textContent") == f"{end - first} equal lines: {names}"
    assert seen() == equal - hidden
    browser.press(".fold", "enter")
    assert seen() == equal - hidden + end - first
    assert browser.run("return document.querySelector('.fold').ariaExpanded") == "true"
    browser.press("body", "u")
    assert seen() == equal
    browser.press("body", "u")
    assert seen() == equal - hidden


def test_light_and_dark(browser, page, tmp_path):
    ground = "return getComputedStyle(document.body).backgroundColor"
    browser.open(page)
    light = browser.run(ground)
    browser.photograph(tmp_path / "light.png")
    browser.press("body", "t")
    dark = browser.run(ground)
    browser.photograph(tmp_path / "dark.png")
    assert light != dark
    browser.press("#theme", "enter")
    assert browser.run(ground) == light
    browser.open(page, scheme="dark")
    assert browser.run(ground) == dark
    browser.press("#theme", "enter")
    assert browser.run(ground) == light


def test_on_a_phone(browser, page, tmp_path):
    """Nothing is wider than the screen, folded or not, and what is touched is large enough."""
    browser.open(page, width=390, height=844)
    for pair in ("reinforce~grpo", "rejection_sampling~trpo", "sft~dpo"):
        browser.run("go(...arguments[0].split('~'))", pair)
        for _ in range(2):
            assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
            lines = "[...document.querySelectorAll('.line')].filter((line) => line.scrollWidth > line.clientWidth)"
            assert browser.run(f"return {lines}.map((line) => line.textContent)") == []
            browser.run("toggleFolds()")
    browser.photograph(tmp_path / "phone.png")
    targets = "[...document.querySelectorAll('select, button, .ladder a')].filter((node) => node.checkVisibility())"
    sizes = browser.run(f"return {targets}.map((node) => [node.offsetWidth, node.offsetHeight])")
    assert len(sizes) > 15 and min(min(size) for size in sizes) >= 44
    browser.press("body", "n", "n")
    assert browser.run(STATE)[3].startswith("2 /")
    browser.photograph(tmp_path / "phone-difference.png")


def test_what_is_copied_is_clean_code(browser, page):
    """No line numbers, no signs, nothing of the other script: the whole of one side is its file."""
    browser.open(page)
    for side, name in (("left", "reinforce"), ("right", "grpo")):
        browser.run(
            "document.querySelector(arguments[0]).dispatchEvent(new Event('pointerdown', {bubbles: true}))",
            f".{side}.line",
        )
        browser.run("if (folded()) toggleFolds(); getSelection().selectAllChildren(main)")
        assert browser.run("return getSelection().toString()") + "\n" == TEXTS[name]


def test_text_that_looks_like_a_page_is_text(browser, tmp_path):
    texts = {name: f"def f():\n    x = {at}\n    # {at} {HOSTILE}\n" for at, name in enumerate(make_diffs.SCRIPTS)}
    path = tmp_path / "hostile.html"
    path.write_text(make_diffs.page(texts), encoding="utf-8")
    browser.open(path)
    drawn = browser.run(f"return ['left', 'right'].map((side) => {LINES})")
    assert ["".join(lines) for lines in drawn] == [texts["reinforce"], texts["grpo"]]
    assert browser.run("return [document.title, document.images.length]") == ["reinforce.py, grpo.py", 0]
    marked = "return [...document.querySelectorAll('mark')].map((mark) => mark.textContent)"
    assert browser.run(marked) == ["2", "5", "2", "5"]
