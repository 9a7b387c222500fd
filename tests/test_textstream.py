import pytest

from kvlocal.template.textstream import TextStream, pieces_of

TEXT = "naïve 日本語 👍🏽 \U0001f468‍\U0001f469‍\U0001f467 end"


def test_byte_by_byte_gives_whole_characters() -> None:
    stream = TextStream()
    parts = [stream.push(bytes([byte])) for byte in TEXT.encode()]
    assert "".join(parts) + stream.flush() == TEXT
    assert all(len(part) <= 1 and "\ufffd" not in part for part in parts)


@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_any_cut_gives_the_same_text(size: int) -> None:
    stream, data = TextStream(), TEXT.encode()
    parts = [stream.push(data[i : i + size]) for i in range(0, len(data), size)]
    assert "".join(parts) + stream.flush() == TEXT


def test_invalid_bytes_are_replaced_and_the_rest_goes_on() -> None:
    stream = TextStream()
    assert stream.push(b"a\xffb") == "a\ufffdb"
    assert stream.push("👍".encode()[:2]) == ""
    assert stream.push(b"c") == "\ufffdc"


def test_flush_replaces_an_unfinished_character() -> None:
    stream = TextStream()
    assert stream.push("ab👍".encode()[:-1]) == "ab"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_stop_string_over_several_pushes() -> None:
    stream = TextStream(stop=["\n### User:"])
    parts = [stream.push(bytes([byte])) for byte in b"one\n### two\n### User: three"]
    assert "".join(parts) == "one\n### two"
    assert stream.stopped
    assert stream.flush() == ""


def test_what_only_looks_like_a_stop_string_is_given_in_the_end() -> None:
    stream = TextStream(stop=["END", "NOW"])
    assert stream.push(b"the EN") == "the "
    assert not stream.stopped
    assert stream.flush() == "EN"


def test_where_the_text_is_cut_the_beginning_of_a_stop_string_is_left_out() -> None:
    stream = TextStream(stop=["<|end|>"])
    assert stream.push(b"a < b <|e") == "a < b "
    assert stream.flush(cut=True) == ""
    assert stream.push(b"c<") + stream.flush() == "c<"


def test_the_first_stop_string_counts() -> None:
    stream = TextStream(stop=["later", "now"])
    assert stream.push(b"stop now or later") == "stop "


@pytest.mark.parametrize(
    "pieces, text, expected",
    [
        ([b"ab", b"c"], "abc", (2, 3)),
        ([b"ab", b"c"], "ab", (1, 2)),
        ([b"ab", b"c"], "a", (0, 0)),
        ([b"a", b"\xc3", b"\xa9"], "a\u00e9", (3, 2)),
        ([b"a", b"\xc3"], "a", (1, 1)),
        ([b"a", b"\xc3", b"\xa9."], "a\u00e9", (1, 1)),
        ([b"\xe2", b"\xe2", b"\xe2"], "\ufffd\ufffd", (2, 2)),
        ([b"a", b"", b"b"], "a", (2, 1)),
        ([], "", (0, 0)),
    ],
)
def test_the_pieces_of_a_text(pieces, text, expected):
    assert pieces_of(pieces, text) == expected
