"""An inspection as one HTML page without external resources: it contains style, script and data.

The page's policy (Content-Security-Policy) allows its one style and its one script, by their
hashes, and no other resource, so that no text can become code on it.
"""

import base64
import hashlib
import html
import json
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from lightning_module.data.tokenizers import DOC, UNK
from lightning_module.inspect.inspection import Inspection, visible

FILES = Path(__file__).parent / "assets"
# Tokens before a token that count as recent, for the age of the state after it.
RECENT = 5


def page_data(inspection: Inspection, checkpoint: str) -> dict[str, Any]:
    """An inspection as JSON data for the page's script.

    Maps are `[H, T]`, units in the order of their memory, longest first, encoded as one byte per
    value in base64: r and z from 0 to 1, n and h from -1 to 1. So is `written`, `[T, T]`, as the
    strength of a colour: the cube root, so that small values are visible, of each share of the
    state over the largest share of an earlier token in its row.

    Args:
        inspection: the inspection to show.
        checkpoint: displayed name of the model.
    """
    order = inspection.memory.argsort(descending=True)
    earlier = inspection.written.tril(-1)
    colors = (earlier / earlier.amax(1, keepdim=True).clamp(min=1e-12)) ** (1 / 3)
    return {
        "checkpoint": checkpoint,
        "layer_type": inspection.layer_type,
        "layer": inspection.layer,
        "layers": inspection.layers,
        "tokens": [
            {"label": visible(token), "blank": not token.strip(), "id": id}
            for token, id in zip(inspection.tokens, inspection.ids, strict=True)
        ],
        "units": order.tolist(),
        "memory": inspection.memory[order].tolist(),
        "r": _bytes(inspection.r.T[order]),
        "z": _bytes(inspection.z.T[order]),
        "n": _bytes((inspection.n.T[order] + 1) / 2),
        "h": _bytes((inspection.h.T[order] + 1) / 2),
        "written": _bytes(colors),
        "origin": inspection.origin(RECENT).tolist(),
        "recent": RECENT,
        "forgotten": inspection.forgotten.tolist(),
        "drawnOn": inspection.r.double().mean(1).tolist(),
        "most": inspection.forgets_most,
        "surprise": inspection.surprise,
        # label, probability, id, and the text that the token adds, "" for special tokens
        "next": [
            [[visible(n.text), n.probability, n.id, _typed(n.text)] for n in row]
            for row in inspection.next_tokens
        ],
    }


def page(data: dict[str, Any], title: str) -> tuple[str, str]:
    """The whole page, and its policy, which a server also sends as a header.

    Args:
        data: `{"inspection": page_data(...)}`; for the served page also `served`, `text` and
            `most_characters`.
        title: title of the page.
    """
    style, script = (
        (FILES / f"inspection.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    if data.get("served"):
        policy += "; connect-src 'self'"
    # In JSON "<" occurs only in strings. Escaped, no text can end the element that contains it.
    json_text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = Template((FILES / "inspection.html").read_text(encoding="utf-8"))
    whole = template.substitute(
        policy=html.escape(policy, quote=False),
        title=html.escape(title),
        style=style,
        script=script,
        data=json_text,
    )
    return whole, policy


def _bytes(values: Tensor) -> str:
    whole = (values.double() * 255).round().clamp(0, 255).to(torch.uint8)
    return base64.b64encode(whole.contiguous().numpy().tobytes()).decode()


def _typed(text: str) -> str:
    return "" if text in (DOC, UNK) or text.startswith("<0x") else text


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
