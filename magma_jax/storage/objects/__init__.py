"""Object storage: run and model folders at ``gs://`` and ``s3://`` addresses."""
