"""What triton-gru-inspect computes, writes and draws."""

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser

import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import font_manager
from matplotlib.text import Text
from omegaconf import OmegaConf

from lightning_module.data.tokenizers import Tokenizer, TokenizerSettings
from lightning_module.errors import (
    CheckpointError,
    DataError,
    InspectionError,
    SettingsError,
    UsageError,
)
from lightning_module.generation import next_tokens
from lightning_module.inspect import figure as inspection_figure
from lightning_module.inspect.command import inspect
from lightning_module.inspect.figure import draw_inspection, fonts_for
from lightning_module.inspect.inspection import MAX_CHARACTERS, MAX_TOKENS, inspect_text, visible
from lightning_module.inspect.page import page, page_data
from lightning_module.model import SentencePredictor
from lightning_module.run_files import TOKENIZER
from lightning_module.settings.config_folder import CONFIGS
from lightning_module.settings.table import check
from tests.tolerances import assert_close

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;${policy}\"'"
TEXT = "却说曹操 be\nor not."
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TokenizerSettings(), [TEXT + HOSTILE])


def made_model(tokenizer, layer_type="gru", layers=2, hidden_size=13):
    torch.manual_seed(1)
    options = {"embedding_size": 5, "hidden_size": hidden_size, "num_layers": layers}
    model = SentencePredictor(
        tokenizer.vocab_size, layer_type={"name": layer_type}, dropout=0.5, **options
    )
    with torch.no_grad():  # untrained gates are all near a half
        for parameter in model.core.parameters():
            parameter.mul_(4)
    return model.eval()


def save(model, tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / TOKENIZER)
    parts = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save(parts, folder / "model.ckpt")
    return folder / "model.ckpt"


@pytest.mark.parametrize("layer_type", ["gru", "gru_reset_before"])
def test_shows_what_the_model_computes(tokenizer, layer_type):
    model = made_model(tokenizer, layer_type)
    ids = torch.tensor(tokenizer.encode(TEXT))
    logits = model(ids[:, None])[0][:, 0].detach()
    found = inspect_text(model, tokenizer, TEXT, layer=2, k=3)
    # layer 2 is the last one: its states are what the output layer reads
    assert_close(model.output(found.h).detach(), logits)
    assert_close((1 - found.z) * found.n + found.z * F.pad(found.h, (0, 0, 1, 0))[:-1], found.h)
    assert found.tokens == list(TEXT)
    assert found.layer_type == layer_type
    expected = F.cross_entropy(logits[:-1], ids[1:], reduction="none") / math.log(2)
    assert found.surprise[0] is None
    assert_close(torch.tensor(found.surprise[1:]), expected)
    for end in (1, len(TEXT)):
        by_predict = next_tokens(model, tokenizer, TEXT[:end], 3)
        assert [n[:2] for n in found.next_tokens[end - 1]] == [n[:2] for n in by_predict]
        assert found.next_tokens[end - 1][0].probability == pytest.approx(by_predict[0].probability)
    first = inspect_text(model, tokenizer, TEXT, layer=1)
    trace = model.core.trace(model.embedding(ids)).r[0, 0].detach()
    assert_close(first.r, trace)
    assert not torch.allclose(first.r, found.r)


def test_memory_forgetting_and_origin(tokenizer):
    found = inspect_text(made_model(tokenizer), tokenizer, TEXT)
    T, H = found.z.shape
    z = found.z.double().tolist()
    by_hand = [sum(1 / (1 - z[t][unit]) for t in range(T)) / T for unit in range(H)]
    assert found.memory.tolist() == pytest.approx(by_hand)
    assert found.forgotten.tolist() == pytest.approx([1 - sum(row) / H for row in z])
    most = found.forgets_most
    assert len(most) == T // 4
    assert 0 not in most
    assert min(found.forgotten[most]) >= max(
        found.forgotten[[t for t in range(1, T) if t not in most]]
    )
    for t in (0, 4, T - 1):
        for s in range(T):
            left = [
                math.prod(z[u][unit] for u in range(s + 1, t + 1)) * (1 - z[s][unit])
                for unit in range(H)
            ]
            expected = sum(left) / H if s <= t else 0
            assert found.written[t, s].item() == pytest.approx(expected)
    origin = found.origin(3)
    assert origin.sum(1).tolist() == pytest.approx([1.0] * T)
    assert origin[-1, 1].item() == pytest.approx(found.written[-1, -4:-1].sum().item())


def test_what_is_written_sums_to_the_state(tokenizer):
    found = inspect_text(made_model(tokenizer, hidden_size=1), tokenizer, TEXT)
    assert_close((found.written @ found.n.double()).float(), found.h)


def test_memory_is_finite_where_a_gate_is_one(tokenizer):
    found = inspect_text(made_model(tokenizer), tokenizer, TEXT)
    shut = dataclasses.replace(found, z=torch.ones_like(found.z))
    assert shut.memory.tolist() == pytest.approx([2**23] * 13)


def test_errors_say_what_cannot_be_shown(tokenizer):
    model = made_model(tokenizer)
    for layer_type in ("lstm", "rnn"):
        with pytest.raises(InspectionError, match=f"'{layer_type}'.*model/layer_type=gru"):
            inspect_text(made_model(tokenizer, layer_type), tokenizer, TEXT)
    for layer in (0, 3):
        with pytest.raises(InspectionError, match=f"from 1 to 2.*got {layer}"):
            inspect_text(model, tokenizer, TEXT, layer=layer)
    assert len(inspect_text(model, tokenizer, "b" * MAX_TOKENS).tokens) == MAX_TOKENS
    with pytest.raises(InspectionError, match=f"257 tokens; at most {MAX_TOKENS} tokens"):
        inspect_text(model, tokenizer, "b" * (MAX_TOKENS + 1))
    with pytest.raises(InspectionError, match="8,193 characters"):
        inspect_text(model, tokenizer, "b" * (MAX_CHARACTERS + 1))
    with pytest.raises(DataError, match="does not know"):
        inspect_text(model, tokenizer, "Z")
    with torch.no_grad():
        model.output.bias[0] = torch.nan
    with pytest.raises(InspectionError, match="diverged"):
        inspect_text(model, tokenizer, TEXT)


def test_an_empty_text_is_the_beginning_of_a_document(tokenizer):
    found = inspect_text(made_model(tokenizer), tokenizer, "")
    assert found.tokens == ["<doc>"]
    assert found.forgets_most == []
    assert page_data(found, "model")["surprise"] == [None]


def test_blanks_are_made_visible():
    assert [visible(t) for t in (" ", "\n", " the", "a b", "\u3000")] == [
        "␣",
        "⏎",
        "␣the",
        "a b",
        "□",
    ]


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += attrs


def test_the_page_has_no_external_resources_and_text_is_never_markup(tokenizer):
    found = inspect_text(made_model(tokenizer), tokenizer, HOSTILE)
    whole, policy = page({"inspection": page_data(found, HOSTILE)}, HOSTILE)
    elements = Elements(whole)
    assert elements.found.count("script") == 2
    assert "img" not in elements.found
    assert [value for name, value in elements.attributes if name in ("src", "href")] == ["data:,"]
    assert not {name for name, _ in elements.attributes if name.startswith("on")}
    assert "http" not in whole.replace("http-equiv", "")
    assert "url(" not in whole
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert dict(elements.attributes)["content"] == policy
    data = whole.partition('id="data">')[2].partition("</script>")[0]
    tokens = json.loads(data)["inspection"]["tokens"]
    assert "".join(token["label"] for token in tokens) == HOSTILE.replace(" ", "␣")


def test_the_maps_on_the_page_are_the_gates(tokenizer):
    found = inspect_text(made_model(tokenizer), tokenizer, TEXT)
    data = page_data(found, "model")
    assert data["memory"] == sorted(found.memory.tolist(), reverse=True)
    for name, low in (("r", 0), ("z", 0), ("n", -1), ("h", -1)):
        values = np.frombuffer(base64.b64decode(data[name]), np.uint8).reshape(13, -1)
        values = torch.from_numpy(values / 255 * (1 - low) + low)
        expected = getattr(found, name).T[data["units"]].double()
        assert (values - expected).abs().max() <= (1 - low) / 255 / 2 + 1e-6


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved = []
    original = matplotlib.figure.Figure.savefig

    def savefig(figure, *arguments, **options):
        original(figure, *arguments, **options)
        saved.append(figure)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def test_the_picture_without_a_font_shows_code_points_and_warns(
    tokenizer, tmp_path, monkeypatch, capsys, figures, recwarn
):
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    found = inspect_text(made_model(tokenizer), tokenizer, TEXT)
    draw_inspection(found, tmp_path / "picture.png", "却说")
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)
    warning = capsys.readouterr().err
    assert "却" in warning
    assert "fonts-noto-cjk" in warning
    drawn = texts(figures[0])
    assert "U+5374U+8BF4" in drawn  # the title
    assert "U+5374" in drawn  # the token
    assert "␣" in drawn
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_a_font_of_the_machine_is_found_for_what_the_first_one_lacks(monkeypatch):
    default = font_manager.findfont(inspection_figure.DEFAULT_FONT)
    other = font_manager.findfont("STIXGeneral")
    lacking = set(font_manager.get_font(other).get_charmap())
    lacking -= set(font_manager.get_font(default).get_charmap())
    character = next(chr(code) for code in sorted(lacking) if chr(code).isprintable())
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    assert fonts_for(f"a{character}") == ([inspection_figure.DEFAULT_FONT], {character})
    broken = __file__  # no font at all
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [broken, other])
    assert fonts_for(f"a{character}") == (
        [inspection_figure.DEFAULT_FONT, "STIXGeneral"],
        set(),
    )
    assert fonts_for("abc") == ([inspection_figure.DEFAULT_FONT], set())


def test_the_picture_of_words(tmp_path, figures):
    words = " wherefore art thou Romeo?" * 12
    tokenizer = Tokenizer.train(TokenizerSettings("word"), [words])
    found = inspect_text(made_model(tokenizer), tokenizer, words)
    draw_inspection(found, tmp_path / "picture.png", "words")
    draw_inspection(inspect_text(made_model(tokenizer), tokenizer, " art thou"),
                    tmp_path / "short.png", "words")  # fmt: skip
    assert "␣thou" in texts(figures[0])
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)
    # Each gate's colours stand beside it, whether the text is long or short, and no title is cut.
    for figure in figures:
        gates = [axes for axes in figure.axes if axes.images]
        assert len(gates) == 2
        for gate in gates:
            (bar,) = gate.child_axes
            place, right = bar.get_window_extent(), gate.images[0].get_window_extent().x1
            assert 0 < (place.x0 - right) / figure.dpi < 0.2  # inches
            assert place.height == pytest.approx(gate.get_window_extent().height)
        for axes in figure.axes:
            assert axes._left_title.get_window_extent().x1 <= figure.bbox.x1


def test_the_command(command, tokenizer, tmp_path):
    model = made_model(tokenizer)
    checkpoint = save(model, tokenizer, tmp_path / "模型")
    done = command(
        "inspect",
        f"checkpoint={checkpoint}",
        f"text={TEXT}",
        "layer=2",
        f"output={tmp_path / '图' / '看'}",
        "device=cpu",
    )
    assert done.returncode == 0, done.stderr
    found = inspect_text(model, tokenizer, TEXT, layer=2)
    assert done.stdout.count("forgets ") == len(found.forgets_most)
    first = found.forgets_most[0]
    assert f"forgets {found.forgotten[first]:.0%} of its memory at {TEXT[first]!r}" in done.stdout
    assert (tmp_path / "图/看.png").read_bytes().startswith(PNG)
    assert "看.html" in done.stdout
    assert '"layer": 2' in (tmp_path / "图/看.html").read_text(encoding="utf-8")
    with np.load(tmp_path / "图/看.npz") as numbers:
        for name in ("r", "z", "n", "h", "memory"):
            np.testing.assert_allclose(numbers[name], getattr(found, name), rtol=1e-5, atol=1e-6)
        assert list(numbers["tokens"]) == list(TEXT)
        assert np.isnan(numbers["surprise"][0])


def test_the_command_says_what_is_wrong(command, tokenizer, tmp_path):
    checkpoint = save(made_model(tokenizer, "lstm"), tokenizer, tmp_path)
    done = command("inspect", f"checkpoint={checkpoint}", stdin="not")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the model's layer type is 'lstm'")


def settings(**given):
    config = OmegaConf.load(CONFIGS / "inspect.yaml")
    del config.defaults, config.hydra
    return OmegaConf.merge(config, given)


def test_reads_standard_input_as_one_text(tokenizer, tmp_path, monkeypatch):
    checkpoint = save(made_model(tokenizer), tokenizer, tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"or\nnot\n")))
    inspect(settings(checkpoint=str(checkpoint), output=str(tmp_path / "look")), None)
    with np.load(tmp_path / "look.npz") as numbers:
        assert "".join(numbers["tokens"]) == "or\nnot"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer": 3}, "layer must be from 1 to 2"),
        ({"layer": 0}, "layer must be a whole number of at least 1; got 0"),
        ({"k": 11}, "k must be a whole number from 1 to 10; got 11"),
        ({"output": None}, "output must be a path"),
        ({"output": "model.ckpt/x"}, "could not write model.ckpt/x"),
        ({"checkpoint": "none"}, "none does not exist"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used"),
    ],
)
def test_settings_out_of_range_are_named(tokenizer, tmp_path, monkeypatch, given, message):
    save(made_model(tokenizer), tokenizer, tmp_path)
    monkeypatch.chdir(tmp_path)
    refusals = (SettingsError, UsageError, InspectionError, CheckpointError)
    config = settings(**{"checkpoint": "model.ckpt", **given})
    with pytest.raises(refusals, match=re.escape(message)):
        check(config, "inspect")
        inspect(config, "or not")


def test_the_page_in_a_browser(browser_page, tokenizer, tmp_path):
    found = inspect_text(made_model(tokenizer), tokenizer, HOSTILE)
    whole, _ = page({"inspection": page_data(found, HOSTILE)}, HOSTILE)
    (tmp_path / "page.html").write_text(whole, encoding="utf-8")
    requests, messages = [], []
    browser_page.on("request", lambda request: requests.append(request.url))
    browser_page.on("console", lambda message: messages.append(message.text))
    browser_page.on("dialog", lambda dialog: messages.append("dialog"))
    url = (tmp_path / "page.html").as_uri()
    browser_page.goto(url)
    chips = browser_page.locator("#strip button")
    assert chips.count() == len(HOSTILE)
    assert "".join(chips.all_text_contents()) == HOSTILE.replace(" ", "␣")
    assert browser_page.locator("#strip button.most").count() == len(found.forgets_most)
    assert browser_page.locator("#chart canvas").count() == 4
    assert browser_page.title() == HOSTILE
    # a colour of the map is the gate's: the last token, the unit that remembers longest
    unit = found.memory.argmax()
    pixel = browser_page.evaluate(
        "() => [...document.querySelector('#chart canvas').getContext('2d')"
        f".getImageData({len(HOSTILE) - 1}, 0, 1, 1).data]"
    )
    z = round(found.z[-1, unit].item() * 255) / 255
    half, end = (246, 244, 239), (31, 95, 168) if z >= 0.5 else (224, 108, 0)
    assert pixel[:3] == pytest.approx(
        [h + (e - h) * abs(2 * z - 1) for h, e in zip(half, end, strict=True)], abs=1
    )
    # another token: clicked, then by key
    chips.nth(3).click()
    assert browser_page.locator("#before").inner_text().endswith("%")
    assert f"cost {found.surprise[3]:.1f} bits" in browser_page.locator("#before").inner_text()
    browser_page.locator("#chart").press("ArrowLeft")
    assert f"cost {found.surprise[2]:.1f} bits" in browser_page.locator("#before").inner_text()
    assert chips.nth(2).get_attribute("aria-pressed") == "true"
    browser_page.locator("#chart canvas").first.hover(position={"x": 2.5 * 17, "y": 5})
    shown = browser_page.locator("#pointer").inner_text()
    assert f"unit {unit.item()}" in shown
    z = round(found.z[2, unit].item() * 255) / 255
    assert f"update gate z {z:.2f}," in shown
    for width in (1280, 700, 320):
        browser_page.set_viewport_size({"width": width, "height": 800})
        browser_page.wait_for_timeout(200)
        scroll = browser_page.evaluate("document.documentElement.scrollWidth")
        assert scroll <= width, f"the page scrolls sideways at {width} px"
    assert requests == [url]
    assert messages == []


def test_a_token_that_looks_like_markup_is_text_in_a_browser(browser_page, tokenizer, tmp_path):
    found = inspect_text(made_model(tokenizer), tokenizer, TEXT)
    markup = "<img src=x><b>bold</b>"
    rows = [[n._replace(text=markup) for n in row] for row in found.next_tokens]
    tokens = [markup] * len(found.tokens)
    hostile = dataclasses.replace(found, tokens=tokens, next_tokens=rows)
    whole, _ = page({"inspection": page_data(hostile, markup)}, markup)
    (tmp_path / "page.html").write_text(whole, encoding="utf-8")
    browser_page.goto((tmp_path / "page.html").as_uri())
    assert browser_page.locator("#strip button").all_text_contents() == tokens
    assert browser_page.locator("img").count() == 0
