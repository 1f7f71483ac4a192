//! The text of `pg_hba.conf` or `pg_ident.conf` to lines of fields of words, as PostgreSQL's `tokenize_auth_file` does
//! it: continued lines, quotes, comma lists, comments, `@file` and the `include` directives.
//!
//! What it is NOT: it knows no keyword beyond `include`, and reads no file itself: [`Files`] does.

use super::HbaError;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest file accepted, in bytes; a longer one is an error.
const MAX_FILE: usize = 1 << 20;
/// How deep files may name each other (PostgreSQL's `CONF_FILE_MAX_DEPTH`); deeper is an error.
const MAX_DEPTH: u32 = 10;
/// Files read in all; more are an error, so that files that include each other many times come to an end.
const MAX_FILES: u32 = 1000;

/// Why a file cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileTrouble {
    Missing,
    Other(String),
}

/// The way to the files that rules name. Paths are as written, beside the naming file where they are relative.
pub trait Files {
    /// The text of a file.
    fn read(&self, path: &Path) -> Result<String, FileTrouble>;
    /// The names in a directory, in any order.
    fn list(&self, directory: &Path) -> Result<Vec<String>, FileTrouble>;
}

/// A word. One that begins with a quotation mark has lost any special meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Word {
    pub(super) text: String,
    pub(super) quoted: bool,
}

impl Word {
    pub(super) fn is(&self, keyword: &str) -> bool {
        !self.quoted && self.text == keyword
    }
}

/// Where a line begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) file: Arc<str>,
    pub(super) line: usize,
}

/// A line that says something.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) place: Place,
    pub(super) fields: Vec<Vec<Word>>,
}

/// Reads a file and all that it includes.
pub(super) struct Reader<'a> {
    files: &'a dyn Files,
    read: u32,
    lines: Vec<Line>,
    errors: Vec<HbaError>,
}

impl<'a> Reader<'a> {
    fn new(files: &'a dyn Files) -> Reader<'a> {
        Reader { files, read: 0, lines: Vec::new(), errors: Vec::new() }
    }

    /// What each line of a file says, those of included ones in their places. All errors are found, file by file, those
    /// of words first.
    pub(super) fn parse<T>(
        file: &Path,
        text: &str,
        files: &dyn Files,
        line: impl Fn(&Line) -> Result<Option<T>, String>,
    ) -> Result<Vec<T>, Vec<HbaError>> {
        let mut reader = Reader::new(files);
        reader.file(file, text, 0);
        let mut said = Vec::new();
        for each in std::mem::take(&mut reader.lines) {
            match line(&each) {
                Ok(one) => said.extend(one),
                Err(problem) => reader.error(&each.place, problem),
            }
        }
        let mut errors = reader.errors;
        errors.sort_by_key(|error| error.line);
        errors.sort_by_key(|error| Path::new(&error.file) != file);
        if errors.is_empty() { Ok(said) } else { Err(errors) }
    }

    /// The lines of a file whose text is known, with the files it includes in their places.
    fn file(&mut self, path: &Path, text: &str, depth: u32) {
        let file: Arc<str> = path.display().to_string().into();
        if text.len() > MAX_FILE {
            let place = Place { file, line: 1 };
            return self.error(&place, format!("the file is longer than {MAX_FILE} bytes; shorten it"));
        }
        for (line, text) in logical_lines(text) {
            let place = Place { file: Arc::clone(&file), line };
            let mut fields = Vec::new();
            match self.fields(path, &text, depth, &mut fields) {
                Ok(()) if fields.is_empty() => {}
                Ok(()) => match directive(&fields) {
                    Some((kind, name)) => self.include(kind, &beside(path, name), &place, depth + 1),
                    None => self.lines.push(Line { place, fields }),
                },
                Err(problem) => self.error(&place, problem),
            }
        }
    }

    fn include(&mut self, kind: Include, path: &Path, place: &Place, depth: u32) {
        let shown = path.display();
        let paths = if kind == Include::Directory {
            match self.files.list(path) {
                Ok(names) => {
                    let mut names: Vec<String> =
                        names.into_iter().filter(|name| name.ends_with(".conf") && !name.starts_with('.')).collect();
                    names.sort();
                    names.into_iter().map(|name| path.join(name)).collect()
                }
                Err(trouble) => return self.error(place, format!("include_dir {shown} {}", why(trouble))),
            }
        } else {
            vec![path.to_owned()]
        };
        for path in paths {
            match self.text(&path, depth) {
                Ok(text) => self.file(&path, &text, depth),
                Err(FileTrouble::Missing) if kind == Include::IfExists => {}
                Err(trouble) => self.error(place, format!("the included file {} {}", path.display(), why(trouble))),
            }
        }
    }

    fn text(&mut self, path: &Path, depth: u32) -> Result<String, FileTrouble> {
        self.read += 1;
        if depth > MAX_DEPTH {
            let text = format!("is included more than {MAX_DEPTH} files deep; do files include each other?");
            return Err(FileTrouble::Other(text));
        }
        if self.read > MAX_FILES {
            return Err(FileTrouble::Other(format!("is one of more than {MAX_FILES} files; include fewer")));
        }
        self.files.read(path)
    }

    /// Splits a line in fields, `@file` words replaced by that file's (PostgreSQL's `next_field_expand`).
    fn fields(&mut self, path: &Path, line: &str, depth: u32, out: &mut Vec<Vec<Word>>) -> Result<(), String> {
        let mut words = Words { rest: line };
        loop {
            let (mut field, mut named) = (Vec::new(), None);
            while let Some((word, goes_on)) = words.next()? {
                match word.text.strip_prefix('@').filter(|name| !word.quoted && !name.is_empty()) {
                    Some(name) => {
                        self.names_of(&beside(path, name), depth + 1, &mut field)?;
                        named = Some(word.text);
                    }
                    None => field.push(word),
                }
                if !goes_on {
                    break;
                }
            }
            match named {
                // PostgreSQL would leave the field out, and the others would move up to mean something else.
                Some(name) if field.is_empty() => {
                    return Err(format!("the file \"{name}\" names nobody; add a name or take the line out"));
                }
                _ if field.is_empty() => return Ok(()),
                _ => out.push(field),
            }
        }
    }

    /// All words of a file of names (PostgreSQL's `tokenize_inc_file`).
    fn names_of(&mut self, path: &Path, depth: u32, out: &mut Vec<Word>) -> Result<(), String> {
        let text =
            self.text(path, depth).map_err(|trouble| format!("the file @{} {}", path.display(), why(trouble)))?;
        if text.len() > MAX_FILE {
            return Err(format!("the file @{} is longer than {MAX_FILE} bytes; shorten it", path.display()));
        }
        for (number, line) in logical_lines(&text) {
            let mut fields = Vec::new();
            let within = |problem| format!("in {}, line {number}: {problem}", path.display());
            self.fields(path, &line, depth, &mut fields).map_err(within)?;
            out.extend(fields.into_iter().flatten());
        }
        Ok(())
    }

    fn error(&mut self, place: &Place, problem: String) {
        self.errors.push(HbaError { file: place.file.to_string(), line: place.line, problem });
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Include {
    Always,
    IfExists,
    Directory,
}

fn directive(fields: &[Vec<Word>]) -> Option<(Include, &str)> {
    let [kind, name] = fields else { return None };
    let ([kind], [name]) = (&kind[..], &name[..]) else { return None };
    let kind = match kind.text.as_str() {
        "include" => Include::Always,
        "include_if_exists" => Include::IfExists,
        "include_dir" => Include::Directory,
        _ => return None,
    };
    Some((kind, &name.text))
}

/// A path as written in `file`.
fn beside(file: &Path, name: &str) -> PathBuf {
    file.parent().map_or_else(|| PathBuf::from(name), |directory| directory.join(name))
}

fn why(trouble: FileTrouble) -> String {
    match trouble {
        FileTrouble::Missing => "is not there; make it, or correct the name".to_owned(),
        FileTrouble::Other(why) => why,
    }
}

/// Lines with their number, continued ones (a backslash at the end) joined.
fn logical_lines(text: &str) -> Vec<(usize, String)> {
    let mut lines: Vec<(usize, String)> = Vec::new();
    let mut continued = false;
    for (index, line) in text.split('\n').enumerate() {
        let line = line.trim_end_matches('\r');
        let (body, continues) = line.strip_suffix('\\').map_or((line, false), |body| (body, true));
        match lines.last_mut().filter(|_| continued) {
            Some((_, previous)) => previous.push_str(body),
            None => lines.push((index + 1, body.to_owned())),
        }
        continued = continues;
    }
    lines
}

/// PostgreSQL's `next_token`, again and again.
struct Words<'a> {
    rest: &'a str,
}

fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\r')
}

impl Words<'_> {
    /// The next word, and whether a comma stands right behind it; `None` at the end of the line.
    fn next(&mut self) -> Result<Option<(Word, bool)>, String> {
        let start = self.rest.trim_start_matches(|c| is_blank(c) || c == ',');
        let mut word = Word { text: String::new(), quoted: false };
        let (mut in_quotes, mut after_quote, mut saw_quote) = (false, false, false);
        let mut chars = start.char_indices();
        let mut goes_on = false;
        self.rest = "";
        for (at, c) in chars.by_ref() {
            match c {
                c if is_blank(c) && !in_quotes => {
                    self.rest = &start[at..];
                    break;
                }
                '#' if !in_quotes => break,
                ',' if !in_quotes => {
                    self.rest = &start[at..];
                    goes_on = true;
                    break;
                }
                _ => {}
            }
            // Two quotation marks in a quoted word are one literal.
            if c != '"' || after_quote {
                word.text.push(c);
            }
            after_quote = in_quotes && c == '"' && !after_quote;
            if c == '"' {
                in_quotes = !in_quotes;
                saw_quote = true;
                if word.text.is_empty() {
                    word.quoted = true;
                }
            }
        }
        if in_quotes {
            return Err(format!("the quotation mark of \"{}\" is not closed; add it", word.text.escape_debug()));
        }
        Ok((saw_quote || !word.text.is_empty()).then_some((word, goes_on)))
    }
}
