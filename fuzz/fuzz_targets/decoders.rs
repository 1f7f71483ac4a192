//! Arbitrary bytes through the decoders of `wire::pg`; what must hold is in tests/drivers/decoders.rs.
#![no_main]

#[path = "../../tests/drivers/decoders.rs"]
mod decoders;

libfuzzer_sys::fuzz_target!(|data: &[u8]| decoders::exercise(data));
