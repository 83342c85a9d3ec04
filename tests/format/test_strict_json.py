"""What kind of file bytes are that are no text."""

import io
import tarfile

import pytest

from conversation.format.strict_json import decode_utf8, recognise


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_archive_is_recognised(form):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form) as archive:
        archive.addfile(tarfile.TarInfo("a.json"), io.BytesIO(b""))
    assert "tar archive" in recognise(packed.getvalue())


@pytest.mark.parametrize("word", ["ustar", "ustar,", "ustar\n", "ustard"])
def test_a_text_that_has_the_word_ustar_where_an_archive_has_it_is_a_text(word):
    text = '{"text": "' + "x" * 247 + word
    assert text.index("ustar") == 257 and recognise(text.encode()) is None and decode_utf8(text.encode()) == text
