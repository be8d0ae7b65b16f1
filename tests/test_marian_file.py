"""Marian's files give the weights that were written, and damage is named; so do shortlists."""

import struct
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_firefox import OPTIONS, dequantised, random_weights, write_bin, write_npz, write_shortlist

from lightning_knnmt.backbone.firefox.marian_file import read_marian_file
from lightning_knnmt.backbone.firefox.shortlist import read_shortlist

TOKENS = 31


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_float32_weights_are_read_as_they_were(tmp_path: Path) -> None:
    weights = random_weights(TOKENS)
    model = read_marian_file(write_bin(tmp_path / "model.bin", weights, int8=False))
    assert_same(model.tensors, weights)
    assert model.options == OPTIONS


def test_int8_weights_are_dequantised_and_no_longer_transposed(tmp_path: Path) -> None:
    weights = random_weights(TOKENS)
    found = read_marian_file(write_bin(tmp_path / "model.bin", weights, int8=True)).tensors
    assert_same(found, dequantised(weights))
    assert found["encoder_l1_ffn_W1"].shape == (24, 32) and found["Wemb"].shape == (TOKENS, 24)
    for name, values in weights.items():  # half a step of the quantisation
        assert np.abs(found[name] - values).max() <= np.abs(values).max() / 127 * 0.51, name


def test_square_matrices_would_show_a_wrong_transposition(tmp_path: Path) -> None:
    weights = random_weights(TOKENS)
    found = read_marian_file(write_bin(tmp_path / "model.bin", weights)).tensors["decoder_l1_rnn_W"]
    assert np.abs(found.T - weights["decoder_l1_rnn_W"]).max() > 10 * np.abs(found - weights["decoder_l1_rnn_W"]).max()


def test_npz_holds_what_the_binary_holds(tmp_path: Path) -> None:
    weights = random_weights(TOKENS)
    weights["decoder_l1_rnn_W"] = np.asfortranarray(weights["decoder_l1_rnn_W"])
    npz = read_marian_file(write_npz(tmp_path / "model.npz", weights))
    assert_same(npz.tensors, read_marian_file(write_bin(tmp_path / "model.bin", weights, int8=False)).tensors)
    assert npz.options == OPTIONS


SMALL = {"Wemb": np.ones((4, 3), np.float32) * 0.5}
HEADERS = 16  # where the first header begins: length of the name, type, dimensions, bytes of data


def changed(content: bytes, position: int, kind: str, value: int | float) -> bytes:
    return content[:position] + struct.pack(kind, value) + content[position + struct.calcsize(kind) :]


@pytest.mark.parametrize(
    ("position", "kind", "value", "message"),
    [
        (0, "<Q", 2, "its version is 2, expected 1"),
        (8, "<Q", 1 << 60, "headers of 1152921504606846976 tensors: .* bytes, expected at most the"),
        (HEADERS, "<Q", 0, "a name has 0 bytes, expected 1 to 4096"),
        (HEADERS, "<Q", 1 << 63, "a name has 9223372036854775808 bytes, expected 1 to 4096"),
        (HEADERS + 8, "<Q", 0x4102, "Wemb is of type 0x4102, expected 0x0101"),
        (HEADERS + 16, "<Q", 0, "Wemb has 0 dimensions, expected 1 to 8"),
        (HEADERS + 16, "<Q", 1 << 40, "Wemb has 1099511627776 dimensions, expected 1 to 8"),
        (HEADERS + 24, "<Q", 1 << 62, "Wemb has 4611686018427387904 bytes, expected 48 and up to 255 more"),
        (HEADERS + 24, "<Q", 16, "Wemb has 16 bytes, expected 48 and up to 255 more"),
        (-1, "<i", 1 << 30, "Wemb has 256 bytes, expected .* and up to 255 more"),
        (-1, "<i", -4, r"Wemb has the shape \(-4, 3\), expected 1 or more in each dimension"),
        (-1, "<i", 0, r"Wemb has the shape \(0, 3\), expected 1 or more in each dimension"),
        (-2, "<f", float("nan"), "Wemb has values that are no numbers, expected finite ones"),
    ],
)
def test_damaged_fields_are_named_with_the_file(tmp_path: Path, position: int, kind: str, value, message: str) -> None:
    path = write_bin(tmp_path / "model.bin", SMALL, int8=False)
    content = path.read_bytes()
    shapes = content.index(b"special:model.yml\0") + len(b"special:model.yml\0")
    position = {-1: shapes, -2: 256}.get(position, position)
    path.write_bytes(changed(content, position, kind, value))
    with pytest.raises(ValueError, match=rf"model\.bin is damaged or no model of Marian: {message}"):
        read_marian_file(path)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_no_positive_number_is_refused(tmp_path: Path, scale: float) -> None:
    path = write_bin(tmp_path / "model.bin", SMALL, int8=True)
    content = path.read_bytes()
    at = content.index(struct.pack("<f", 254.0))
    path.write_bytes(changed(content, at, "<f", scale))
    with pytest.raises(ValueError, match=r"Wemb has the quantMult .*, expected a number above 0"):
        read_marian_file(path)


def test_every_truncation_and_appendix_is_refused(tmp_path: Path) -> None:
    content = write_bin(tmp_path / "whole.bin", SMALL).read_bytes()
    path = tmp_path / "model.bin"
    for length in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model\.bin is damaged"):
            read_marian_file(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=r"its tensors claim .* bytes, expected the"):
        read_marian_file(path)


def test_random_damage_is_refused_or_harmless_but_never_another_error(tmp_path: Path) -> None:
    content = bytearray(write_bin(tmp_path / "whole.bin", SMALL).read_bytes())
    generator, path, refused = np.random.default_rng(1), tmp_path / "model.bin", 0
    for _ in range(300):
        damaged = bytearray(content)
        for position in generator.integers(0, 240, size=2):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            read_marian_file(path)
        except ValueError:
            refused += 1
    assert refused > 150


def test_a_name_may_be_there_once(tmp_path: Path) -> None:
    weights = {"ab": SMALL["Wemb"], "cd": SMALL["Wemb"]}
    path = write_bin(tmp_path / "model.bin", weights, int8=False)
    path.write_bytes(path.read_bytes().replace(b"cd\0", b"ab\0"))
    with pytest.raises(ValueError, match="ab is there twice, expected each name once"):
        read_marian_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [", "special:model.yml is no YAML"),
        (b"- 1", "special:model.yml is list, expected names and values"),
        (b"\xff", "special:model.yml is no YAML"),
    ],
)
def test_options_that_are_no_mapping_are_refused(tmp_path: Path, text: bytes, message: str) -> None:
    np.savez(tmp_path / "model.npz", **{"special:model.yml": np.frombuffer(text, np.int8)})
    with pytest.raises(ValueError, match=message):
        read_marian_file(tmp_path / "model.npz")


def test_a_file_without_options_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", **SMALL)
    with pytest.raises(ValueError, match=r"it holds no special:model\.yml, expected the training options there"):
        read_marian_file(tmp_path / "model.npz")


def test_npz_never_unpickles_nor_decompresses(tmp_path: Path) -> None:
    options = {"special:model.yml": np.frombuffer(yaml.safe_dump(OPTIONS).encode(), np.int8)}
    path = tmp_path / "model.npz"
    np.savez(path, Wemb=np.array([{}], dtype=object), **options)
    with pytest.raises(ValueError, match=r"Wemb is of type object, expected float32, float16 or int8"):
        read_marian_file(path)
    np.savez_compressed(path, Wemb=np.zeros((5000, 5000), np.float32), **options)
    with pytest.raises(ValueError, match="it is compressed, expected members that are stored"):
        read_marian_file(path)
    np.savez(path, Wemb=np.ones((2, 2), np.float64), **options)
    with pytest.raises(ValueError, match=r"Wemb is of type float64, expected float32, float16 or int8"):
        read_marian_file(path)


def test_npz_damage_is_named(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "model.npz", SMALL)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(4, 3)", b"(9, 3)"))
    with pytest.raises(ValueError, match=r"model\.npz is damaged or no model of Marian: "):
        read_marian_file(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.npz is damaged or no model of Marian: "):
        read_marian_file(path)


LISTS = [[5, 9], [], [7], [9, 30]]


def test_a_shortlist_allows_frequent_tokens_copies_and_those_of_the_source(tmp_path: Path) -> None:
    shortlist = read_shortlist(write_shortlist(tmp_path / "lex.bin", LISTS, frequent=3), TOKENS)
    # 0 1 2 are frequent, 3 is copied, 5 9 and 9 30 are listed; 4 fills up to a multiple of eight
    assert shortlist.allowed([0, 3, 3], TOKENS, shared=True).tolist() == [0, 1, 2, 3, 4, 5, 9, 30]
    assert shortlist.allowed([2], TOKENS, shared=False).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert len(shortlist.allowed([0, 1, 2, 3], TOKENS, shared=False)) % 8 == 0
    with pytest.raises(ValueError, match="source id is 4, expected 0 to 3"):
        shortlist.allowed([4], TOKENS, shared=False)


@pytest.mark.parametrize(
    ("position", "kind", "value", "message"),
    [
        (0, "<Q", 1, "it begins with 0x1, expected 0xf11a48d5013417f5"),
        (8, "<Q", 1, "its checksum is .*, expected 0x1"),
        (16, "<Q", 9, "its checksum is"),
        (32, "<Q", 1 << 61, "it has .* bytes, expected"),
        (40, "<Q", 1 << 61, "it has .* bytes, expected"),
    ],
)
def test_a_damaged_shortlist_is_named(tmp_path: Path, position: int, kind: str, value: int, message: str) -> None:
    path = write_shortlist(tmp_path / "lex.bin", LISTS)
    path.write_bytes(changed(path.read_bytes(), position, kind, value))
    with pytest.raises(ValueError, match=rf"lex\.bin is damaged or no shortlist of Marian: {message}"):
        read_shortlist(path, TOKENS)


def test_a_shortlist_of_another_vocabulary_or_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_shortlist(tmp_path / "lex.bin", LISTS)
    with pytest.raises(ValueError, match="it names the token 30, expected less than 30"):
        read_shortlist(path, 30)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="it has 40 bytes, expected 48 or more"):
        read_shortlist(path, TOKENS)
