"""What self-contained HTML pages share: one style, pictures inside. No script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from typing import Literal

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } .note { opacity: .75; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; }
.figures div { border: 1px solid #8884; border-radius: .5rem; padding: .75rem 1rem; }
.figures b { display: block; font-size: 1.6rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; } td, th { padding: .35rem .75rem; text-align: right; }
td:first-child, th:first-child, .settings td { text-align: left; } tr { border-bottom: 1px solid #8884; }
img { max-width: 100%; background: white; border-radius: .5rem; }
"""


def data_url(picture: bytes, kind: Literal["png", "jpeg"]) -> str:
    """Return the address that holds a picture itself."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
