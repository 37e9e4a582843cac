"""The documents' commands that need a server, run against one."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from tests.e2e.server import ADMIN_KEY, KEY, ROOT, Server
from tests.support.documents import Fence, expected_output, marked

pytestmark = pytest.mark.ray

ADDRESS = re.compile(r"http://(?:127\.0\.0\.1|localhost):8000")
NEW_EACH_TIME = re.compile(r'(?<="id":")[a-z]+-[0-9a-f]{32}|(?<="created":)[0-9]+|(?<="cached_tokens":)[0-9]+')


def commands(fence: Fence) -> list[str]:
    lines = fence.code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("fence", marked("curl"), ids=str)
def test_a_curl_command_answers_as_the_document_says(fence: Fence, server: Server) -> None:
    """The test's server wants a key, which the documents' one does not: it is added."""
    expected = NEW_EACH_TIME.sub("_", expected_output(fence) or "").splitlines()
    for number, command in enumerate(commands(fence)):
        program, *arguments = shlex.split(ADDRESS.sub(server.url, command))
        assert program == "curl", f"{fence}: {command}"
        done = subprocess.run(
            ["curl", "--fail-with-body", "--max-time", "60", "-H", f"authorization: Bearer {ADMIN_KEY}", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=90,
        )
        assert done.returncode == 0, f"{fence}: {command}: {done.stdout or done.stderr}"
        assert done.stdout
        assert number >= len(expected) or expected[number] in NEW_EACH_TIME.sub("_", done.stdout)


@pytest.mark.parametrize("fence", marked("client"), ids=str)
def test_a_client_example_runs_against_the_server(fence: Fence, server: Server) -> None:
    code = re.sub(r'api_key="[^"]*"', f'api_key="{KEY}"', ADDRESS.sub(server.url, fence.code))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = expected_output(fence)
    assert expected is None or done.stdout.strip() == expected.strip()
