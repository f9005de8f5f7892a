"""What went wrong with a file is told in this project's words, whoever wrote it."""

from concurrent.futures import Future

import pytest
from ray_errors import as_ray_gives_it

from common.errors import LeaseError, StorageError
from extractor.pools import last_line
from extractor.writers import Writers


@pytest.mark.parametrize("kind", [LeaseError, StorageError])
def test_a_writers_error_is_its_sentence(kind):
    handle: Future = Future()
    handle.set_exception(as_ray_gives_it(kind("The lake is another run's.")))
    with pytest.raises(kind) as raised:
        Writers(in_driver=True).result(handle)
    assert (type(raised.value), str(raised.value)) == (kind, "The lake is another run's.")


def test_the_last_line_of_a_mistake_is_kept_and_of_ours_the_sentence():
    assert last_line(as_ray_gives_it(ValueError("no such tensor"))) == "ValueError: no such tensor"
    assert last_line(as_ray_gives_it(StorageError("Line one:\nline two."))) == "Line one:\nline two."
