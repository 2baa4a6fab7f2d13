"""Random requests: known by their numbers, and some of them on every run."""

from tests.serve.fuzz import case, send


def test_a_request_is_known_by_its_number():
    first = [case(7, number) for number in range(60)]
    assert {sent.kind for sent in first} == {"json", "image", "bytes"}
    assert [case(7, number) for number in range(60)] == first
    assert first[0] != case(8, 0)


def test_random_requests(server, printed):
    for number in range(150):
        statuses = send(server.port, case(0, number), 120)
        assert not [status for status in statuses if status >= 500], number
    assert "Traceback" not in printed()
    assert server.chat(max_tokens=2).status_code == 200
