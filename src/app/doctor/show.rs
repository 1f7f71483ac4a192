//! The report for people, worst first with the remedy below and what it all means at the end, and for programs; and
//! what is still waited for, on a terminal.

use super::checks::{self, Then};
use super::compare::days;
use super::gather::Facts;
use super::sheet::Sheet;
use super::{Level, Report};
use crate::app::render::{Style, clean};
use crate::base::config::Node;
use serde_json::json;
use std::cell::RefCell;
use std::io::{IsTerminal, Write};

/// Where a remedy begins.
const INDENT: &str = "      ";
/// Checks named in the last line for each consequence.
const NAMED: usize = 4;

/// One line on a terminal that says what is still looked at.
pub(super) struct Progress {
    shown: bool,
    waiting: RefCell<Vec<String>>,
}

impl Progress {
    pub(super) fn new(quiet: bool) -> Progress {
        Progress { shown: !quiet && std::io::stderr().is_terminal(), waiting: RefCell::default() }
    }

    /// Waits for one part, which is named while it lasts.
    pub(super) async fn step<T>(&self, name: &str, part: impl Future<Output = T>) -> T {
        self.waiting.borrow_mut().push(name.to_owned());
        self.draw();
        let done = part.await;
        self.waiting.borrow_mut().retain(|waiting| waiting != name);
        self.draw();
        done
    }

    fn draw(&self) {
        if self.shown {
            let names = clean(&self.waiting.borrow().join(", "));
            let _not_worth_failing = write!(std::io::stderr(), "\r\x1b[Klooking: {names}");
        }
    }

    /// Takes the line away.
    pub(super) fn end(&self) {
        if self.shown {
            let _not_worth_failing = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

pub(super) fn json(report: &Report, sheets: &[Sheet], node: &Node) -> String {
    let unchecked: Vec<_> = report.unchecked.iter().map(|(what, why)| json!({"what": what, "why": why})).collect();
    let nodes: Vec<_> =
        sheets.iter().map(|sheet| json!({"node": sheet.node, "role": sheet.role, "version": sheet.version})).collect();
    let last = |of: fn(&Sheet) -> Option<&crate::engine::status::EventRow>| {
        let rows = sheets.iter().filter_map(|sheet| Some((sheet, of(sheet)?)));
        rows.max_by_key(|(_, row)| row.at.clone())
            .map(|(sheet, row)| json!({"node": sheet.node, "at": row.at, "text": row.text}))
    };
    let findings: Vec<_> = report
        .findings
        .iter()
        .map(|f| {
            let (about, why) = checks::of(&f.check).map(|check| (check.what, check.why)).unzip();
            json!({"node": f.node, "check": f.check, "severity": f.level, "what": f.text, "remedy": f.remedy,
                   "about": about, "why": why})
        })
        .collect();
    let all = json!({
        "node": node.name.as_str(), "nodes": nodes, "findings": findings, "checked": report.checked,
        "unchecked": unchecked, "last_drill": last(|sheet| sheet.last_drill.as_ref()),
        "last_promotion": last(|sheet| sheet.last_promotion.as_ref()), "summary": summary(report),
    });
    format!("{all}\n")
}

pub(super) fn text(report: &Report, facts: &Facts, sheets: &[Sheet], node: &Node, style: Style) -> String {
    let mut out = String::new();
    let count = |level| report.findings.iter().filter(|finding| finding.level == level).count();
    let role = |sheet: &Sheet| sheet.role.clone().unwrap_or_else(|| "its daemon does not answer".to_owned());
    let nodes: Vec<String> =
        sheets.iter().map(|sheet| format!("{} ({})", clean(&sheet.node), clean(&role(sheet)))).collect();
    let (critical, warnings, advice) = (count(Level::Critical), count(Level::Warning), count(Level::Advice));
    let nodes = nodes.join(", ");
    out.push_str(&format!("{nodes}: {critical} critical, {warnings} warnings, {advice} pieces of advice\n"));
    if facts.status.is_err() {
        out.push_str("the daemon of this node does not answer: what only it knows is not checked\n");
    }
    let mut level = None;
    for finding in &report.findings {
        if level != Some(finding.level) {
            level = Some(finding.level);
            out.push_str(&format!("\n{}\n", head(finding.level, style)));
        }
        out.push_str(&format!("  {} {}: {}\n", clean(&finding.node), clean(&finding.check), clean(&finding.text)));
        let mut lines = finding.remedy.lines();
        if let Some(first) = lines.next() {
            out.push_str(&format!("    -> {}\n", clean(first)));
        }
        lines.for_each(|line| out.push_str(&format!("{INDENT}   {}\n", clean(line))));
    }
    if !report.unchecked.is_empty() {
        out.push_str("\nnot checked\n");
        for (what, why) in &report.unchecked {
            out.push_str(&format!("  {}: {}\n", clean(what), clean(why)));
        }
    }
    out.push_str(&format!("\n{} things were checked, from {}", report.checked.len(), node.name));
    out.push_str(&past(sheets, crate::io::clock::wall()));
    out.push('\n');
    out.push_str(&clean(&summary(report)));
    out.push('\n');
    out
}

/// `; last drill 12 days ago, last promotion today`
fn past(sheets: &[Sheet], now: jiff::Timestamp) -> String {
    let newest = |of: fn(&Sheet) -> Option<&crate::engine::status::EventRow>| {
        sheets.iter().filter_map(of).map(|row| row.at.clone()).max().and_then(|at| days(&at, now))
    };
    let ago = |days: i64| match days {
        0 => "today".to_owned(),
        1 => "yesterday".to_owned(),
        _ => format!("{days} days ago"),
    };
    let mut words = Vec::new();
    if let Some(days) = newest(|sheet| sheet.last_drill.as_ref()) {
        words.push(format!("last drill {}", ago(days)));
    }
    if let Some(days) = newest(|sheet| sheet.last_promotion.as_ref()) {
        words.push(format!("last promotion {}", ago(days)));
    }
    if words.is_empty() { String::new() } else { format!("; {}", words.join(", ")) }
}

/// The last line: what a failover would be now.
pub(super) fn summary(report: &Report) -> String {
    let counted: Vec<_> = report.findings.iter().filter(|finding| finding.level < Level::Advice).collect();
    let advice = report.findings.len() - counted.len();
    let then = |check: &str| checks::of(check).map_or(Then::Hinders, |check| check.then);
    let mut parts = Vec::new();
    for (kind, words) in [
        (Then::Fails, "might not work"),
        (Then::Loses, "may lose acknowledged writes"),
        (Then::Passes, "leaves a way past the gate"),
        (Then::Hinders, "takes longer, or makes the way back harder"),
    ] {
        let mut names: Vec<&str> = Vec::new();
        for finding in counted.iter().filter(|finding| then(&finding.check) == kind) {
            if !names.contains(&finding.check.as_str()) {
                names.push(&finding.check);
            }
        }
        if !names.is_empty() {
            let more = if names.len() > NAMED { ", ..." } else { "" };
            names.truncate(NAMED);
            parts.push(format!("{words} ({}{more})", names.join(", ")));
        }
    }
    let unseen = match report.unchecked.iter().find_map(|(what, _)| what.strip_prefix("all of ")) {
        Some(node) => format!("; {node} could not be looked at"),
        None => String::new(),
    };
    let told = match counted.len() {
        0 => "no finding".to_owned(),
        1 => "1 finding".to_owned(),
        many => format!("{many} findings"),
    };
    let further = if advice == 0 { String::new() } else { format!(" and {advice} of advice") };
    match parts.is_empty() {
        true if unseen.is_empty() => format!("{told}{further}: a failover now would work"),
        true => format!("{told}{further}{unseen}"),
        false => format!("{told}{further}: a failover now {}{unseen}", parts.join(", and ")),
    }
}

fn head(level: Level, style: Style) -> String {
    let (word, code) = match level {
        Level::Critical => ("CRITICAL", "31"),
        Level::Warning => ("WARNING", "33"),
        Level::Advice => ("ADVICE", "2"),
    };
    if style.color { format!("\x1b[{code}m{word}\x1b[0m") } else { word.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_says_what_a_failover_would_be() {
        let said = |found: &[(Level, &'static str)], unseen: bool| {
            let mut report = Report::default();
            found.iter().for_each(|(level, check)| report.find(*level, check, "x", "y"));
            if unseen {
                report.unchecked("all of midna", "silence");
            }
            summary(&report)
        };
        assert_eq!(said(&[], false), "no finding: a failover now would work");
        assert_eq!(
            said(&[(Level::Advice, "pair.drill")], false),
            "no finding and 1 of advice: a failover now would work"
        );
        assert_eq!(
            said(
                &[
                    (Level::Critical, "dns.update"),
                    (Level::Warning, "commit.lowered"),
                    (Level::Warning, "rejoin.rewind")
                ],
                false
            ),
            "3 findings: a failover now might not work (dns.update), and may lose acknowledged writes \
             (commit.lowered), and takes longer, or makes the way back harder (rejoin.rewind)"
        );
        assert_eq!(said(&[], true), "no finding; midna could not be looked at");
        assert!(
            said(&[(Level::Warning, "peer.unasked")], true).ends_with("(peer.unasked); midna could not be looked at")
        );
    }
}
