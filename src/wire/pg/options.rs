//! What a client that shares backends has set for its session, as far as its statements show it at their beginning.
//!
//! What it is NOT: no parser. It knows names of customized options (`my.tenant`), which PostgreSQL shows in no list,
//! and whether anything may have been set that it does not know; then the backend is reset rather than lent on as it
//! is. What a function, a DO block or a statement prepared before sets inside of itself is not seen here.
//!
//! **Invariant:** every SET that was carried out was either begun by a statement that was understood, or leaves doubt.

use super::customized_option;

/// Customized options of one client that are looked after; what goes beyond them leaves doubt.
const MAX_NAMES: usize = 64;
/// Bytes of a statement that are looked at.
const HEAD: usize = 128;

/// See the module.
#[derive(Debug, Default)]
pub struct Options {
    names: Vec<String>,
    /// SET statements that were understood and not yet carried out.
    understood: u32,
    in_doubt: bool,
}

impl Options {
    /// A transaction begins.
    pub fn begin(&mut self) {
        self.understood = 0;
    }

    /// A statement that begins like this comes from the client. Whether it sets something without saying so in the end.
    pub fn note(&mut self, statement: &[u8]) -> bool {
        let head = &statement[..statement.len().min(HEAD)];
        let head = head.trim_ascii_start();
        if strip(head, b"set ").is_some() {
            let is_kept = match customized_option(head) {
                Some(name) => self.keep(name),
                // A name in quotes may be a customized one.
                None => !head.contains(&b'"'),
            };
            self.understood += u32::from(is_kept);
            return false;
        }
        let Some(call) = strip(head, b"select ").map(<[u8]>::trim_ascii_start) else { return false };
        let Some(arguments) = strip(strip(call, b"pg_catalog.").unwrap_or(call), b"set_config(") else { return false };
        // For this transaction alone.
        if arguments.to_ascii_lowercase().windows(5).any(|end| end == b"true)") {
            return false;
        }
        let name = arguments.strip_prefix(b"'").and_then(|rest| rest.split(|b| *b == b'\'').next());
        let name = name.map(|name| String::from_utf8_lossy(name).to_ascii_lowercase());
        if let Some(name) = name.filter(|name| name.contains('.')) {
            self.keep(name);
        }
        self.in_doubt = true;
        true
    }

    /// A command was carried out; `tag` as in CommandComplete.
    pub fn carried_out(&mut self, tag: &[u8]) {
        if tag != b"SET\0" {
            return;
        }
        match self.understood.checked_sub(1) {
            Some(left) => self.understood = left,
            None => self.in_doubt = true,
        }
    }

    /// The names, and whether there was doubt since this was last asked.
    pub fn take(&mut self) -> (Vec<String>, bool) {
        (self.names.clone(), std::mem::take(&mut self.in_doubt))
    }

    fn keep(&mut self, name: String) -> bool {
        let is_known = self.names.contains(&name);
        if !is_known && self.names.len() < MAX_NAMES {
            self.names.push(name);
            return true;
        }
        is_known
    }
}

fn strip<'a>(text: &'a [u8], word: &[u8]) -> Option<&'a [u8]> {
    text.split_at_checked(word.len()).filter(|(front, _)| front.eq_ignore_ascii_case(word)).map(|(_, rest)| rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_understood_leaves_doubt() {
        for (statement, sets, names, doubt) in [
            ("set search_path = a", 1, &[][..], false),
            (" SET my.tenant = 'x'", 1, &["my.tenant"], false),
            ("set \"my\".\"tenant\" = 'x'", 1, &[], true),
            ("/* app */ set my.tenant = 'x'", 1, &[], true),
            ("begin; set my.tenant = 'x'; commit", 1, &[], true),
            ("set my.a = '1'; set my.b = '2'", 2, &["my.a"], true),
            ("select set_config('my.tenant', 'x', false)", 0, &["my.tenant"], true),
            ("Select PG_CATALOG.Set_Config($1, $2, $3)", 0, &[], true),
            ("select set_config('my.tenant', 'x', true)", 0, &[], false),
            ("select 1", 0, &[], false),
            ("sel", 0, &[], false),
        ] {
            let mut options = Options::default();
            options.begin();
            options.note(statement.as_bytes());
            (0..sets).for_each(|_| options.carried_out(b"SET\0"));
            let (known, in_doubt) = options.take();
            assert_eq!(
                (&known[..], in_doubt),
                (&names.iter().map(|n| n.to_string()).collect::<Vec<_>>()[..], doubt),
                "{statement}"
            );
            assert!(!options.take().1, "said once");
        }
    }

    #[test]
    fn names_beyond_the_limit_leave_doubt() {
        let mut options = Options::default();
        for n in 0..=MAX_NAMES {
            options.begin();
            options.note(format!("set my.o{n} = 1").as_bytes());
            options.carried_out(b"SET\0");
            assert_eq!(options.take().1, n == MAX_NAMES);
        }
        // Prepared and never run, it vouches for nothing in the next transaction.
        options.note(b"set my.o1 = 2");
        options.begin();
        options.carried_out(b"SET\0");
        assert!(options.take().1);
    }
}
