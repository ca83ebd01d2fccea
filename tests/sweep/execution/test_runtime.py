"""What a Ray that is started on this machine does to its workers."""

import os

import pytest
import ray


@pytest.mark.slow
def test_workers_have_the_priority_of_the_driver(ray_started):
    assert ray.get(ray.remote(lambda: os.nice(0)).remote(), timeout=60) == os.nice(0)
