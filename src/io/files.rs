//! Files of the administrator: the configuration and the secrets it names, read once at start or by `check-config`.
//!
//! Not the journal (`io::journal`) and nothing of PostgreSQL's. Decides nothing about their content but form and mode.
//!
//! **Invariant:** a secret leaves this file only from a file that others can neither read nor write, and no error of
//! this file repeats a byte of one.

use crate::base::config::{Auth, Config, ConfigError, Lines, Secret};
use crate::base::fault::{ExitCode, Fault};
use crate::wire::hba::{FileTrouble, Files, HbaError, HbaFile, IdentFile};
use data_encoding::BASE64;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// A configuration is a few KiB; a larger file is not one, and is refused.
const LARGEST_CONFIG: u64 = 1 << 20;
/// A secret is less than a hundred bytes; a larger file is not one, and is refused.
const LARGEST_SECRET: u64 = 64 << 10;
/// Length of the cluster key (contract, `[cluster]`).
pub const CLUSTER_KEY_BYTES: usize = 32;
/// Permission bits that others must not have on a secret.
const OTHERS: u32 = 0o006;

/// Reads, parses and proves the configuration. Opens no secret file.
///
/// # Errors
/// Exit code 2, one line: the first error, and how many more there are.
pub fn load_config(path: &Path) -> Result<Config, Fault> {
    load_config_with_lines(path).map(|(config, _)| config).map_err(|errors| {
        let more = match errors.len() {
            0 | 1 => String::new(),
            count => format!(" ({} more: portcullis check-config {})", count - 1, path.display()),
        };
        Fault::new(ExitCode::Config, format!("{}{more}", errors.first().map(String::as_str).unwrap_or_default()))
    })
}

/// As [`load_config`], with the line of each key.
///
/// # Errors
/// Every error, one line each.
pub fn load_config_with_lines(path: &Path) -> Result<(Config, Lines), Vec<String>> {
    let text = read(path, LARGEST_CONFIG).map_err(|error| {
        vec![format!("{}: {error}; name the file with --config, or write one: portcullis init", path.display())]
    })?;
    let text = String::from_utf8(text)
        .map_err(|_| vec![format!("{}: not UTF-8 text; write it anew: portcullis init", path.display())])?;
    Config::parse_with_lines(&text, path).map_err(|errors| errors.iter().map(ToString::to_string).collect())
}

/// Proves the files that the configuration names, as far as they belong to this machine: there, of the right form, and
/// closed to others. The second list is warnings.
pub fn prove_files(config: &Config, lines: &Lines, file: &Path) -> (Vec<ConfigError>, Vec<String>) {
    let mut errors = Vec::new();
    let mut warnings = Vec::new();
    let mut prove = |key: &str, result: Result<(), String>| {
        if let Err(text) = result {
            let (problem, remedy) = text.split_once("; ").unwrap_or((text.as_str(), "correct the file"));
            errors.push(ConfigError {
                file: file.to_owned(),
                line: lines.of(key),
                key: key.to_owned(),
                problem: problem.to_owned(),
                remedy: remedy.to_owned(),
            });
        }
    };
    prove("cluster.key_file", cluster_key(&config.cluster.key_file).map(drop));
    if let Some(tsig) = config.dns.as_ref().and_then(|dns| dns.tsig.as_ref()) {
        prove("dns.tsig_key_file", tsig_secret(&tsig.key_file).map(drop));
    }
    if let Some(cert) = &config.auth.tls_cert_file {
        let readable = read(cert, LARGEST_CONFIG).map(drop);
        prove(
            "auth.tls_cert_file",
            readable.map_err(|error| format!("{}: {error}; put the certificate (PEM) there", cert.display())),
        );
    }
    if let Some(key) = &config.auth.tls_key_file {
        prove("auth.tls_key_file", read_secret(key).map(drop));
    }
    if let Some(ca) = &config.auth.tls_ca_file {
        let readable = read(ca, LARGEST_CONFIG).map(drop);
        prove(
            "auth.tls_ca_file",
            readable.map_err(|error| format!("{}: {error}; put the certificates of your CA (PEM) there", ca.display())),
        );
    }
    if let Some(crl) = &config.auth.tls_crl_file {
        let readable = read(crl, LARGEST_CONFIG).map(drop);
        prove(
            "auth.tls_crl_file",
            readable.map_err(|error| format!("{}: {error}; put your CA's revocation list (PEM) there", crl.display())),
        );
    }
    if let Some(program) = config.fence.stonith.first().map(Path::new) {
        prove("fence.stonith", runnable(program));
    }
    let password = &config.replication.password_file;
    match replication_password(password) {
        Ok(Some(_)) => {}
        Ok(None) => warnings.push(format!(
            "replication.password_file: {} is not there; without it standbys log in with no password, which only a \
             pg_hba.conf with trust or cert takes",
            password.display()
        )),
        Err(error) => prove("replication.password_file", Err(error)),
    }
    errors.extend(hba_errors(&config.auth, lines, file));
    (errors, warnings)
}

fn runnable(program: &Path) -> Result<(), String> {
    let why = match fs::metadata(program) {
        Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => return Ok(()),
        Ok(_) => "is no program that can be run".to_owned(),
        Err(error) => format!("cannot be run: {error}"),
    };
    Err(format!("{} {why}; install it on both nodes, or take the key out", program.display()))
}

/// Every line of `hba_file` and `ident_file` that the gate would not understand, named by its file and line. The first
/// may be missing (contract: then scram-sha-256 for everyone).
fn hba_errors(auth: &Auth, lines: &Lines, config: &Path) -> Vec<ConfigError> {
    let error = |key: &str, file: &Path, line: usize, text: &str| {
        let (problem, remedy) = text.split_once("; ").unwrap_or((text, "correct the line"));
        let (problem, remedy) = (problem.to_owned(), remedy.to_owned());
        ConfigError { file: file.to_owned(), line, key: key.to_owned(), problem, remedy }
    };
    match load_rules(auth) {
        Ok(_) if auth.tls_ca_file.is_some() => Vec::new(),
        Ok(rules) => {
            let demands = rules.entries().filter(|(entry, _)| entry.needs_certificate);
            let text = "certificates of clients are demanded, but there is no CA for them; set auth.tls_ca_file";
            demands.map(|(entry, _)| error("auth.hba_file", Path::new(entry.file()), entry.line(), text)).collect()
        }
        Err(RulesTrouble::Unreadable { key, text }) => vec![error(key, config, lines.of(key), &text)],
        Err(RulesTrouble::Wrong { key, errors }) => {
            errors.iter().map(|wrong| error(key, Path::new(&wrong.file), wrong.line, &wrong.problem)).collect()
        }
    }
}

/// Why there are no rules.
#[derive(Debug, thiserror::Error)]
pub enum RulesTrouble {
    /// The file of this key cannot be had: `what happened; what to do about it`.
    #[error("{text}")]
    Unreadable { key: &'static str, text: String },
    /// All errors of all files that this key leads to.
    #[error("{}", .errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Wrong { key: &'static str, errors: Vec<HbaError> },
}

/// The rules of `hba_file` with the files it names and the maps of `ident_file`; without the first, those for everyone.
///
/// # Errors
/// One cannot be read, or not all of it is understood, or a map is named that is not there.
pub fn load_rules(auth: &Auth) -> Result<HbaFile, RulesTrouble> {
    const HBA: &str = "auth.hba_file";
    const IDENT: &str = "auth.ident_file";
    let wrong = |key| move |errors| RulesTrouble::Wrong { key, errors };
    let unreadable =
        |key, path: &Path, why: &str| Err(RulesTrouble::Unreadable { key, text: format!("{} {why}", path.display()) });
    let rules = match RuleFiles.read(&auth.hba_file) {
        Ok(text) => HbaFile::parse_with(&auth.hba_file, &text, &RuleFiles).map_err(wrong(HBA))?,
        Err(FileTrouble::Missing) => HbaFile::default(),
        Err(FileTrouble::Other(why)) => return unreadable(HBA, &auth.hba_file, &why),
    };
    let ident = auth.ident_file.clone().unwrap_or_else(|| auth.hba_file.with_file_name("pg_ident.conf"));
    let maps = match RuleFiles.read(&ident) {
        Ok(text) => IdentFile::parse_with(&ident, &text, &RuleFiles).map_err(wrong(IDENT))?,
        Err(FileTrouble::Missing) if auth.ident_file.is_none() => IdentFile::default(),
        Err(FileTrouble::Missing) => return unreadable(IDENT, &ident, "does not exist; make it, or take the key out"),
        Err(FileTrouble::Other(why)) => return unreadable(IDENT, &ident, &why),
    };
    rules.with_maps(maps).map_err(wrong(HBA))
}

/// The files that rules and maps name.
struct RuleFiles;

fn trouble(error: &io::Error) -> FileTrouble {
    match error.kind() {
        io::ErrorKind::NotFound => FileTrouble::Missing,
        _ => FileTrouble::Other(format!("cannot be read ({error}); let the daemon's user read it: chmod 0644")),
    }
}

impl Files for RuleFiles {
    fn read(&self, path: &Path) -> Result<String, FileTrouble> {
        let bytes = read(path, LARGEST_CONFIG).map_err(|error| trouble(&error))?;
        String::from_utf8(bytes).map_err(|_| FileTrouble::Other("is not UTF-8 text; write it as such".to_owned()))
    }

    fn list(&self, directory: &Path) -> Result<Vec<String>, FileTrouble> {
        let names = fs::read_dir(directory).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let names = names.map_err(|error| trouble(&error))?;
        Ok(names.iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }
}

/// The bytes of a secret file, as they stand.
///
/// # Errors
/// `what happened; what to do about it`: not there, not readable, open to others, empty, or too large.
pub fn read_secret(path: &Path) -> Result<Secret, String> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            format!("{shown} does not exist; portcullis init makes it, or copy the other node's")
        }
        io::ErrorKind::PermissionDenied => {
            format!("{shown} cannot be read by this user; run as root or as its owner, or chgrp postgres {shown}")
        }
        _ => format!("{shown} cannot be opened ({error}); make it a plain file that the daemon may read"),
    })?;
    // Of the open file, not of the name: nobody swaps it in between.
    let meta = file.metadata().map_err(|error| format!("{shown} cannot be looked at ({error}); check the disk"))?;
    if !meta.is_file() {
        return Err(format!("{shown} is not a plain file; name the file itself"));
    }
    let mode = meta.mode() & 0o7777;
    if mode & OTHERS != 0 {
        return Err(format!("{shown} has mode {mode:04o}, so that others can read or write it; chmod o-rw {shown}"));
    }
    let mut bytes = Vec::new();
    (&file)
        .take(LARGEST_SECRET + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("{shown} cannot be read ({error}); check the disk"))?;
    let secret = Secret::new(bytes);
    match secret.expose().len() {
        0 => Err(format!("{shown} is empty; write the secret into it")),
        length if length as u64 > LARGEST_SECRET => {
            Err(format!("{shown} is too large to be a secret; name another file"))
        }
        _ => Ok(secret),
    }
}

fn base64(path: &Path, remedy: &str) -> Result<Secret, String> {
    let secret = read_secret(path)?;
    let text: Vec<u8> = secret.expose().iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let text = Secret::new(text);
    match BASE64.decode(text.expose()) {
        Ok(bytes) if !bytes.is_empty() => Ok(Secret::new(bytes)),
        _ => Err(format!("{} is not base64; {remedy}", path.display())),
    }
}

/// The cluster key: base64 of 32 bytes.
///
/// # Errors
/// As [`read_secret`], and when it is of another form.
pub fn cluster_key(path: &Path) -> Result<Secret, String> {
    let remedy = "make one with: openssl rand -base64 32";
    let key = base64(path, remedy)?;
    match key.expose().len() {
        CLUSTER_KEY_BYTES => Ok(key),
        other => Err(format!("{} holds {other} bytes instead of {CLUSTER_KEY_BYTES}; {remedy}", path.display())),
    }
}

/// The TSIG key: base64, as `tsig-keygen` shows it between the quotes.
///
/// # Errors
/// As [`read_secret`], and when it is of another form.
pub fn tsig_secret(path: &Path) -> Result<Secret, String> {
    let make = "make one with: tsig-keygen, and write the text between the quotes of its secret line there";
    base64(path, make).map_err(|error| match path.exists() {
        true => error,
        false => format!("{} does not exist; {make}", path.display()),
    })
}

/// The replication password, without the newline at its end; `None` where the file is not there.
///
/// # Errors
/// As [`read_secret`].
pub fn replication_password(path: &Path) -> Result<Option<Secret>, String> {
    if matches!(fs::metadata(path), Err(error) if error.kind() == io::ErrorKind::NotFound) {
        return Ok(None);
    }
    let secret = read_secret(path)?;
    let bytes = secret.expose();
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
    if bytes.is_empty() || bytes.contains(&b'\n') || bytes.contains(&0) {
        return Err(format!("{} is not one line of text; write the password alone", path.display()));
    }
    Ok(Some(Secret::new(bytes.to_vec())))
}

/// Writes a file that must not exist yet, with exactly this mode, its group `group` where that exists and we may.
///
/// # Errors
/// What happened; the file is not left half-written.
pub fn create(path: &Path, content: &[u8], mode: u32, group: Option<&str>) -> Result<(), String> {
    let fail = |error: io::Error| match error.kind() {
        io::ErrorKind::AlreadyExists => format!("{} exists; it is left as it is", path.display()),
        _ => format!("{} cannot be written ({error}); choose another --output-dir, or run as root", path.display()),
    };
    // 0600 until it is complete and belongs to whom it shall.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(fail)?;
    let write = |file: &mut File| {
        file.write_all(content)?;
        if let Some(gid) = group.and_then(group_id) {
            // Only root may; anyone else keeps the file to himself.
            let _ = std::os::unix::fs::fchown(&*file, None, Some(gid));
        }
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()
    };
    write(&mut file).map_err(|error| {
        let _ = fs::remove_file(path);
        fail(error)
    })
}

/// The number of a group of /etc/group.
pub fn group_id(name: &str) -> Option<u32> {
    let groups = fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

fn read(path: &Path, largest: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(largest + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > largest {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "too large"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn file(dir: &tempfile::TempDir, name: &str, content: &[u8], mode: u32) -> PathBuf {
        let path = dir.path().join(name);
        create(&path, content, mode, None).expect("a fresh file");
        path
    }

    #[test]
    fn a_secret_open_to_others_is_refused_with_mode_and_remedy() {
        let dir = tempfile::tempdir().expect("a directory");
        for mode in [0o644, 0o604, 0o602, 0o666] {
            let path = file(&dir, &format!("s{mode:o}"), b"hunter2", mode);
            let error = read_secret(&path).expect_err("open to others");
            assert!(error.contains(&format!("{mode:04o}")) && error.contains("; chmod o-rw "), "{error}");
            assert!(error.contains(&path.display().to_string()) && !error.contains("hunter2"), "{error}");
        }
        for mode in [0o600, 0o640, 0o400] {
            let path = file(&dir, &format!("s{mode:o}"), b"hunter2", mode);
            assert_eq!(read_secret(&path).expect("closed").expose(), b"hunter2");
        }
    }

    #[test]
    fn keys_are_proven_to_their_form() {
        let dir = tempfile::tempdir().expect("a directory");
        let good = BASE64.encode(&[7; 32]) + "\n";
        assert_eq!(cluster_key(&file(&dir, "a", good.as_bytes(), 0o600)).expect("good").expose(), &[7; 32]);
        let short = BASE64.encode(&[7; 31]);
        let error = cluster_key(&file(&dir, "b", short.as_bytes(), 0o600)).expect_err("short");
        assert!(error.contains("31 bytes") && !error.contains(&short), "{error}");
        let error = cluster_key(&file(&dir, "c", b"not base64!", 0o600)).expect_err("no base64");
        assert!(error.contains("not base64") && error.contains("openssl"), "{error}");
        assert!(tsig_secret(&file(&dir, "d", short.as_bytes(), 0o600)).is_ok());
        assert!(tsig_secret(&file(&dir, "e", b"", 0o600)).expect_err("empty").contains("is empty"));
        let gone = cluster_key(&dir.path().join("gone")).expect_err("gone");
        assert!(gone.contains("does not exist; "), "{gone}");
        assert!(tsig_secret(&dir.path().join("gone")).expect_err("gone").contains("tsig-keygen"));
    }

    #[test]
    fn a_program_that_cannot_be_run_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(runnable(&file(&dir, "x", b"#!/bin/sh\n", 0o755)), Ok(()));
        for (path, words) in [
            (file(&dir, "n", b"#!/bin/sh\n", 0o644), "is no program that can be run; install it on both nodes"),
            (dir.path().to_owned(), "is no program"),
            (dir.path().join("gone"), "cannot be run: No such file"),
        ] {
            let why = runnable(&path).expect_err("not runnable");
            assert!(why.starts_with(&path.display().to_string()) && why.contains(words), "{why}");
        }
    }

    #[test]
    fn a_newline_after_the_password_is_ignored() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = file(&dir, "p", b"pass word\n", 0o600);
        let secret = replication_password(&path).expect("closed").expect("there");
        assert_eq!(secret.expose(), b"pass word");
        assert!(replication_password(&dir.path().join("gone")).expect("fine").is_none());
        assert!(replication_password(&file(&dir, "two", b"a\nb\n", 0o600)).is_err());
    }

    #[test]
    fn create_never_overwrites() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = file(&dir, "x", b"first", 0o640);
        let error = create(&path, b"second", 0o640, None).expect_err("exists");
        assert!(error.contains("exists; it is left"), "{error}");
        assert_eq!(fs::read(&path).expect("there"), b"first");
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o7777, 0o640);
    }
}
