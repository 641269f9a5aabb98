"""Bucketward: antivirus for cloud object storage."""

__version__ = "0.1.0"
