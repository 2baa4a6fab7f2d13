"""Reads TensorBoard's event files back."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def read_events(folder: Path) -> list[Event]:
    """Events of all files of a folder, oldest file first. A record is its length, two checksums and the bytes."""
    events = []
    for path in sorted(folder.glob("events.*")):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            events.append(Event.FromString(data[start + 12 : start + 12 + length]))
            start += 12 + length + 4
    return events


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag to step to value, as TensorBoard shows them: a restart hides what older files hold from its step on."""
    values: dict[str, dict[int, float]] = {}
    for event in read_events(folder):
        if event.HasField("session_log") and event.session_log.status == event.session_log.START:
            for steps in values.values():
                for step in [step for step in steps if step >= event.step]:
                    del steps[step]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                values.setdefault(value.tag, {})[event.step] = value.simple_value
    return values


def images(folder: Path) -> dict[str, dict[int, bytes]]:
    """Tag to step to PNG file."""
    values: dict[str, dict[int, bytes]] = {}
    for event in read_events(folder):
        for value in event.summary.value:
            if value.HasField("image"):
                values.setdefault(value.tag, {})[event.step] = value.image.encoded_image_string
    return values
