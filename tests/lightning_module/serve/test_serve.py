"""The page of triton-gru-predict --serve: what it answers, what it refuses, and in a browser."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from lightning_module.data.tokenizers import Tokenizer, TokenizerSettings
from lightning_module.errors import InspectionError
from lightning_module.generation import next_tokens
from lightning_module.inspect.inspection import MAX_CHARACTERS, MAX_TOKENS
from lightning_module.serve.server import MAX_BODY, InspectionServer
from tests.lightning_module.inspect.test_inspection import HOSTILE, TEXT, made_model, save


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TokenizerSettings(), [TEXT + HOSTILE])


@pytest.fixture(scope="module")
def server(tokenizer):
    model = made_model(tokenizer)
    server = InspectionServer(model, tokenizer, checkpoint=HOSTILE, port=0, text="or ", k=3)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(server, question, **headers):
    """Status and answer to a question."""
    body = question if isinstance(question, bytes) else json.dumps(question).encode()
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(f"{server.url}inspect", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def raw(server, *lines):
    """The status of a request that is sent as it stands."""
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        with http.client.HTTPResponse(connection) as answer:
            answer.begin()
            return answer.status, answer.read().decode()


def test_the_page_and_its_headers(server):
    with urllib.request.urlopen(server.url, timeout=30) as answer:
        page, headers = answer.read().decode(), answer.headers
    assert '"served": true' in page
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert page.count("</script>") == 2


def test_answers_what_predict_does(server):
    status, found = ask(server, {"text": "or not", "layer": 2})
    assert status == 200
    assert "".join(token["label"] for token in found["tokens"]) == "or␣not"
    expected = next_tokens(server.model, server.tokenizer, "or not", 3)
    assert [n[2] for n in found["next"][-1]] == [n.id for n in expected]
    assert found["next"][-1][0][1] == pytest.approx(expected[0].probability)
    assert found["layer"] == 2
    status, found = ask(server, {"text": "", "layer": 1})
    assert [token["label"] for token in found["tokens"]] == ["<doc>"]


def test_listens_on_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_refuses_other_hosts_and_origins(server):
    port = server.server_port
    question = {"text": "or", "layer": 1}
    for host in (f"evil.example:{port}", "evil.example", "127.0.0.1", f"127.0.0.1.evil:{port}"):
        assert ask(server, question, Host=host)[0] == 403
        assert raw(server, "GET / HTTP/1.1", f"Host: {host}")[0] == 403
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}", "http://127.0.0.1"):
        assert ask(server, question, Origin=origin)[0] == 403
    assert raw(server, "GET / HTTP/1.0")[0] == 403
    twice = [f"Host: 127.0.0.1:{port}", "Host: evil.example"]
    assert raw(server, "GET / HTTP/1.1", *twice)[0] == 403
    for name in ("127.0.0.1", "localhost"):
        own = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}"}
        assert ask(server, question, **own)[0] == 200


def test_refuses_questions_that_are_none(server):
    for body in (b"", b"{", b"[]", b'"or"', b"null", b'{"text": "or"}', b"\xff", b"[" * 50_000):
        assert ask(server, body)[0] == 400, body[:20]
    for question in ({"text": 1, "layer": 1}, {"text": "or", "layer": "1"}):
        assert ask(server, question)[0] == 400
    assert ask(server, {"text": "or", "layer": True})[0] == 400
    form = ask(server, {"text": "or", "layer": 1}, **{"Content-Type": "text/plain"})
    assert form[0] == 415
    own = f"Host: 127.0.0.1:{server.server_port}"
    assert raw(server, "POST /inspect HTTP/1.1", own)[0] == 411
    assert raw(server, "POST /inspect HTTP/1.1", own, "Content-Length: -5")[0] == 411
    assert raw(server, "POST /other HTTP/1.1", own, "Content-Length: 0")[0] == 404
    assert raw(server, "GET /etc/passwd HTTP/1.1", own)[0] == 404
    assert raw(server, "DELETE / HTTP/1.1", own)[0] == 501


def test_bounds_lengths_and_says_so(server):
    own = f"Host: 127.0.0.1:{server.server_port}"
    for length in (MAX_BODY + 1, 10**30):
        status, answer = raw(server, "POST /inspect HTTP/1.1", own, f"Content-Length: {length}")
        assert status == 413
        assert f"{MAX_CHARACTERS:,} characters" in answer
    status, answer = ask(server, {"text": "o" * (MAX_TOKENS + 1), "layer": 1})
    assert status == 422
    assert "at most 256 tokens" in answer["error"]
    # the longest text that the page lets one type arrives, whatever its characters take in JSON
    status, answer = ask(server, {"text": "\U0001f600" * MAX_CHARACTERS, "layer": 1})
    assert status == 422
    assert "does not know" in answer["error"]
    status, answer = ask(server, {"text": "or", "layer": 3})
    assert status == 422
    assert "layer must be from 1 to 2" in answer["error"]


def test_many_at_once_get_their_own_answers(server):
    texts = ["o", "or", "or ", "or n", "or no", "or not"] * 3
    answers = {}

    def one(number, text):
        answers[number] = len(ask(server, {"text": text, "layer": 1})[1]["tokens"])

    threads = [threading.Thread(target=one, args=item) for item in enumerate(texts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number] for number in range(len(texts))] == [len(text) for text in texts]


def test_refuses_a_model_without_gates(tokenizer):
    with pytest.raises(InspectionError, match="layer type is 'rnn'"):
        InspectionServer(made_model(tokenizer, "rnn"), tokenizer, checkpoint="", port=0)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_the_command_ends_on_ctrl_c(command, tokenizer, tmp_path):
    checkpoint = save(made_model(tokenizer), tokenizer, tmp_path)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "lightning_module.predict", "--serve", "port=0"),
            *(f"checkpoint={checkpoint}", "prompt=却说", "device=cpu"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    url, port = line.split()[0], int(line.split()[0].rstrip("/").rpartition(":")[2])
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert '"text": "却说"' in answer.read().decode()
    taken = command("predict", "format=web", f"port={port}", f"checkpoint={checkpoint}")
    assert taken.returncode == 1
    assert f"error: cannot bind port {port}" in taken.stderr
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Stopped." in output
    assert errors == ""
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)


def test_typing_in_a_browser(browser_page, server):
    dialogs = []
    browser_page.on("dialog", lambda dialog: dialogs.append(dialog) or dialog.dismiss())
    browser_page.goto(server.url)
    text, chips = browser_page.locator("#text"), browser_page.locator("#strip button")
    assert text.input_value() == "or "
    assert chips.count() == 3

    def wait_for(shown):
        visible = shown.replace(" ", "␣")
        browser_page.wait_for_function(
            "shown => [...document.querySelectorAll('#strip button')]"
            ".map(b => b.textContent).join('') === shown",
            arg=visible,
        )

    before = browser_page.locator("#chart canvas").first.evaluate("c => c.toDataURL()")
    text.press("End")
    text.press_sequentially("not")
    wait_for("or not")
    assert browser_page.locator("#chart canvas").first.evaluate("c => c.toDataURL()") != before
    # the buttons are the likeliest next tokens, and a click adds one
    expected = next_tokens(server.model, server.tokenizer, "or not", 3)
    buttons = browser_page.locator("#next button")
    assert [label.split()[0] for label in buttons.all_text_contents()] == [
        token.text.replace(" ", "␣").replace("\n", "⏎")
        for token in expected
        if token.text != "<doc>"
    ]
    added = next(token.text for token in expected if token.text not in ("<doc>", "<unk>"))
    buttons.first.click()
    browser_page.wait_for_function(
        "text => document.getElementById('text').value === text", arg="or not" + added
    )
    # what cannot be read is said, as text, and the page goes on
    text.fill("or <img src=x onerror=alert(1)> Z")
    browser_page.wait_for_function("() => document.getElementById('error').textContent !== ''")
    assert "'Z'" in browser_page.locator("#error").inner_text()
    text.fill(HOSTILE)
    wait_for(HOSTILE)
    assert browser_page.locator("#error").text_content() == ""
    assert browser_page.locator("img").count() == 0
    browser_page.locator("#layer").select_option("2")
    browser_page.wait_for_function(
        "() => document.getElementById('model').textContent.includes('layer 2 of 2')"
    )
    assert dialogs == []
    for width in (1280, 320):
        browser_page.set_viewport_size({"width": width, "height": 800})
        browser_page.wait_for_timeout(200)
        assert browser_page.evaluate("document.documentElement.scrollWidth") <= width
