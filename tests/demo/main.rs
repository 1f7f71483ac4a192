//! `make demo`: the main job on one machine. Two nodes of real PostgreSQL, the embedded witness and a client host, each
//! in namespaces of its own; the active node loses power under load, the other is promoted, the first comes back, stays
//! shut, and rejoins. The report at the end is made of what the client saw, and of nothing else.
//!
//! `--keep` (or KEEP=1) leaves everything running; `--stop` ends what was kept.

#[path = "../lab/harness/mod.rs"]
#[macro_use]
mod harness;
mod report;

use harness::client::{Writer, WriterOptions};
use harness::config::Options;
use harness::net::VIP;
use harness::node::{GATE_PORT, Node, STATUS_PORT, text_at};
use harness::postgres::APP_PASSWORD;
use harness::sys::{Fail, Outcome, ms, never, now, pause, secs, wait_until};
use harness::watch;
use harness::witness::{Kind, SERVICE};
use harness::{Lab, host};
use portcullis::base::time::Instant;
use report::{ClientLog, Report};
use rustix::process::Signal;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "usage: demo [--keep | --stop]
  --keep  leave the two nodes running at the end and print how to look around (also: KEEP=1)
  --stop  end what a former --keep left running";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let keep = std::env::var("KEEP").is_ok_and(|value| !matches!(value.as_str(), "" | "0"));
    let outcome = match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => demo(keep),
        ["--keep"] => demo(true),
        ["--stop"] => stop().map(|()| true),
        ["--help" | "-h"] => {
            println!("{USAGE}");
            Ok(true)
        }
        _ => Err(Fail(USAGE.to_owned())),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints lines with the seconds since the demo began.
struct Narrator(Instant);

impl Narrator {
    fn say(&self, text: &str) {
        println!("{:7.2} s  {text}", now().since(self.0).as_secs_f64());
    }

    /// A line that one of the programs printed.
    fn quote(&self, line: &str) {
        println!("{:7.2} s    | {line}", now().since(self.0).as_secs_f64());
    }
}

fn demo(keep: bool) -> Outcome<bool> {
    if !rustix::process::geteuid().is_root() {
        return Err(Fail("network namespaces need root; run it with sudo".to_owned()));
    }
    let options = Options { nodes: ["alp", "midna"], witness: Kind::Embedded, ..Options::with_vip("demo") };
    let tell = Narrator(now());
    println!("{PICTURE}");
    tell.say("plugging four machines into one switch (network and pid namespaces; nothing outside is touched)");
    let lab = Lab::new(options)?;
    let outcome = play(&lab, &tell);
    match outcome {
        Err(error) => {
            for host in [&lab.a.host, &lab.b.host] {
                let _ = host.thaw();
            }
            eprintln!("{}", lab.diagnosis());
            Err(error)
        }
        Ok(good) => {
            if keep {
                leave_running(lab)?;
            }
            Ok(good)
        }
    }
}

const PICTURE: &str = r"
        client ---- db.example.org, VIP 192.0.2.100 ----+
                                                        v
        alp 192.0.2.11 [gate | PostgreSQL] <--- TLS, streaming ---> midna 192.0.2.12 [gate | PostgreSQL]
                  \__________________ witness 192.0.2.53 (DNS) __________________/
";

fn play(lab: &Lab, tell: &Narrator) -> Outcome<bool> {
    let (alp, midna, client) = (&lab.a, &lab.b, lab.client.ns());
    tell.say("starting the embedded witness, a PostgreSQL primary on alp and a streaming standby on midna");
    lab.start_servers()?;
    tell.say("starting one daemon on each node; nobody is told who is active");
    midna.start_daemon()?;
    alp.start_daemon()?;
    alp.wait_active(secs(20))?;
    alp.wait_in_sync(secs(20))?;
    tell.say(&format!("alp serves: {}", line_of(alp)));

    tell.say("the client writes rising numbers through the service name, and probes it four times a second");
    let record = watch::record(client, lab.witness.address())?;
    let pages = [watch::active_page(client, alp.address())?, watch::active_page(client, midna.address())?];
    let writer = Writer::start_flowing(client, WriterOptions::service(1, lab.witness.address()))?;
    let (probe, probe_log) = start_probe(lab)?;
    pause(secs(3));

    tell.say("PULLING THE PLUG of alp: its wire first, then every process at once");
    let dark = alp.power_off()?;
    tell.say("midna$ portcullis promote --yes");
    let said = midna.cli_live(&["promote", "--yes"], |line| tell.quote(line))?.expect(0)?;
    let first = writer.wait_ack_via(midna.gate()?, dark, secs(15))?;
    tell.say(&format!("midna serves: {}", line_of(midna)));
    pause(secs(3));

    tell.say("power is back on alp; its PostgreSQL unit asks `portcullis may-start-primary` before it starts");
    let allowed = alp.boot()?;
    ensure!(!allowed, "the old primary was allowed to start writable");
    tell.say("  ... and is refused. The daemon runs; does the node stay shut?");
    never(secs(3), "the old node serving", || Ok(alp.gate_is_open()? || alp.role()? == "active"))?;
    tell.say(&format!("  three seconds on, alp is still shut: {}", line_of(alp)));

    tell.say("midna$ portcullis rejoin alp");
    midna.cli_live(&["rejoin", "alp"], |line| tell.quote(line))?.expect(0)?;
    midna.wait_in_sync(secs(30))?;
    tell.say("alp streams from midna; commits wait for it again");
    writer.wait_acks(100, secs(10))?;

    let probe_summary = stop_probe(probe, &probe_log)?;
    let log = ClientLog {
        zero: dark,
        writer: writer.finish(),
        record: record.finish(),
        pages: pages.map(watch::Watcher::finish),
        names: lab.options.nodes,
        gates: [alp.gate()?, midna.gate()?],
    };
    let written = log.write(&log_path()?)?;
    // The standby replays what it has already confirmed; a moment, not a repair.
    let lost_on = |node: &Node| harness::client::lost(&log.writer, 1, &node.postgres);
    let caught_up = wait_until(secs(10), "alp to replay", || Ok(lost_on(alp)?.is_empty()));
    let report =
        Report { lost: [lost_on(alp)?.len(), lost_on(midna)?.len()], promote: (said.started, said.ended), log };
    let good = report.print(&probe_summary, &written) && caught_up.is_ok();
    tell.say(&format!("done; the first write on midna was {} ms after the plug was pulled", ms(dark, first)));
    Ok(good)
}

/// What a node says of itself, in one line.
fn line_of(node: &Node) -> String {
    let Ok(status) = node.status() else { return "(no answer)".to_owned() };
    let reason = text_at(&status, "/gate/reason");
    format!(
        "role {}, gate {}, epoch {}{}",
        text_at(&status, "/role"),
        text_at(&status, "/gate/state"),
        status["epoch"],
        if reason.is_empty() { String::new() } else { format!(" ({reason})") }
    )
}

fn dsn() -> String {
    format!("host={SERVICE} port={GATE_PORT} user=app dbname=app password={APP_PASSWORD} connect_timeout=2")
}

/// Starts `portcullis probe` on the client host; returns its pid and log.
fn start_probe(lab: &Lab) -> Outcome<(i32, PathBuf)> {
    let log = lab.dir.join("probe.log");
    let program = lab.dir.join("portcullis").display().to_string();
    let pid = lab.client.spawn(&log, &[], &[&program, "probe", "--interval", "250ms", "--json", &dsn()])?;
    wait_until(secs(5), "the first line of probe", || Ok(fs::read_to_string(&log)?.lines().count() > 0))?;
    Ok((pid, log))
}

/// Ctrl-C for the prober; returns the last line it printed, its summary.
fn stop_probe(pid: i32, log: &Path) -> Outcome<String> {
    host::send(pid, Signal::INT)?;
    wait_until(secs(5), "probe to end after Ctrl-C", || Ok(!host::is_alive(pid)))?;
    Ok(harness::sys::tail(log, 1))
}

/// Beside the built programs, where `cargo clean` finds it.
fn log_path() -> Outcome<PathBuf> {
    let me = std::env::current_exe()?;
    let dir = me.parent().and_then(Path::parent).ok_or("this program has no folder above its own")?;
    Ok(dir.join("demo-client.log"))
}

/// Hands the lab to a process of its own and prints what a visitor may type.
fn leave_running(lab: Lab) -> Outcome {
    let dir = lab.dir.clone();
    for (name, pid, verb) in [
        (lab.a.name(), lab.a.host.init_pid()?, Some(lab.a.command_line(&[]))),
        (lab.b.name(), lab.b.host.init_pid()?, Some(lab.b.command_line(&[]))),
        ("client", lab.client.init_pid()?, None),
    ] {
        let enter = format!("#!/bin/sh\nexec nsenter -t {pid} -n -p -m -u --");
        write_script(&dir.join(format!("on-{name}")), &format!("{enter} \"$@\"\n"))?;
        if let Some(line) = verb {
            write_script(&dir.join(format!("portcullis-{name}")), &format!("{enter} {} \"$@\"\n", line.join(" ")))?;
        }
    }
    let keeper = lab.keep()?;
    let dir = dir.display();
    println!(
        "\nThe two nodes are still running. Look around:\n\
         \x20 status page    {dir}/on-client curl -s http://192.0.2.12:{STATUS_PORT}/\n\
         \x20 psql           {dir}/on-client psql '{}'\n\
         \x20                (or host={VIP}; try SHOW pool_nodes)\n\
         \x20 this node      {dir}/portcullis-midna status\n\
         \x20 move it back   {dir}/portcullis-alp switchover\n\
         \x20 health         {dir}/portcullis-alp check\n\
         \x20 a shell        {dir}/on-alp bash\n\
         \x20 logs           {dir}/*.log\n\
         To end it: make demo-stop   (or: kill {keeper})",
        dsn()
    );
    Ok(())
}

fn write_script(path: &Path, text: &str) -> Outcome {
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

/// Ends every kept demo of this machine: the process that holds its lifeline.
fn stop() -> Outcome {
    let mut ended = 0;
    for entry in fs::read_dir("/tmp")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !(name.starts_with("pclab-") && name.ends_with("-demo")) {
            continue;
        }
        let Ok(owner) = fs::read_to_string(entry.path().join("keeper")) else { continue };
        let pid: i32 = owner.trim().parse()?;
        // A number may have been given to another process since; the keeper is a `sleep`.
        if fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == "sleep") {
            host::send(pid, Signal::TERM)?;
            wait_until(secs(20), "the kept demo to be gone", || Ok(!entry.path().exists()))?;
            ended += 1;
        }
    }
    println!("ended {ended} kept demo{}", if ended == 1 { "" } else { "s" });
    Ok(())
}
