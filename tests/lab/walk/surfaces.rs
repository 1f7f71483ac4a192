//! What one node says on each of its surfaces, and that nothing of it contradicts its snapshot.

use super::essence;
use super::plain::plain;
use crate::ensure;
use crate::harness::Lab;
use crate::harness::node::{GATE_PORT, Node, Said, text_at};
use crate::harness::postgres::{APP_PASSWORD, Template};
use crate::harness::sys::{Fail, Outcome};
use serde_json::Value;
use std::collections::BTreeMap;

/// The answers of one node, all of one state.
pub struct Told {
    /// What they are compared to.
    pub status: Value,
    pub check: Said,
    json: Value,
    text: String,
    rows: Value,
    table: String,
    metrics: String,
    page: String,
    pool_nodes: String,
    cgi: String,
    columns: String,
    /// `/active`, `/replica`, `/health` with their code.
    pages: BTreeMap<&'static str, (u16, String)>,
    shown: Option<String>,
    console: Option<(BTreeMap<String, String>, Vec<String>)>,
}

impl Told {
    pub fn ask(lab: &Lab, node: &Node, status: Value) -> Outcome<Told> {
        let pages = ["/active", "/primary", "/read-write", "/replica", "/read-only", "/health"];
        let get = |path: &'static str| Ok((path, node.http(path)?));
        let good = |path: &str| -> Outcome<String> {
            let (code, body) = node.http(path)?;
            ensure!(code == 200, "{path} on {} answers {code}: {body}", node.name());
            Ok(body)
        };
        let psql = Template::once()?.bin_dir.join("psql").display().to_string();
        let sql = |database: &str, statement: &str| {
            let dsn = format!(
                "host={} port={GATE_PORT} user=app dbname={database} password={APP_PASSWORD} connect_timeout=5",
                node.address()
            );
            lab.client.exec("", &[&psql, "-XAt", &dsn, "-c", statement])
        };
        // First the clients, which count as sessions until they have left.
        let open = status["gate"]["open"] == true;
        let paused = text_at(&status, "/gate/state") == "paused";
        // It may shut in between: then the snapshots differ, and what is missing here is asked again.
        let shown = if open { sql("app", "SHOW pool_nodes").ok() } else { None };
        let console = match open || paused {
            true => sql("portcullis", "SHOW STATUS").ok().zip(sql("portcullis", "SHOW LEASE").ok()),
            false => None,
        };
        let status = if open || paused { node.status()? } else { status };
        Ok(Told {
            json: serde_json::from_str(&node.cli(&["status", "--json"])?.expect(0)?.out)?,
            text: node.cli(&["status"])?.expect(0)?.out,
            rows: serde_json::from_str(&node.cli(&["nodes", "--json"])?.expect(0)?.out)?,
            table: node.cli(&["nodes"])?.expect(0)?.out,
            check: node.cli(&["check"])?,
            cgi: node.cli(&["cgi"])?.expect(0)?.out,
            metrics: good("/metrics")?,
            pool_nodes: good("/pool_nodes")?,
            columns: good("/pool_nodes?format=4.3")?,
            pages: pages.into_iter().map(get).collect::<Outcome<_>>()?,
            page: plain(&good("/")?),
            shown,
            console: console.map(|(items, lease)| {
                let items = items.lines().filter_map(|line| line.split_once('|'));
                let items = items.map(|(item, value)| (item.to_owned(), value.to_owned())).collect();
                (items, lease.trim_end().split('|').map(str::to_owned).collect())
            }),
            status,
        })
    }

    /// Every surface against the snapshot.
    pub fn agree(&self) -> Outcome {
        let name = text_at(&self.status, "/node");
        let parts: [(&str, Outcome); 8] = [
            ("status --json", self.same_json()),
            ("status", self.status_text()),
            ("nodes", self.node_tables()),
            ("check", self.check_line()),
            ("/metrics", self.figures()),
            ("the page", self.people()),
            ("the pages for balancers", self.balancers()),
            ("SHOW", self.shown()),
        ];
        // All at once: one run tells of every fault.
        let faults: Vec<String> =
            parts.into_iter().filter_map(|(what, seen)| seen.err().map(|fail| format!("{what}: {fail}"))).collect();
        ensure!(
            faults.is_empty(),
            "{name} contradicts itself:\n  {}\nits snapshot: {}",
            faults.join("\n  "),
            essence(&self.status)
        );
        Ok(())
    }

    fn is(&self, pointer: &str) -> bool {
        self.status.pointer(pointer) == Some(&Value::Bool(true))
    }

    fn at(&self, pointer: &str) -> String {
        match self.status.pointer(pointer) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        }
    }

    fn has(&self, pointer: &str) -> bool {
        self.status.pointer(pointer).is_some_and(|value| !value.is_null())
    }

    fn list(&self, pointer: &str) -> &[Value] {
        self.status.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    fn is_streaming_standby(&self) -> bool {
        self.at("/role") == "passive" && self.is("/postgres/streaming") && self.at("/postgres/role") == "standby"
    }

    /// The node that this one takes for active.
    fn active(&self) -> Option<String> {
        match self.at("/role").as_str() {
            "active" => Some(self.at("/node")),
            _ if self.is("/peer/reachable") && self.at("/peer/role") == "active" => Some(self.at("/peer/name")),
            _ => None,
        }
    }

    fn same_json(&self) -> Outcome {
        let (one, other) = (essence(&self.status), essence(&self.json));
        ensure!(one == other, "the socket says {other}");
        ensure!(
            self.rows == self.json["nodes"] || essence_of_rows(&self.rows) == essence_of_rows(&self.json["nodes"]),
            "nodes --json says {}",
            self.rows
        );
        ensure!(self.is("/gate/open") == (self.at("/gate/state") == "open"), "open, and its state is another");
        ensure!(
            self.is("/gate/open") != self.has("/gate/reason"),
            "a gate has a reason when it is not open, only then"
        );
        Ok(())
    }

    fn status_text(&self) -> Outcome {
        let text = &self.text;
        let says = |label: &str, part: &str| -> Outcome {
            let mut lines = text.lines().skip_while(|line| !line.starts_with(label));
            let first = lines.next().ok_or_else(|| Fail(format!("no line {label}: {text}")))?;
            let more = lines.take_while(|line| line.starts_with("             "));
            let all: Vec<&str> = std::iter::once(first).chain(more).collect();
            ensure!(all.iter().any(|line| line.contains(part)), "{label} has no {part:?}: {all:?}");
            Ok(())
        };
        let silent = |label: &str| -> Outcome {
            ensure!(!text.lines().any(|line| line.starts_with(label)), "it speaks of {label}: {text}");
            Ok(())
        };
        if let Some(active) = self.active() {
            let head = text.lines().next().unwrap_or_default();
            ensure!(head.starts_with(&format!("{active} is active")), "the headline is {head:?}");
        } else {
            let head = text.lines().next().unwrap_or_default();
            let named = self
                .list("/nodes")
                .iter()
                .find(|row| head.starts_with(&format!("{} is active", text_at(row, "/name"))));
            ensure!(named.is_none(), "the headline is {head:?}");
        }
        says("this node", &format!("{}, {}, epoch {},", self.at("/node"), self.at("/role"), self.at("/epoch")))?;
        says("gate", &self.at("/gate/state"))?;
        says("gate", &self.at("/gate/reason"))?;
        let sessions = self.at("/gate/sessions");
        says("gate", &format!("{sessions} session"))?;
        for vip in self.list("/vips") {
            says("VIP", if vip["bound"] == true { " bound here" } else { " not bound here" })?;
            says("VIP", vip["conflict"].as_str().unwrap_or_default())?;
        }
        for server in self.list("/witness/servers") {
            says("witness", &format!("{} ", text_at(server, "/server")))?;
            says("witness", &text_at(server, "/verdict"))?;
        }
        match self.is("/peer/reachable") {
            true => says(
                "peer",
                &format!("{} {}, epoch {}", self.at("/peer/name"), self.at("/peer/role"), self.at("/peer/epoch")),
            )?,
            false => says("peer", "does not answer")?,
        }
        says("PostgreSQL", if self.is("/postgres/up") { "up" } else { "down" })?;
        let line = text.lines().find(|line| line.starts_with("replication")).unwrap_or_default();
        let in_sync = line.contains(", in sync");
        ensure!(in_sync == self.is("/replication/in_sync"), "in sync: {line}");
        ensure!(line.contains("alone since") == (self.has("/replication/alone_since") && !in_sync), "alone: {line}");
        says("replication", &self.at("/replication/alone_since"))?;
        says("failover", &self.at("/outlook/text"))?;
        match self.has("/next") {
            true => {
                says("next", &format!("on {}: {}", self.at("/next/on"), self.at("/next/command")))?;
                says("next", &self.at("/next/why"))?;
            }
            false => says("next", "nothing")?,
        }
        if self.is("/maintenance") {
            says("maintenance", "on")?
        } else {
            silent("maintenance")?
        }
        match self.has("/procedure") {
            true => says("procedure", &self.at("/procedure/step"))?,
            false => silent("procedure")?,
        }
        for row in self.list("/nodes") {
            let line = text.lines().filter(|line| line.starts_with(row["name"].as_str().unwrap_or("?")));
            let rows: Vec<Vec<&str>> = line.map(|line| line.split_whitespace().collect()).collect();
            let (status, role) = (text_at(row, "/status"), text_at(row, "/role"));
            let fits = rows.iter().any(|words| {
                words.get(2).is_some_and(|word| word.trim_end_matches(',') == status) && words.contains(&role.as_str())
            });
            ensure!(fits, "no row {status} {role} of {}: {rows:?}", row["name"]);
        }
        let last = self.list("/events").last().map(|event| text_at(event, "/text")).unwrap_or_default();
        ensure!(text.contains(&last), "the last event is missing: {last}");
        ensure!(text.lines().count() <= 30, "{} lines: {text}", text.lines().count());
        Ok(())
    }

    fn node_tables(&self) -> Outcome {
        let table: Vec<Vec<&str>> = self.table.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        let nodes = self.list("/nodes");
        let (four, cgi) = (lines(&self.columns), self.cgi.split_once("\n\n").map_or("", |(_, body)| body));
        let plain = lines(&self.pool_nodes);
        ensure!(lines(cgi) == plain, "cgi says {cgi:?}, /pool_nodes {plain:?}");
        ensure!(
            table.len() == nodes.len() && plain.len() == nodes.len() && four.len() == nodes.len(),
            "rows: {} in JSON, nodes {table:?}, /pool_nodes {plain:?}, 4.3 {four:?}",
            nodes.len()
        );
        for (n, row) in nodes.iter().enumerate() {
            let word = |key: &str| match &row[key] {
                Value::Null => String::new(),
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            let dash = |key: &str| if word(key).is_empty() { "-".to_owned() } else { word(key) };
            let weight = row["weight"].as_f64().unwrap_or(-1.0);
            let attached = row["attached"] == true;
            let expected = [
                word("node_id"),
                word("name"),
                word("hostname"),
                word("port"),
                word("status"),
                word("role"),
                format!("{weight:.2}"),
                if attached { "yes" } else { "no" }.to_owned(),
                dash("replication_delay_bytes"),
                dash("replication_state"),
                dash("sync_state"),
                word("select_count"),
                dash("last_status_change"),
            ];
            ensure!(table[n] == expected, "nodes: {:?}, not {expected:?}", table[n]);
            let in_service = attached && word("status") == "up";
            let numbers: &[&str] = if in_service { &["1", "2"] } else { &["3"] };
            let head = format!("{},{},{}", word("node_id"), word("hostname"), word("port"));
            let fits = numbers.iter().any(|number| plain[n] == format!("{head},{number},{weight:.6},{}", word("role")));
            ensure!(fits, "/pool_nodes: {}", plain[n]);
            let cells: Vec<&str> = four[n].split(',').collect();
            let since = word("last_status_change").replace('T', " ");
            let is_primary = word("role");
            let expected = [
                word("node_id"),
                word("hostname"),
                word("port"),
                if in_service { "up" } else { "down" }.to_owned(),
                word("status"),
                format!("{weight:.6}"),
                is_primary.clone(),
                if word("status") == "up" { is_primary } else { "unknown".to_owned() },
                word("select_count"),
                (row["name"] == self.status["node"]).to_string(),
                row["replication_delay_bytes"].as_u64().unwrap_or(0).to_string(),
                word("replication_state"),
                word("sync_state"),
                since.get(..19).unwrap_or_default().to_owned(),
            ];
            ensure!(cells == expected, "?format=4.3: {cells:?}, not {expected:?}");
        }
        Ok(())
    }

    fn check_line(&self) -> Outcome {
        let line = &self.check.out;
        let code = self.check.code;
        let word = ["OK", "WARNING", "CRITICAL", "UNKNOWN"][usize::try_from(code).unwrap_or(3).min(3)];
        ensure!(line.starts_with(&format!("PORTCULLIS {word} - ")), "ends with {code}: {line}");
        let (node, role, epoch) = (self.at("/node"), self.at("/role"), self.at("/epoch"));
        ensure!(line.contains(&format!("{node} {role}, epoch {epoch}")), "not {node} {role}, epoch {epoch}: {line}");
        for figure in [format!("sessions={};", self.at("/gate/sessions")), format!("epoch={epoch};")] {
            ensure!(line.contains(&figure), "no {figure} {line}");
        }
        let serves = role == "active" && self.is("/gate/open");
        ensure!(code > 0 || serves || self.is_streaming_standby(), "OK, and it neither serves nor stands by: {line}");
        if role == "active" {
            let alone = self.at("/replication/alone_since");
            ensure!(alone.is_empty() || line.contains(&format!("alone since {alone}")), "alone: {line}");
            let safe = self.is("/replication/in_sync");
            ensure!(safe || code > 0, "not in sync, and OK: {line}");
            ensure!(safe || !line.contains(", in sync"), "in sync: {line}");
        }
        ensure!(self.is("/outlook/safe") || code > 0 || self.has("/procedure"), "no safe failover, and OK: {line}");
        // Why somebody who serves nobody does not: a passive standby needs no excuse.
        if !self.is("/gate/open") && self.at("/gate/state") != "shut" && self.at("/gate/state") != "paused" {
            ensure!(line.contains(&self.at("/gate/reason")), "no reason: {line}");
        }
        // A standby that is away is not 0 bytes behind.
        let lag = if self.has("/lag/bytes") {
            format!("replication_delay={}B", self.at("/lag/bytes"))
        } else {
            String::new()
        };
        ensure!(line.contains(&lag), "no {lag:?}: {line}");
        ensure!(self.is("/maintenance") == line.contains("maintenance is on"), "maintenance: {line}");
        let conflict = self.list("/vips").iter().any(|vip| !vip["conflict"].is_null());
        ensure!(conflict == line.contains("is claimed by"), "VIP: {line}");
        ensure!(line.contains("PostgreSQL is down") != self.is("/postgres/up"), "PostgreSQL: {line}");
        Ok(())
    }

    fn figures(&self) -> Outcome {
        let mut figures = BTreeMap::new();
        for line in self.metrics.lines().filter(|line| !line.starts_with('#')) {
            let (key, value) = line.rsplit_once(' ').unwrap_or_default();
            figures.insert(key.trim_start_matches("portcullis_").to_owned(), value.parse::<f64>().unwrap_or(f64::NAN));
        }
        let mut expected: Vec<(String, f64)> = Vec::new();
        let flag = |value: bool| f64::from(u8::from(value));
        let mut flags = vec![
            ("gate_open".to_owned(), self.is("/gate/open")),
            ("maintenance".to_owned(), self.is("/maintenance")),
            ("turn_running".to_owned(), true),
            ("postgres_up".to_owned(), self.is("/postgres/up")),
            ("standby_streaming".to_owned(), self.is("/postgres/streaming")),
            ("replication_in_sync".to_owned(), self.is("/replication/in_sync")),
            ("replication_alone".to_owned(), self.has("/replication/alone_since")),
            ("replication_commits_wait".to_owned(), self.has("/replication/waiting_since")),
            ("failover_safe".to_owned(), self.is("/outlook/safe")),
            ("witness_points_here".to_owned(), self.at("/witness/points_at") == self.at("/node")),
            (format!("peer_reachable{{peer=\"{}\"}}", self.at("/peer/name")), self.is("/peer/reachable")),
        ];
        for state in ["open", "shut", "lapsed", "fenced", "paused"] {
            flags.push((format!("gate_state{{state=\"{state}\"}}"), self.at("/gate/state") == state));
        }
        for role in ["active", "passive", "fenced"] {
            flags.push((format!("role{{role=\"{role}\"}}"), self.at("/role") == role));
        }
        for vip in self.list("/vips") {
            let address = text_at(vip, "/address");
            flags.push((format!("vip_bound{{address=\"{address}\"}}"), vip["bound"] == true));
            flags.push((format!("vip_conflict{{address=\"{address}\"}}"), !vip["conflict"].is_null()));
        }
        for row in self.list("/nodes") {
            let name = text_at(row, "/name");
            flags.push((format!("node_up{{node=\"{name}\"}}"), row["status"] == "up"));
            flags.push((format!("node_attached{{node=\"{name}\"}}"), row["attached"] == true));
            let delay = format!("replication_delay_bytes{{node=\"{name}\"}}");
            match row["replication_delay_bytes"].as_f64() {
                Some(bytes) => expected.push((delay, bytes)),
                None => ensure!(!figures.contains_key(&delay), "{delay} of a node whose delay is not known"),
            }
        }
        for server in self.list("/witness/servers") {
            for word in ["here", "elsewhere", "nothing", "silent"] {
                let key = format!("witness_verdict{{server=\"{}\",verdict=\"{word}\"}}", text_at(server, "/server"));
                flags.push((key, server["verdict"] == word));
            }
        }
        expected.extend(flags.into_iter().map(|(key, value)| (key, flag(value))));
        for (key, pointer) in [("epoch", "/epoch"), ("sessions", "/gate/sessions"), ("fence_number", "/journal/fence")]
        {
            expected.push((key.to_owned(), self.status.pointer(pointer).and_then(Value::as_f64).unwrap_or(f64::NAN)));
        }
        let wrong: Vec<String> = expected
            .iter()
            .filter(|(key, value)| figures.get(key).is_none_or(|told| (told - value).abs() > 1e-9))
            .map(|(key, value)| format!("{key} is {:?}, not {value}", figures.get(key)))
            .collect();
        ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        let kind = self.at("/procedure/kind");
        let running: Vec<&String> = figures.keys().filter(|key| key.starts_with("procedure_running")).collect();
        ensure!(running.len() == usize::from(!kind.is_empty()), "{running:?}, and {kind:?} is under way");
        ensure!(running.iter().all(|key| key.contains(&kind)), "{running:?}, and {kind} is under way");
        let lost = figures.get("failover_lost_transactions").copied();
        let told = self.status.pointer("/outlook/lost").and_then(Value::as_f64);
        ensure!(lost == told, "failover_lost_transactions {lost:?}, and the outlook says {told:?}");
        // Milliseconds pass between the two; that there is one at all does not.
        let left = figures.get("lease_remaining_seconds").copied().unwrap_or(f64::NAN);
        ensure!(!self.is("/gate/open") || left > 0.0, "open, and the lease has {left} s left");
        Ok(())
    }

    fn people(&self) -> Outcome {
        let page = &self.page;
        let says = |part: &str| -> Outcome {
            ensure!(page.contains(part), "no {part:?} in: {page}");
            Ok(())
        };
        let (node, state, reason) = (self.at("/node"), self.at("/gate/state"), self.at("/gate/reason"));
        says(&format!("{node}, epoch {}", self.at("/epoch")))?;
        says(&if reason.is_empty() { format!("gate {state} ") } else { format!("gate {state}: {reason}") })?;
        says(&format!("{} sessions at this gate", self.at("/gate/sessions")))?;
        says(&self.at("/outlook/text"))?;
        let safe = page.contains("✓ Nothing would be lost.");
        ensure!(safe == self.is("/outlook/safe"), "safe: {safe}");
        match self.has("/next") {
            true => {
                says(&format!("on {}: {} {}", self.at("/next/on"), self.at("/next/command"), self.at("/next/why")))?
            }
            false => says("What to do next Nothing.")?,
        }
        let switching = self.has("/procedure") && !self.is("/gate/open") && self.at("/procedure/kind") != "rejoin";
        if switching {
            says(&format!("{} is under way on {node}: {}", self.at("/procedure/kind"), self.at("/procedure/step")))?;
        } else {
            says(self.text.lines().next().unwrap_or("no headline"))?;
        }
        let names = page.contains("✓ synchronous, in sync");
        ensure!(names == self.is("/replication/in_sync"), "in sync: {names}");
        let alone = page.contains("✗ alone since");
        ensure!(alone == (self.has("/replication/alone_since") && !names), "alone: {alone}");
        ensure!(page.contains("maintenance") || !self.is("/maintenance"), "maintenance is not shown");
        if self.has("/witness/points_at") {
            says(&format!("the record names {}", self.at("/witness/points_at")))?;
        }
        for server in self.list("/witness/servers") {
            let mark = match text_at(server, "/verdict").as_str() {
                "here" => "✓ here",
                "elsewhere" => "→ elsewhere",
                "nothing" => "✗ nothing",
                _ => "… silent",
            };
            says(&format!("{} {mark}", text_at(server, "/server")))?;
        }
        let peer = self.at("/peer/name");
        match self.is("/peer/reachable") {
            true => {
                says(&format!("peer {peer}: ✓ answers, {}, epoch {}", self.at("/peer/role"), self.at("/peer/epoch")))?
            }
            false => says(&format!("peer {peer}: ✗ does not answer"))?,
        }
        for vip in self.list("/vips") {
            match (vip["conflict"].as_str(), vip["bound"] == true) {
                (Some(mac), _) => says(&format!("CONFLICT: the machine with MAC {mac}"))?,
                (None, true) => says(&format!("✓ held by {node} (here)"))?,
                (None, false) => says(&format!("{}: not bound here", text_at(vip, "/address")))?,
            }
        }
        says(if self.is("/postgres/up") { "PostgreSQL here ✓ up" } else { "PostgreSQL here ✗ down" })?;
        for row in self.list("/nodes") {
            let own = if row["name"] == self.status["node"] { " (this one)" } else { "" };
            let up = if row["status"] == "up" { "✓ up" } else { "✗ down" };
            let place = format!("{}:{}", text_at(row, "/hostname"), row["port"]);
            let service = if row["attached"] == true { "✓ yes" } else { "✗ no" };
            let words: Vec<&str> =
                ["replication_state", "sync_state"].iter().filter_map(|key| row[*key].as_str()).collect();
            let (name, role) = (text_at(row, "/name"), text_at(row, "/role"));
            says(format!("{name}{own} {place} {up} {role} {service} {}", words.join(", ")).trim_end())?;
        }
        Ok(())
    }

    fn balancers(&self) -> Outcome {
        let attached = self
            .list("/nodes")
            .iter()
            .find(|row| row["name"] == self.status["node"])
            .is_none_or(|row| row["attached"] == true);
        for (path, (code, text)) in &self.pages {
            let good = match *path {
                "/health" => true,
                "/replica" | "/read-only" => self.is_streaming_standby() && attached,
                _ => self.is("/gate/open"),
            };
            ensure!((*code == 200) == good && [200, 503].contains(code), "{path} answers {code}: {text}");
            if *path == "/active" {
                let why = if good { format!("epoch {}", self.at("/epoch")) } else { self.at("/gate/reason") };
                ensure!(text.contains(&why), "{path} says {text:?}, not {why:?}");
            }
        }
        Ok(())
    }

    fn shown(&self) -> Outcome {
        let open = self.is("/gate/open");
        match &self.shown {
            Some(shown) => {
                let told = lines(&self.columns);
                ensure!(
                    shown.lines().map(|line| line.replace('|', ",")).eq(told.iter().map(ToString::to_string)),
                    "SHOW pool_nodes {shown:?}, and /pool_nodes {told:?}"
                );
            }
            None => ensure!(!open, "the gate is open, and SHOW pool_nodes is not answered"),
        }
        let Some((items, lease)) = &self.console else {
            ensure!(!open, "the gate is open, and the console does not answer");
            return Ok(());
        };
        let item = |name: &str| items.get(name).cloned().unwrap_or_else(|| "(missing)".to_owned());
        let headline = self.text.lines().next().unwrap_or_default();
        let peer = if self.is("/peer/reachable") { self.at("/peer/role") } else { "does not answer".to_owned() };
        let next = match self.has("/next") {
            true => format!("on {}: {}", self.at("/next/on"), self.at("/next/command")),
            false => String::new(),
        };
        let expected = [
            ("summary", headline.to_owned()),
            ("node", self.at("/node")),
            ("role", self.at("/role")),
            ("epoch", self.at("/epoch")),
            ("gate.open", open.to_string()),
            ("gate.state", self.at("/gate/state")),
            ("witness.points_at", self.at("/witness/points_at")),
            ("peer", format!("{} {peer}", self.at("/peer/name"))),
            ("replication.mode", self.at("/replication/mode")),
            ("replication.in_sync", self.at("/replication/in_sync")),
            ("replication.alone_since", self.at("/replication/alone_since")),
            ("maintenance", self.at("/maintenance")),
            ("outlook.safe", self.at("/outlook/safe")),
            ("outlook", self.at("/outlook/text")),
            ("next", next),
            ("advice", self.at("/advice")),
        ];
        for (name, value) in expected {
            ensure!(item(name) == value, "SHOW STATUS: {name} is {:?}, not {value:?}", item(name));
        }
        let expected = [
            (0, self.at("/node")),
            (1, self.at("/gate/state")),
            (2, if open { "t" } else { "f" }.to_owned()),
            (4, self.at("/gate/reason")),
            (5, self.at("/epoch")),
            (6, self.at("/witness/points_at")),
            (8, self.at("/peer/name")),
            (9, if self.is("/peer/reachable") { "t" } else { "f" }.to_owned()),
        ];
        for (column, value) in expected {
            let cell = lease.get(column);
            ensure!(cell == Some(&value), "SHOW LEASE: column {column} is {cell:?}, not {value:?}");
        }
        Ok(())
    }
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().filter(|line| !line.is_empty()).collect()
}

/// Rows without what counts on.
fn essence_of_rows(rows: &Value) -> Value {
    essence(&serde_json::json!({ "nodes": rows }))["nodes"].clone()
}
