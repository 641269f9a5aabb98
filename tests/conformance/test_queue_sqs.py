"""The SQS queue keeps the contract."""

import json
from uuid import uuid4

import pytest

from bucketward.model import Credentials
from bucketward.queues.sqs import open_sqs
from bucketward.testing.queue import QueueSuite


def credentials():
    return Credentials("AKIAIOSFODNN7EXAMPLE", "test-secret")


def make(moto, max_deliveries=3, **attributes):
    """Make a queue with a dead-letter queue and return its name."""
    name = f"q-{uuid4().hex}"
    sqs = moto.client("sqs")
    sqs.create_queue(QueueName=f"{name}-dead")
    sqs.create_queue(
        QueueName=name,
        Attributes={
            "RedrivePolicy": json.dumps(
                {
                    "deadLetterTargetArn": f"arn:aws:sqs:us-east-1:123456789012:{name}-dead",
                    "maxReceiveCount": max_deliveries,
                }
            )
        }
        | attributes,
    )
    return name


class TestSqsQueue(QueueSuite):
    lease = 2.0
    tick = 1.0
    is_exact = False
    knows_spent_receipts = False

    @pytest.fixture
    def queue(self, moto):
        queue = open_sqs(
            f"sqs://us-east-1/{make(moto, self.max_deliveries)}?endpoint={moto.url}&lease=2",
            credentials,
        )
        yield queue
        queue.close()
