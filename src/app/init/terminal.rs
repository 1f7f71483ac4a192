//! Questions on a terminal, on standard error: a proposal in brackets, an answer judged at once and asked again when it
//! is wrong.

use super::wrong;
use crate::base::fault::Fault;
use dialoguer::{Confirm, Input, Select};
use std::io::{IsTerminal, Write};

type Judge<'a> = &'a dyn Fn(&str) -> Result<(), String>;

/// Can anybody be asked?
pub(super) fn is_there() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// A line between the questions.
pub(super) fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

fn gone(error: dialoguer::Error) -> Fault {
    wrong(format!("the terminal went away ({error}); nothing was written, use the flags of portcullis init --help"))
}

fn input(question: &str, proposal: Option<String>, empty: bool, judge: Judge<'_>) -> Result<String, Fault> {
    let mut input = Input::<String>::new().with_prompt(question).allow_empty(empty);
    if let Some(proposal) = proposal {
        input = input.show_default(!proposal.is_empty()).default(proposal);
    }
    let input = input.validate_with(|text: &String| judge(text.trim()));
    input.interact_text().map(|text| text.trim().to_owned()).map_err(gone)
}

/// An answer that must be one.
pub(super) fn ask(question: &str, proposal: Option<String>, judge: Judge<'_>) -> Result<String, Fault> {
    input(question, proposal, false, judge)
}

/// An answer that may be empty.
pub(super) fn ask_any(question: &str, proposal: String, judge: Judge<'_>) -> Result<String, Fault> {
    input(question, Some(proposal), true, judge)
}

/// Yes or no.
pub(super) fn confirm(question: &str, proposal: bool) -> Result<bool, Fault> {
    Confirm::new().with_prompt(question).default(proposal).wait_for_newline(true).interact().map_err(gone)
}

/// One of several; the first is proposed. Which one.
pub(super) fn choose(question: &str, rows: &[String]) -> Result<usize, Fault> {
    Select::new().with_prompt(format!("{question} (arrows, Enter)")).items(rows).default(0).interact().map_err(gone)
}
