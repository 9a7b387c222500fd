"""Texts that somebody else wrote, as bytes: what every door of the program tolerates in them."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8, which some editors put before a text


def text_of(data: bytes, errors: str = "strict") -> str:
    """The text that somebody's file, line or pipe holds in UTF-8, without a byte order mark, and with its lines ended as here.

    Args:
        errors: what to do with bytes that are not UTF-8, as `bytes.decode` takes it.

    Raises:
        UnicodeDecodeError: they are not, and `errors` is "strict".
    """
    return data.removeprefix(BYTE_ORDER_MARK).decode("utf-8", errors).replace("\r\n", "\n")


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing, or nothing but a byte order mark and spaces."""
    return not line.removeprefix(BYTE_ORDER_MARK).strip()
