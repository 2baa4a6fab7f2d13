"""A bucket of S3 in memory, as far as s3fs uses its API; as ``gcs_server``, with which it shares its objects.

Use ``s3_server()``.
"""

import functools
import hashlib
import os
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.storage.gcs_server import BUCKET, PAGE, Bucket, Handler, bucket_server, serve

_CODES = {403: "AccessDenied", 404: "NoSuchKey", 412: "PreconditionFailed", 503: "ServiceUnavailable"}


@functools.cache
def s3_server() -> Bucket:
    """The objects of ``bucket_server``; sets the environment variables that make s3fs read and write them."""
    bucket = bucket_server()

    class Served(_S3Handler):
        served = bucket

    os.environ |= {
        "AWS_ENDPOINT_URL": serve(Served),
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }
    return bucket


class _S3Handler(Handler):
    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        place, _, name = unquote(url.path).strip("/").partition("/")
        # Requests count as those of Cloud Storage, so that tests need to know one kind.
        method = "POST" if self.command == "PUT" else self.command
        if place != BUCKET:
            return self._fail(404, "The specified bucket does not exist", "NoSuchBucket")
        with self.served.lock:
            self.served.requests.append((method, name))
            status = self.served.fault(method, name)
            if status is not None:
                return self._fail(status, "The fault that was asked for.")
            content, generation = self.served.objects.get(name, (None, 0))
            if self.command == "GET" and not name:
                return self._list(query)
            if self.command in ("PUT", "POST"):
                if "*" in self.headers.get("If-None-Match", "") and content is not None:
                    return self._fail(412, "At least one of the preconditions did not hold", condition="If-None-Match")
                return self._write(name, query, body)
            if self.command == "DELETE":
                self.served.objects.pop(name, None)
                return self._answer(204, b"")
        if content is None:
            return self._fail(404, "The specified key does not exist.")
        self._send_content(content, generation)

    def _headers(self, content: bytes, generation: int) -> dict[str, str]:
        return {"ETag": _tag(content), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}

    def _write(self, name: str, query: dict[str, str], body: bytes) -> None:
        uploads = self.served.uploads
        if "uploads" in query:
            number = str(next(self.served.numbers))
            return self._xml(
                f"<InitiateMultipartUploadResult><UploadId>{number}</UploadId></InitiateMultipartUploadResult>"
            )
        if "partNumber" in query:
            uploads[f"{query['uploadId']}/{int(query['partNumber']):05d}"] = name, body
            return self._answer(200, b"", {"ETag": _tag(body)})
        if "uploadId" in query:
            parts = sorted(key for key in uploads if key.startswith(f"{query['uploadId']}/"))
            body = b"".join(uploads.pop(key)[1] for key in parts)
        self.served.put(name, body)
        if "uploadId" in query:
            return self._xml(
                f"<CompleteMultipartUploadResult><ETag>{_tag(body)}</ETag></CompleteMultipartUploadResult>"
            )
        self._answer(200, b"", {"ETag": _tag(body)})

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        found: dict[str, str] = {}
        for name in self.served.names(prefix):
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if cut:
                folder = escape(prefix + head + cut)
                found[folder] = f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>"
            else:
                content = self.served.objects[name][0]
                about = f"<Size>{len(content)}</Size><ETag>{escape(_tag(content))}</ETag>"
                found[name] = (
                    f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00Z</LastModified>"
                    f"{about}<StorageClass>STANDARD</StorageClass></Contents>"
                )
        first = int(query.get("continuation-token", 0))
        end = first + min(PAGE, int(query.get("max-keys", PAGE)))
        more = end < len(found)
        self._xml(
            f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{''.join([*found.values()][first:end])}"
            f"{f'<NextContinuationToken>{end}</NextContinuationToken>' if more else ''}</ListBucketResult>"
        )

    def _xml(self, content: str) -> None:
        self._answer(200, f'<?xml version="1.0"?>\n{content}'.encode(), {"Content-Type": "application/xml"})

    def _fail(self, status: int, message: str, code: str = "", condition: str = "") -> None:
        code = code or _CODES.get(status, "InternalError")
        about = f"<Condition>{condition}</Condition>" if condition else ""
        content = f"<Error><Code>{code}</Code><Message>{message}</Message>{about}</Error>"
        self._answer(status, content.encode(), {"Content-Type": "application/xml"})


def _tag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'
