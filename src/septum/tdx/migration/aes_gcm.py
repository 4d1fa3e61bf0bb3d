"""AES-256-GCM (NIST SP 800-38D) on immutable values, so that an interrupted function can keep its state in a cell.

All blocks of one call go through the cipher side by side: the state is sixteen numbers, one for each byte of an AES
block, and each number holds that byte of every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

KEY_SIZE: Final = 32
IV_SIZE: Final = 12
TAG_SIZE: Final = 16
_BLOCK: Final = 16
_ROUNDS: Final = 14
_POLYNOMIAL: Final = 0xE1 << 120
"""Of GHASH, in its reflected bit order."""


class AesGcm(NamedTuple):
    """One message on its way through the cipher: first its additional data, then its text, then its tag.

    Each step gives a new state. Additional data is taken whole; of the text, all parts but the last have a length that
    is a multiple of 16.
    """

    key: bytes
    iv: bytes
    ghash: int = 0
    aad_size: int = 0
    text_size: int = 0

    def with_aad(self, data: bytes) -> AesGcm:
        """After additional data, which is authenticated only."""
        return self._replace(ghash=_absorb(self.key, self.ghash, data), aad_size=len(data))

    def encrypt(self, plain: bytes) -> tuple[AesGcm, bytes]:
        """After more text; and that text enciphered."""
        cipher = self._cipher(plain)
        return self._after(cipher), cipher

    def decrypt(self, cipher: bytes) -> tuple[AesGcm, bytes]:
        """After more enciphered text; and that text in clear."""
        return self._after(cipher), self._cipher(cipher)

    def tag(self) -> bytes:
        """The 16 bytes that authenticate the message."""
        sizes = (8 * self.aad_size).to_bytes(8, "big") + (8 * self.text_size).to_bytes(8, "big")
        digest = _absorb(self.key, self.ghash, sizes).to_bytes(TAG_SIZE, "big")
        return _xor(digest, _counter_stream(self.key, self.iv, 1, 1))

    def _cipher(self, data: bytes) -> bytes:
        blocks = -(-len(data) // _BLOCK)
        return _xor(data, _counter_stream(self.key, self.iv, 2 + self.text_size // _BLOCK, blocks)[: len(data)])

    def _after(self, cipher: bytes) -> AesGcm:
        ghash = _absorb(self.key, self.ghash, cipher)
        return self._replace(ghash=ghash, text_size=self.text_size + len(cipher))


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")


# -- GHASH -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _products(key: bytes) -> tuple[tuple[int, ...], ...]:
    """For each byte of a block, the product of each of its values with the hash key."""
    power = int.from_bytes(_encrypt_blocks(key, [0] * _BLOCK, 1), "big")
    tables = []
    for _ in range(_BLOCK):
        table = [0] * 256
        for bit in reversed(range(8)):
            for value in range(0, 256, 2 << bit):
                table[value | 1 << bit] = power
            power = power >> 1 ^ (_POLYNOMIAL if power & 1 else 0)
        for value in range(1, 256):
            lowest = value & -value
            table[value] = table[lowest] ^ table[value ^ lowest]
        tables.append(tuple(table))
    return tuple(tables)


def _absorb(key: bytes, ghash: int, data: bytes) -> int:
    """GHASH over more data, filled up with zeros to whole blocks."""
    tables = _products(key)
    for at in range(0, len(data), _BLOCK):
        block = ghash ^ int.from_bytes(data[at : at + _BLOCK].ljust(_BLOCK, b"\0"), "big")
        ghash = 0
        for table, byte in zip(tables, block.to_bytes(_BLOCK, "big"), strict=True):
            ghash ^= table[byte]
    return ghash


# -- AES -------------------------------------------------------------------------------------------------------------


def _double(value: int) -> int:
    """Twice an element of the field of AES."""
    return value << 1 ^ (0x11B if value & 0x80 else 0)


def _make_sbox() -> bytes:
    sbox = bytearray(256)
    power = inverse = 1
    while True:
        power ^= _double(power)
        for shift in (1, 2, 4):
            inverse ^= inverse << shift & 0xFF
        inverse ^= 0x09 if inverse & 0x80 else 0
        rotated = inverse * 0x101
        sbox[power] = (inverse ^ rotated >> 7 ^ rotated >> 6 ^ rotated >> 5 ^ rotated >> 4) & 0xFF ^ 0x63
        if power == 1:
            break
    sbox[0] = 0x63
    return bytes(sbox)


_SBOX: Final = _make_sbox()
_SBOX_DOUBLED: Final = bytes(map(_double, _SBOX))
_SHIFTED_ROWS: Final = tuple((column + row) % 4 * 4 + row for column in range(4) for row in range(4))


@lru_cache(maxsize=16)
def _round_keys(key: bytes) -> tuple[bytes, ...]:
    words = [key[i : i + 4] for i in range(0, KEY_SIZE, 4)]
    constant = 1
    while len(words) < 4 * (_ROUNDS + 1):
        word = words[-1]
        if len(words) % 8 == 0:
            word = _xor((word[1:] + word[:1]).translate(_SBOX), bytes((constant, 0, 0, 0)))
            constant <<= 1
        elif len(words) % 8 == 4:
            word = word.translate(_SBOX)
        words.append(_xor(words[-8], word))
    return tuple(b"".join(words[i : i + 4]) for i in range(0, len(words), 4))


def _encrypt_blocks(key: bytes, state: Sequence[int], count: int) -> bytes:
    """``count`` blocks enciphered; ``state`` has one number of ``count`` bytes for each byte of a block."""
    ones = int.from_bytes(b"\1" * count, "big")
    first, *middle, last = _round_keys(key)
    state = [number ^ ones * byte for number, byte in zip(state, first, strict=True)]
    for round_key in middle:
        raw = [number.to_bytes(count, "big") for number in state]
        once = [int.from_bytes(raw[i].translate(_SBOX), "big") for i in _SHIFTED_ROWS]
        twice = [int.from_bytes(raw[i].translate(_SBOX_DOUBLED), "big") for i in _SHIFTED_ROWS]
        state = []
        for at in range(0, _BLOCK, 4):
            a, b, c, d = once[at : at + 4]
            for row, all_others in enumerate((b ^ c ^ d, a ^ c ^ d, a ^ b ^ d, a ^ b ^ c)):
                mixed = twice[at + row] ^ twice[at + (row + 1) % 4] ^ all_others
                state.append(mixed ^ ones * round_key[at + row])
    raw = [number.to_bytes(count, "big").translate(_SBOX) for number in state]
    out = bytearray(_BLOCK * count)
    for at, (source, byte) in enumerate(zip(_SHIFTED_ROWS, last, strict=True)):
        out[at::_BLOCK] = _xor(raw[source], bytes((byte,)) * count)
    return bytes(out)


def _counter_stream(key: bytes, iv: bytes, first: int, count: int) -> bytes:
    """The enciphered counter blocks from number ``first`` on."""
    if not count:
        return b""
    counters = b"".join(number.to_bytes(4, "big") for number in range(first, first + count))
    ones = int.from_bytes(b"\1" * count, "big")
    state = [ones * byte for byte in iv]
    state += [int.from_bytes(counters[i::4], "big") for i in range(4)]
    return _encrypt_blocks(key, state, count)
