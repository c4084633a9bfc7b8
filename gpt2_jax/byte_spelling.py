"""Bytes and the characters that spell them in the files of a byte-level vocabulary."""

from functools import cache


@cache
def byte_chars() -> dict[int, str]:
    """Returns the character that spells each byte in vocabulary files.

    As in openai/gpt-2, src/encoder.py: printable bytes are spelled by themselves, the others by the
    characters from U+0100 on, so that no token holds a space or a control character.
    """
    # The soft hyphen, U+00AD, lies between the last two ranges: it is not printed.
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    chars = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in chars]
    for i, byte in enumerate(others):
        chars[byte] = chr(256 + i)
    return chars


@cache
def _char_bytes() -> dict[str, int]:
    return {char: byte for byte, char in byte_chars().items()}


def spelled_bytes(token: str) -> bytes:
    """Returns the bytes that a token spells; one that is spelled otherwise stands for itself."""
    # Otherwise: tokens that were added by hand, with a space in them, for example.
    try:
        return bytes(map(_char_bytes().__getitem__, token))
    except KeyError:
        return token.encode("utf-8")
