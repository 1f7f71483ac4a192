//! The book in `docs/` as a test: `docs/configuration.md` is made from the code, the emergency sheet has a section for
//! every alarm and an index of them, and the table of contents names every chapter. A module of `tidy`, because a test
//! program of its own would cost another link.
//!
//! `UPDATE_GOLDEN=1 cargo test --test tidy the_book` writes what is made.

use super::{none, root, rust_files, text};
use portcullis::app::notices::{KINDS, Severity};
use portcullis::base::config::{Config, Template};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// What the one line in the example does not say, or the key has none there.
const MORE: [(&str, &str); 33] = [
    ("service.listen", "The port is the door; the addresses may be narrower than all"),
    ("node.port", "PostgreSQL's port on that machine"),
    ("node.data_dir", "PostgreSQL's data directory"),
    ("node.bin_dir", "Where `pg_ctl`, `pg_rewind` and `pg_basebackup` of that version are"),
    ("node.stop", "As `start`"),
    ("auth.hba_file", "`pg_hba.conf` syntax, methods trust, reject, scram-sha-256, md5, cert, peer"),
    ("auth.tls_cert_file", "PEM; needs `tls_key_file`"),
    ("auth.tls_key_file", "PEM, closed to others"),
    ("dns.zone", "The zone of the service name; default: the name without its first label"),
    ("dns.tsig_name", "Name of the key at the DNS server"),
    ("dns.tsig_algorithm", "`hmac-sha256`, `hmac-sha384` or `hmac-sha512`"),
    ("dns.update_command", "Not built yet: anything but an empty list is refused"),
    ("dns.propagation", "See [recipes](recipes.md#a-person-edits-the-record)"),
    ("witness.listen", "Where the embedded DNS server listens; default: what `dns.servers` names"),
    ("vip.address", "IPv4 or IPv6, the mask is for finding the interface"),
    ("fence.stonith", "See [operations](operations.md#more-walls)"),
    ("replication.on_standby_loss", "See [operations](operations.md#when-the-standby-is-lost)"),
    ("replication.password_file", "A newline at its end is ignored; made by `init`"),
    ("pool.mode", "See [operations](operations.md#the-pool)"),
    ("pool.max_clients", "The descriptor limit is raised to fit, or the start is refused"),
    ("pool.reserve_after", "How long a client waits before it gets one of `reserve`"),
    ("vip.interface", "Without it the one with the address's subnet; `[[node]]` `vip_interface` goes first"),
    ("vip.witness", "Addresses that are always there; only a lease without `[dns]` asks them"),
    ("node.address", "At most one of each family"),
    ("pool.max_clients_per_database", "0: no limit but `max_clients`"),
    ("pool.idle_in_transaction_timeout", "A client that is idle inside of a transaction for so long; `\"0s\"`: never"),
    ("reads.balance", "Read balancing is not built yet: `true` is refused"),
    ("status.listen", "`\"\"`: none. Whoever reads it reads names of users and databases"),
    ("notify.command", "A program by its full path and its words; no shell"),
    ("cluster.key_file", "Closed to others"),
    ("dns.tsig_key_file", "In observe mode questions are signed only where a key is named"),
    ("service.units", "See [operations](operations.md#applications-beside-the-gate-serviceunits)"),
    ("service.passive", "See [operations](operations.md#clients-that-reach-the-wrong-node-servicepassive--forward)"),
];

/// Keys that the example leaves out: what they do is not built.
const UNBUILT: [&str; 2] = ["dns.update_command", "reads.balance"];

/// One line of the example: a key, with what stands behind it.
struct Key {
    /// `fence.lease`, `node.address`, `node.postgres.port`, `state_dir`.
    path: String,
    section: String,
    name: String,
    comment: String,
}

fn template() -> Template {
    Template { witness: true, vip: Some("192.0.2.100/24".into()), ..Template::default() }
}

/// Where the comment of a TOML line begins, outside of quotes.
fn comment_at(line: &str) -> usize {
    let mut quoted = false;
    for (at, character) in line.char_indices() {
        match character {
            '"' => quoted = !quoted,
            '#' if !quoted => return at,
            _ => {}
        }
    }
    line.len()
}

/// `[x]` and `[[x]]` -> `x`.
fn header(line: &str) -> Option<&str> {
    let name = line.strip_prefix('[')?.trim_start_matches('[');
    name.split(']').next()
}

/// `key = ...` -> `key`.
fn key_of(line: &str) -> Option<&str> {
    let (key, _) = line.split_once('=')?;
    let key = key.trim();
    (!key.is_empty() && key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')).then_some(key)
}

/// The keys of the example in its order, those that are commented out too, and what is said over each section.
fn keys(example: &str) -> (Vec<Key>, BTreeMap<String, String>) {
    let (mut keys, mut about, mut section, mut said): (Vec<Key>, BTreeMap<_, _>, _, _) =
        (Vec::new(), BTreeMap::new(), String::new(), String::new());
    for line in example.lines() {
        let bare = line.strip_prefix("# ").unwrap_or(line);
        if let Some(name) = header(bare) {
            section = name.to_owned();
            about.entry(section.clone()).or_insert(std::mem::take(&mut said));
        } else if let Some(name) = key_of(bare) {
            let path = if section.is_empty() { name.to_owned() } else { format!("{section}.{name}") };
            let comment = bare.get(comment_at(bare)..).unwrap_or_default().trim_start_matches('#').trim().to_owned();
            if !keys.iter().any(|key| key.path == path) {
                keys.push(Key { path, section: section.clone(), name: name.to_owned(), comment });
            }
        } else if line.starts_with('#') {
            said = format!("{said} {}", line.trim_start_matches('#').trim()).trim().to_owned();
        } else {
            said.clear();
        }
    }
    for path in UNBUILT {
        let (section, name) = path.split_once('.').expect("a section");
        let key = Key { path: path.into(), section: section.into(), name: name.into(), comment: String::new() };
        let at = keys.iter().rposition(|key| key.section == section).map_or(keys.len(), |last| last + 1);
        keys.insert(at, key);
    }
    (keys, about)
}

/// The example with one key of every section of that name left out (`None`) or given another value.
fn with(example: &str, key: &Key, value: Option<&str>) -> String {
    let (mut section, mut out, mut there) = (String::new(), String::new(), false);
    let put = |out: &mut String| {
        if let Some(value) = value {
            let _ = writeln!(out, "{} = {value}", key.name);
        }
    };
    for line in example.lines() {
        if let Some(name) = header(line) {
            section = name.to_owned();
            let _ = writeln!(out, "{line}");
            if section == key.section {
                there = true;
                put(&mut out);
            }
        } else if section != key.section || key_of(line) != Some(key.name.as_str()) {
            let _ = writeln!(out, "{line}");
        }
    }
    if key.section.is_empty() {
        return value.map_or_else(String::new, |value| format!("{} = {value}\n", key.name)) + &out;
    }
    if !there {
        let _ = writeln!(out, "[{}]", key.section);
        put(&mut out);
    }
    out
}

fn parse(text: &str) -> Result<Config, Vec<portcullis::base::config::ConfigError>> {
    Config::parse(text, Path::new("example"))
}

/// The example with nothing in it but what has no default, and the names of those keys.
fn least(example: &str, keys: &[Key]) -> (String, Vec<String>) {
    let (mut least, mut required) = (example.to_owned(), Vec::new());
    for key in keys {
        // One that follows from another is needed only where that one is gone too.
        if let Err(errors) = parse(&with(example, key, None)) {
            assert!(errors.iter().any(|e| e.problem.contains("missing")), "{}: {errors:?}", key.path);
            required.push(key.path.clone());
        }
        let without = with(&least, key, None);
        if parse(&without).is_ok() {
            least = without;
        }
    }
    (least, required)
}

/// What the parser wants to be written there, in its own words.
fn kind(example: &str, key: &Key) -> String {
    let errors = parse(&with(example, key, Some("1979-05-27"))).expect_err("no key takes a date");
    // A key that is read twice is known best by what names an example.
    let told = |error: &&portcullis::base::config::ConfigError| error.problem.contains("not a date");
    let best = errors.iter().filter(told).find(|error| error.remedy != "write \"...\"");
    let error = best.or(errors.iter().find(told)).unwrap_or_else(|| panic!("{}: {errors:?}", key.path));
    let what = error.problem.trim_start_matches("is ").split(", not ").next().unwrap_or_default();
    let wanted = error.remedy.trim_start_matches("write ").trim_start_matches("a ");
    match what {
        "a duration" => "duration".to_owned(),
        "a whole number" | "a number" | "true or false" => wanted.to_owned(),
        "text in quotes" if wanted.contains("/an/absolute/path") => "path".to_owned(),
        "text in quotes" if wanted == "\"...\"" => "text".to_owned(),
        "text in quotes" if wanted.contains(" or \"") && !wanted.contains(" for none") => {
            wanted.split(" or ").map(|word| format!("`{word}`")).collect::<Vec<_>>().join(" or ")
        }
        "text in quotes" => format!("text, as `{}`", wanted.split(", or ").next().unwrap_or_default()),
        "a list" => format!("list, as `{wanted}`"),
        other => panic!("{}: {other}", key.path),
    }
}

const HEAD: &str = "# Configuration reference

<!-- Made from the code by tests/book.rs: UPDATE_GOLDEN=1 cargo test --test tidy the_book -->

One TOML file, `/etc/portcullis/portcullis.toml`, the same on both nodes (`state_dir` and `runtime_dir` may differ). An
unknown key is an error that names the nearest known one. `portcullis check-config` proves the file offline, the
relations between keys too; `portcullis init --example` prints it with comments.

- *Type* is what the parser asks for. A duration has its unit: `\"250ms\"`, `\"5s\"`, `\"10m\"`, `\"1h\"`.
- *Default* is what holds where the line is left out; one that follows from another key is shown for the node `alp` with
  the address 192.0.2.11 and the service `db.example.org`.
- *Change*: `reload` is taken over by `portcullis reload` (`systemctl reload portcullis`); `restart` waits for a restart
  of the daemon, and `reload` says so by name.
- The sections `dns`, `witness` and `vip` may be left out as a whole. What nodes must have alike before one pledges to
  the other: `fence.lease`, `fence.max_drift`, `fence.margin`, the two voters' names and addresses, `service.name`,
  `dns.mode`, `dns.zone`, `dns.servers` and the VIP's addresses. `portcullis doctor` shows what differs.
";

fn reference() -> String {
    let example = template().render();
    let (keys, about) = keys(&example);
    let (least, required) = least(&example, &keys);
    let config = parse(&least).expect("the least example");
    let rows: BTreeMap<String, (String, bool)> = config
        .rows()
        .into_iter()
        .filter(|row| !row.key.starts_with("node.") || row.key.starts_with("node.alp."))
        .map(|row| (row.key.replacen("node.alp.", "node.", 1), (row.value, row.live)))
        .collect();
    let known: Vec<&String> = keys.iter().map(|key| &key.path).collect();
    none(
        "the example lacks keys of the code",
        &rows.keys().filter(|row| !known.contains(row)).cloned().collect::<Vec<_>>(),
    );
    let (mut out, mut section, mut bare) = (HEAD.to_owned(), None, Vec::new());
    for key in &keys {
        if section != Some(&key.section) {
            section = Some(&key.section);
            let title = match key.section.as_str() {
                "" => "At the top of the file".to_owned(),
                "node" => "`[[node]]`".to_owned(),
                name => format!("`[{name}]`"),
            };
            let _ = writeln!(out, "\n## {title}\n");
            if let Some(said) = about.get(&key.section).filter(|said| !said.is_empty() && !said.contains(" = ")) {
                let _ = writeln!(out, "{said}\n");
            }
            out.push_str("| key | type | default | change | what it is |\n|---|---|---|---|---|\n");
        }
        let (default, live) = match rows.get(&key.path) {
            Some((value, live)) => (value.clone(), *live),
            // A node's name is part of its path.
            None => (String::new(), false),
        };
        let default = match required.contains(&key.path) {
            true => "required".to_owned(),
            false if default.is_empty() => "none".to_owned(),
            false => format!("`{default}`"),
        };
        let short = format!("{}.{}", key.section.split('.').next().unwrap_or_default(), key.name);
        let more = MORE.iter().find(|(path, _)| *path == key.path || *path == short).map(|(_, more)| *more);
        let what = match (key.comment.as_str(), more) {
            ("", None) => {
                bare.push(format!("{} is described neither in example.rs nor in tests/book.rs", key.path));
                String::new()
            }
            ("", Some(more)) => more.to_owned(),
            (comment, None) => comment.to_owned(),
            (comment, Some(more)) => format!("{comment}. {more}"),
        };
        let what = what.replace('|', "or");
        let change = if live { "reload" } else { "restart" };
        let _ = writeln!(out, "| `{}` | {} | {default} | {change} | {what} |", key.name, kind(&example, key));
    }
    none("keys without a word on them", &bare);
    out
}

/// Compares a file with what it shall be, or writes it.
fn golden(path: &str, wanted: &str) {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(root().join(path), wanted).expect("docs is writable");
    }
    let differs = fs::read_to_string(root().join(path)).ok().as_deref() != Some(wanted);
    let stale = if differs { vec![path.to_owned()] } else { Vec::new() };
    none("UPDATE_GOLDEN=1 cargo test --test tidy the_book, and look at the diff", &stale);
}

#[test]
fn the_book_has_the_configuration_of_the_code() {
    golden("docs/configuration.md", &reference());
}

/// What `(...)` follows in a file of ours, up to a `{` of a format string: enough to know the sentence by.
fn sentences(source: &str, before: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in source.match_indices(before) {
        let rest = source[at + before.len()..].trim_start().trim_start_matches("format!(").trim_start();
        let Some(literal) = rest.strip_prefix('"').and_then(|rest| rest.split('"').next()) else { continue };
        let pieces = literal.split(['{', '}']).step_by(2).map(str::trim).map(|p| p.trim_matches([':', ',', ' ']));
        found.extend(pieces.max_by_key(|piece| piece.len()).map(str::to_owned));
    }
    found
}

const INDEX: [&str; 2] = ["<!-- index: from the sections below -->\n", "<!-- end of the index -->\n"];

/// GitHub's and most renderers' anchor of a heading.
fn anchor(heading: &str) -> String {
    let kept = |c: char| c.is_alphanumeric() || c == ' ' || c == '-' || c == '_';
    heading.to_lowercase().chars().filter(|c| kept(*c)).collect::<String>().replace(' ', "-")
}

#[test]
fn the_book_has_a_section_for_every_alarm() {
    let sheet = text("docs/emergency.md");
    let mut names: Vec<(String, String)> = Vec::new();
    let mut wrong = Vec::new();
    for section in sheet.split("\n## ").skip(1) {
        let (heading, body) = section.split_once('\n').unwrap_or((section, ""));
        let Some(seen) = body.lines().find_map(|line| line.strip_prefix("Seen as: ")) else { continue };
        let body_has = |word: &str| body.contains(word);
        for part in ["**What it means.**", "**At stake.**", "**Type.**", "**Do not.**"] {
            if !body_has(part) {
                wrong.push(format!("\"{heading}\" has no {part}"));
            }
        }
        // The line goes on to the next empty one.
        let seen_at = body.find(seen).unwrap_or_default();
        let all = body[seen_at..].split("\n\n").next().unwrap_or_default();
        names.extend(all.split('`').skip(1).step_by(2).map(|name| (name.replace('\n', " "), heading.to_owned())));
    }
    let alerts = text("docs/monitoring/alerts.yml");
    let mut wanted: Vec<String> =
        alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).map(str::to_owned).collect();
    assert!(wanted.len() > 20, "the alert rules are read");
    wanted.extend(KINDS.iter().filter(|(_, how)| *how != Severity::Info).map(|(kind, _)| (*kind).to_owned()));
    let page = text("src/serve/http/page.rs");
    let badges = page.split("fn badge(").nth(1).and_then(|rest| rest.split("\n}").next()).expect("fn badge");
    let moods = ["bad", "warn"].map(|mood| format!("\", \"{mood}\")"));
    for line in badges.lines().filter(|line| moods.iter().any(|mood| line.contains(mood.as_str()))) {
        wanted.extend(line.split("=> (\"").nth(1).and_then(|rest| rest.split('"').next()).map(str::to_owned));
    }
    let check = text("src/app/render/check.rs");
    let check = check.split("#[cfg(test)]").next().unwrap_or_default();
    let critical = sentences(check, "Level::Critical,");
    assert!(critical.len() > 8, "the sentences of check are read: {critical:?}");
    for name in wanted {
        if !names.iter().any(|(known, _)| *known == name) {
            wrong.push(format!("{name} is in no line \"Seen as:\""));
        }
    }
    for sentence in critical {
        if !names.iter().any(|(known, _)| known.contains(&sentence)) {
            wrong.push(format!("check's \"{sentence}\" is in no line \"Seen as:\""));
        }
    }
    none("docs/emergency.md", &wrong);
    let mut index = String::from("| what you see | section |\n|---|---|\n");
    names.sort();
    for (name, heading) in &names {
        let _ = writeln!(index, "| `{name}` | [{heading}](#{}) |", anchor(heading));
    }
    let (before, rest) = sheet.split_once(INDEX[0]).expect("the index begins");
    let (_, after) = rest.split_once(INDEX[1]).expect("the index ends");
    golden("docs/emergency.md", &format!("{before}{}{index}{}{after}", INDEX[0], INDEX[1]));
}

#[test]
fn the_book_leads_to_every_chapter_and_no_link_is_dead() {
    let contents = text("docs/README.md");
    let mut wrong = Vec::new();
    let mut pages = vec!["README.md".to_owned()];
    for entry in fs::read_dir(root().join("docs")).expect("docs") {
        let name = entry.expect("readable").file_name().into_string().expect("UTF-8");
        if name.ends_with(".md") {
            if name != "README.md" && !contents.contains(&format!("]({name})")) {
                wrong.push(format!("docs/README.md does not lead to {name}"));
            }
            pages.push(format!("docs/{name}"));
        }
    }
    for page in &pages {
        let folder = Path::new(page).parent().expect("a folder");
        let source = text(page);
        for (at, _) in source.match_indices("](") {
            let target = source[at + 2..].split(')').next().unwrap_or_default();
            if target.starts_with("http") || target.contains(['\n', ' ']) {
                continue;
            }
            let (file, place) = target.split_once('#').unwrap_or((target, ""));
            let path = if file.is_empty() { page.clone() } else { folder.join(file).display().to_string() };
            let Ok(found) = fs::read(root().join(&path)) else {
                if !root().join(&path).is_dir() {
                    wrong.push(format!("{page}: {target} leads nowhere"));
                }
                continue;
            };
            let headings = String::from_utf8_lossy(&found);
            let mut anchors = headings.lines().filter(|line| line.starts_with('#')).map(|line| {
                let bare = line.trim_start_matches('#').trim();
                anchor(bare)
            });
            if !place.is_empty() && !anchors.any(|known| known == place) {
                wrong.push(format!("{page}: {target}: no such heading"));
            }
        }
    }
    none("links of the book", &wrong);
}

#[test]
fn the_book_names_every_room_of_the_code() {
    let map = text("docs/architecture.md");
    let named: Vec<&str> = map.split('`').skip(1).step_by(2).flat_map(|span| span.split(['/', '.', ' '])).collect();
    let mut wrong = Vec::new();
    for path in rust_files("src").iter().filter(|path| !path.components().any(|part| part.as_os_str() == "tests")) {
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let folder = path.parent().and_then(Path::file_name).and_then(|name| name.to_str()).unwrap_or_default();
        let name = if stem == "mod" { folder } else { stem };
        if !named.contains(&name) && !matches!(name, "main" | "tests") {
            wrong.push(format!("{} is not on the map", path.display()));
        }
    }
    none("docs/architecture.md", &wrong);
}

#[test]
fn the_book_shows_configurations_that_hold() {
    let recipes = text("docs/recipes.md");
    let whole: Vec<&str> = recipes.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(whole.len() >= 4, "one for each recipe");
    let wrong = whole.iter().filter_map(|text| parse(text).err()).flatten().map(|error| error.to_string());
    none("configurations in docs/recipes.md", &wrong.collect::<Vec<_>>());
}

/// `portcullis VERB` in the book is a verb, and its `--options` are the verb's.
#[test]
fn the_book_types_commands_that_exist() {
    let mut command = portcullis::app::cli::command();
    command.build();
    let mut wrong = Vec::new();
    for page in fs::read_dir(root().join("docs")).expect("docs") {
        let page = page.expect("readable").path();
        // Of the benchmarks nobody types a line.
        if page.extension().is_none_or(|extension| extension != "md") || page.ends_with("benchmarks.md") {
            continue;
        }
        let source = fs::read_to_string(&page).expect("UTF-8");
        let name = page.file_name().expect("a name").to_string_lossy().into_owned();
        for (at, _) in source.match_indices("portcullis ") {
            // Typed: at the begin of a line of a block or of a code span, or after a prompt.
            let before = &source[..at];
            let block = before.matches("```").count() % 2 == 1;
            let prompt = before.ends_with("# ") && !before.ends_with("\n# ");
            if !(before.ends_with('`') || prompt || block && before.ends_with('\n')) {
                continue;
            }
            let line = source[at..].split(['\n', '`', '|']).next().unwrap_or_default();
            let line = line.split(" #").next().unwrap_or_default();
            let words: Vec<&str> = line.split_whitespace().skip(1).collect();
            // A line of pg_ident.conf.
            if words == ["postgres", "ROLE"] {
                continue;
            }
            let Some(verb) = words.iter().find(|word| !word.starts_with('-')) else { continue };
            let verb = verb.trim_end_matches(['*', ':', ',', '.', ';', ')']);
            let Some(known) = command
                .get_subcommands()
                .find(|known| known.get_name() == verb || known.get_all_aliases().any(|alias| alias == verb))
            else {
                wrong.push(format!("{name}: `{line}`: no such verb"));
                continue;
            };
            for option in words.iter().filter(|word| word.starts_with("--")) {
                let option = option.trim_start_matches('-').split('=').next().unwrap_or_default();
                let option = option.trim_end_matches([',', '.', ';', ')', '"']);
                if !known.get_arguments().any(|argument| argument.get_long() == Some(option)) {
                    wrong.push(format!("{name}: `{line}`: {verb} has no --{option}"));
                }
            }
        }
    }
    none("commands in the book", &wrong);
}
