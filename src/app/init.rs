//! `portcullis init`: writes a commented configuration and the secrets it names, brings both to the other node, and
//! prepares PostgreSQL where it is told to.
//!
//! - `answers.rs`: flags, questions, and what was found here;
//! - `terminal.rs`: how a question is asked;
//! - `bundle.rs`: configuration and secrets as one text, for the other node;
//! - `steps.rs`: what comes next, as exact commands.
//!
//! **Invariants:** never overwrites; what it writes parses; the configuration is written last, so that an `init` that
//! was interrupted can be run again; PostgreSQL is touched only by `--postgres` or an answer, after everything else.

mod answers;
mod bundle;
mod steps;
mod terminal;

use super::cli::print;
use super::verbs::{InitArgs, PostgresHow};
use crate::base::config::{Config, Node};
use crate::base::fault::{ExitCode, Fault};
use crate::io::files;
use crate::io::journal::replay;
use crate::io::network::NameFacts;
use crate::io::postgres::{Preparation, cluster_in};
use data_encoding::{BASE64, BASE64URL_NOPAD};
use ring::rand::{SecureRandom, SystemRandom};
use std::future::Future;
use std::path::Path;

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
    if let Some(server) = args.dns_server {
        print(&steps::dns_server(&target, server)?);
        return Ok(());
    }
    if let Some(out) = &args.export {
        return bundle::export(&target, out, args.for_witness);
    }
    if let Some(from) = &args.import {
        let imported = bundle::import(&target, from)?;
        print(&imported.said);
        if imported.for_witness {
            print("next:\n  1. here:\n       systemctl enable --now portcullis-witness\n");
            return Ok(());
        }
        return finish(&target, &imported.config, true, None, args.postgres.unwrap_or(PostgresHow::Leave));
    }
    if target.exists() {
        let Some(how) = args.postgres else {
            return Err(wrong(format!("{} exists; edit it, or name another --output-dir", target.display())));
        };
        // What was written before stays; PostgreSQL may still be to prepare.
        let config = files::load_config(&target)?;
        same_service(args, &config, &target)?;
        print(&format!("kept {}, which was there already\n", target.display()));
        return finish(&target, &config, false, None, how);
    }
    let answers = in_runtime(answers::gather(args, &dir))??;
    let written = write(&answers, &dir, &target).map_err(|fault| {
        wrong(format!("{fault} (the same answers: {})", answers::as_flags(&answers.template, answers.how)))
    })?;
    let notes = answers.notes.iter().map(|note| format!("{note}\n")).collect::<String>();
    print(&format!("{notes}{}", written.1));
    finish(&target, &written.0, false, answers.facts.as_ref(), answers.how)
}

/// Proves the answers, then writes secrets and configuration. What it wrote, in words.
fn write(answers: &answers::Answers, dir: &Path, target: &Path) -> Result<(Config, String), Fault> {
    let text = answers.template.render();
    let config = Config::parse(&text, target).map_err(|errors| {
        let first = errors.first();
        let text =
            first.map_or_else(String::new, |error| format!("{}: {}; {}", error.key, error.problem, error.remedy));
        wrong(format!("{text} (nothing was written)"))
    })?;
    std::fs::create_dir_all(dir)
        .map_err(|error| wrong(format!("{} cannot be made ({error}); name another --output-dir", dir.display())))?;
    let mut said = String::new();
    secret(&mut said, &dir.join("cluster.key"), BASE64.encode(&random::<KEY_BYTES>()?))?;
    secret(&mut said, &dir.join("replication.pass"), BASE64URL_NOPAD.encode(&random::<PASSWORD_BYTES>()?))?;
    if answers.template.dns {
        secret(&mut said, &dir.join("tsig.key"), BASE64.encode(&random::<KEY_BYTES>()?))?;
    }
    files::create(target, text.as_bytes(), 0o644, None).map_err(wrong)?;
    said.push_str(&format!("wrote {}\n", target.display()));
    Ok((config, said))
}

/// PostgreSQL as it was told, then the next steps.
fn finish(
    target: &Path,
    config: &Config,
    imported: bool,
    facts: Option<&NameFacts>,
    how: PostgresHow,
) -> Result<(), Fault> {
    let here = steps::this_node(config);
    if let Some(why) = steps::misnamed(config) {
        return Err(wrong(format!("{why} (PostgreSQL was left alone; then run init again)")));
    }
    let mut lines = None;
    if let Some(node) = here {
        lines = in_runtime(postgres(config, node, how))??;
    } else if how != PostgresHow::Leave {
        return Err(wrong(format!(
            "this host is none of the nodes ({}), so that its PostgreSQL is left alone; run init --postgres on a node",
            steps::names(config)
        )));
    } else if imported {
        print(&format!(
            "this host has neither the name nor an address of a node ({}): give every command here --node NAME\n",
            steps::names(config)
        ));
    }
    let place = steps::Place { config, here, target, imported, how, facts, lines };
    print(&steps::next(&place));
    Ok(())
}

/// Does to the local PostgreSQL what was asked for. Where that is nothing: the lines it lacks.
async fn postgres(config: &Config, node: &Node, how: PostgresHow) -> Result<Option<String>, Fault> {
    let Some(cluster) = cluster_in(&node.postgres.data_dir) else {
        return match how {
            PostgresHow::Leave => Ok(None),
            _ => Err(wrong(format!(
                "there is no PostgreSQL cluster for {} here; install postgresql, or correct data_dir",
                node.postgres.data_dir.display()
            ))),
        };
    };
    let preparation = Preparation {
        cluster: &cluster,
        own_host: &node.postgres.host,
        hosts: config.nodes.iter().map(|node| node.postgres.host.as_str()).collect(),
        user: &config.replication.user,
        admin: &config.postgres.admin_user,
    };
    if how == PostgresHow::Leave {
        return Ok(Some(format!(
            "# postgresql.conf\n{}# pg_hba.conf, before its other lines\n{}",
            preparation.settings(),
            preparation.rules()
        )));
    }
    if how == PostgresHow::Standby && has_served(config) {
        return Err(wrong(format!(
            "{} has been a node of this service, and its data is not a fresh cluster's to move; `portcullis rejoin {}`",
            node.name, node.name
        )));
    }
    let tell = |lines: Vec<String>| print(&lines.iter().map(|line| format!("{line}\n")).collect::<String>());
    let settings = preparation.write_settings().map_err(wrong)?;
    let again = preparation.is_done() && settings.iter().all(|line| line.starts_with("kept "));
    tell(settings);
    match how {
        PostgresHow::Primary if again => tell(vec!["not restarted: nothing changed".to_owned()]),
        PostgresHow::Primary => tell(preparation.restart().await.map_err(wrong)?),
        PostgresHow::Standby => tell(vec![preparation.set_aside().await.map_err(wrong)?]),
        PostgresHow::Prepare | PostgresHow::Leave => {}
    }
    // Last: with it in place a start already asks.
    tell(preparation.write_drop_in().await.map_err(wrong)?.into_iter().collect());
    if how == PostgresHow::Prepare {
        let unit = cluster.unit().unwrap_or_default();
        print(&format!("not restarted: the settings are in force after: systemctl restart {unit}\n"));
    }
    Ok(None)
}

/// Its journal knows of an epoch, or cannot be read: nobody moves such a node's data but `rejoin`.
fn has_served(config: &Config) -> bool {
    replay(&config.state_dir).map_or(true, |durable| durable.is_some_and(|durable| !durable.is_virgin()))
}

/// Flags that say something else than the configuration that is there.
fn same_service(args: &InitArgs, config: &Config, target: &Path) -> Result<(), Fault> {
    let other_name = args.service_name.as_ref().is_some_and(|name| !name.eq_ignore_ascii_case(&config.service.name));
    let known = |text: &String| {
        config.nodes.iter().any(|node| {
            text.split_once('=').is_some_and(|(name, addresses)| {
                node.name.as_str() == name
                    && addresses.split(',').all(|a| a.parse().is_ok_and(|a| node.addresses.contains(&a)))
            })
        })
    };
    match other_name || !args.nodes.iter().all(known) {
        true => Err(wrong(format!(
            "{} exists and is of another service or other nodes; edit it, or name another --output-dir",
            target.display()
        ))),
        false => Ok(()),
    }
}

fn in_runtime<T>(work: impl Future<Output = T>) -> Result<T, Fault> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| wrong(format!("no runtime ({error}); free descriptors or memory")))?;
    Ok(runtime.block_on(work))
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

/// The daemon runs as postgres, so the group reads it; without the group there is nobody to open it to.
fn secret_mode() -> u32 {
    if files::group_id(GROUP).is_some() { 0o640 } else { 0o600 }
}

/// Is something else there already?
fn exists_otherwise(path: &Path, text: &str) -> Result<bool, Fault> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(bytes != text.as_bytes()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(wrong(format!("{} cannot be read ({error}); run as root", path.display()))),
    }
}

/// Writes one secret, or keeps the one that is there: it may be the other node's copy.
fn secret(said: &mut String, path: &Path, text: String) -> Result<(), Fault> {
    if path.exists() {
        said.push_str(&format!("kept {}, which was there already\n", path.display()));
        return Ok(());
    }
    files::create(path, format!("{text}\n").as_bytes(), secret_mode(), Some(GROUP)).map_err(wrong)?;
    said.push_str(&format!("wrote {}\n", path.display()));
    Ok(())
}
