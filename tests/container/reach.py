"""What stands in the way of containers on a machine: told apart from what is broken in these tests' own images."""

import re
from typing import Any

import docker
from docker.errors import APIError, ContainerError

# Names of pip's connection errors (urllib3's). A refused certificate, or a pip that does not work, is none of these.
_NO_CONNECTION = re.compile(r"(NewConnection|NameResolution|ConnectTimeout|ReadTimeout)Error")


def cannot_start(engine: docker.DockerClient, image: str, program: str = "true", **options: Any) -> str | None:
    """Why the engine starts no container at all; None where it does.

    Raises:
        ImageNotFound: If the image is not there.
        APIError: If the engine would, and the image does not hold the program.
        ContainerError: If the program fails.
    """
    engine.images.get(image)  # `run` would pull one that is not there
    try:
        engine.containers.run(image, [program], remove=True, **options)
    except APIError as error:
        if f'exec: "{program}"' in str(error.explanation):
            raise
        return f"the Docker engine starts no container: {error.explanation}"
    return None


def no_index(engine: docker.DockerClient, image: str, **options: Any) -> str | None:
    """Why pip in a container of the image has no connection to its package index; None where it has one.

    Raises:
        AssertionError: With pip's words, if it fails for another reason.
    """
    ask = ["python", "-m", "pip", "index", "versions", "--retries", "1", "--timeout", "20", "uv"]
    try:
        engine.containers.run(image, ask, remove=True, **options)
    except ContainerError as error:
        said = error.stderr.decode(errors="replace")
        found = _NO_CONNECTION.search(said)
        assert found is not None, f"pip in {image} fails, and not for want of a connection:\n{said[-3000:]}"
        return f"pip in {image} has no connection to its package index ({found[0]})"
    return None
