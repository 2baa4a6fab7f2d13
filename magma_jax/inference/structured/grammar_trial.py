"""Trial of grammars in a separate process under limits of time, memory and stack.

llguidance bounds most costs of a grammar, but not all: a few hundred bytes of schema can take minutes, and a long chain
of references overflows the stack, which would crash the server. Each grammar is therefore first compiled and used for
some steps in a child process, which the system kills at its limits.

Run as a program, this file is the process that forks the children: it loads only llguidance and the vocabulary.
"""

import contextlib
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
from typing import Any, NamedTuple

# Limit of processor time. A schema of 60 kB takes less than half of it, an ordinary one a hundredth.
SECONDS = 1.0
# Limit of memory beyond what the process already uses: an ordinary grammar takes less than one megabyte.
MEMORY = 96 * 2**20
# Limit of the stack; threads of the engine's process have eight times as much by default.
STACK = 2**20
# Steps of random text, enough for parser states to accumulate in grammars prone to it.
STEPS = 48
# Timeout in seconds, for a machine that is busy with other work.
PATIENCE = 30.0

# llguidance's own limits for a grammar and for one step: some ten milliseconds.
LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 50_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}


class Vocabulary:
    """The tokenizer in llguidance's interface.

    Args:
        tokens: bytes of each id; empty for unused ids.
        special_ids: ids that are not text.
        eos_id: end of text.
        encode: tokenization of forced text; None for greedy longest match.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_ids: list[int], eos_id: int, encode: Any = None):
        import llguidance

        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special_ids, eos_id
        self._encode = encode
        self.trie = llguidance.LLTokenizer(self)  # pyright: ignore[reportArgumentType]  # is_tokenizer_wrapper is enough

    def __call__(self, text: str) -> list[int]:
        return self.trie.greedy_tokenize(text) if self._encode is None else self._encode(text)

    def matcher(self, grammar: str) -> Any:
        """The compiled grammar; never raises, but reports problems through ``get_error``."""
        import llguidance

        limits = llguidance.LLParserLimits(**LIMITS)
        return llguidance.LLMatcher(self.trie, grammar, log_level=0, limits=limits)


class Verdict(NamedTuple):
    """Result of a trial.

    Attributes:
        error: what is wrong; None if nothing is.
        nbytes: memory of the grammar.
    """

    error: str | None
    nbytes: int = 0


class TrialError(RuntimeError):
    """A trial without a result, which says nothing about the grammar."""


class Trial:
    """A process that tries grammars one at a time, ``process``; started by the first trial, ended by ``close``."""

    def __init__(self, tokens: list[bytes], special_ids: list[int], eos_id: int):
        self._vocabulary = (tokens, special_ids, eos_id)
        self.process: subprocess.Popen | None = None

    def __call__(self, grammar: str) -> Verdict:
        """Tries a grammar.

        Raises:
            TrialError: the process did not answer.
        """
        if self.process is None or self.process.poll() is not None:
            self.close()
            self._start()
        process = self._running()
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        try:
            self._send(grammar)
            assert process.stdout is not None  # a pipe
            return Verdict(*pickle.load(process.stdout))
        except (OSError, EOFError):
            self.close()
            raise TrialError("it could not be tried; try again later") from None
        finally:
            timer.cancel()

    def _start(self) -> None:
        # -P keeps this file's folder out of the import path; a new session leaves Ctrl-C to the parent.
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._send(self._vocabulary)

    def _send(self, thing: Any) -> None:
        pipe = self._running().stdin
        assert pipe is not None  # as it was started
        pickle.dump(thing, pipe)
        pipe.flush()

    def _running(self) -> subprocess.Popen:
        assert self.process is not None  # it was started
        return self.process

    def close(self) -> None:
        """Ends the process."""
        if self.process is None:
            return
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self.process.wait()
        self.process = None


def _serve() -> None:
    vocabulary = Vocabulary(*pickle.load(sys.stdin.buffer))
    while True:
        try:
            grammar = pickle.load(sys.stdin.buffer)
        except EOFError:  # the parent has closed the pipe
            return
        pickle.dump(tuple(_in_child(vocabulary, grammar)), sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _in_child(vocabulary: Vocabulary, grammar: str) -> Verdict:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with open(writer, "wb") as pipe:
            _limit()
            pickle.dump(tuple(_try(vocabulary, grammar)), pipe)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return Verdict(*pickle.loads(said))
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return Verdict(f"it takes more than {SECONDS:g} s to compile")
    return Verdict("it takes too much memory to compile, or is nested too deeply")


def _limit() -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    with contextlib.suppress(OSError):  # memory is limited on Linux only
        size, _ = _memory()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))


def _memory() -> tuple[int, int]:
    """Sizes of the address space and of its data segment, in bytes."""
    with open("/proc/self/statm") as file:
        size, _, _, _, _, data, _ = map(int, file.read().split())
    return size * resource.getpagesize(), data * resource.getpagesize()


def _try(vocabulary: Vocabulary, grammar: str) -> Verdict:
    try:
        _, before = _memory()
    except OSError:
        before = None
    matcher = vocabulary.matcher(grammar)
    if matcher.is_error():
        return Verdict(matcher.get_error())
    # A fixed seed makes trials of a grammar reproducible.
    chance = random.Random(0)
    for _ in range(STEPS):
        if matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() and "NoExtension" in matcher.get_error():
            return Verdict("it reaches a state that allows no token")
        # The first allowed token from a random index on, or the first of all.
        place = chance.randrange(len(vocabulary.tokens))
        rest = mask >> place
        token = place + (rest & -rest).bit_length() - 1 if rest else (mask & -mask).bit_length() - 1
        if token < 0 or not matcher.consume_token(token):
            break
    return Verdict(None, max(0, _memory()[1] - before) if before is not None else 0)


if __name__ == "__main__":
    _serve()
