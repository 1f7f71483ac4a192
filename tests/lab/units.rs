//! `service.units` with a real systemd: the first node's PID 1. The daemon runs as user postgres and asks over the
//! system bus, where polkit decides by the rule that the package has as an example.

use crate::claims::{CUT_MS, LEASE_MS};
use crate::ensure;
use crate::harness::client::{Target, Writer, WriterOptions};
use crate::harness::config::Options;
use crate::harness::node::Node;
use crate::harness::sys::{Fail, Outcome, millis, ms, never, now, secs, wait_until};
use crate::in_lab;
use portcullis::base::time::Instant;
use rustix::process::Signal;
use serde_json::Value;

/// What the application of a service looks like; one whose stop hangs; one that cannot start.
const APP: &str = "[Service]\nExecStart=/bin/sleep infinity\n";
const HANG: &str = "[Service]\nExecStart=/bin/sleep infinity\nExecStop=/bin/sleep 600\nTimeoutStopSec=4s\n";
const BAD: &str = "[Service]\nType=oneshot\nExecStart=/bin/false\n";
const UNITS: [(&str, &str); 3] = [("lab-app.service", APP), ("lab-hang.service", HANG), ("lab-bad.service", BAD)];
const RULES: &str = include_str!("../../packaging/polkit-units.rules");

/// Writes a file inside the machine, whose disk is its own.
fn write_inside(node: &Node, path: &str, text: &str) -> Outcome {
    let script = r#"mkdir -p "$(dirname "$1")" && printf %s "$2" >"$1""#;
    node.host.exec("", &["sh", "-c", script, "write", path, text]).map(drop)
}

fn state_of(node: &Node, unit: &str, property: &str) -> Outcome<String> {
    let line = format!("--property={property}");
    Ok(node.host.exec("", &["systemctl", "show", "--value", &line, unit])?.trim().to_owned())
}

fn is(node: &Node, unit: &str, state: &str) -> Outcome<bool> {
    let seen = state_of(node, unit, "ActiveState")?;
    if seen == state { Ok(true) } else { Err(Fail(format!("{unit} is {seen}"))) }
}

fn wait_for(node: &Node, unit: &str, state: &str) -> Outcome<Instant> {
    wait_until(secs(60), &format!("{unit} to be {state}"), || is(node, unit, state))?;
    Ok(now())
}

/// Texts of the events of a kind, oldest first.
fn events(node: &Node, kind: &str) -> Outcome<Vec<String>> {
    let status = node.status()?;
    let rows = status["events"].as_array().cloned().unwrap_or_default();
    let of_kind = rows.iter().filter(|row| row["kind"] == kind);
    Ok(of_kind.map(|row| row["text"].as_str().unwrap_or_default().to_owned()).collect())
}

fn prepare(node: &Node) -> Outcome {
    for (name, text) in UNITS {
        write_inside(node, &format!("/etc/systemd/system/{name}"), text)?;
    }
    let names = UNITS.map(|(name, _)| format!("\"{name}\"")).join(", ");
    let rules = RULES.replace("\"example.service\"", &names);
    ensure!(rules.contains("lab-app.service"), "the example rule has no example.service any more");
    write_inside(node, "/etc/polkit-1/rules.d/61-portcullis-units.rules", &rules)?;
    node.host.exec("", &["systemctl", "daemon-reload"]).map(drop)
}

#[test]
fn units_follow_the_gate_and_never_hold_it_up() {
    let units = "units = [\"lab-app.service\", \"lab-hang.service\", \"lab-bad.service\"]\n";
    in_lab(Options { service: units, systemd: true, ..Options::new("units") }, |lab| {
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        prepare(a)?;
        lab.start_servers()?;
        let said = a.cli(&["doctor"])?;
        ensure!(!said.out.contains("service.units"), "doctor finds fault with sound units: {}", said.out);
        b.start_daemon()?;
        a.start_daemon()?;
        never(millis(500), "a unit started before the gate opened", || {
            Ok(!a.gate_is_open()? && is(a, "lab-app.service", "active").unwrap_or(false) && !a.gate_is_open()?)
        })?;
        a.wait_active(secs(60))?;
        let opened = now();
        let started = wait_for(a, "lab-app.service", "active")?;
        wait_for(a, "lab-hang.service", "active")?;
        wait_until(secs(60), "the failure of one unit to be told", || {
            Ok(events(a, "units_failed")?.iter().any(|text| text.contains("started: ") && text.contains("lab-bad")))
        })?;

        // The cut is the first effect; a stop that hangs holds nothing up, nor does the next opening wait for it.
        let options = WriterOptions { target: Target::Always(a.gate()?), ..WriterOptions::once(1, a.gate()?) };
        let writer = Writer::start_flowing(client, options)?;
        let cut = now();
        a.cli(&["fence"])?.expect(0)?;
        let stopped = wait_for(a, "lab-app.service", "inactive")?;
        wait_for(a, "lab-hang.service", "deactivating")?;
        ensure!(!a.gate_is_open()?, "the gate is open while the units stop");
        let last = writer.log().last_ack().ok_or("no acknowledgement")?.at;
        ensure!(ms(cut, last) <= CUT_MS, "the last acknowledgement came {} ms after the fence", ms(cut, last));
        a.cli(&["unfence"])?.expect(0)?;
        a.wait_active(secs(60))?;
        let again = now();
        wait_for(a, "lab-app.service", "active")?;
        wait_for(a, "lab-hang.service", "active")?;
        let hung = ms(cut, now());
        a.wait_in_sync(secs(60))?;

        // A clean end takes the units along.
        a.stop_daemon()?;
        wait_for(a, "lab-app.service", "inactive")?;
        // systemd kills it at its own time-out, which it calls a failure.
        wait_for(a, "lab-hang.service", "failed")?;
        a.start_daemon()?;
        a.wait_active(secs(60))?;
        wait_for(a, "lab-app.service", "active")?;

        // Killed, nobody stops them; the next life does, unless the gate is open within a lease.
        a.kill_daemon(Signal::KILL)?;
        never(secs(1), "systemd stopping what nobody asked it to", || Ok(!is(a, "lab-app.service", "active")?))?;
        lab.witness.host.isolate()?;
        b.stop_daemon()?;
        let life = now();
        a.start_daemon()?;
        let gone = wait_for(a, "lab-app.service", "inactive")?;
        ensure!(ms(life, gone) >= LEASE_MS, "stopped {} ms after the start, before a lease was over", ms(life, gone));
        ensure!(!a.gate_is_open()?, "the gate opened without proof");
        lab.witness.host.rejoin_network()?;
        a.wait_active(secs(60))?;
        wait_for(a, "lab-app.service", "active")?;

        // Killed and back with proof within a lease: the application runs on as if nothing had been.
        a.wait_in_sync(secs(60))?;
        let main = state_of(a, "lab-app.service", "MainPID")?;
        a.kill_daemon(Signal::KILL)?;
        let reborn = now();
        a.start_daemon()?;
        a.wait_active(secs(60))?;
        let open = ms(reborn, now());
        never(secs(4), "the application of an open gate stopped", || {
            let same = state_of(a, "lab-app.service", "MainPID")? == main;
            // Within the lease, less what the look itself may take.
            Ok(open < 2800 && !same)
        })?;
        ensure!(is(a, "lab-app.service", "active")?, "the application is gone");
        eprintln!("units: the gate was open again {open} ms after the start of a killed daemon");
        eprintln!(
            "figure: service.units started {} ms after the gate opened, stopped {} ms after the fence (last \
             acknowledgement {} ms after it); a stop hanging 4 s: gate open again after {} ms, that unit after {hung} \
             ms; \
             killed and started without proof: stopped {} ms after the start (lease 3 s)",
            ms(opened, started),
            ms(cut, stopped),
            ms(cut, last),
            ms(cut, again),
            ms(life, gone)
        );
        drop(writer);
        Ok(())
    });
}

#[test]
fn units_without_the_right_to_start_them_are_told() {
    in_lab(
        Options { service: "units = [\"lab-app.service\"]\n", systemd: true, ..Options::new("unitsdenied") },
        |lab| {
            let a = &lab.a;
            write_inside(a, "/etc/systemd/system/lab-app.service", APP)?;
            a.host.exec("", &["systemctl", "daemon-reload"])?;
            lab.start_pair()?;
            wait_until(secs(60), "the refusal to be told", || {
                let told = events(a, "units_failed")?;
                let why =
                    told.iter().any(|text| text.contains("started: ") && text.contains("copy polkit-units.rules"));
                if why { Ok(true) } else { Err(Fail(format!("{told:?}"))) }
            })?;
            ensure!(a.gate_is_open()?, "units that do not start shut the gate");
            ensure!(is(a, "lab-app.service", "inactive")?, "started without the right");
            // Enabled, it would run on the passive node as well after a reboot; missing, nothing would start it.
            write_inside(
                a,
                "/etc/systemd/system/lab-app.service",
                &format!("{APP}[Install]\nWantedBy=multi-user.target\n"),
            )?;
            a.host.exec("", &["systemctl", "daemon-reload"])?;
            a.host.exec("", &["systemctl", "enable", "lab-app.service"])?;
            let report: Value = serde_json::from_str(&a.cli(&["doctor", "--json"])?.expect(1)?.out)?;
            ensure!(report.to_string().contains("lab-app.service of service.units is enabled"), "{report}");
            a.host.exec("", &["sh", "-c", "systemctl disable lab-app; rm /etc/systemd/system/lab-app.service"])?;
            a.host.exec("", &["systemctl", "daemon-reload"])?;
            let report: Value = serde_json::from_str(&a.cli(&["doctor", "--json"])?.expect(1)?.out)?;
            ensure!(report.to_string().contains("lab-app.service of service.units is not-found"), "{report}");
            Ok(())
        },
    );
}
