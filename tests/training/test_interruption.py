"""Signals: the first one is noted, the second one acts as it does elsewhere."""

import signal
import threading

import pytest

from magma_jax.training.interruption import StopRequest


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def number(request):
    return request.param


def test_the_first_signal_is_noted_and_told(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.reached(1)
        signal.raise_signal(number)
        assert stop.reached(2)
        assert stop.signal == number.name
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err == f"\n{number.name}: finishing this step, then saving; once more stops at once\n"


def test_the_second_ctrl_c_stops_at_once():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_second_sigterm_is_no_longer_held_back():
    with StopRequest():
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_threads_get_no_signals():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.reached(1)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
