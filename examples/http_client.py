"""Ask a server to score payments, and come back when it says so.

plinth serve finance
python examples/http_client.py payment.json
"""

import json
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

URL = "http://127.0.0.1:8000/v1/finance/score"
ATTEMPTS = 5


def post(url: str, body: bytes, deadline_ms: float) -> Any:
    """The answer to one request; tried again after ``Retry-After`` when the server is full.

    Args:
        url: of the route.
        body: one JSON object, or a list of them.
        deadline_ms: the answer is worthless later; the server refuses what cannot be in time.

    Raises:
        urllib.error.HTTPError: refused for good; its body says why.
    """
    headers = {"content-type": "application/json", "x-slo-deadline-ms": f"{deadline_ms:g}"}
    request = urllib.request.Request(url, body, headers)
    for attempt in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code not in (429, 503) or attempt == ATTEMPTS - 1:
                raise
            threading.Event().wait(float(error.headers.get("Retry-After", 1)))
    raise AssertionError("unreachable")


def main() -> None:
    """Send one payment alone and a list with a broken one among them."""
    payment = Path(sys.argv[1] if len(sys.argv) > 1 else "payment.json").read_bytes()
    one = post(URL, payment, deadline_ms=5000)
    print(one["decision"], one["score"])
    both = post(URL, b"[" + payment + b', {"amount": "much"}]', deadline_ms=5000)
    for each in both["results"]:
        print("error" in each, each)


if __name__ == "__main__":
    main()
