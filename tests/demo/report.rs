//! The client's log, and the figures read from it. The only moment that is not the client's own is the zero: when the
//! plug was pulled.

use super::harness::client::WriterLog;
use super::harness::sys::{Outcome, ms};
use super::harness::watch::Look;
use portcullis::base::time::{Duration, Instant};
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::Path;

/// The longest outage the demo accepts: W (3.26 s with the demo's 3 s lease), the 2 s of asking a peer that has just
/// fallen silent, the 1.5 s that a promote may take, and slack for a small machine.
const OUTAGE_LIMIT: Duration = Duration::from_secs(10);

/// A look at the record: addresses of the service and text of the marker.
type RecordLook = Look<Option<(Vec<String>, String)>>;

/// All that the client host saw.
#[derive(Debug)]
pub struct ClientLog {
    /// When the plug was pulled.
    pub zero: Instant,
    pub writer: WriterLog,
    pub record: Vec<RecordLook>,
    /// Looks at `/active` of both nodes.
    pub pages: [Vec<Look<Option<bool>>>; 2],
    pub names: [&'static str; 2],
    pub gates: [SocketAddr; 2],
}

impl ClientLog {
    /// Writes it as text, one line a sight, times in milliseconds from the zero. Returns the path as text.
    pub fn write(&self, path: &Path) -> Outcome<String> {
        let mut lines: Vec<(Instant, String)> = Vec::new();
        lines
            .extend(self.writer.acks.iter().map(|ack| (ack.at, format!("acknowledged {} through {}", ack.n, ack.via))));
        lines.extend(self.writer.errors.iter().map(|(at, error)| (*at, format!("error: {error}"))));
        lines.extend(self.writer.sessions.iter().map(|(at, gate)| (*at, format!("session opened to {gate}"))));
        lines.extend(changes(&self.record, |seen| match seen {
            Some((addresses, marker)) => format!("record: A {} marker \"{marker}\"", addresses.join(" ")),
            None => "record: no answer".to_owned(),
        }));
        for (name, looks) in self.names.iter().zip(&self.pages) {
            lines.extend(changes(looks, |seen| match seen {
                Some(true) => format!("/active on {name}: 200"),
                Some(false) => format!("/active on {name}: 503"),
                None => format!("/active on {name}: no answer"),
            }));
        }
        lines.sort_by_key(|(at, _)| *at);
        let mut text = String::from("# milliseconds from the moment the plug was pulled; what the client saw\n");
        for (at, line) in lines {
            let _ = writeln!(text, "{:+8} {line}", ms(self.zero, at));
        }
        std::fs::write(path, text)?;
        Ok(path.display().to_string())
    }

    fn record_moved(&self) -> Option<Instant> {
        let word = format!("active={}", self.names[1]);
        let names_it = |marker: &str| marker.split(' ').any(|part| part == word);
        let found = self.record.iter().find(|look| look.seen.as_ref().is_some_and(|(_, marker)| names_it(marker)));
        found.map(|look| look.answered)
    }

    fn last_ack_through(&self, gate: SocketAddr) -> Option<Instant> {
        self.writer.acks.iter().rev().find(|ack| ack.via == gate).map(|ack| ack.at)
    }

    fn first_ack_through(&self, gate: SocketAddr) -> Option<Instant> {
        self.writer.acks.iter().find(|ack| ack.via == gate && ack.at > self.zero).map(|ack| ack.at)
    }

    fn opened(&self) -> Option<Instant> {
        let looks = self.pages[1].iter();
        looks.filter(|look| look.answered > self.zero).find(|look| look.seen == Some(true)).map(|look| look.answered)
    }
}

/// The looks at which what was seen changed, told by `word`.
fn changes<T: PartialEq>(looks: &[Look<T>], word: impl Fn(&T) -> String) -> Vec<(Instant, String)> {
    let mut before = None;
    let mut lines = Vec::new();
    for look in looks {
        if before != Some(&look.seen) {
            lines.push((look.answered, word(&look.seen)));
            before = Some(&look.seen);
        }
    }
    lines
}

/// The end of the demo.
#[derive(Debug)]
pub struct Report {
    pub log: ClientLog,
    /// Acknowledged numbers missing on each node.
    pub lost: [usize; 2],
    /// When the promote command began and ended.
    pub promote: (Instant, Instant),
}

impl Report {
    /// Prints the figures; true when nothing was lost and the outage is within bounds.
    pub fn print(&self, probe_summary: &str, written: &str) -> bool {
        let log = &self.log;
        let [old, new] = log.names;
        let after = |moment: Option<Instant>| match moment {
            Some(moment) => format!("{:+.3} s", seconds(ms(log.zero, moment))),
            None => "never seen".to_owned(),
        };
        let (gap, from) = log.writer.longest_gap();
        let acks = log.writer.acks.len();
        let bounded = gap <= OUTAGE_LIMIT;
        let lost = self.lost[0].max(self.lost[1]);
        println!();
        println!("  what the client saw (times from the moment {old}'s plug was pulled)");
        println!("  -----------------------------------------------------------------");
        println!(
            "  gate cut            {:>12}   last acknowledgement through {old}",
            after(log.last_ack_through(log.gates[0]))
        );
        println!("  record moved        {:>12}   the marker names {new}", after(log.record_moved()));
        println!("  promoted            {:>12}   {new}'s /active answers 200", after(log.opened()));
        println!(
            "  first write         {:>12}   acknowledged through {new}",
            after(log.first_ack_through(log.gates[1]))
        );
        println!("  longest outage      {:>10.3} s   beginning at {}", gap.as_secs_f64(), after(Some(from)));
        println!(
            "  acknowledged writes {acks:>12}   {} sessions; {} attempts failed meanwhile",
            log.writer.sessions.len(),
            log.writer.errors.len()
        );
        println!("  lost writes         {lost:>12}   missing on {old} {}, on {new} {}", self.lost[0], self.lost[1]);
        println!("  promote command     {:>10.3} s   Enter to prompt", seconds(ms(self.promote.0, self.promote.1)));
        println!("  probe               {}", probe_line(probe_summary));
        println!("  client's log        {written}");
        println!();
        if lost > 0 {
            println!("  FAILED: acknowledged writes were lost.");
        }
        if !bounded {
            println!("  FAILED: the outage was longer than {} s.", OUTAGE_LIMIT.as_secs());
        }
        lost == 0 && bounded && acks > 0
    }
}

/// The prober's own summary in one line; its words as they are when they cannot be read.
fn probe_line(summary: &str) -> String {
    let Ok(value) = serde_json::from_str::<serde_json::Value>(summary) else { return summary.to_owned() };
    let number = |pointer: &str| value.pointer(pointer).and_then(serde_json::Value::as_u64);
    let parts = (number("/ticks"), number("/longest_outage_ms/update"), number("/lost_writes"));
    let (Some(ticks), Some(longest), Some(lost)) = parts else { return summary.to_owned() };
    let longest = Duration::from_millis(longest).as_secs_f64();
    format!("{ticks} ticks, longest outage of updates {longest:.3} s, lost writes {lost}")
}

/// Milliseconds as seconds, for people.
fn seconds(ms: i64) -> f64 {
    std::time::Duration::from_millis(ms.unsigned_abs()).as_secs_f64() * if ms < 0 { -1.0 } else { 1.0 }
}
