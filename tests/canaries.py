"""Secrets that tests plant, and every spelling of one that must not turn up anywhere.

assert not spelled_in("hunter2-hunter2", everything_that_was_said)
"""

import base64
import html
import json
import re
from functools import cache
from urllib.parse import quote, quote_plus


@cache
def spellings(secret: str) -> frozenset[str]:
    """The secret as servers and programs write it: plain, percent-coded, in JSON, HTML, base64 of more, hexadecimal."""
    plain = {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], html.escape(secret)}
    plain |= {each.replace("/", "\\/") for each in set(plain)}
    coded = {quote(secret), quote(secret, safe=""), quote_plus(secret), quote(quote(secret, safe=""), safe="")}
    coded |= {re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), each) for each in set(coded)}
    bits = secret.encode()
    found = plain | coded | {bits.hex(), bits.hex().upper()}
    for shift in range(3):  # what stands before it decides how its bits fall into letters
        letters = base64.b64encode(bytes(shift) + bits).decode()
        inner = letters[-(-shift * 8 // 6) : (shift + len(bits)) * 8 // 6]
        for each in (inner, inner.translate(str.maketrans("+/", "-_"))):
            found |= {each, quote(each, safe=""), each.replace("/", "\\/")}
    return frozenset(found)


def spelled_in(secret: str, text: str | bytes) -> list[str]:
    """Those of its spellings that are in the text."""
    where = text if isinstance(text, str) else text.decode("latin-1")
    return sorted(each for each in spellings(secret) if each in where)
