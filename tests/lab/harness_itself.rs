//! The harness proves itself without the daemon: what the other tests lean on must itself be true.

use crate::claims::ON_THE_WIRE;
use crate::ensure;
use crate::harness::client::{TABLE_SQL, Target, Writer, WriterOptions};
use crate::harness::config::Options;
use crate::harness::net::{self, VIP};
use crate::harness::postgres::PORT;
use crate::harness::sys::{Fail, Outcome, millis, never, now, pause, run, secs, wait_until};
use crate::harness::watch::{Look, never_two_active};
use crate::harness::witness::Kind;
use crate::harness::{Lab, host};
use crate::in_lab;
use portcullis::base::time::Instant;
use std::path::Path;

#[test]
fn harness_itself_works() {
    in_lab(Options::new("self"), |lab| {
        wires_carry_and_can_be_cut(lab)?;
        addresses_are_seen_and_answered(lab)?;
        dns_takes_signed_updates_and_survives_a_kill(lab)?;
        processes_freeze_thaw_and_are_reaped(lab)?;
        the_pair_streams_and_a_writer_counts(lab)?;
        power_off_ends_everything(lab)
    });
}

#[test]
fn nothing_is_left_behind() {
    let mut pids = Vec::new();
    let mut seen = None;
    in_lab(Options::new("gone"), |lab| {
        lab.witness.start()?;
        // A frozen machine must go as well.
        lab.b.host.spawn(&lab.dir.join("sleep.log"), &[], &["sleep", "1000"])?;
        pids.extend(lab.b.host.processes()?);
        pids.extend(lab.witness.host.processes()?);
        lab.b.host.freeze()?;
        seen = Some((lab.dir.clone(), lab.switch.ns.clone()));
        Ok(())
    });
    let (dir, switch) = seen.unwrap();
    assert!(!dir.exists(), "{} is left", dir.display());
    assert!(pids.iter().all(|pid| !host::is_alive(*pid)), "a process is left");
    let prefix = switch.trim_end_matches("sw");
    let left = run(&["ip", "netns", "list"]).unwrap();
    assert!(!left.contains(prefix), "a namespace is left: {left}");
}

#[test]
fn a_kept_lab_lives_until_its_keeper_is_ended() {
    let _turn = crate::turns::Turn::wait("kept", false);
    let lab = Lab::new(Options::new("kept")).unwrap();
    let (dir, ns, init) = (lab.dir.clone(), lab.a.ns().to_owned(), lab.a.host.init_pid().unwrap());
    let keeper = i32::try_from(lab.keep().unwrap()).unwrap();
    pause(millis(300));
    let alive = host::is_alive(init) && dir.exists() && crate::harness::sys::netns_path(&ns).exists();
    host::send(keeper, rustix::process::Signal::TERM).unwrap();
    let gone = wait_until(secs(60), "the kept lab gone", || {
        Ok(!host::is_alive(init) && !dir.exists() && !crate::harness::sys::netns_path(&ns).exists())
    });
    assert!(alive, "a kept lab ended with its value");
    gone.unwrap();
}

#[test]
fn both_witnesses_get_a_configuration_and_two_active_are_noticed() {
    let text = {
        crate::harness::postgres::Template::once().unwrap();
        let options = Options { witness: Kind::Embedded, ..Options::with_vip("text") };
        crate::harness::config::text(&options, Path::new("/nowhere"), 1).unwrap()
    };
    let table: toml::Table = text.parse().unwrap();
    assert_eq!(table["node"].as_array().unwrap().len(), 2);
    assert_eq!(table["state_dir"].as_str(), Some("/nowhere/b/state"));
    assert!(table.contains_key("witness") && table.contains_key("vip"));

    let at = |ms: u64| Instant::from_nanos(ms * 1_000_000);
    let look = |ms: u64, role: &str| Look { asked: at(ms), answered: at(ms + 5), seen: Some(role.to_owned()) };
    let a = [look(0, "active"), look(20, "active"), look(40, "passive")];
    let b_later = [look(10, "passive"), look(30, "active"), look(50, "active")];
    never_two_active(&a, &b_later).unwrap();
    let b_inside = [look(10, "active"), look(30, "active")];
    never_two_active(&a, &b_inside).unwrap_err();
    never_two_active(&b_inside, &a).unwrap_err();
}

fn pings(lab: &Lab, from: &str, to: &str) -> Outcome<bool> {
    // No ping program is needed: a refused connection also proves that packets go there and back.
    let target: std::net::SocketAddr = format!("{to}:9").parse()?;
    let refused = crate::harness::sys::in_netns(from, || {
        let error = std::net::TcpStream::connect_timeout(&target, millis(1500)).err();
        Ok(error.is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused))
    })?;
    let _ = lab;
    Ok(refused)
}

fn wires_carry_and_can_be_cut(lab: &Lab) -> Outcome {
    let (a, b, c) = (&lab.a.host, &lab.b.host, &lab.client);
    let all = [a, b, c, &lab.witness.host];
    for from in all {
        for to in all {
            ensure!(pings(lab, from.ns(), to.address())?, "{} does not reach {}", from.name, to.name);
        }
    }
    lab.switch.cut_between(&a.plug, &b.plug)?;
    ensure!(!pings(lab, a.ns(), b.address())?, "a cut wire carries");
    ensure!(pings(lab, c.ns(), b.address())?, "the cut hit others too");
    lab.switch.heal()?;
    ensure!(pings(lab, a.ns(), b.address())?, "a healed wire is cut");

    lab.switch.cut_port_between(&a.plug, &b.plug, 9)?;
    ensure!(!pings(lab, a.ns(), b.address())?, "a cut port carries");
    ensure!(!pings(lab, b.ns(), a.address())?, "a cut port carries the other way");
    lab.switch.heal()?;

    b.isolate()?;
    ensure!(!pings(lab, c.ns(), b.address())?, "an isolated node is reached");
    ensure!(run(&["ip", "-n", b.ns(), "link", "show", "eth0"])?.contains("LOWER_UP"), "an isolated node lost carrier");
    b.rejoin_network()?;
    wait_until(secs(60), "the node back on the network", || pings(lab, c.ns(), b.address()))?;

    b.link_down()?;
    ensure!(run(&["ip", "-n", b.ns(), "link", "show", "eth0"])?.contains("NO-CARRIER"), "the node still has carrier");
    b.link_up()?;
    wait_until(secs(60), "the node back with carrier", || pings(lab, c.ns(), b.address())).map(drop)
}

fn addresses_are_seen_and_answered(lab: &Lab) -> Outcome {
    let (a, b, client) = (lab.a.ns(), lab.b.ns(), lab.client.ns());
    ensure!(net::who_answers_arp(client, VIP)?.is_empty(), "somebody answers for a VIP that nobody holds");
    net::add_address(a, VIP)?;
    ensure!(lab.a.has_vip()?, "an address put on by hand is not seen");
    let answers = net::who_answers_arp(client, VIP)?;
    ensure!(answers == [lab.a.host.plug.mac.clone()].into(), "ARP answers: {answers:?}");
    net::add_address(b, VIP)?;
    let answers = net::who_answers_arp(client, VIP)?;
    ensure!(answers.len() == 2, "two holders, but ARP answers: {answers:?}");
    net::delete_address(b, VIP)?;
    net::delete_address(a, VIP)?;
    net::address_gone(a, VIP, secs(60)).map(drop)
}

fn dns_takes_signed_updates_and_survives_a_kill(lab: &Lab) -> Outcome {
    let dns = &lab.witness;
    dns.start()?;
    ensure!(dns.service_addresses()? == [lab.a.address()], "the first address is {:?}", dns.service_addresses());
    ensure!(dns.marker()?.is_none(), "a marker from nowhere");
    dns.move_record_to(lab.b.address())?;
    ensure!(dns.service_addresses()? == [lab.b.address()], "moved, but it is {:?}", dns.service_addresses());
    dns.nsupdate("update add _portcullis.db.example.org 5 TXT \"v=1 epoch=1\"")?;
    dns.kill()?;
    ensure!(dns.service_addresses().is_err(), "a dead server answers");
    dns.start()?;
    ensure!(dns.marker()?.as_deref() == Some("v=1 epoch=1"), "an update was lost: {:?}", dns.marker());
    ensure!(dns.service_addresses()? == [lab.b.address()], "an update was lost");
    let resolved = lab.client.exec("", &["getent", "ahostsv4", "db.example.org"])?;
    ensure!(resolved.contains(lab.b.address()), "the client's resolver says {resolved}");
    dns.freeze()?;
    ensure!(dns.service_addresses().is_err(), "a frozen server answers");
    dns.thaw()?;
    let script = "printf 'server 192.0.2.53\\nzone example.org\\nupdate add x.example.org 5 A 192.0.2.9\\nsend\\n' \
                  | nsupdate -t 2";
    let unsigned = lab.client.exec_within(secs(30), "", &["sh", "-c", script])?;
    ensure!(!unsigned.status.success(), "an unsigned update was taken");
    dns.move_record_to(lab.a.address())
}

fn processes_freeze_thaw_and_are_reaped(lab: &Lab) -> Outcome {
    let host = &lab.a.host;
    let log = lab.dir.join("ticks.log");
    let ticker = host.spawn(&log, &[], &["sh", "-c", "while :; do echo tick; sleep 0.02; done"])?;
    let ticks = || std::fs::read_to_string(&log).map(|text| text.len()).map_err(Fail::from);
    wait_until(secs(60), "ticks", || Ok(ticks()? > 20))?;
    host.freeze()?;
    let frozen = ticks()?;
    never(millis(300), "a tick of a frozen process", || Ok(ticks()? != frozen))?;
    host.thaw()?;
    wait_until(secs(60), "ticks after the thaw", || Ok(ticks()? > frozen))?;
    host::send(ticker, rustix::process::Signal::KILL)?;
    wait_until(secs(60), "the killed process reaped", || Ok(!Path::new(&format!("/proc/{ticker}")).exists()))?;
    // An orphan whose parent ended is PID 1's to reap.
    host.exec("", &["sh", "-c", "setsid sleep 0.05 >/dev/null 2>&1 &"])?;
    wait_until(secs(60), "no zombie", || {
        let list = host.exec("", &["ps", "-eo", "stat,args"])?;
        Ok(!list.lines().any(|line| line.starts_with('Z')) && !list.contains("sleep 0.05"))
    })?;
    ensure!(host.exec("", &["hostname"])?.trim() == "a", "the machine has another name");
    let slow = host.exec_within(millis(200), "", &["sleep", "10"])?;
    ensure!(slow.status.code() == Some(124), "a time limit did not hold: {}", slow.status);
    Ok(())
}

fn the_pair_streams_and_a_writer_counts(lab: &Lab) -> Outcome {
    let (a, b) = (&lab.a, &lab.b);
    a.postgres.init_primary(&a.host)?;
    a.postgres.sql("app", TABLE_SQL)?;
    b.postgres.init_standby_of(&b.host, &a.host)?;
    ensure!(!a.postgres.is_read_only()? && b.postgres.is_read_only()?, "the roles are the wrong way round");
    let name = a.postgres.sql("postgres", "SELECT application_name FROM pg_stat_replication")?;
    ensure!(name == "b", "the standby calls itself {name}");
    ensure!(!net::connects(lab.client.ns(), b.address(), PORT + 1)?, "a port that nobody listens on is open");
    // No gate yet, so let the writer in at PostgreSQL itself.
    let rule = "host app app 192.0.2.0/24 scram-sha-256\n";
    let hba = a.postgres.data_dir.join("pg_hba.conf");
    std::fs::write(&hba, std::fs::read_to_string(&hba)? + rule)?;
    a.postgres.sql("postgres", "SELECT pg_reload_conf()")?;
    let door = format!("{}:{PORT}", a.address()).parse()?;
    wait_until(secs(60), "the rule to be in force", || {
        let rules = a
            .postgres
            .sql("postgres", "SELECT count(*) FROM pg_hba_file_rules WHERE type = 'host' AND 'app' = ANY (database)")?;
        Ok(rules == "1" && net::connects(lab.client.ns(), a.address(), PORT)?)
    })?;
    let writer = Writer::start_flowing(lab.client.ns(), WriterOptions { depth: 4, ..WriterOptions::once(1, door) })?;
    let frozen = a.host.freeze()?;
    pause(millis(1200));
    ensure!(writer.log().acks_after(frozen + ON_THE_WIRE).is_empty(), "a frozen server acknowledged");
    let thawed = a.host.thaw()?;
    wait_until(secs(60), "the thawed server to go on", || Ok(!writer.log().acks_after(thawed).is_empty()))?;
    ensure!(writer.log().longest_gap().0 >= millis(500), "the gap was not seen");
    ensure!(writer.lost_on(&a.postgres)?.is_empty(), "acknowledged numbers are missing on the primary");
    wait_until(secs(60), "the standby to have all", || Ok(writer.lost_on(&b.postgres)?.is_empty()))?;
    let log = writer.finish();
    a.postgres.sql("app", "DELETE FROM acks WHERE n = 3")?;
    let lost = crate::harness::client::lost(&log, 1, &a.postgres)?;
    ensure!(lost == [3].into(), "a lost write is not noticed: {lost:?}");
    let target = Target::Service { dns: format!("{}:53", lab.witness.address()) };
    let gateless = Writer::start(lab.client.ns(), WriterOptions { target, ..WriterOptions::once(2, door) })?;
    wait_until(secs(60), "a refused connection to be noted", || Ok(!gateless.log().errors.is_empty()))?;
    let log = gateless.finish();
    ensure!(log.acks.is_empty(), "acknowledgements without a gate: {log:?}");
    Ok(())
}

fn power_off_ends_everything(lab: &Lab) -> Outcome {
    let a = &lab.a;
    let pids = a.host.processes()?;
    ensure!(pids.len() > 5, "PostgreSQL should run here: {pids:?}");
    let before = now();
    a.power_off()?;
    ensure!(now().since(before) < secs(30), "power-off took long");
    ensure!(pids.iter().all(|pid| !host::is_alive(*pid)), "a process outlived the power");
    ensure!(!pings(lab, lab.client.ns(), a.address())?, "a dark machine answers");
    a.host.power_on()?;
    wait_until(secs(60), "the machine back on the network", || pings(lab, lab.client.ns(), a.address()))?;
    a.postgres.start(&a.host)?;
    ensure!(a.postgres.sql("app", "SELECT count(*) > 5 FROM acks")? == "t", "the disk is not the same");
    a.postgres.stop(&a.host, "fast")
}
