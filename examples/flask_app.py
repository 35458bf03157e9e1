"""Flask and plain requests beside mailproxy: one page sends a mail, one learns what became of it.

    pip install flask requests
    MAILPROXY_SYNC_TOKEN=choose-one flask --app flask_app run --port 8080

config.ini of mailproxy, so that it calls back:

    [client]
    client_sync_url = http://127.0.0.1:8080/proxy_sync
    client_sync_token = choose-one
"""

import hmac
import os

import requests
from flask import Flask, request

URL = os.environ.get("MAILPROXY_URL", "http://127.0.0.1:8000")
TOKEN = os.environ.get("MAILPROXY_TOKEN", "")
SYNC_TOKEN = os.environ["MAILPROXY_SYNC_TOKEN"]

app = Flask(__name__)
app.logger.setLevel("INFO")


@app.post("/orders/<int:number>/confirmation")
def confirm(number: int):
    """Send a confirmation. The id is made of the order, so asking twice sends one mail, and is told that it is known."""
    mail = {
        "id": f"order-{number}-confirmation",
        "from": "Shop <shop@example.com>",
        "to": request.form["email"],
        "subject": f"Your order {number}",
        "body": "Thank you!",
    }
    answer = requests.post(
        f"{URL}/commands/add-messages", json={"messages": [mail]}, headers={"X-API-Token": TOKEN}, timeout=10
    )
    told = answer.json()
    if told["ok"] and not told["rejected"]:
        return {"mail": "known" if told.get("known") else "queued"}
    refusal = told["rejected"][0] if "rejected" in told else {"code": told["code"], "reason": told["error"]}
    app.logger.error("order %s has no confirmation: %s", number, refusal["reason"])  # for people
    return {"mail": "refused", "code": refusal["code"]}, 502  # for programs


@app.post("/proxy_sync")
def proxy_sync():
    """Learn what became of mail; a 2xx says that we have it, so note it down before."""
    given = request.headers.get("Authorization", "").encode()
    if not hmac.compare_digest(given, f"Bearer {SYNC_TOKEN}".encode()):
        return {"ok": False, "error": "wrong token"}, 401
    for entry in request.json["delivery_report"]:
        app.logger.info("%s is %s %s", entry["id"], entry["status"], entry["error"] or "")
    return {"ok": True}
