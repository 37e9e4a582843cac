"""Whatever a server answers to a request for a range: the right bytes are taken out of it, or none."""

from hypothesis import given
from hypothesis import strategies as st

from adapter_store.sources.base import RangeRead, SourceChanged, SourceFile
from adapter_store.sources.ranges import WrongRange, num_bytes_to_skip, parse_content_range, range_header

SIZES = st.integers(1, 6)


@st.composite
def asked(draw):
    """A file of distinct bytes, and a range of it of which some is there already."""
    content = bytes(range(draw(SIZES)))
    start = draw(st.integers(0, len(content) - 1))
    part = RangeRead(start, memoryview(bytearray(draw(st.integers(1, len(content) - start)))))
    part.write(content[start : start + draw(st.integers(0, part.num_missing - 1))])
    return content, part


@given(asked(), st.integers(0, 6), SIZES, st.sampled_from(["right", "more", "unknown"]), st.booleans())
def test_an_answer_with_any_range_gives_the_right_bytes_or_none(question, begin, num_bytes, total, tells_length):
    content, part = question
    body = content[begin : begin + num_bytes]
    known = {"right": len(content), "more": len(content) + 1, "unknown": "*"}[total]
    header = f"bytes {begin}-{begin + len(body) - 1}/{known}" if body else f"bytes */{known}"
    first = part.start + part.num_received
    try:
        skip = num_bytes_to_skip(listed(content), part, header, len(body) if tells_length else None)
    except WrongRange:
        assert body != content[first : part.end]
    except SourceChanged:
        assert total == "more"
    else:
        assert body[skip : skip + part.num_missing] == content[first : part.end]


@given(asked(), st.booleans(), SIZES)
def test_an_answer_with_the_whole_file_gives_the_right_bytes_or_none(question, tells_length, other_size):
    content, part = question
    body = content if other_size % 2 else bytes(other_size)
    try:
        skip = num_bytes_to_skip(listed(content), part, None, len(body) if tells_length else None)
    except SourceChanged:
        assert len(body) != len(content)
    else:
        assert skip == part.start + part.num_received
        assert not tells_length or len(body) == len(content)


@given(asked())
def test_what_is_asked_for_is_what_is_missing(question):
    content, part = question
    begin, end, _ = parse_content_range(f"{range_header(part).replace('=', ' ')}/*")
    assert content[begin:end] == content[part.start : part.end][part.num_received :]


def listed(content):
    return SourceFile(name="adapter_config.json", etag="e", num_bytes=len(content))
