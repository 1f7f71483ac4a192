//! What can go wrong, sorted by what the caller must be told: the exit code and the one line on standard error.

use std::fmt;

/// Exit codes of the program (the contract).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCode {
    /// Done.
    Done = 0,
    /// Failed, nothing changed; also "the daemon does not answer".
    Failed = 1,
    /// Bad configuration, or bad usage.
    Config = 2,
    /// Refused as unsafe; the sentence says why.
    Refused = 3,
    /// Stopped half-way; run again to finish.
    HalfWay = 4,
}

/// An error for the person at the terminal: what happened, and what to do about it.
#[derive(Debug, Clone)]
pub struct Fault {
    /// Which exit code the program ends with.
    pub exit: ExitCode,
    /// `what happened; what to do about it`, one line, no secret in it.
    pub text: String,
}

impl Fault {
    /// A fault with its exit code.
    pub fn new(exit: ExitCode, text: impl Into<String>) -> Fault {
        Fault { exit, text: text.into() }
    }
}
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
impl std::error::Error for Fault {}
