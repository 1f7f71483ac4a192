//! The house rules as a test: floors, purity, sizes, words that must not stay, golden files, and that the repository
//! has what it says it has. Reads the tree and runs nothing.
//!
//! `UPDATE_GOLDEN=1 cargo test --test tidy` writes the golden files anew; the diff is then for the reviewer.

#[path = "book.rs"]
mod book;

use portcullis::app::cli;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// From the bottom; an import may only point to the left or stay.
const FLOORS: [&str; 6] = ["base", "wire", "engine", "io", "serve", "app"];
/// Floors below this one have no I/O, no async and no clock.
const FIRST_FLOOR_OF_THE_SHELL: usize = 3;
/// A file longer than this says in its module doc why ("Over 600 lines: ...").
const LONG_FILE: usize = 600;
/// No file is longer than this.
const LONGEST_FILE: usize = 1000;
const LONGEST_LINE: usize = 120;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A file of the repository as text.
fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every Rust file under a folder, sorted, as paths from the root.
fn rust_files(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.expect("a readable folder").path();
            match path.is_dir() {
                true => folders.push(path),
                false if path.extension().is_some_and(|extension| extension == "rs") => {
                    found.push(path.strip_prefix(root()).expect("below the root").to_owned());
                }
                false => {}
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    text(path.to_str().expect("UTF-8"))
}

/// Code without what stands in `//` comments, line by line.
fn code(text: &str) -> Vec<&str> {
    let bare = |line: &str| line.find("//").unwrap_or(line.len());
    // "://" is in an address, not before a comment.
    text.lines().map(|line| if line.contains("://") { line } else { &line[..bare(line)] }).collect()
}

/// The floor of a file under src, by its folder.
fn floor(path: &Path) -> Option<usize> {
    let folder = path.components().nth(1)?.as_os_str().to_str()?;
    FLOORS.iter().position(|floor| *floor == folder)
}

/// The floors that a piece of code names by `crate::`, one by one and in braces.
fn imports(code: &str) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        let words: Vec<&str> = match rest.strip_prefix('{') {
            None => vec![rest],
            Some(group) => top_level_words(group),
        };
        for word in words {
            let word = word.trim_start();
            let name = word.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
            found.extend(FLOORS.iter().position(|floor| *floor == name));
        }
    }
    found
}

/// `a::{b, c}, d};...` -> `a::{b, c}`, `d`.
fn top_level_words(group: &str) -> Vec<&str> {
    let (mut depth, mut start, mut words) = (0usize, 0, Vec::new());
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => {
                words.push(&group[start..at]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                words.push(&group[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    words
}

#[track_caller]
fn none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn the_import_finder_finds() {
    let floors = |code: &str| imports(code).into_iter().collect::<Vec<_>>();
    assert_eq!(floors("use crate::io::clock;"), [3]);
    assert_eq!(floors("use crate::{base::{config, ids}, app::cli};"), [0, 5]);
    assert_eq!(floors("let x = crate::serve::gate::X; othercrate::app::y()"), [4]);
    assert_eq!(code("a // crate::app\nb"), ["a ", "b"]);
}

#[test]
fn imports_point_down() {
    let mut wrong = Vec::new();
    for path in rust_files("src") {
        let Some(own) = floor(&path) else { continue };
        let source = read(&path);
        let code = code(&source).join("\n");
        for other in imports(&code) {
            let sideways =
                (FLOORS[own] == "serve" && FLOORS[other] == "io") || (FLOORS[own] == "io" && FLOORS[other] == "serve");
            if other > own || sideways {
                wrong.push(format!("{} imports crate::{}", path.display(), FLOORS[other]));
            }
        }
        for name in FLOORS {
            if code.contains(&format!("super::super::{name}")) {
                wrong.push(format!("{} climbs out of its floor by super::super::{name}", path.display()));
            }
        }
    }
    none("floors are imported upward or sideways", &wrong);
}

#[test]
fn floors_below_the_shell_are_pure() {
    let banned = [
        ".await",
        "async fn",
        "async move",
        "tokio::",
        "Instant::now",
        "SystemTime",
        "Timestamp::now",
        "Zoned::now",
        "std::fs",
        "std::process",
        "std::thread",
        "std::env",
        "TcpStream",
        "TcpListener",
        "UdpSocket",
        "UnixStream",
        "UnixListener",
        "rustix::",
        "libc::",
    ];
    let mut wrong = Vec::new();
    for path in rust_files("src") {
        if floor(&path).is_none_or(|floor| floor >= FIRST_FLOOR_OF_THE_SHELL) {
            continue;
        }
        for (number, line) in code(&read(&path)).iter().enumerate() {
            // `crate::base::time::Instant` has no `now`; what is banned is the world's.
            // A unit test may be told its seed.
            let seed = |word: &str| word == "std::env" && path.components().any(|part| part.as_os_str() == "tests");
            for word in banned.iter().filter(|word| line.contains(**word) && !seed(word)) {
                wrong.push(format!("{}:{}: {word}", path.display(), number + 1));
            }
        }
    }
    none("floors 0 to 2 touch the world", &wrong);
}

#[test]
fn the_clock_is_read_in_one_place() {
    let mut wrong = Vec::new();
    for path in rust_files("src").into_iter().filter(|path| !path.ends_with("io/clock.rs")) {
        let source = read(&path);
        for word in ["clock_gettime", "CLOCK_BOOTTIME", "ClockId::Boottime"] {
            if code(&source).iter().any(|line| line.contains(word)) {
                wrong.push(format!("{}: {word}", path.display()));
            }
        }
    }
    none("CLOCK_BOOTTIME is read outside io/clock.rs", &wrong);
}

#[test]
fn files_are_of_a_size_to_be_read() {
    let mut wrong = Vec::new();
    for path in rust_files("src").into_iter().chain(rust_files("tests")) {
        let source = read(&path);
        let lines = source.lines().count();
        let head: Vec<&str> = source.lines().take_while(|line| line.starts_with("//!")).collect();
        if head.is_empty() {
            wrong.push(format!("{}: no module doc (//! what it is, what it is not)", path.display()));
        }
        if lines > LONGEST_FILE {
            wrong.push(format!("{}: {lines} lines; split it by responsibility", path.display()));
        } else if lines > LONG_FILE && !head.join(" ").contains("Over 600 lines") {
            wrong.push(format!(
                "{}: {lines} lines; split it, or say why in its head (\"Over 600 lines: ...\")",
                path.display()
            ));
        }
    }
    none("files are too long or without a head", &wrong);
}

#[test]
fn lines_fit_and_no_note_to_self_stays() {
    let notes = ["FIX".to_owned() + "ME", "TO".to_owned() + "DO", "XX".to_owned() + "X ", "to".to_owned() + "do!("];
    let mut wrong = Vec::new();
    let folders = ["src", "tests", "examples"];
    for path in folders.iter().flat_map(|folder| rust_files(folder)) {
        for (number, line) in read(&path).lines().enumerate() {
            let place = format!("{}:{}", path.display(), number + 1);
            if line.chars().count() > LONGEST_LINE {
                wrong.push(format!("{place}: {} columns", line.chars().count()));
            }
            if let Some(note) = notes.iter().find(|note| line.contains(note.as_str())) {
                wrong.push(format!("{place}: {note}"));
            }
        }
    }
    none("lines are too long or unfinished", &wrong);
}

#[test]
fn every_file_is_on_the_floor_plan() {
    let mut reachable: BTreeSet<PathBuf> = ["src/lib.rs", "src/main.rs"].iter().map(PathBuf::from).collect();
    let mut open: Vec<(PathBuf, PathBuf)> = vec![("src/lib.rs".into(), "src".into())];
    while let Some((file, folder)) = open.pop() {
        let mut inside = folder.clone();
        for line in read(&file).lines() {
            let line = line.trim().trim_start_matches("pub(crate) ").trim_start_matches("pub(in crate::io) ");
            let line = line.trim_start_matches("pub ");
            if line == "}" {
                inside = folder.clone();
            }
            let Some(name) = line.strip_prefix("mod ") else { continue };
            if let Some(floor) = name.strip_suffix(" {") {
                inside = folder.join(floor);
            } else if let Some(module) = name.strip_suffix(';') {
                let flat = inside.join(format!("{module}.rs"));
                let nested = inside.join(module).join("mod.rs");
                let found = if root().join(&flat).exists() { flat } else { nested };
                open.push((found.clone(), inside.join(module)));
                reachable.insert(found);
            }
        }
    }
    let lost = rust_files("src").into_iter().filter(|path| !reachable.contains(path));
    let lost: Vec<String> = lost.map(|path| path.display().to_string()).collect();
    none("files are on no floor of src/lib.rs and are never compiled", &lost);
}

#[test]
fn unsafe_code_stands_alone_and_says_why() {
    let allow = "allow(unsafe".to_owned() + "_code)";
    let unwrap = "allow(clippy::unwrap".to_owned() + "_used)";
    let mut wrong = Vec::new();
    for path in rust_files("src") {
        let source = read(&path);
        if source.contains(&allow) && !source.contains("SAFETY:") {
            wrong.push(format!("{}: unsafe without a SAFETY comment", path.display()));
        }
        if source.contains(&unwrap) {
            wrong.push(format!("{}: allows unwrap", path.display()));
        }
    }
    let manifest = text("Cargo.toml");
    for lint in ["unsafe_code = \"deny\"", "unwrap_used = \"deny\"", "panic = \"abort\"", "disallowed_types = \"deny\""]
    {
        if !manifest.contains(lint) {
            wrong.push(format!("Cargo.toml: {lint} is gone"));
        }
    }
    none("lints are weakened", &wrong);
}

#[test]
fn help_texts_are_the_golden_ones() {
    let folder = root().join("tests/golden/help");
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut command = cli::command();
    command.build();
    let mut pages = vec![("portcullis".to_owned(), command.render_long_help().to_string())];
    for verb in command.get_subcommands_mut() {
        pages.push((verb.get_name().to_owned(), verb.render_long_help().to_string()));
    }
    let mut wrong = Vec::new();
    for (name, page) in &pages {
        // No version in a golden file: a release must not touch them.
        let path = folder.join(format!("{name}.txt"));
        if update {
            fs::write(&path, page).expect("the golden folder is writable");
        } else if fs::read_to_string(&path).ok().as_ref() != Some(page) {
            wrong.push(format!("{} differs", path.display()));
        }
    }
    for entry in fs::read_dir(&folder).expect("the golden folder") {
        let file = entry.expect("readable").file_name().into_string().expect("UTF-8");
        if !pages.iter().any(|(name, _)| file == format!("{name}.txt")) {
            wrong.push(format!("{file} is the help of no verb"));
        }
    }
    none("--help changed; UPDATE_GOLDEN=1 cargo test --test tidy, and look at the diff", &wrong);
}

#[test]
fn the_repository_has_what_it_promises() {
    let files = [
        "README.md",
        "CHANGELOG.md",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "deny.toml",
        "clippy.toml",
        "rustfmt.toml",
        "Makefile",
        ".ci/run",
        "docs/README.md",
        "docs/architecture.md",
        "docs/concepts.md",
        "docs/concepts.svg",
        "docs/recipes.md",
        "docs/drill.md",
        "docs/emergency.md",
        "docs/comparison.md",
        "docs/faq-pgpool.md",
        "docs/glossary.md",
        "docs/design.md",
        "docs/install.md",
        "docs/operations.md",
        "systemd/portcullis.service",
        "systemd/portcullis-witness.service",
        "systemd/postgresql-portcullis.conf",
        "packaging/polkit.rules",
        "packaging/setup.sh",
        "packaging/deb.sh",
        "tests/run.sh",
    ];
    let missing: Vec<String> =
        files.iter().filter(|file| !root().join(file).is_file()).map(|file| (*file).to_owned()).collect();
    none("files are missing", &missing);
    for script in [".ci/run", "packaging/setup.sh", "packaging/deb.sh", "tests/run.sh"] {
        let mode = fs::metadata(root().join(script)).expect("there").permissions().mode();
        assert!(mode & 0o111 != 0, "{script} is not executable");
        assert!(text(script).contains("set -e"), "{script} goes on after an error");
    }
    let version = env!("CARGO_PKG_VERSION");
    assert!(text("CHANGELOG.md").contains(&format!("## [{version}]")), "CHANGELOG.md knows no version {version}");
}

#[test]
fn make_check_proves_the_pure_floors_and_writes_nothing() {
    let makefile = text("Makefile");
    let recipe: String = makefile
        .lines()
        .skip_while(|line| !line.starts_with("check:"))
        .skip(1)
        .take_while(|line| line.starts_with('\t') || line.is_empty())
        .collect::<Vec<_>>()
        .join("\n");
    for words in ["fmt --check", "check --lib --no-default-features", "-D warnings", "--test tidy"] {
        assert!(recipe.contains(words), "make check does not run {words}");
    }
    assert!(!recipe.contains("UPDATE_GOLDEN"), "make check writes");
    // What the documents tell people to type exists.
    for document in ["README.md", "docs/architecture.md", "docs/operations.md"] {
        for (at, _) in text(document).match_indices("`make ") {
            let document_text = text(document);
            let rest = &document_text[at + "`make ".len()..];
            let target: String = rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
            assert!(makefile.contains(&format!("\n{target}:")), "{document} names make {target}, which is no target");
        }
    }
}

#[test]
fn operations_names_every_verb() {
    let operations = text("docs/operations.md");
    let verbs = cli::command();
    let missing: Vec<String> = verbs
        .get_subcommands()
        .map(|verb| verb.get_name().to_owned())
        .filter(|verb| !operations.contains(&format!("`portcullis {verb}")))
        .collect();
    none("docs/operations.md has no paragraph on these verbs", &missing);
}

#[test]
fn the_unit_never_takes_postgresql_down() {
    let unit = text("systemd/portcullis.service");
    for line in
        ["Type=notify", "KillMode=process", "User=postgres", "ConditionPathExists=/etc/portcullis/portcullis.toml"]
    {
        assert!(unit.lines().any(|written| written == line), "systemd/portcullis.service has no {line}");
    }
}
