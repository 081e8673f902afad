from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.support.tiny import tiny_compressor, tiny_generator
from vist_rag.codec import FORMS, check_form, decode, encode, size_bytes
from vist_rag.errors import ConfigError, IncompatibleMemoryError, InputError, StoreError
from vist_rag.generation import SoftPromptFusion

BITS = [form for form in FORMS if form != "float16"]
RNG = np.random.default_rng(0)
LATENTS = RNG.normal(size=(20, 33)).astype(np.float32)


def halves(latents: np.ndarray) -> np.ndarray:
    return latents.astype(np.float16).astype(np.float32)


def test_float16_is_the_numbers_one_after_another() -> None:
    data = encode(LATENTS, "float16")
    assert data == LATENTS.astype("<f2").tobytes()
    np.testing.assert_array_equal(decode(data, "float16", 20, 33), halves(LATENTS))


def test_the_layout_is_the_one_that_is_written_down() -> None:
    latents = np.array([[0, 5, 1], [1, 5, 2], [2, 5, 4], [7, 5, 8]], np.float32)
    # Steps of int3 down the columns: 0 1 2 7; 0 0 0 0; 0 1 3 7.
    low = np.packbits([0, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1])
    middle = np.packbits([0, 0, 0, 0, 0, 0, 1, 0, 1, 1, 0, 1])
    high = np.packbits([0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1])
    ends = np.array([[0, 5, 1], [7, 5, 8]], "<f2")
    data = encode(latents, "int3")
    assert data == ends.tobytes() + low.tobytes() + middle.tobytes() + high.tobytes()
    np.testing.assert_allclose(decode(data, "int3", 4, 3), latents, atol=1e-6)


@pytest.mark.parametrize("form", BITS)
def test_no_number_is_further_off_than_half_a_step_of_its_column(form: str) -> None:
    latents = LATENTS * 10.0 ** RNG.integers(-2, 3, 33) + RNG.normal(size=33)
    back = decode(encode(latents, form), form, 20, 33)
    step = (latents.max(0) - latents.min(0)) / (2 ** FORMS[form] - 1)
    assert (np.abs(back - latents) <= 0.5 * step + np.abs(latents).max(0) * 2**-10).all()
    assert (np.abs(back - latents).max(0) > 0.25 * step).all()  # or the form would be finer than it says


@pytest.mark.parametrize("form", FORMS)
def test_the_ends_of_a_column_come_back_as_float16_has_them(form: str) -> None:
    back = decode(encode(LATENTS, form), form, 20, 33)
    np.testing.assert_array_equal(back.max(0), halves(LATENTS).max(0))
    np.testing.assert_array_equal(back.min(0), halves(LATENTS).min(0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_sizes_are_known_before(form: str, n: int) -> None:
    for d in (1, 3, 8, 513):
        assert len(encode(np.ones((n, d)), form)) == size_bytes(form, n, d)


def test_a_full_page_of_the_embedded_model_takes_less_than_16_kib() -> None:
    assert size_bytes("int3", 64, 513) == 2 * 2 * 513 + 3 * 64 * 513 // 8 == 14364
    assert size_bytes("float16", 64, 513) == 65664


@pytest.mark.parametrize("form", FORMS)
def test_one_latent_and_zeros_are_exact_in_every_form(form: str) -> None:
    np.testing.assert_array_equal(decode(encode(LATENTS[:1], form), form, 1, 33), halves(LATENTS[:1]))
    zeros = np.zeros((5, 33), np.float32)
    np.testing.assert_array_equal(decode(encode(zeros, form), form, 5, 33), zeros)


numbers = st.one_of(
    # No subnormal ones: some libraries have the processor read them as 0, once they are loaded.
    st.floats(-65504, 65504, width=32, allow_subnormal=False),
    st.sampled_from([0.0, -0.0, 1e-8, -1e-7, 6e-5, 65504.0, -65504.0, 1.0, 1.0005]),
)


@settings(deadline=None, max_examples=300)
@given(
    arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=numbers),
    st.sampled_from(sorted(FORMS)),
)
def test_what_was_decoded_is_encoded_to_the_same_bytes(latents: np.ndarray, form: str) -> None:
    data = encode(latents, form)
    back = decode(data, form, *latents.shape)
    assert back.shape == latents.shape
    assert back.dtype == np.float32
    assert encode(back, form) == data
    assert encode(latents, form) == data


@pytest.mark.parametrize("form", BITS)
def test_a_small_end_beside_a_large_one_is_kept(form: str) -> None:
    latents = np.array([[-14956.0], [9.4e-5]], np.float32)
    np.testing.assert_array_equal(decode(encode(latents, form), form, 2, 1), halves(latents))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_any_float_array_is_taken_and_left_as_it_was(dtype: Any) -> None:
    latents = halves(LATENTS).astype(dtype)
    before = latents.copy()
    assert encode(np.asfortranarray(latents), "int4") == encode(halves(LATENTS), "int4")
    np.testing.assert_array_equal(latents, before)
    assert decode(encode(latents, "float16"), "float16", 20, 33).flags.writeable


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65520.0, -1e30])
def test_numbers_that_float16_lacks_are_refused(form: str, bad: float) -> None:
    latents = LATENTS.copy()
    latents[3, 4] = bad
    with pytest.raises(
        InputError, match=r"latents must be finite in float16 \(65504 at most\), got (nan|-?inf|65520|-1e\+30); scale"
    ):
        encode(latents, form)


@pytest.mark.parametrize(
    "shape", [np.zeros(3), np.zeros((0, 3)), np.zeros((3, 0)), np.zeros((1, 2, 3)), np.zeros((2, 2), int), "text"]
)
def test_what_is_no_memory_is_refused(shape: Any) -> None:
    with pytest.raises(InputError, match=r"latents must be a float array \[n, d\], got .*; give those of one passage"):
        encode(shape, "int3")


def test_an_unknown_form_is_refused() -> None:
    allowed = "float16, int8, int4, int3, int2, got 'int5'"
    for refused in (lambda: encode(LATENTS, "int5"), lambda: size_bytes("int5", 1, 1), lambda: check_form("int5")):
        with pytest.raises(ConfigError, match=f"form of a memory must be one of {allowed}"):
            refused()
    with pytest.raises(StoreError, match=f"one of the forms {allowed}.*newer version"):
        decode(b"", "int5", 1, 1)


@pytest.mark.parametrize("form", FORMS)
def test_bytes_that_are_too_few_or_too_many_are_refused(form: str) -> None:
    data = encode(LATENTS, form)
    for torn in (data[:-1], data + b"\0", b""):
        with pytest.raises(
            StoreError, match=f"of 20 x 33 numbers in {form} must be {len(data)} bytes, got {len(torn)}"
        ):
            decode(torn, form, 20, 33)
    for n, d in ((0, 33), (-20, -33), (20, 0)):
        with pytest.raises(StoreError, match="a stored memory of"):
            decode(data, form, n, d)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_numbers_are_refused(form: str) -> None:
    for bad in (np.nan, np.inf):
        data = np.float16(bad).tobytes() + encode(LATENTS, form)[2:]
        with pytest.raises(StoreError, match="is damaged; restore"):
            decode(data, form, 20, 33)


def test_ends_the_wrong_way_round_are_refused() -> None:
    data = encode(LATENTS, "int3")
    with pytest.raises(StoreError, match="is damaged; restore"):
        decode(data[66:132] + data[:66] + data[132:], "int3", 20, 33)


def test_stored_bytes_belong_to_no_generator() -> None:
    """A memory is stored as its compressor made it; each generator reads it by a fusion of its own."""
    compressor = tiny_compressor()
    latents = compressor.encode(["the river runs to the sea"])[0].latents
    data = encode(latents.numpy(), "int3")
    soft: list[torch.Tensor] = []
    for seed in (1, 2):
        generator = tiny_generator(seed)
        generator.fusion.bind(compressor.fingerprint)
        memory = compressor.memory(torch.from_numpy(decode(data, "int3", *latents.shape)))
        generator.fusion.check(memory)
        soft.append(generator.fusion.read(generator, memory.latents)[0])
    assert soft[0].shape == soft[1].shape == (len(latents) + 2, 32)
    assert not torch.allclose(soft[0], soft[1], atol=0.05)
    other = SoftPromptFusion(tiny_generator().fusion.config)
    other.bind(tiny_compressor(seed=1).fingerprint)
    with pytest.raises(IncompatibleMemoryError, match="memory must come from compressor"):
        other.check(memory)
