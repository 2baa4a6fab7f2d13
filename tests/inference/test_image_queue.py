"""The queue of drawings: requests that join a running batch, that are drawn alone, that fail, and that leave."""

import threading

import pytest
from PIL import Image

from magma_jax.inference.answers import Canvas, ImageOptions
from magma_jax.inference.image_queue import ImageQueue
from magma_jax.inference.pending import EngineError, QueueFull, UnfinishedError


class Batch:
    """Draws one token of every request in a step; ``steps`` lists the prompts that were in it."""

    def __init__(self, slots, context):
        self.slots, self.context, self.steps, self.left = slots, context, [], {}
        self.go, self.resets = threading.Semaphore(0), 0

    @property
    def room(self):
        return len(self.left) < self.slots

    @property
    def busy(self):
        return bool(self.left)

    def takes(self, options):
        return options.candidates == 1

    def begin(self, key, prompt, options):
        if prompt[0] == "bad":
            raise ValueError("'bad' cannot be drawn")
        self.left[key] = [prompt[0], options.n]

    def step(self):
        if not self.left:
            return []
        self.go.acquire()
        self.steps.append(sorted(text for text, _ in self.left.values()))
        if any(text == "break" for text, _ in self.left.values()):
            raise RuntimeError("the device is lost")
        for entry in self.left.values():
            entry[1] -= 1
        done = [key for key, (_, left) in self.left.items() if left == 0]
        return [(key, lambda text=self.left.pop(key)[0]: canvas(text)) for key in done]

    def cancel(self, key):
        self.left.pop(key, None)

    def reset(self):
        self.left, self.resets = {}, self.resets + 1

    def warm_up(self):
        self.warm = True


def canvas(text):
    if text == "unscored":
        raise ValueError("score gives nothing")
    return Canvas([Image.new("L", (1, 1))], "stop")


class Drawer:
    """A model whose ``n`` is the number of its steps."""

    makes, image_size, image_tokens, tokenizer = frozenset({"image"}), 1, 1, None
    classes = 0

    def __init__(self):
        self.alone = []

    def image_batch(self, slots, context=None):
        self.batch = Batch(slots, context)
        return self.batch

    def canvases(self, prompt, options, *, previews=0):
        self.alone.append(prompt[0])
        yield canvas(prompt[0])

    def answers(self, prompts, options=None, *, count=None):
        raise NotImplementedError

    def text_tokens(self, text):
        return 1

    def sampler(self, options):
        return {}

    def warm_up(self, rows):
        raise AssertionError("the batch is warmed up")


@pytest.fixture
def model():
    return Drawer()


@pytest.fixture
def queue(model):
    with ImageQueue(model, 5, slots=2, context=9) as queue:
        yield queue
        model.batch.go.release(99)


def test_requests_join_and_leave_a_running_batch(model, queue):
    batch = model.batch
    assert (batch.slots, batch.context) == (2, 9)
    queue.warmup(4)
    assert batch.warm
    long, short = (queue.submit([name], ImageOptions(n=n)) for name, n in (("long", 4), ("short", 1)))
    waits = queue.submit(["waits"], ImageOptions(n=1))
    batch.go.release(6)
    assert [len(list(ticket)) for ticket in (short, waits, long)] == [1, 1, 1]
    assert ["long", "waits"] in batch.steps
    queue.close(drain=True)
    assert (queue.stats().images_drawn, queue.stats().finished, queue.stats().running) == (3, 3, 0)


def test_what_the_batch_does_not_take_is_drawn_alone(model, queue):
    assert len(list(queue.submit(["many"], ImageOptions(candidates=2)))) == 1
    assert model.alone == ["many"]
    assert model.batch.steps == []


def test_failures_end_those_that_they_concern(model, queue):
    model.batch.go.release(9)
    with pytest.raises(UnfinishedError, match="'bad' cannot be drawn"):
        list(queue.submit(["bad"], ImageOptions()))
    with pytest.raises(EngineError, match="score gives nothing"):
        list(queue.submit(["unscored"], ImageOptions()))
    with pytest.raises(EngineError, match=r"drawing failed \(RuntimeError: the device is lost\)"):
        list(queue.submit(["break"], ImageOptions()))
    assert len(list(queue.submit(["good"], ImageOptions()))) == 1
    assert model.batch.resets == 1
    assert queue.failure is None


def test_cancelled_requests_leave_and_a_full_queue_refuses(model, queue):
    batch = model.batch
    first, second = (queue.submit([name], ImageOptions(n=2)) for name in "ab")
    waiting = [queue.submit([name], ImageOptions(n=1)) for name in "cd"]

    def fill():
        for _ in range(6):
            queue.submit(["e"], ImageOptions(n=1))

    with pytest.raises(QueueFull):
        fill()
    first.cancel()
    waiting[0].cancel()
    batch.go.release(99)
    for ticket in (first, waiting[0]):
        with pytest.raises(EngineError, match="cancelled"):
            list(ticket)
    assert len(list(second)) == len(list(waiting[1])) == 1
    queue.close(drain=True)
    with pytest.raises(EngineError, match="the server is shutting down"):
        queue.submit(["late"], ImageOptions())


def test_closing_ends_what_runs(model):
    queue = ImageQueue(model, 3, slots=2)
    ticket = queue.submit(["never"], ImageOptions(n=99))
    closing = threading.Thread(target=queue.close)
    closing.start()
    model.batch.go.release(9)
    closing.join(10)
    with pytest.raises(EngineError):
        list(ticket)
