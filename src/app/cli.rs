//! The command line: reads it, finds the configuration and which node this is, and hands each verb to its room.
//!
//! Not the definitions (`verbs.rs`) and not the work: the offline verbs are in `init.rs` and `manual.rs`, all others in
//! `daemon.rs`, `probe.rs`, `witness.rs` and the client. What is here: one line for each error, the exit codes of the
//! contract, and that no panic shows a backtrace.

use super::log::{self, Form, Record};
use super::verbs::{CheckConfigArgs, Cli, Command, Globals, LogFormat};
use super::{init, lines::Lines, manual, online};
use crate::base::config::Config;
use crate::base::fault::{ExitCode, Fault};
use crate::base::ids::NodeName;
use crate::io::{files, host};
use clap::{CommandFactory, Parser};
use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// How long a server that ends waits for its last lines to be written.
const LAST_LINES: Duration = Duration::from_millis(300);
/// Columns of `--help` where there is no terminal, so that golden files and manual pages never depend on one.
const HELP_WIDTH: usize = 100;
/// The monitoring-plugin interface's UNKNOWN, which `check` uses for whatever kept it from checking.
const CHECK_UNKNOWN: u8 = 3;

/// Runs the program; the only function of this crate that `main` knows.
pub fn run() -> std::process::ExitCode {
    silence_panics();
    let args: Vec<OsString> = std::env::args_os().collect();
    let is_check = verb(&args).is_some_and(|verb| verb == "check");
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, is_check),
    };
    let log = start_logging(cli.globals.log, matches!(cli.command, Command::Daemon | Command::Witness));
    let result = dispatch(&cli.globals, cli.command);
    if let Some(log) = log {
        log.flush(LAST_LINES);
    }
    match result {
        Ok(code) => std::process::ExitCode::from(code),
        Err(fault) if is_check && fault.exit == ExitCode::Config => {
            print(&format!("PORTCULLIS UNKNOWN - {fault}\n"));
            std::process::ExitCode::from(CHECK_UNKNOWN)
        }
        Err(fault) => {
            complain(&fault.text);
            std::process::ExitCode::from(code(fault.exit))
        }
    }
}

/// The definitions, for golden files, manual pages and completions.
pub fn command() -> clap::Command {
    Cli::command().term_width(HELP_WIDTH)
}

/// The number of an exit code.
pub fn code(exit: ExitCode) -> u8 {
    match exit {
        ExitCode::Done => 0,
        ExitCode::Failed => 1,
        ExitCode::Config => 2,
        ExitCode::Refused => 3,
        ExitCode::HalfWay => 4,
    }
}

/// Hands the verb on. `Ok` is the exit code of a verb that has said all there is to say.
fn dispatch(globals: &Globals, command: Command) -> Result<u8, Fault> {
    match command {
        Command::CheckConfig(args) => check_config(globals, &args),
        Command::Init(args) => init::run(&args).map(|()| 0),
        Command::Completions(args) => {
            print(&manual::completions(args.shell));
            Ok(0)
        }
        Command::Man(args) => manual::write_pages(&args.dir).map(|()| 0),
        Command::Attach(_) => not_built("attach"),
        Command::Detach(_) => not_built("detach"),
        online => online::dispatch(globals, &online).unwrap_or_else(|| not_built("this verb")),
    }
}

fn not_built(verb: &str) -> Result<u8, Fault> {
    Err(Fault::new(ExitCode::Failed, format!("{verb} is not built yet; CHANGELOG.md says what is")))
}

impl Globals {
    /// Reads and proves the configuration.
    ///
    /// # Errors
    /// Exit code 2: the first thing wrong with it.
    pub fn load(&self) -> Result<Config, Fault> {
        files::load_config(&self.config)
    }

    /// The node of `--node`, where it is given.
    ///
    /// # Errors
    /// Exit code 2: given twice, or not a name.
    pub fn node_name(&self) -> Result<Option<NodeName>, Fault> {
        match self.node.as_slice() {
            [] => Ok(None),
            [name] => {
                let name = name
                    .parse()
                    .map_err(|error| Fault::new(ExitCode::Config, format!("--node: {error}; name one [[node]]")))?;
                Ok(Some(name))
            }
            _ => Err(Fault::new(ExitCode::Config, "--node is given twice; name one node")),
        }
    }

    /// Which node this is: `--node`, else the one whose name is this host's, else the one whose address is.
    ///
    /// # Errors
    /// Exit code 2: no node, or more than one, fits.
    pub fn this_node(&self, config: &Config) -> Result<NodeName, Fault> {
        let all = || config.nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>().join(", ");
        if let Some(name) = self.node_name()? {
            return match config.node(&name) {
                Some(_) => Ok(name),
                None => {
                    Err(Fault::new(ExitCode::Config, format!("no [[node]] is named {name}; name one of {}", all())))
                }
            };
        }
        let hostname = host::name();
        let short = hostname.split('.').next().unwrap_or_default();
        if let Some(node) = config.nodes.iter().find(|node| [hostname.as_str(), short].contains(&node.name.as_str())) {
            return Ok(node.name.clone());
        }
        let here = |address: &std::net::IpAddr| host::is_local(*address);
        let mine: Vec<_> = config.nodes.iter().filter(|node| node.addresses.iter().any(here)).collect();
        match mine.as_slice() {
            [node] => Ok(node.name.clone()),
            [] => Err(Fault::new(
                ExitCode::Config,
                format!(
                    "no [[node]] has the name or an address of this host ({hostname}); say which it is with --node: {}",
                    all()
                ),
            )),
            _ => Err(Fault::new(
                ExitCode::Config,
                format!("several [[node]] have an address of this host; say which it is with --node, one of {}", all()),
            )),
        }
    }
}

fn check_config(globals: &Globals, args: &CheckConfigArgs) -> Result<u8, Fault> {
    let file: &Path = args.file.as_deref().unwrap_or(&globals.config);
    let (config, lines) = match files::load_config_with_lines(file) {
        Ok(loaded) => loaded,
        Err(errors) => {
            errors.iter().for_each(|error| complain(error));
            return Ok(code(ExitCode::Config));
        }
    };
    let (errors, mut warnings) = files::prove_files(&config, &lines, file);
    errors.iter().for_each(|error| complain(&error.to_string()));
    warnings.splice(0..0, config.warnings.iter().cloned());
    warnings.iter().for_each(|warning| complain(&format!("warning: {}: {warning}", file.display())));
    // Only files that can be read are tried together.
    let tls = if errors.is_empty() { super::daemon::read_tls(&config.auth).err() } else { None };
    tls.iter().for_each(|fault| complain(&fault.to_string()));
    if !errors.is_empty() || tls.is_some() {
        return Ok(code(ExitCode::Config));
    }
    let names: Vec<&str> = config.nodes.iter().map(|node| node.name.as_str()).collect();
    print(&format!(
        "{}: good: {} on {}, lease {}, a take-over waits {}\n",
        file.display(),
        config.service.name,
        names.join(" and "),
        humantime::format_duration(config.fence.lease),
        humantime::format_duration(config.wait_before_takeover()),
    ));
    Ok(0)
}

/// Prints to standard output; a reader that has gone away (`| head`) is not an error.
pub fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// One line on standard error.
pub fn complain(text: &str) {
    let line = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    let _ = writeln!(std::io::stderr().lock(), "portcullis: {line}");
}

/// Help and version as asked for; anything else is wrong usage, told in one line.
fn usage(error: &clap::Error, is_check: bool) -> std::process::ExitCode {
    use clap::error::ErrorKind;
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        print(&error.render().to_string());
        return std::process::ExitCode::SUCCESS;
    }
    let text = error.render().to_string();
    // clap's first paragraph says what is wrong, and "tip:" what may have been meant; usage is one --help away.
    let first: Vec<&str> = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
    let what = match error.kind() {
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            "no verb given".to_owned()
        }
        _ => first.join(" ").trim_start_matches("error: ").to_owned(),
    };
    let tip = text.lines().find_map(|line| line.trim().strip_prefix("tip: ")).map(|tip| format!("{tip}, or "));
    let args: Vec<OsString> = std::env::args_os().collect();
    let known = verb(&args).filter(|verb| command().find_subcommand(verb).is_some());
    let help = known.map_or_else(|| "portcullis --help".to_owned(), |verb| format!("portcullis {verb} --help"));
    complain(&format!("{what}; {}see {help}", tip.unwrap_or_default()));
    std::process::ExitCode::from(if is_check { CHECK_UNKNOWN } else { code(ExitCode::Config) })
}

/// The verb of a command line that may not parse: the first word that is neither an option nor its value.
fn verb(args: &[OsString]) -> Option<String> {
    let mut words = args.iter().skip(1).filter_map(|word| word.to_str());
    loop {
        match words.next()? {
            "--config" | "--node" | "--log" => {
                words.next();
            }
            word if word.starts_with('-') => {}
            word => return Some(word.to_owned()),
        }
    }
}

/// Log lines go to standard error; `RUST_LOG` filters them. A client verb is quiet unless something is wrong. A server
/// hands its lines to a writer, which is returned: whoever reads them may be stuck, and the turn must not be.
fn start_logging(format: LogFormat, is_server: bool) -> Option<Lines<Record>> {
    let quiet = if is_server { "info" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(format!("{quiet},hickory_server=warn")));
    let color = std::io::stderr().is_terminal();
    let form = if format == LogFormat::Json { Form::Json } else { Form::Text { color } };
    if is_server {
        let (lines, layer) = log::start(form);
        tracing_subscriber::registry().with(filter).with(layer).init();
        return Some(lines);
    }
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Json => builder.json().init(),
        LogFormat::Text => builder.with_ansi(color).with_target(false).init(),
    }
    None
}

/// A panic is a bug and ends the process (`panic = "abort"`), but says so in one line. A reader that has gone away
/// while `println!` wrote is no bug: it ends the process quietly, as SIGPIPE would.
fn silence_panics() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown");
        if text.contains("failed printing to stdout") && text.contains("Broken pipe") {
            std::process::exit(0);
        }
        let place = info.location().map(|at| format!(" at {}:{}", at.file(), at.line())).unwrap_or_default();
        complain(&format!("internal error{place}: {text}; this is a bug, report it with this line"));
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn the_definitions_are_sound() {
        command().debug_assert();
    }

    #[test]
    fn global_options_stand_before_or_after_the_verb() {
        for line in ["portcullis --node alp --config /x status", "portcullis status --node alp --config /x"] {
            let cli = Cli::try_parse_from(words(line)).expect(line);
            assert_eq!(cli.globals.config, Path::new("/x"));
            assert_eq!(cli.globals.node_name().expect("one").map(String::from).as_deref(), Some("alp"), "{line}");
            assert_eq!(verb(&words(line)).as_deref(), Some("status"));
        }
    }

    #[test]
    fn init_has_a_node_option_of_its_own() {
        let line = "portcullis init --node alp=192.0.2.11 --node midna=192.0.2.12";
        let cli = Cli::try_parse_from(words(line)).expect(line);
        let Command::Init(args) = cli.command else { panic!("init") };
        assert_eq!(args.nodes, ["alp=192.0.2.11", "midna=192.0.2.12"]);
    }

    #[test]
    fn this_node_is_named_or_found_by_address() {
        let text = Config::example().replace("192.0.2.12", "127.0.0.1");
        let config = Config::parse(&text, Path::new("x")).expect("valid");
        let globals = |line: &str| Cli::try_parse_from(words(line)).expect(line).globals;
        let found = |line: &str| globals(line).this_node(&config).map(String::from).map_err(|fault| fault.text);
        assert_eq!(found("portcullis status").as_deref(), Ok("midna"));
        assert_eq!(found("portcullis status --node alp").as_deref(), Ok("alp"));
        assert!(found("portcullis status --node bob").expect_err("unknown").contains("alp, midna"));
        assert!(found("portcullis status --node alp --node midna").expect_err("two").contains("twice"));
        let nowhere = Config::parse(&Config::example(), Path::new("x")).expect("valid");
        let fault = globals("portcullis status").this_node(&nowhere).expect_err("no address of ours");
        assert!(fault.text.contains("--node") && fault.exit == ExitCode::Config, "{fault}");
    }
}
