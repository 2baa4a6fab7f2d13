"""Every row of the table of hostile requests, against a server that goes on afterwards."""

import pytest

from tests.serve.hostile import ROWS, ask


@pytest.mark.parametrize("name", ROWS)
def test_a_hostile_request_gets_one_clear_line(server, name):
    row = ROWS[name]
    status, says = ask(server.port, row)
    assert status == row.status, says
    assert row.says in says
    assert row.send is not None or ("\n" not in says and len(says) < 500)
    assert server.http.get("/health").status_code == 200


def test_the_server_still_answers(server):
    assert server.chat(max_tokens=2).status_code == 200
