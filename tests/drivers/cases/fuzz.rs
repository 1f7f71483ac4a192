//! x
use crate::suite::*;
pub fn cases() -> Vec<Case> { vec![] }
