//! The dialogue of `promote`: facts first, then the question, then the deed.
//!
//! The facts come from a dry run in the daemon, which runs every check for real. What it says in `data`:
//!
//! | `data` of the dry run's end | with exit | the dialogue |
//! |---|---|---|
//! | `{"already_active": true}` | 0 | nothing to ask: this node is active |
//! | `{"may_lose": false}` or nothing | 0 | asks for `y` or `yes` |
//! | `{"may_lose": true}` | 3 | only the acceptance of loss is missing: asks for the word `lose-data` |
//! | anything else | not 0 | the refusal stands |
//!
//! **Invariant:** without a terminal nothing is asked, and without `--yes` nothing is done. The daemon judges loss anew
//! in the real run: an answer given here never covers more than what `--accept-data-loss` says.

use super::{End, Out, Target, printed, printed_up_to, settle};
use crate::base::fault::{ExitCode, Fault};
use dialoguer::console::{Key, Term};
use serde_json::{Value, json};
use std::io::IsTerminal;

/// What must be typed when acknowledged transactions may be lost.
const LOSS_WORD: &str = "lose-data";
/// Ctrl-D.
const END_OF_INPUT: char = '\u{4}';

/// The flags of `promote`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PromoteArgs {
    pub yes: bool,
    pub dry_run: bool,
    pub accept_data_loss: bool,
    /// Name of the node that the operator asserts to be off.
    pub peer_is_off: Option<String>,
    pub json: bool,
}

/// Puts a question and returns what was typed; `None` when nobody answered.
pub type Ask<'a> = &'a mut (dyn FnMut(&str) -> Option<String> + Send);

/// Asks on the terminal, where both ends are one; `None` as a function when nobody is there to answer.
pub fn ask_on_terminal() -> Option<fn(&str) -> Option<String>> {
    fn ask(question: &str) -> Option<String> {
        let terminal = Term::stdout();
        terminal.write_str(&format!("{question}: ")).ok()?;
        let answer = typed(&mut || terminal.read_key(), &mut |text| terminal.write_str(text));
        let _only_looks = terminal.write_line("");
        answer
    }
    (std::io::stdin().is_terminal() && std::io::stdout().is_terminal()).then_some(ask)
}

/// One line, key by key: `None` at Ctrl-C, and at Ctrl-D, for which `dialoguer` has no ear.
fn typed(
    key: &mut dyn FnMut() -> std::io::Result<Key>,
    show: &mut dyn FnMut(&str) -> std::io::Result<()>,
) -> Option<String> {
    let mut text = String::new();
    loop {
        match key().ok()? {
            Key::Enter => return Some(text),
            Key::Char(END_OF_INPUT) | Key::CtrlC => return None,
            Key::Backspace if text.pop().is_some() => show("\u{8} \u{8}").ok()?,
            Key::Char(c) if !c.is_control() => {
                text.push(c);
                show(c.encode_utf8(&mut [0; 4])).ok()?;
            }
            _ => {}
        }
    }
}

fn body(args: &PromoteArgs) -> Value {
    json!({
        "yes": args.yes,
        "dry_run": args.dry_run,
        "accept_data_loss": args.accept_data_loss,
        "peer_is_off": args.peer_is_off,
    })
}

/// `promote`. `ask` is `None` without a terminal ([`ask_on_terminal`]).
pub async fn promote(
    target: &Target,
    args: &PromoteArgs,
    ask: Option<Ask<'_>>,
    out: &mut Out<'_>,
) -> Result<ExitCode, Fault> {
    if args.yes || args.dry_run {
        let end = printed(target, "promote", &body(args), args.json, out).await?;
        return settle(end, args.json);
    }
    let Some(ask) = ask else {
        // Nothing would be done on the active node, so nothing has to be asked.
        if let Ok(now) = super::snapshot(target).await
            && now.gate.open
        {
            out.put(&format!("{} is already active at epoch {}\n", now.node, now.epoch))?;
            return Ok(ExitCode::Done);
        }
        return Err(Fault::new(
            ExitCode::Refused,
            "promote asks before it acts, and there is no terminal to ask on; give --yes (see first with --dry-run)",
        ));
    };
    let dry = PromoteArgs { dry_run: true, ..args.clone() };
    // "nothing was changed" is not for somebody who is about to be asked.
    let facts = printed_up_to(target, "promote", &body(&dry), args.json, false, out).await?;
    let fact = |name: &str| facts.data.as_ref().and_then(|data| data.get(name)).and_then(Value::as_bool) == Some(true);
    if facts.exit == ExitCode::Done && fact("already_active") {
        if !args.json {
            out.put(&format!("{}\n", crate::app::render::clean(&facts.text)))?;
        }
        return Ok(ExitCode::Done);
    }
    let may_lose = fact("may_lose");
    let only_loss = facts.exit == ExitCode::Refused && may_lose;
    if facts.exit != ExitCode::Done && !only_loss {
        return settle(facts, args.json);
    }
    agreed(&facts, may_lose, ask)?;
    let real = PromoteArgs { yes: true, accept_data_loss: args.accept_data_loss || may_lose, ..args.clone() };
    let end = printed(target, "promote", &body(&real), args.json, out).await?;
    settle(end, args.json)
}

/// Loss is accepted by its own word alone; everything else by a plain yes.
fn agreed(facts: &End, may_lose: bool, ask: Ask<'_>) -> Result<(), Fault> {
    let (question, wanted): (_, &[&str]) = if may_lose {
        let why = crate::app::render::clean(&facts.text);
        (format!("{why}\nPromote all the same? Type {LOSS_WORD} to accept that"), &[LOSS_WORD])
    } else {
        ("Promote this node now? Type y or yes".to_owned(), &["y", "yes"])
    };
    let typed = ask(&question);
    let typed = typed.as_deref().map(str::trim).unwrap_or_default();
    if wanted.iter().any(|word| typed.eq_ignore_ascii_case(word)) {
        return Ok(());
    }
    let missing = if may_lose && !typed.is_empty() { format!(" (only {LOSS_WORD} does)") } else { String::new() };
    let text =
        format!("promote was not confirmed{missing}; nothing was changed; run it again and type the word it asks for");
    Err(Fault::new(ExitCode::Refused, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_typed_mended_and_given_up() {
        let read = |keys: &[Key]| {
            let (mut keys, mut shown) = (keys.iter().cloned(), String::new());
            let mut key = || keys.next().ok_or_else(|| std::io::Error::other("too few"));
            let typed = typed(&mut key, &mut |text| {
                shown.push_str(text);
                Ok(())
            });
            (typed, shown)
        };
        let c = Key::Char;
        let mended = [Key::Backspace, c('y'), c('x'), Key::Backspace, Key::ArrowUp, c('e'), c('s'), Key::Enter];
        assert_eq!(read(&mended), (Some("yes".to_owned()), "yx\u{8} \u{8}es".to_owned()));
        assert_eq!(read(&[c('y'), c('\u{4}')]).0, None, "Ctrl-D");
        assert_eq!(read(&[c('y'), Key::CtrlC]).0, None);
        assert_eq!(read(&[c('y')]).0, None, "the terminal has gone");
    }
}
