def test_moto_answers(moto):
    sqs = moto.client("sqs")
    assert "QueueUrls" not in sqs.list_queues()
