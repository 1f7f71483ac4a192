//! The verbs that need a daemon, a database or a socket: from the parsed command line to their rooms.

use super::client::{self, DrillArgs, Out, PromoteArgs, Target};
use super::render::Style;
use super::render::check::Thresholds;
use super::verbs::{Command, DoctorArgs, Globals, ProbeArgs, Since, Switch};
use super::{cli, daemon, doctor, log, may_start, probe, witness};
use crate::base::config::Config;
use crate::base::fault::{ExitCode, Fault};
use crate::base::ids::NodeName;
use crate::io::files;
use crate::wire::dns::TsigKey;
use serde_json::{Value, json};

/// Runs one of the verbs that are not offline; `None`: it is not one of them.
pub fn dispatch(globals: &Globals, command: &Command) -> Option<Result<u8, Fault>> {
    let result = match command {
        Command::Daemon => run_daemon(globals),
        Command::Witness => run_witness(globals),
        Command::Probe(args) => run_probe(args),
        Command::MayStartPrimary => run_may_start(globals),
        Command::Doctor(args) => run_doctor(globals, args),
        Command::Check(args) => {
            let thresholds = Thresholds { warning: args.warning.clone(), critical: args.critical.clone() };
            with_target(globals, async |target, out| Ok(client::check(target, &thresholds, args.json, out).await))
        }
        Command::Status(args) => {
            let (json, watch) = (args.json, args.watch);
            with_target(globals, async |t, out| client::status(t, json, watch, out).await.map(cli::code))
        }
        Command::Nodes(args) => {
            let json = args.json;
            with_target(globals, async |t, out| client::nodes(t, json, out).await.map(cli::code))
        }
        Command::Cgi => {
            // RFC 3875: a web server says so, and with which query it was asked.
            let query = std::env::var_os("GATEWAY_INTERFACE").map(|_| std::env::var("QUERY_STRING"));
            let query = query.map(Result::unwrap_or_default);
            with_target(globals, async |t, out| client::cgi(t, query.as_deref(), out).await.map(cli::code))
        }
        Command::Events(args) => {
            let since = args.since.map(|since| match since {
                Since::Ago(span) => {
                    let at = jiff::Timestamp::now() - jiff::SignedDuration::try_from(span).unwrap_or_default();
                    at.to_string()
                }
                Since::At(at) => at.to_string(),
            });
            let json = args.json;
            with_target(globals, async |t, out| client::events(t, since.as_deref(), json, out).await.map(cli::code))
        }
        Command::Promote(args) => {
            let args = PromoteArgs {
                yes: args.yes,
                dry_run: args.dry_run,
                accept_data_loss: args.accept_data_loss,
                peer_is_off: args.peer_is_off.as_ref().map(ToString::to_string),
                json: args.json,
            };
            with_target(globals, async |t, out| {
                let mut on_terminal = client::ask_on_terminal();
                let ask = on_terminal.as_mut().map(|ask| ask as client::Ask<'_>);
                client::promote(t, &args, ask, out).await.map(cli::code)
            })
        }
        Command::Switchover(args) => {
            let body = json!({"to": args.to.as_ref().map(NodeName::as_str), "dry_run": args.dry_run});
            send(globals, "switchover", body, args.json)
        }
        Command::Rejoin(args) => {
            let body = json!({"node": args.node_name.as_str(), "dry_run": args.dry_run});
            send(globals, "rejoin", body, args.json)
        }
        Command::Drill(args) => {
            let (to, dsn) = (args.to.clone(), args.dsn.clone());
            let (wait, voters) = match globals.load() {
                Ok(config) => (config.wait_before_takeover(), config.voters().map(|node| node.name.clone())),
                Err(fault) => return Some(Err(fault)),
            };
            let args = DrillArgs { to, dsn, json: args.json, wait, voters };
            with_target(globals, async |t, out| client::drill(t, &args, out).await.map(cli::code))
        }
        Command::Fence(args) => send(globals, "fence", json!({"reason": args.reason}), args.json),
        Command::Unfence(args) => send(globals, "unfence", json!({}), args.json),
        Command::Pause(args) => send(globals, "pause", json!({"database": args.database}), args.json),
        Command::Resume(args) => send(globals, "resume", json!({"database": args.database}), args.json),
        Command::Reconnect(args) => send(globals, "reconnect", json!({"database": args.database}), args.json),
        Command::Kill(args) => send(globals, "kill", json!({"database": args.database}), args.json),
        Command::Reload(args) => send(globals, "reload", json!({}), args.json),
        Command::Maintenance(args) => {
            let on = args.switch == Switch::On;
            send(globals, "maintenance", json!({"on": on}), args.json)
        }
        _ => return None,
    };
    Some(result)
}

fn send(globals: &Globals, verb: &str, body: Value, json: bool) -> Result<u8, Fault> {
    with_target(globals, async |t, out| client::run(t, verb, &body, json, out).await.map(cli::code))
}

fn with_target(
    globals: &Globals,
    work: impl AsyncFnOnce(&Target, &mut Out<'_>) -> Result<u8, Fault>,
) -> Result<u8, Fault> {
    let config = globals.load()?;
    // Which node this is only guards against a wrong daemon's answer; not knowing it is no error for a client.
    let node = if globals.node.is_empty() { globals.this_node(&config).ok() } else { globals.node_name()? };
    let target = Target::new(&config, node);
    let mut stdout = std::io::stdout();
    let mut out = Out { writer: &mut stdout, style: Style::of_stdout() };
    runtime()?.block_on(work(&target, &mut out))
}

fn runtime() -> Result<tokio::runtime::Runtime, Fault> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fault::new(ExitCode::Failed, format!("no runtime: {error}")))
}

fn run_daemon(globals: &Globals) -> Result<u8, Fault> {
    let config = globals.load()?;
    let me = globals.this_node(&config)?;
    daemon::run(config, &me, &globals.config).map(|()| 0)
}

fn run_may_start(globals: &Globals) -> Result<u8, Fault> {
    let config = globals.load()?;
    let me = globals.this_node(&config)?;
    let node = config.node(&me).ok_or_else(|| Fault::new(ExitCode::Config, format!("no [[node]] is named {me}")))?;
    match runtime()?.block_on(may_start::may_start(&config, node))? {
        Ok(why) => {
            cli::print(&format!("yes: {why}\n"));
            Ok(cli::code(ExitCode::Done))
        }
        Err(why) => {
            // The daemon looks for it: it starts this PostgreSQL once the proof has come (R6).
            let mark = config.state_dir.join(daemon::START_REFUSED);
            // Asked by root before, it is there and is root's.
            if let Err(error) = std::fs::write(&mark, b"")
                && !mark.exists()
            {
                eprintln!("portcullis: {} cannot be written: {error}; start PostgreSQL again by hand", mark.display());
            }
            Err(Fault::new(ExitCode::Refused, format!("PostgreSQL must not start as a primary: {why}")))
        }
    }
}

fn run_doctor(globals: &Globals, args: &DoctorArgs) -> Result<u8, Fault> {
    let config = globals.load()?;
    let me = globals.this_node(&config)?;
    let node = config.node(&me).ok_or_else(|| Fault::new(ExitCode::Config, format!("no [[node]] is named {me}")))?;
    let DoctorArgs { json, here, fix, yes, for_peer } = *args;
    let options = doctor::Options { json, here, fix, yes, for_peer };
    doctor::run(&config, node, &globals.config, options).map(cli::code)
}

fn run_probe(args: &ProbeArgs) -> Result<u8, Fault> {
    let args = probe::ProbeArgs {
        dsn: args.dsn.clone(),
        interval: args.interval,
        duration: args.duration,
        read_only: args.read_only,
        json: args.json,
    };
    runtime()?.block_on(probe::probe(&args)).map(cli::code)
}

fn run_witness(globals: &Globals) -> Result<u8, Fault> {
    log::begin().map_err(|error| Fault::new(ExitCode::Failed, format!("no thread for the log: {error}")))?;
    let config = globals.load()?;
    let options = witness_options(&config)?;
    runtime()?.block_on(witness::run(options, stop())).map(|()| 0)
}

fn witness_options(config: &Config) -> Result<witness::WitnessOptions, Fault> {
    let bad = |text: &str| Fault::new(ExitCode::Config, text.to_owned());
    let section =
        config.witness.as_ref().ok_or_else(|| bad("there is no [witness] section; add listen, ns and active"))?;
    let dns = config.dns.as_ref().ok_or_else(|| bad("the witness needs the [dns] section: zone, ttl and TSIG key"))?;
    let tsig = dns.tsig.as_ref().ok_or_else(|| bad("the witness needs dns.tsig_key_file"))?;
    let secret = files::tsig_secret(&tsig.key_file).map_err(|why| bad(&why))?;
    let text = data_encoding::BASE64.encode(secret.expose());
    let key = TsigKey::new(&tsig.name, &tsig.algorithm, &text).map_err(|why| bad(&why))?;
    let node = config.node(&section.active).ok_or_else(|| bad("witness.active names no [[node]]"))?;
    std::fs::create_dir_all(&config.state_dir)
        .map_err(|error| bad(&format!("{} cannot be made: {error}", config.state_dir.display())))?;
    Ok(witness::WitnessOptions {
        listen: section.listen.clone(),
        zone: dns.zone.clone(),
        ns: section.ns.clone(),
        service_name: config.service.name.clone(),
        ttl: dns.ttl,
        key,
        store: config.state_dir.join("witness.zone"),
        first_addresses: node.addresses.clone(),
    })
}

async fn stop() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        _ => std::future::pending().await,
    }
}
