"""The S3 server, for these tests."""

from tests.s3 import s3, s3_port  # noqa: F401
