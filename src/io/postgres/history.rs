//! Timeline histories: which timelines a cluster went through, and where two of them part (protocol-review P14: numbers
//! alone say nothing). Pure; a history file names the timelines before its own (PostgreSQL 15, section 26.3.5).

use crate::base::ids::{Lsn, TimelineId};

/// All timelines of one cluster, oldest first; the last one has no end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct History(Vec<Span>);

/// One timeline of a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) timeline: TimelineId,
    pub(super) begin: Lsn,
    /// Where the next one was forked off; `None`: this is the current one.
    pub(super) end: Option<Lsn>,
}

impl History {
    /// The ended timelines with their ends, as a history file lists them, and the current one.
    pub(super) fn new(ended: &[(TimelineId, Lsn)], current: TimelineId) -> History {
        let mut begin = Lsn(0);
        let mut spans = Vec::new();
        for (timeline, end) in ended {
            spans.push(Span { timeline: *timeline, begin, end: Some(*end) });
            begin = *end;
        }
        spans.push(Span { timeline: current, begin, end: None });
        History(spans)
    }

    pub(super) fn current(&self) -> TimelineId {
        self.0.last().map_or(TimelineId(0), |span| span.timeline)
    }

    /// The parts of it from `lsn` on.
    pub(super) fn from(&self, lsn: Lsn) -> impl Iterator<Item = Span> + '_ {
        self.0
            .iter()
            .filter(move |span| span.end.is_none_or(|end| end > lsn))
            .map(move |span| Span { begin: span.begin.max(lsn), ..*span })
    }

    /// The last timeline that both went through, and up to where they went together; `None` end: neither left it.
    /// A timeline is the same one only if it began at the same place after the same ones.
    pub(super) fn common(&self, other: &History) -> Option<Span> {
        let together = self.0.iter().zip(&other.0);
        let (mine, theirs) = together.take_while(|(a, b)| (a.timeline, a.begin) == (b.timeline, b.begin)).last()?;
        let end = match (mine.end, theirs.end) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        Some(Span { end, ..*mine })
    }
}

/// What a history file lists.
pub(super) fn parse(text: &str) -> Vec<(TimelineId, Lsn)> {
    let line = |line: &str| {
        let mut words = line.split('#').next()?.split_whitespace();
        Some((TimelineId(words.next()?.parse().ok()?), words.next()?.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// Name of a timeline's history file.
pub(super) fn file_name(timeline: TimelineId) -> String {
    format!("{:08X}.history", timeline.0)
}

/// Name of the segment that holds `lsn`.
pub(super) fn segment_name(timeline: TimelineId, lsn: Lsn, size: u64) -> String {
    let number = lsn.0 / size.max(1);
    let per_file = 0x1_0000_0000 / size.max(1);
    format!("{:08X}{:08X}{:08X}", timeline.0, number / per_file, number % per_file)
}

/// Timeline and first byte of a segment by its name; `None`: it is no segment.
pub(super) fn segment_of(name: &str, size: u64) -> Option<(TimelineId, Lsn)> {
    if name.len() != 24 || !name.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let part = |at: usize| u64::from_str_radix(name.get(at..at + 8)?, 16).ok();
    let (high, low) = (part(8)?, part(16)?);
    Some((TimelineId(u32::try_from(part(0)?).ok()?), Lsn((high << 32).checked_add(low.checked_mul(size)?)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(ended: &[(u32, u64)], current: u32) -> History {
        let ended: Vec<_> = ended.iter().map(|(t, l)| (TimelineId(*t), Lsn(*l))).collect();
        History::new(&ended, TimelineId(current))
    }

    fn parted(a: &History, b: &History) -> Option<(u32, Option<u64>)> {
        a.common(b).map(|span| (span.timeline.0, span.end.map(|lsn| lsn.0)))
    }

    #[test]
    fn histories_part_where_the_first_of_them_left() {
        let one = history(&[], 1);
        assert_eq!(parted(&one, &one), Some((1, None)));
        assert_eq!(parted(&one, &history(&[(1, 50)], 2)), Some((1, Some(50))), "the source was promoted");
        assert_eq!(parted(&history(&[(1, 50)], 2), &one), Some((1, Some(50))), "the target was");
        assert_eq!(parted(&history(&[(1, 50)], 2), &history(&[(1, 40)], 3)), Some((1, Some(40))));
        assert_eq!(parted(&history(&[(1, 50), (2, 70)], 3), &history(&[(1, 50)], 2)), Some((2, Some(70))));
    }

    #[test]
    fn p14_equal_numbers_are_not_equal_histories() {
        // Y took 3 from 2 at 70 and died; X took 3 from 2 at 60.
        let (y, x) = (history(&[(1, 50), (2, 70)], 3), history(&[(1, 50), (2, 60)], 3));
        assert_eq!(parted(&y, &x), Some((2, Some(60))));
        // The same number after different ones.
        assert_eq!(parted(&history(&[(1, 50)], 3), &history(&[(1, 50), (2, 50)], 3)), Some((1, Some(50))));
        assert_eq!(parted(&history(&[(1, 50), (2, 70)], 3), &history(&[(1, 50), (2, 70)], 3)), Some((3, None)));
    }

    #[test]
    fn history_files_and_segment_names_are_postgresqls() {
        let text = "1\t0/5000098\tno recovery target specified\n\n# made up\n2\t1/A\tx # y\n";
        assert_eq!(parse(text), [(TimelineId(1), Lsn(0x500_0098)), (TimelineId(2), Lsn(0x1_0000_000A))]);
        assert_eq!(file_name(TimelineId(26)), "0000001A.history");
        let size = 16 << 20;
        let name = segment_name(TimelineId(3), Lsn(0x16_B374_D848), size);
        assert_eq!(name, "0000000300000016000000B3");
        assert_eq!(segment_of(&name, size), Some((TimelineId(3), Lsn(0x16_B300_0000))));
        assert_eq!(segment_of("00000003.history", size), None);
        let spans: Vec<Span> = history(&[(1, 50), (2, 70)], 3).from(Lsn(60)).collect();
        assert_eq!(spans.iter().map(|s| (s.timeline.0, s.begin.0)).collect::<Vec<_>>(), [(2, 60), (3, 70)]);
    }
}
