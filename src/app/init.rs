//! `portcullis init`: writes a commented configuration and the secrets it names.
//!
//! **Invariants:** never overwrites; what it writes parses; the configuration is written last, so that an `init` that
//! was interrupted can be run again.

use super::cli::print;
use super::verbs::InitArgs;
use crate::base::config::{Config, ExampleNode, Template};
use crate::base::fault::{ExitCode, Fault};
use crate::io::files;
use data_encoding::{BASE64, BASE64URL_NOPAD};
use dialoguer::Input;
use ring::rand::{SecureRandom, SystemRandom};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// The group PostgreSQL and the daemon run as on Debian; it must read the secrets.
const GROUP: &str = "postgres";
/// 256 bits, more than a guess can ever reach.
const KEY_BYTES: usize = files::CLUSTER_KEY_BYTES;
/// 192 bits, 32 characters.
const PASSWORD_BYTES: usize = 24;

/// Asks, proves, writes, and says what comes next.
///
/// # Errors
/// Exit code 2, with nothing overwritten.
pub fn run(args: &InitArgs) -> Result<(), Fault> {
    if args.example {
        print(&Config::example());
        return Ok(());
    }
    let dir = std::path::absolute(&args.output_dir)
        .map_err(|error| wrong(format!("--output-dir: {error}; name a directory")))?;
    let target = dir.join("portcullis.toml");
    if target.exists() {
        return Err(wrong(format!("{} exists; edit it, or name another --output-dir", target.display())));
    }
    let template = answers(args, &dir)?;
    let text = template.render();
    if let Err(errors) = Config::parse(&text, &target) {
        let first = errors.first();
        let text =
            first.map_or_else(String::new, |error| format!("{}: {}; {}", error.key, error.problem, error.remedy));
        return Err(wrong(format!("{text} (nothing was written)")));
    }
    std::fs::create_dir_all(&dir)
        .map_err(|error| wrong(format!("{} cannot be made ({error}); name another --output-dir", dir.display())))?;
    let mut said = String::new();
    secret(&mut said, &dir.join("cluster.key"), BASE64.encode(&random::<KEY_BYTES>()?))?;
    secret(&mut said, &dir.join("replication.pass"), BASE64URL_NOPAD.encode(&random::<PASSWORD_BYTES>()?))?;
    let tsig = dir.join("tsig.key");
    if args.witness {
        secret(&mut said, &tsig, BASE64.encode(&random::<KEY_BYTES>()?))?;
    }
    files::create(&target, text.as_bytes(), 0o644, None).map_err(wrong)?;
    said.push_str(&format!("wrote {}\n", target.display()));
    said.push_str(&next_steps(&template, &target, (template.dns && !tsig.exists()).then_some(&tsig)));
    print(&said);
    Ok(())
}

fn wrong(text: String) -> Fault {
    Fault::new(ExitCode::Config, text)
}

fn random<const N: usize>() -> Result<[u8; N], Fault> {
    let mut bytes = [0; N];
    let filled = SystemRandom::new().fill(&mut bytes);
    filled.map_err(|_| wrong("the kernel gives no random bytes; check getrandom(2) on this machine".to_owned()))?;
    Ok(bytes)
}

/// Writes one secret, or keeps the one that is there: it may be the other node's copy.
fn secret(said: &mut String, path: &Path, text: String) -> Result<(), Fault> {
    if path.exists() {
        said.push_str(&format!("kept {}, which was there already\n", path.display()));
        return Ok(());
    }
    // The daemon runs as postgres, so the group reads it; without the group there is nobody to open it to.
    let mode = if files::group_id(GROUP).is_some() { 0o640 } else { 0o600 };
    files::create(path, format!("{text}\n").as_bytes(), mode, Some(GROUP)).map_err(wrong)?;
    said.push_str(&format!("wrote {}\n", path.display()));
    Ok(())
}

fn next_steps(template: &Template, target: &Path, tsig: Option<&PathBuf>) -> String {
    let mut steps = Vec::new();
    if let Some(tsig) = tsig {
        steps.push(format!(
            "make the TSIG key of the zone {} known here: tsig-keygen portcullis on the DNS server; the text between \
             the quotes of its secret line goes into {} (chgrp {GROUP}, chmod 0640)",
            template.zone,
            tsig.display()
        ));
    }
    let dir = target.parent().unwrap_or(Path::new("/"));
    steps.push(format!("copy {} to the other node as it is, secrets included", dir.display()));
    steps.push(format!("portcullis check-config {}", target.display()));
    steps.push("on both nodes: systemctl enable --now portcullis".to_owned());
    if !template.dns {
        steps.push("on the node that shall serve: portcullis promote (the first epoch)".to_owned());
    }
    let numbered = steps.iter().enumerate().map(|(index, step)| format!("  {}. {step}\n", index + 1));
    format!("next:\n{}", numbered.collect::<String>())
}

/// The answers of the flags; on a terminal, what they leave open is asked.
fn answers(args: &InitArgs, dir: &Path) -> Result<Template, Fault> {
    let asks = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    if !asks {
        refuse_gaps(args)?;
    }
    let service_name = match &args.service_name {
        Some(name) => name.clone(),
        None => ask("DNS name that clients use (db.example.org)", None)?,
    };
    let parent =
        service_name.trim_end_matches('.').split_once('.').map(|(_, zone)| zone.to_owned()).unwrap_or_default();
    let zone = match &args.zone {
        Some(zone) => zone.clone(),
        None if asks && !args.no_dns => ask("DNS zone it is in", Some(parent))?,
        None => parent,
    };
    let servers = match args.servers.is_empty() {
        false => args.servers.clone(),
        true if asks && !args.no_dns => {
            words(&ask("DNS servers of the zone, address:port (empty: found from the zone)", Some(String::new()))?)
        }
        true => Vec::new(),
    };
    let nodes = match args.nodes.is_empty() {
        false => args.nodes.iter().map(|text| node(text)).collect::<Result<_, _>>()?,
        true => {
            let first = ask("First node, name=address", None)?;
            let second = ask("Second node, name=address", None)?;
            vec![node(&first)?, node(&second)?]
        }
    };
    let version = newest_postgresql();
    let shown = |path: &PathBuf| path.display().to_string();
    let data_dir = match &args.data_dir {
        Some(dir) => shown(dir),
        None => ask("PostgreSQL's data directory", Some(format!("/var/lib/postgresql/{version}/main")))?,
    };
    let bin_dir = match &args.bin_dir {
        Some(dir) => shown(dir),
        None => ask("Directory of PostgreSQL's programs", Some(format!("/usr/lib/postgresql/{version}/bin")))?,
    };
    let vip = match &args.vip {
        Some(vip) => Some(vip.clone()),
        None if asks => {
            Some(ask("Virtual address with its mask (empty: none)", Some(String::new()))?).filter(|vip| !vip.is_empty())
        }
        None => None,
    };
    Ok(Template {
        service_name,
        zone,
        servers,
        nodes,
        data_dir,
        bin_dir,
        secrets_dir: dir.display().to_string(),
        vip,
        witness: args.witness,
        dns: !args.no_dns,
    })
}

/// Without a terminal every gap is named at once.
fn refuse_gaps(args: &InitArgs) -> Result<(), Fault> {
    let needs = [
        (args.service_name.is_none(), "--service-name NAME"),
        (args.nodes.len() < 2, "--node NAME=ADDRESS for each of the two nodes"),
        (args.data_dir.is_none(), "--data-dir DIR"),
        (args.bin_dir.is_none(), "--bin-dir DIR"),
        (args.no_dns && args.vip.is_none(), "--vip ADDRESS/MASK with --no-dns"),
    ];
    let missing: Vec<&str> = needs.into_iter().filter(|(gap, _)| *gap).map(|(_, flag)| flag).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(wrong(format!("init needs {}; give them, or run it on a terminal, where it asks", missing.join(", "))))
}

fn ask(question: &str, default: Option<String>) -> Result<String, Fault> {
    let mut input = Input::<String>::new().with_prompt(question);
    if let Some(default) = default {
        input = input.allow_empty(true).show_default(!default.is_empty()).default(default);
    }
    let answer = input.interact_text();
    answer
        .map(|text| text.trim().to_owned())
        .map_err(|error| wrong(format!("the terminal went away ({error}); use the flags of portcullis init --help")))
}

fn words(text: &str) -> Vec<String> {
    text.split([' ', ',']).filter(|word| !word.is_empty()).map(ToOwned::to_owned).collect()
}

fn node(text: &str) -> Result<ExampleNode, Fault> {
    match text.split_once('=') {
        Some((name, addresses)) if !name.is_empty() && !addresses.is_empty() => {
            Ok(ExampleNode { name: name.trim().to_owned(), addresses: words(addresses) })
        }
        _ => Err(wrong(format!("\"{}\" is no node; write it as name=address, alp=192.0.2.11", text.escape_debug()))),
    }
}

/// The highest version under /usr/lib/postgresql, as a proposal.
fn newest_postgresql() -> u32 {
    let Ok(entries) = std::fs::read_dir("/usr/lib/postgresql") else { return 15 };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).max().unwrap_or(15)
}
