//! One text with the configuration and the secrets it names, for the other node: `init --export` and `init --import`.
//!
//! Whoever has it is a node of the service; how it travels is the administrator's (a pipe through ssh leaves no copy).
//!
//! **Invariants:** an import writes all or, where a file with another content is there, nothing; a text that was cut
//! off or changed on its way is refused.

use super::{exists_otherwise, secret_mode, wrong};
use crate::app::cli::print;
use crate::base::config::Config;
use crate::base::fault::Fault;
use crate::io::files;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

/// What this program writes and reads.
const VERSION: u32 = 1;
/// A configuration and three secrets take a few kilobytes.
const LARGEST: u64 = 1024 * 1024;
/// Names of what it may hold.
const CONFIGURATION: &str = "configuration";
const CLUSTER_KEY: &str = "cluster_key";
const TSIG_KEY: &str = "tsig_key";
const REPLICATION_PASSWORD: &str = "replication_password";

#[derive(Serialize, Deserialize)]
struct Bundle {
    version: u32,
    /// SHA-256 over names and texts, in hex: nothing is missing.
    digest: String,
    files: BTreeMap<String, String>,
}

/// What was imported.
pub(super) struct Imported {
    pub(super) config: Config,
    pub(super) said: String,
    /// It holds no cluster key: for the machine of the embedded witness.
    pub(super) for_witness: bool,
}

fn digest(files: &BTreeMap<String, String>) -> String {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    for (name, text) in files {
        for part in [name, text] {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part.as_bytes());
        }
    }
    data_encoding::HEXLOWER.encode(context.finish().as_ref())
}

/// Where each secret of the configuration stands.
fn places(config: &Config) -> Vec<(&'static str, &Path)> {
    let mut places: Vec<(&'static str, &Path)> = vec![(CLUSTER_KEY, &config.cluster.key_file)];
    if let Some(tsig) = config.dns.as_ref().and_then(|dns| dns.tsig.as_ref()) {
        places.push((TSIG_KEY, &tsig.key_file));
    }
    places.push((REPLICATION_PASSWORD, &config.replication.password_file));
    places
}

/// Writes the bundle of the configuration `target` to `out`, `-` being standard output.
///
/// # Errors
/// Exit code 2; what could not be read or written.
pub(super) fn export(target: &Path, out: &Path, for_witness: bool) -> Result<(), Fault> {
    let config = files::load_config(target)?;
    if for_witness && config.witness.is_none() {
        return Err(wrong(format!(
            "{} has no [witness], so there is no machine for it; leave --for-witness out",
            target.display()
        )));
    }
    let text = std::fs::read_to_string(target)
        .map_err(|error| wrong(format!("{} cannot be read ({error}); run as root", target.display())))?;
    let mut contents = BTreeMap::from([(CONFIGURATION.to_owned(), text)]);
    for (name, path) in places(&config) {
        if for_witness && name != TSIG_KEY {
            continue;
        }
        // A password file that is not there means that standbys log in by a certificate.
        if name == REPLICATION_PASSWORD && !path.exists() {
            continue;
        }
        let secret = files::read_secret(path).map_err(wrong)?;
        let text = String::from_utf8(secret.expose().to_vec());
        let text = text.map_err(|_| wrong(format!("{} is no text; copy it by hand", path.display())))?;
        contents.insert(name.to_owned(), text);
    }
    let bundle = Bundle { version: VERSION, digest: digest(&contents), files: contents };
    let body = toml::to_string(&bundle).map_err(|error| wrong(format!("{error}; this is a bug, report it")))?;
    let text = format!(
        "# Portcullis: the configuration of {} with its secrets, for: portcullis init --import FILE\n\
         # Whoever has this can act for the service. Keep it from others, and delete it after use.\n{body}",
        config.service.name
    );
    if out == Path::new("-") {
        if std::io::stdout().is_terminal() {
            return Err(wrong(
                "the bundle holds secrets, which a terminal is no place for; pipe it to the other machine's \
                 `portcullis init --import -`, or name a file"
                    .to_owned(),
            ));
        }
        print(&text);
        return Ok(());
    }
    files::create(out, text.as_bytes(), 0o600, None)
        .map_err(|why| wrong(why.replace("choose another --output-dir", "name another file")))?;
    print(&format!("wrote {}; delete it after use\n", out.display()));
    Ok(())
}

/// Reads the bundle `from` (`-`: standard input) and writes what it holds, the configuration as `target`.
///
/// # Errors
/// Exit code 2, with nothing written (but for an error of the disk).
pub(super) fn import(target: &Path, from: &Path) -> Result<Imported, Fault> {
    let (bundle, shown) = read(from)?;
    let text = bundle.files.get(CONFIGURATION).map(String::as_str).unwrap_or_default();
    let config = Config::parse(text, target).map_err(|errors| {
        let first = errors.first().map(ToString::to_string).unwrap_or_default();
        wrong(format!("{shown} is of another version of portcullis: {first}; install the same version on both nodes"))
    })?;
    let mut plan: Vec<(PathBuf, &str)> = Vec::new();
    for (name, path) in places(&config) {
        if let Some(text) = bundle.files.get(name) {
            plan.push((path.to_owned(), text));
        }
    }
    // The configuration is last: an import that was interrupted can be run again.
    plan.push((target.to_owned(), text));
    for (path, text) in &plan {
        if exists_otherwise(path, text)? {
            return Err(wrong(format!(
                "{} exists and is not what {shown} holds; move it away if nothing uses it (nothing was written)",
                path.display()
            )));
        }
    }
    let mut said = String::new();
    for (path, text) in &plan {
        if path.exists() {
            said.push_str(&format!("kept {}, which was there already\n", path.display()));
            continue;
        }
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .map_err(|error| wrong(format!("{} cannot be made ({error}); run as root", folder.display())))?;
        }
        let (mode, group) = if path == target { (0o644, None) } else { (secret_mode(), Some(super::GROUP)) };
        files::create(path, text.as_bytes(), mode, group).map_err(wrong)?;
        said.push_str(&format!("wrote {}\n", path.display()));
    }
    let for_witness = !bundle.files.contains_key(CLUSTER_KEY);
    Ok(Imported { config, said, for_witness })
}

fn read(from: &Path) -> Result<(Bundle, String), Fault> {
    let stdin = from == Path::new("-");
    let shown = if stdin { "what came".to_owned() } else { from.display().to_string() };
    if stdin && std::io::stdin().is_terminal() {
        return Err(wrong("nothing is piped in; name the file, or pipe `portcullis init --export -` here".to_owned()));
    }
    let mut text = String::new();
    let done = if stdin {
        std::io::stdin().lock().take(LARGEST).read_to_string(&mut text)
    } else {
        std::fs::File::open(from).and_then(|file| file.take(LARGEST).read_to_string(&mut text))
    };
    done.map_err(|error| {
        wrong(format!("{shown} cannot be read ({error}); name what `portcullis init --export` wrote"))
    })?;
    let whole = toml::from_str::<Bundle>(&text).ok().filter(|bundle| bundle.digest == digest(&bundle.files));
    match whole {
        Some(bundle) if bundle.version == VERSION => Ok((bundle, shown)),
        Some(bundle) => Err(wrong(format!(
            "{shown} is of form {}, and this portcullis reads {VERSION}; install the same version on both nodes",
            bundle.version
        ))),
        None => Err(wrong(format!(
            "{shown} is not, or not all of, what `portcullis init --export` writes; export it anew (nothing was \
             written)"
        ))),
    }
}
