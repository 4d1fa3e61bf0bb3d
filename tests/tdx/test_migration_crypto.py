"""AES-256-GCM against the test vectors of its specification, and bundle headers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.tdx.migration.aes_gcm import AesGcm
from septum.tdx.migration.mbmd import SIZE, BundleType, Mbmd, immutable_body, open_immutable_body

KEY = bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2)
IV = bytes.fromhex("cafebabefacedbaddecaf888")
PLAIN = bytes.fromhex(
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255"
)
AAD = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
CIPHER = bytes.fromhex(
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad"
)
#: Test cases 13 to 16 of the proposal of GCM to NIST: key, IV, additional data, text, enciphered text, tag.
CASES = [
    (bytes(32), bytes(12), b"", b"", b"", "530f8afbc74536b9a963b4f1c4cb738b"),
    (
        bytes(32), bytes(12), b"", bytes(16), bytes.fromhex("cea7403d4d606b6e074ec5d3baf39d18"),
        "d0d1c8a799996bf0265b98b5d48ab919",
    ),
    (KEY, IV, b"", PLAIN, CIPHER, "b094dac5d93471bdec1a502270e3cc6c"),
    (KEY, IV, AAD, PLAIN[:60], CIPHER[:60], "76fc6ece0f4e1768cddf8853bb2d551b"),
]  # fmt: skip
keys, ivs = st.binary(min_size=32, max_size=32), st.binary(min_size=12, max_size=12)


@pytest.mark.parametrize(("key", "iv", "aad", "plain", "cipher", "tag"), CASES)
def test_known_answers(key: bytes, iv: bytes, aad: bytes, plain: bytes, cipher: bytes, tag: str) -> None:
    begun = AesGcm(key, iv).with_aad(aad)
    encrypted, out = begun.encrypt(plain)
    assert (out, encrypted.tag().hex()) == (cipher, tag)
    decrypted, back = begun.decrypt(cipher)
    assert (back, decrypted.tag().hex()) == (plain, tag)


@given(keys, ivs, st.binary(max_size=40), st.binary(max_size=200), st.lists(st.integers(0, 12)))
def test_parts_are_as_good_as_the_whole(key: bytes, iv: bytes, aad: bytes, text: bytes, cuts: list[int]) -> None:
    begun = AesGcm(key, iv).with_aad(aad)
    whole, cipher = begun.encrypt(text)
    places = sorted({0, len(text), *(16 * cut for cut in cuts if 16 * cut < len(text))})
    state, parts = begun, b""
    for start, end in pairwise(places):
        state, part = state.encrypt(text[start:end])
        parts += part
    assert (parts, state.tag()) == (cipher, whole.tag())


@given(keys, ivs, st.binary(min_size=1, max_size=64), st.data())
def test_every_bit_counts(key: bytes, iv: bytes, text: bytes, data: st.DataObject) -> None:
    sent, cipher = AesGcm(key, iv).encrypt(text)
    bit = data.draw(st.integers(0, 8 * len(cipher) - 1))
    forged = bytearray(cipher)
    forged[bit // 8] ^= 1 << bit % 8
    received, _ = AesGcm(key, iv).decrypt(bytes(forged))
    assert received.tag() != sent.tag()


@given(st.binary(min_size=SIZE, max_size=SIZE))
def test_headers_survive_packing(raw: bytes) -> None:
    assert Mbmd.unpack(raw).pack() == raw


def test_the_mac_does_not_cover_what_is_in_the_iv() -> None:
    header = Mbmd(BundleType.MEM, mb_counter=3)
    assert header._replace(migs_index=7, iv_counter=9).authenticated() == header.authenticated()
    assert header._replace(mb_counter=4).authenticated() != header.authenticated()


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFF), st.integers(0, 63))
def test_reserved_bits_of_immutable_state(streams: int, pages: int, bit: int) -> None:
    body = immutable_body(streams, pages)
    assert open_immutable_body(body) == (streams, pages)
    reserved = not (bit < 16 or 32 <= bit < 40)
    assert (open_immutable_body(body ^ 1 << bit) is None) == reserved
