"""`relay dev`: what it prints is what Rocket.Chat's settings must hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from unit.test_tls import CERTIFICATES, KEYS


@pytest.mark.parametrize("how", ["file, over TLS", "environment"])
def test_the_printed_url_and_the_first_of_the_given_tokens_are_taken(tmp_path: Path, how: str) -> None:
    tokens = "the-first-token\nthe-second-token\n"
    certificate, key, secret = tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "token"
    certificate.write_text(CERTIFICATES[0])
    key.write_text(KEYS[0])
    secret.write_text(tokens)
    settings = {"RELAY_TOKEN": tokens}
    scheme = "http"
    if how == "file, over TLS":
        scheme = "https"
        settings = {
            "RELAY_TOKEN_FILE": str(secret),
            "RELAY_HTTP_TLS_CERTFILE": str(certificate),
            "RELAY_HTTP_TLS_KEYFILE": str(key),
            "SSL_CERT_FILE": str(certificate),  # The player trusts it.
        }
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")} | settings
    command = [sys.executable, "-m", "relay", "dev", "--play", "--once", "--port", "0", "--admin-port", "0"]

    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path)

    assert ran.returncode == 0, ran.stderr
    assert f"  Webhook URL    {scheme}://127.0.0.1:" in ran.stdout
    assert "  Secret Token   the-first-token\n" in ran.stdout
    assert "each on Kafka once, in order." in ran.stdout
