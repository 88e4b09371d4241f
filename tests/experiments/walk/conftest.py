import pytest

from experiments.walk.__main__ import Config, invent, write


@pytest.fixture(scope="session")
def text() -> str:
    """The page that the command writes without options."""
    return write(Config(), invent(Config()))[0]
