//! Regular expressions in `pg_hba.conf` (`/...`, PostgreSQL 16 and later) and `pg_ident.conf`, on the `regex` crate.
//!
//! What it is NOT: not all of PostgreSQL's regular expressions. What the two read differently is an error with the
//! character named, so that no rule silently means something else. What a group matches is asked only of expressions
//! whose groups have one reading: PostgreSQL prefers the longest match, the crate the first alternative.

use regex::{Regex, RegexBuilder};

/// Longest compiled expression, in bytes; a bigger one is an error.
const MAX_COMPILED: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Pattern {
    regex: Regex,
    /// Why what its first group matches is not surely what PostgreSQL takes for it.
    unclear: Option<&'static str>,
}

impl Pattern {
    /// From the word, its leading slash included.
    pub(super) fn parse(word: &str) -> Result<Pattern, String> {
        let shown = word.escape_debug();
        let text = word.strip_prefix('/').unwrap_or(word);
        let unclear = unclear(text);
        let text = translate(text).map_err(|part| {
            format!("the expression \"{shown}\" has {part}, which the gate does not read as PostgreSQL; write it anew")
        })?;
        let built = RegexBuilder::new(&text).dot_matches_new_line(true).size_limit(MAX_COMPILED).build();
        built.map(|regex| Pattern { regex, unclear }).map_err(|error| {
            let why = match error {
                regex::Error::CompiledTooBig(_) => "it is too big".to_owned(),
                error => error.to_string().lines().last().unwrap_or_default().trim().to_owned(),
            };
            format!("the expression \"{shown}\" is not understood ({why}); correct it")
        })
    }

    pub(super) fn matches(&self, name: &str) -> bool {
        self.regex.is_match(name)
    }

    /// What the first group matched.
    pub(super) fn first_group<'n>(&self, name: &'n str) -> Option<&'n str> {
        Some(self.regex.captures(name)?.get(1)?.as_str())
    }

    /// Whether there is a first group, and one way alone to say what it matches; the error says what to do.
    pub(super) fn names_its_first_group(&self) -> Result<(), &'static str> {
        if self.regex.captures_len() < 2 {
            return Err("it has none; put a part of it in parentheses");
        }
        self.unclear.map_or(Ok(()), Err)
    }
}

/// Why the first group of a good expression of PostgreSQL's might be another part of the name for it than for the
/// crate: with both ends fixed, no choice before that group's end, and up to there only single characters
/// repeated, each as often as can be, the two agree (`tests/it/proxy/rules_maps.rs` compares them).
fn unclear(text: &str) -> Option<&'static str> {
    const ENDS: &str = "it may match a part of the name; begin it with ^ and end it with $";
    const CHOICE: &str = "it has a choice (|) before that group's end or around it; write a line for each";
    const REPEATED: &str = "it repeats a group before that group's end or around it; repeat single characters";
    const LAZY: &str = "it repeats as rarely as can be (*? and such); say which characters instead";
    if !text.starts_with('^') {
        return Some(ENDS);
    }
    let is_repetition = |c: Option<&char>| matches!(c, Some('*' | '+' | '?' | '{'));
    // For each open group whether it began before the first one that captures ended; where that one stands.
    let (mut open, mut first): (Vec<bool>, Option<usize>) = (Vec::new(), None);
    let (mut is_over, mut ends) = (false, false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        ends = false;
        match c {
            '\\' => drop(chars.next()),
            '[' => {
                chars.next_if_eq(&'^');
                chars.next_if_eq(&']');
                while let Some(inner) = chars.next().filter(|c| *c != ']') {
                    match inner {
                        '\\' => drop(chars.next()),
                        '[' => drop(chars.by_ref().find(|c| *c == ']')),
                        _ => {}
                    }
                }
            }
            '(' => {
                if chars.next_if_eq(&'?').is_some() {
                    chars.next();
                } else if first.is_none() {
                    first = Some(open.len());
                }
                open.push(!is_over);
            }
            ')' => {
                if open.pop() == Some(true) && is_repetition(chars.peek()) {
                    return Some(REPEATED);
                }
                is_over |= first == Some(open.len());
            }
            '|' if *open.last().unwrap_or(&true) => return Some(CHOICE),
            '*' | '+' | '?' | '{' => {
                if c == '{' {
                    chars.by_ref().find(|c| *c == '}');
                }
                if is_repetition(chars.peek()) {
                    return Some(LAZY);
                }
            }
            '$' => ends = true,
            _ => {}
        }
    }
    (!ends).then_some(ENDS)
}

/// The same in the crate's syntax, or the part that has no same.
fn translate(text: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut chars = text.chars().peekable();
    let mut class_at = None;
    if text.starts_with("***") {
        return Err("a prefix ***".to_owned());
    }
    for at in 0.. {
        let Some(c) = chars.next() else { break };
        let next = chars.peek().copied();
        match (c, class_at) {
            ('\\', _) => {
                chars.next();
                let bare = match next {
                    Some('d') => "0-9",
                    Some('w') => "A-Za-z0-9_",
                    Some('s') => " \\t\\n\\r\\f\\v",
                    Some(c) if !c.is_ascii_alphanumeric() && !matches!(c, '<' | '>') => {
                        out.extend(['\\', c]);
                        continue;
                    }
                    Some(c) => return Err(format!("\\{c}")),
                    None => return Err("a backslash at its end".to_owned()),
                };
                out.push_str(&if class_at.is_some() { bare.to_owned() } else { format!("[{bare}]") });
            }
            ('[', None) => {
                class_at = Some(at);
                out.push('[');
                if next == Some('^') {
                    chars.next();
                    out.push('^');
                }
                // A bracket that comes first is meant.
                if chars.peek() == Some(&']') {
                    chars.next();
                    out.push_str("\\]");
                }
            }
            (']', Some(_)) => {
                class_at = None;
                out.push(']');
            }
            ('[', Some(_)) if next == Some(':') => {
                let name: String = chars.by_ref().take_while(|c| *c != ']').collect();
                out.push_str(&format!("[{name}]"));
            }
            ('[', Some(_)) => return Err("a [ inside of brackets".to_owned()),
            ('&' | '~' | '-', Some(_)) if next == Some(c) => return Err(format!("{c}{c} inside of brackets")),
            ('(', None) if next == Some('?') => {
                chars.next();
                if chars.next() != Some(':') {
                    return Err("(? without a colon".to_owned());
                }
                out.push_str("(?:");
            }
            _ => out.push(c),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_match_anywhere_unless_they_are_anchored() {
        for (pattern, yes, no) in [
            ("/^db\\d{2,4}$", &["db12", "db1234"][..], &["db1", "xdb12", "db12345"][..]),
            ("/app", &["app", "myapp2"], &["ap"]),
            ("/^(a|b)_[[:alpha:]]+$", &["a_x", "b_yz"], &["c_x", "a_1"]),
            ("/^[]x]+$", &["]x"], &["y"]),
            ("/^[^]]$", &["a", "é"], &["]"]),
            ("/^[\\w.]+$", &["a.b_9"], &["a-b"]),
            ("/^\\.\\$$", &[".$"], &["x$"]),
            ("/^(?:x|y)$", &["x"], &["xy"]),
            ("/", &["", "anything"], &[]),
        ] {
            let compiled = Pattern::parse(pattern).expect(pattern);
            for name in yes {
                assert!(compiled.matches(name), "{pattern} {name}");
            }
            for name in no {
                assert!(!compiled.matches(name), "{pattern} {name}");
            }
        }
    }

    #[test]
    fn what_the_two_read_differently_is_refused_by_name() {
        for (pattern, part) in [
            ("/\\y", "\\y"),
            ("/\\bx", "\\b"),
            ("/\\<x", "\\<"),
            ("/(a)\\1", "\\1"),
            ("/[a[b]", "a [ inside"),
            ("/[a&&b]", "&&"),
            ("/(?i)x", "(?"),
            ("/(?=x)", "(?"),
            ("/***=x", "***"),
            ("/x\\", "backslash at its end"),
            ("/(", "unclosed group"),
            ("/x{2", "repetition"),
            ("/\\d{99999999}", "too big"),
        ] {
            let why = Pattern::parse(pattern).expect_err(pattern);
            assert!(why.contains(part) && why.contains(&pattern.escape_debug().to_string()), "{pattern}: {why}");
        }
    }
}
