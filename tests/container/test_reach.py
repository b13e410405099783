"""Tests skip for what a machine does not allow, and fail for what is broken."""

import pytest
from container.reach import cannot_start, no_index
from docker.errors import APIError, ImageNotFound


def test_an_engine_that_refuses_is_told_from_an_image_that_is_broken(engine, base):
    assert cannot_start(engine, base) is None
    assert "no-such-runtime" in str(cannot_start(engine, base, runtime="no-such-runtime"))
    with pytest.raises(APIError, match="no-such-program"):
        cannot_start(engine, base, "no-such-program")
    with pytest.raises(ImageNotFound):
        cannot_start(engine, "dqo-nowhere:1")


def test_a_missing_network_is_told_from_a_pip_that_does_not_work(engine, base, index):
    assert no_index(engine, base) is None
    assert "has no connection to its package index" in str(no_index(engine, base, network_mode="none"))
    another = "/etc/ssl/certs/ACCVRAIZ1.pem"  # an authority that has not signed the index' certificate
    for broken in ({"REQUESTS_CA_BUNDLE": another, "PIP_CERT": another}, {"PIP_INDEX_URL": "nonsense"}):
        with pytest.raises(AssertionError, match="not for want of a connection"):
            no_index(engine, base, environment=broken)
