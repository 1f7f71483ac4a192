//! Suites in other languages: what they need is installed below target/drivers, and their output is read line by line.
//!
//! Versions are exact, downloads have their hash. What it is NOT: nothing is installed into the system; Python, Node,
//! npm, Java and pgjdbc come from packaging/setup.sh.

use crate::suite::{Board, Outcome, Target};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Installed with `pip --require-hashes`.
const PYTHON: &str = include_str!("scripts/requirements.txt");
/// Installed with `npm ci`.
const NODE: [(&str, &str); 2] = [
    ("package.json", include_str!("scripts/package.json")),
    ("package-lock.json", include_str!("scripts/package-lock.json")),
];
/// asyncpg's own tests are only in its source package.
const ASYNCPG: (&str, &str) = (
    "https://files.pythonhosted.org/packages/80/4e/59dc964f962f09e3ed472e5d2d3ba670a41a2be25080dc62ab3db507ff5e/\
     asyncpg-0.32.0.tar.gz",
    "45e64e56714d888330b884aad1dfb363d0bf43fb343e3d1a8968525f3bade478",
);
/// Debian's libpostgresql-jdbc-java.
const JDBC: &str = "/usr/share/java/postgresql.jar";
/// What is left of a program's last words when it fails.
const LAST_WORDS: usize = 2000;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn scripts() -> PathBuf {
    root().join("tests/drivers/scripts")
}

/// `$CARGO_TARGET_DIR`.
pub fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// What is installed for these suites.
pub fn folder() -> PathBuf {
    target_folder().join("drivers")
}

/// The interpreters' packages, unless they are there.
pub fn install_python() {
    let (folder, venv) = (folder(), folder().join("venv"));
    let tests = folder.join("asyncpg");
    stamped(&venv, PYTHON, || {
        // Debian's own, not one that happens to come first in $PATH.
        done(Command::new("/usr/bin/python3").args(["-m", "venv", "--clear"]).arg(&venv));
        let pip = ["install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--only-binary", ":all:"];
        done(Command::new(venv.join("bin/pip")).args(pip).arg("-r").arg(scripts().join("requirements.txt")));
    });
    stamped(&tests, ASYNCPG.1, || {
        let (url, hash) = ASYNCPG;
        done(Command::new(venv.join("bin/python")).arg(scripts().join("unpack.py")).args([url, hash]).arg(&tests));
    });
}

/// npm's packages, unless they are there.
pub fn install_node() {
    let node = folder().join("node");
    stamped(&node, NODE[1].1, || {
        for (name, text) in NODE {
            std::fs::write(node.join(name), text).unwrap();
        }
        let quiet = ["ci", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"];
        done(Command::new("npm").args(quiet).current_dir(&node));
    });
}

/// sqlx is a project of its own: its dependencies shall not be ours.
pub fn build_sqlx() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = root().join("tests/drivers/sqlx/Cargo.toml");
    done(
        Command::new(cargo)
            .args(["build", "--quiet", "--locked", "--manifest-path"])
            .arg(manifest)
            .env_remove("RUSTFLAGS")
            .env("CARGO_TARGET_DIR", folder().join("sqlx")),
    );
}

/// pgjdbc is Debian's, and so is the compiler that needs no more than a Java runtime.
pub fn build_jdbc() {
    let folder = folder().join("jdbc");
    stamped(&folder, include_str!("scripts/Jdbc.java"), || {
        let compile = ["-proc:none", "-nowarn", "-17", "-encoding", "UTF-8", "-cp", JDBC];
        done(Command::new("ecj").args(compile).arg("-d").arg(&folder).arg(scripts().join("Jdbc.java")));
    });
}

/// Makes a folder with `make` unless its stamp says that it was made from the same text.
fn stamped(folder: &Path, text: &str, make: impl FnOnce()) {
    let stamp = folder.join("made-from");
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == text) {
        return;
    }
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir_all(folder).unwrap();
    make();
    std::fs::write(stamp, text).unwrap();
}

fn done(command: &mut Command) {
    let out = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = [out.stdout, out.stderr].concat();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&said));
}

fn python(script: &str, target: &Target) -> Command {
    let mut command = Command::new(folder().join("venv/bin/python"));
    command.arg(scripts().join(script)).env("PYTHONDONTWRITEBYTECODE", "1");
    target.environment(&mut command);
    command
}

pub fn asyncpg(target: &Target) -> Command {
    let mut command = python("asyncpg_tests.py", target);
    command.current_dir(folder().join("asyncpg"));
    command
}

pub fn psycopg(target: &Target) -> Command {
    python("psycopg3.py", target)
}

/// The admin console, as drivers in Python and on the JVM speak to it.
pub fn consoles(target: &Target) -> [Command; 2] {
    let mut java = pgjdbc(target);
    java.arg("console");
    [python("console.py", target), java]
}

pub fn libpq_pipeline(target: &Target) -> Command {
    python("libpq_pipeline.py", target)
}

fn node(script: &str, target: &Target) -> Command {
    let mut command = Command::new("node");
    command.arg(scripts().join(script)).env("NODE_MODULES", folder().join("node/node_modules"));
    target.environment(&mut command);
    command
}

pub fn node_postgres(target: &Target) -> Command {
    node("node_postgres.js", target)
}

pub fn postgres_js(target: &Target) -> Command {
    node("postgres_js.js", target)
}

pub fn sqlx(target: &Target) -> Command {
    let mut command = Command::new(folder().join("sqlx/debug/sqlx-suite"));
    target.environment(&mut command);
    command
}

pub fn pgjdbc(target: &Target) -> Command {
    let mut command = Command::new("java");
    let path = format!("{JDBC}:{}", folder().join("jdbc").display());
    command.args(["-Xmx512m", "-XX:TieredStopAtLevel=1", "-cp", &path, "Jdbc"]);
    target.environment(&mut command);
    command
}

/// Runs a program and reads its outcomes. At the limit all of it is killed; what it had not said has not passed.
pub fn run(mut command: Command, limit: Duration, board: &Board) {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return board.put("(start)", Outcome::Failed(format!("{command:?}: {error}"))),
    };
    let group = format!("-{}", child.id());
    let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let lines = {
        let board = board.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                read_line(&line, &board);
            }
        })
    };
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = BufReader::new(err).read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let mut waited = Duration::ZERO;
    let tick = Duration::from_millis(20);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if waited >= limit {
            break None;
        }
        std::thread::sleep(tick);
        waited += tick;
    };
    // Its children too, however it ended.
    let _ = Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
    let _ = child.wait();
    let _ = lines.join();
    let said = errors.join().unwrap_or_default();
    let last = said.char_indices().rev().nth(LAST_WORDS).map_or(0, |(at, _)| at);
    let outcome = match status {
        None => Outcome::Failed(format!("killed: not over within {} s\n{}", limit.as_secs(), &said[last..])),
        Some(status) if !status.success() => Outcome::Failed(format!("{status}\n{}", &said[last..])),
        Some(_) => Outcome::Passed,
    };
    board.put("(the program itself)", outcome);
}

fn read_line(line: &str, board: &Board) {
    if let Some(test) = line.strip_prefix("ok ") {
        board.put(test.trim(), Outcome::Passed);
    } else if let Some(rest) = line.strip_prefix("not ok ") {
        let (test, why) = rest.split_once(": ").unwrap_or((rest, ""));
        board.put(test.trim(), Outcome::Failed(why.to_owned()));
    } else if let Some(test) = line.strip_prefix("skip ") {
        board.put(test.trim(), Outcome::Skipped);
    }
}
