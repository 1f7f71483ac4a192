//! TOML text to typed values, each with the line it stands on.
//!
//! Walks `toml`'s spanned tree by hand: serde's `deny_unknown_fields` knows neither lines of defaults nor a nearest
//! key. Collects every error instead of stopping at the first. Knows no key by name; `read.rs` does.

use super::{ConfigError, Lines};
use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::Spanned;
use toml::de::{DeArray, DeString, DeTable, DeValue};

/// Longest duration taken; longer is a slip of the unit, and the arithmetic on leases need not fear overflow.
pub(super) const LONGEST_DURATION: Duration = Duration::from_secs(365 * 86_400);

/// What is noted while the text is walked: errors, the line of each key seen, and every key asked for.
pub(super) struct Notes<'t> {
    file: &'t Path,
    text: &'t str,
    errors: RefCell<Vec<ConfigError>>,
    lines: RefCell<Lines>,
    known: RefCell<Vec<(String, String)>>,
    unknown: RefCell<Vec<Unknown>>,
}

struct Unknown {
    section: String,
    shown: String,
    key: String,
    line: usize,
}

impl<'t> Notes<'t> {
    pub(super) fn new(text: &'t str, file: &'t Path) -> Notes<'t> {
        Notes {
            file,
            text,
            errors: RefCell::default(),
            lines: RefCell::default(),
            known: RefCell::default(),
            unknown: RefCell::default(),
        }
    }

    /// Line, counted from 1, of a byte offset.
    fn line(&self, offset: usize) -> usize {
        let end = offset.min(self.text.len());
        1 + self.text.as_bytes().iter().take(end).filter(|b| **b == b'\n').count()
    }

    /// The syntax errors of the file, each on one line.
    pub(super) fn syntax(&self, errors: Vec<toml::de::Error>) -> Vec<ConfigError> {
        let mut found: Vec<ConfigError> = errors
            .into_iter()
            .map(|error| ConfigError {
                file: self.file.to_owned(),
                line: error.span().map_or(1, |span| self.line(span.start)),
                key: "TOML".to_owned(),
                problem: error.message().lines().collect::<Vec<_>>().join(", "),
                remedy: "correct this line (text in quotes, one value a key, each section once)".to_owned(),
            })
            .collect();
        found.sort_by_key(|error| error.line);
        found.dedup_by_key(|error| error.line);
        found
    }

    /// Notes an error about `key` (its full path), on the line the key, or else its section, stands on.
    pub(super) fn error(&self, key: &str, problem: impl Into<String>, remedy: impl Into<String>) {
        let line = self.lines.borrow().of(key);
        self.errors.borrow_mut().push(ConfigError {
            file: self.file.to_owned(),
            line,
            key: key.to_owned(),
            problem: problem.into(),
            remedy: remedy.into(),
        });
    }

    /// Is nothing wrong so far?
    pub(super) fn is_clean(&self) -> bool {
        self.errors.borrow().is_empty() && self.unknown.borrow().is_empty()
    }

    /// Ends the walk: the lines of all keys, or every error in the order of the file.
    pub(super) fn finish(self) -> Result<Lines, Vec<ConfigError>> {
        for unknown in self.unknown.take() {
            let remedy = self.nearest(&unknown);
            self.errors.borrow_mut().push(ConfigError {
                file: self.file.to_owned(),
                line: unknown.line,
                key: join(&unknown.shown, &unknown.key),
                problem: "unknown key".to_owned(),
                remedy,
            });
        }
        let mut errors = self.errors.take();
        errors.sort_by_key(|error| error.line);
        if errors.is_empty() { Ok(self.lines.take()) } else { Err(errors) }
    }

    /// A key close by in the same section, else the same word in another section, else the closest here.
    fn nearest(&self, unknown: &Unknown) -> String {
        let known = self.known.borrow();
        let distance = |key: &str| strsim::damerau_levenshtein(key, &unknown.key);
        let here = known.iter().filter(|(section, _)| *section == unknown.section).map(|(_, key)| key.as_str());
        let best = here.min_by_key(|key| distance(key));
        let close = 1 + unknown.key.len() / 3;
        if let Some(best) = best.filter(|key| distance(key) <= close) {
            return format!("did you mean \"{best}\"?");
        }
        if let Some((section, key)) = known.iter().find(|(_, key)| *key == unknown.key) {
            let place = match section.as_str() {
                "" => "before the first section".to_owned(),
                "node" => "in [[node]]".to_owned(),
                other => format!("in [{other}]"),
            };
            return format!("\"{key}\" belongs {place}");
        }
        best.map_or_else(|| "take it out".to_owned(), |best| format!("the nearest known key is \"{best}\""))
    }
}

fn join(section: &str, key: &str) -> String {
    if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") }
}

/// One table of the file, or the absence of it (then every key has its default).
pub(super) struct Section<'a> {
    notes: &'a Notes<'a>,
    table: Option<&'a DeTable<'a>>,
    /// As known keys are grouped: `node.postgres`.
    kind: String,
    /// As errors show it: `node.alp.postgres`.
    shown: String,
    /// Written, but not as a section: its error is noted, and that its keys are missing would be noise.
    broken: bool,
}

impl<'a> Section<'a> {
    pub(super) fn root(notes: &'a Notes<'a>, table: &'a DeTable<'a>) -> Section<'a> {
        Section { notes, table: Some(table), kind: String::new(), shown: String::new(), broken: false }
    }

    /// Is the section written in the file?
    pub(super) fn is_present(&self) -> bool {
        self.table.is_some()
    }

    /// The full path of a key, as errors name it.
    pub(super) fn path(&self, key: &str) -> String {
        join(&self.shown, key)
    }

    /// Notes an error about a key of this section.
    pub(super) fn error(&self, key: &str, problem: impl Into<String>, remedy: impl Into<String>) {
        self.notes.error(&self.path(key), problem, remedy);
    }

    fn look_up(&self, key: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        let group = (self.kind.clone(), key.to_owned());
        if !self.notes.known.borrow().contains(&group) {
            self.notes.known.borrow_mut().push(group);
        }
        let (at, value) = self.table?.get_key_value(key)?;
        self.notes.lines.borrow_mut().note(self.path(key), self.notes.line(at.span().start));
        Some(value)
    }

    /// A sub-section.
    pub(super) fn section(&self, key: &str) -> Section<'a> {
        let value = self.look_up(key);
        let table = value.and_then(|value| match value.get_ref() {
            DeValue::Table(table) => Some(table),
            other => {
                let path = self.path(key);
                let problem = format!("is a section, not {}", kind(other));
                self.notes.error(&path, problem, format!("write [{path}] and its keys on the lines below"));
                None
            }
        });
        Section {
            notes: self.notes,
            table,
            kind: join(&self.kind, key),
            shown: self.path(key),
            broken: value.is_some() && table.is_none(),
        }
    }

    /// The tables of `[[key]]`, in file order; each is shown by its `name` where it has one.
    pub(super) fn sections(&self, key: &str) -> Vec<Section<'a>> {
        let wrong = |found: &DeValue<'_>| {
            let problem = format!("is a list of sections, not {}", kind(found));
            self.error(key, problem, format!("write [[{key}]] (two brackets) once for each"));
        };
        let Some(value) = self.look_up(key) else { return Vec::new() };
        let DeValue::Array(items) = value.get_ref() else {
            wrong(value.get_ref());
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let DeValue::Table(table) = item.get_ref() else {
                wrong(item.get_ref());
                continue;
            };
            let name = table.get("name").and_then(|name| name.get_ref().as_str());
            // A name only when it is unique so far: two nodes of one name must not share one line.
            let shown = match name.map(|name| format!("{key}.{name}")) {
                Some(shown) if !sections.iter().any(|s: &Section<'_>| s.shown == shown) => shown,
                _ => format!("{key}[{}]", index + 1),
            };
            self.notes.lines.borrow_mut().note(shown.clone(), self.notes.line(item.span().start));
            sections.push(Section {
                notes: self.notes,
                table: Some(table),
                kind: join(&self.kind, key),
                shown,
                broken: false,
            });
        }
        sections
    }

    /// Call last: whatever was not asked for is unknown.
    pub(super) fn finish(self) {
        let Some(table) = self.table else { return };
        let known = self.notes.known.borrow();
        for (key, _) in table.iter() {
            let name: &str = key.get_ref();
            if !known.iter().any(|(section, known)| *section == self.kind && known == name) {
                self.notes.unknown.borrow_mut().push(Unknown {
                    section: self.kind.clone(),
                    shown: self.shown.clone(),
                    key: name.to_owned(),
                    line: self.notes.line(key.span().start),
                });
            }
        }
    }

    /// The one way to a typed value: `parse` says what is wrong and what to write instead.
    fn read<T>(&self, key: &str, parse: impl FnOnce(&DeValue<'a>) -> Result<T, (String, String)>) -> Option<T> {
        let value = self.look_up(key)?;
        match parse(value.get_ref()) {
            Ok(value) => Some(value),
            Err((problem, remedy)) => {
                self.error(key, problem, remedy);
                None
            }
        }
    }

    /// Notes a missing required key; `example` is what to write.
    pub(super) fn require<T>(&self, key: &str, value: Option<T>, example: &str) -> Option<T> {
        // A value of the wrong type has had its error already.
        if value.is_none() && !self.broken && self.look_up(key).is_none() {
            self.error(key, "missing, and it has no default", format!("write {key} = {example}"));
        }
        value
    }

    pub(super) fn string(&self, key: &str) -> Option<String> {
        self.read(key, |value| text(value, "\"...\"").map(ToOwned::to_owned))
    }

    /// Text of a form that `parse` checks; it says what is wrong, `example` what to write.
    pub(super) fn parsed<T>(&self, key: &str, example: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        self.read(key, |value| element(value, example, &parse))
    }

    /// A list of such texts.
    pub(super) fn list<T>(
        &self,
        key: &str,
        example: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        self.read(key, |value| match value {
            DeValue::Array(items) => elements(items, example, &parse),
            other => Err((format!("is a list, not {}", kind(other)), format!("write [{example}]"))),
        })
    }

    /// One such text, or a list of them.
    pub(super) fn one_or_list<T>(
        &self,
        key: &str,
        example: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        self.read(key, |value| match value {
            DeValue::Array(items) => elements(items, example, &parse),
            one => element(one, example, &parse).map(|value| vec![value]),
        })
    }

    /// An absolute path; empty text is `None` too.
    pub(super) fn path_of(&self, key: &str) -> Option<PathBuf> {
        self.read(key, |value| {
            let path = text(value, "\"/an/absolute/path\"")?;
            if path.is_empty() {
                return Ok(None);
            }
            if !path.starts_with('/') {
                return Err((
                    format!("\"{}\" is not an absolute path", path.escape_debug()),
                    "write it from the root, \"/...\"".to_owned(),
                ));
            }
            Ok(Some(PathBuf::from(path)))
        })
        .flatten()
    }

    pub(super) fn boolean(&self, key: &str) -> Option<bool> {
        self.read(key, |value| match value {
            DeValue::Boolean(value) => Ok(*value),
            other => Err((format!("is true or false, not {}", kind(other)), "write true or false".to_owned())),
        })
    }

    /// A whole number of `low..=high`.
    pub(super) fn integer(&self, key: &str, low: u32, high: u32) -> Option<u32> {
        let remedy = || format!("write a whole number from {low} to {high}");
        self.read(key, |value| match value {
            DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
                .ok()
                .and_then(|number| u32::try_from(number).ok())
                .filter(|number| (low..=high).contains(number))
                .ok_or_else(|| (format!("{} is out of range", number.as_str()), remedy())),
            other => Err((format!("is a whole number, not {}", kind(other)), remedy())),
        })
    }

    /// A finite number of `low..=high`, with or without decimals.
    pub(super) fn number(&self, key: &str, low: f64, high: f64) -> Option<f64> {
        let remedy = || match high.is_finite() {
            true => format!("write a number from {low} to {high}"),
            false => format!("write a number, {low} or more"),
        };
        self.read(key, |value| {
            let shown = match value {
                DeValue::Float(number) => number.as_str(),
                DeValue::Integer(number) if number.radix() == 10 => number.as_str(),
                other => return Err((format!("is a number, not {}", kind(other)), remedy())),
            };
            shown
                .parse::<f64>()
                .ok()
                .filter(|number| number.is_finite() && (low..=high).contains(number))
                .ok_or_else(|| (format!("{shown} is out of range"), remedy()))
        })
    }

    /// A duration in whole milliseconds with its unit, as `"5s"` or `"250ms"`; `example` is what to write.
    pub(super) fn duration(&self, key: &str, example: &str) -> Option<Duration> {
        self.read(key, |value| match value {
            DeValue::String(text) => duration(text, example),
            DeValue::Integer(number) => {
                Err(("a duration needs its unit".to_owned(), format!("write \"{}s\"", number.as_str())))
            }
            DeValue::Float(number) => {
                Err(("a duration needs its unit".to_owned(), format!("write \"{}s\"", number.as_str())))
            }
            other => Err((format!("is a duration, not {}", kind(other)), format!("write \"{example}\""))),
        })
    }
}

fn duration(text: &DeString<'_>, example: &str) -> Result<Duration, (String, String)> {
    let shown = text.escape_debug();
    // humantime takes a bare "0".
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        return Err((format!("\"{shown}\" has no unit"), format!("write \"{shown}s\"")));
    }
    let wrong = |why: String| (why, format!("write \"{example}\""));
    let value =
        humantime::parse_duration(text).map_err(|error| wrong(format!("\"{shown}\" is not a duration ({error})")))?;
    if value.subsec_nanos() % 1_000_000 != 0 {
        return Err(wrong(format!("\"{shown}\" is finer than a millisecond")));
    }
    if value > LONGEST_DURATION {
        return Err(wrong(format!("\"{shown}\" is longer than a year")));
    }
    Ok(value)
}

/// What a value is, as a person would say it.
fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a section",
    }
}

fn text<'v>(value: &'v DeValue<'_>, example: &str) -> Result<&'v str, (String, String)> {
    match value {
        DeValue::String(text) => Ok(text),
        other => Err((format!("is text in quotes, not {}", kind(other)), format!("write {example}"))),
    }
}

fn element<T>(
    value: &DeValue<'_>,
    example: &str,
    parse: &impl Fn(&str) -> Result<T, String>,
) -> Result<T, (String, String)> {
    parse(text(value, example)?).map_err(|problem| (problem, format!("write {example}")))
}

fn elements<T>(
    items: &DeArray<'_>,
    example: &str,
    parse: &impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, (String, String)> {
    items.iter().map(|item| element(item.get_ref(), example, parse)).collect()
}

/// `address:port`, the port required.
pub(super) fn socket(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("\"{}\" is not an address with a port", text.escape_debug()))
}

/// `address` or `address:port`; port 53 where none is given.
pub(super) fn dns_server(text: &str) -> Result<SocketAddr, String> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(SocketAddr::new(address, 53)),
        Err(_) => socket(text).map_err(|_| {
            format!("\"{}\" is not an IP address (a name would need the DNS it stands for)", text.escape_debug())
        }),
    }
}

/// An IPv4 or IPv6 address that one host can own.
pub(super) fn address(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text.parse().map_err(|_| format!("\"{}\" is not an IP address", text.escape_debug()))?;
    if address.is_unspecified() || address.is_multicast() {
        return Err(format!("\"{address}\" is no address of one host"));
    }
    Ok(address)
}

/// The name of a systemd unit, with its suffix.
pub(super) fn unit(text: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b);
    let suffixes = [".service", ".target", ".timer", ".socket", ".path", ".mount", ".slice"];
    let named = suffixes.iter().any(|suffix| text.len() > suffix.len() && text.ends_with(suffix));
    if !named || !text.bytes().all(plain) || text.starts_with('-') {
        return Err(format!("\"{}\" is not the name of a unit, as \"web.service\"", text.escape_debug()));
    }
    Ok(text.to_owned())
}

/// Where a mail goes: `dba@example.org`, or a local user. Never an option of sendmail, never two.
pub(super) fn mail_address(text: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~.@".contains(&b);
    if text.is_empty() || text.starts_with('-') || text.starts_with('|') || !text.bytes().all(plain) {
        return Err(format!("\"{}\" is not one mail address, as \"dba@example.org\"", text.escape_debug()));
    }
    Ok(text.to_owned())
}

/// An address with its mask, as `192.0.2.100/24`.
pub(super) fn network(text: &str) -> Result<ipnet::IpNet, String> {
    let network: ipnet::IpNet =
        text.parse().map_err(|_| format!("\"{}\" is not an address with its mask", text.escape_debug()))?;
    address(&network.addr().to_string())?;
    Ok(network)
}

/// A DNS name, lower case and without the dot at its end (RFC 1035 section 2.3.1, with underscores).
pub(super) fn dns_name(text: &str) -> Result<String, String> {
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() <= 253 && name.split('.').all(label) {
        Ok(name)
    } else {
        Err(format!("\"{}\" is not a DNS name", text.escape_debug()))
    }
}
