//! The report for people, worst first with the remedy below, and for programs.

use super::gather::Facts;
use super::{Level, Report};
use crate::app::render::{Style, clean};
use crate::base::ids::NodeName;
use serde_json::json;

/// Where a remedy begins.
const INDENT: &str = "      ";

pub(super) fn json(report: &Report, node: &NodeName) -> String {
    let findings: Vec<_> = report
        .findings
        .iter()
        .map(|f| json!({"level": f.level.as_str(), "area": f.area, "text": f.text, "remedy": f.remedy}))
        .collect();
    let unchecked: Vec<_> = report.unchecked.iter().map(|(what, why)| json!({"what": what, "why": why})).collect();
    let all = json!({
        "node": node.as_str(), "findings": findings, "checked": report.checked, "unchecked": unchecked
    });
    format!("{all}\n")
}

pub(super) fn text(report: &Report, facts: &Facts, node: &NodeName, style: Style) -> String {
    let mut out = String::new();
    let count = |level| report.findings.iter().filter(|finding| finding.level == level).count();
    let role = facts.status.as_ref().map_or("its daemon does not answer", |snapshot| snapshot.role.as_str());
    let (critical, warnings, advice) = (count(Level::Critical), count(Level::Warning), count(Level::Advice));
    out.push_str(&format!("{node} ({role}): {critical} critical, {warnings} warnings, {advice} pieces of advice\n"));
    let mut level = None;
    for finding in &report.findings {
        if level != Some(finding.level) {
            level = Some(finding.level);
            out.push_str(&format!("\n{}\n", head(finding.level, style)));
        }
        out.push_str(&format!("  {}: {}\n", finding.area, clean(&finding.text)));
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
    out.push_str(&format!("\n{} things were checked on {node}", report.checked.len()));
    match facts.status.as_ref().ok().and_then(|snapshot| snapshot.peer.as_ref()) {
        Some(peer) => out.push_str(&format!("; run doctor on {} as well\n", peer.name)),
        None => out.push_str("; run doctor on the other node as well\n"),
    }
    out
}

fn head(level: Level, style: Style) -> String {
    let (word, code) = match level {
        Level::Critical => ("CRITICAL", "31"),
        Level::Warning => ("WARNING", "33"),
        Level::Advice => ("ADVICE", "2"),
    };
    if style.color { format!("\x1b[{code}m{word}\x1b[0m") } else { word.to_owned() }
}
