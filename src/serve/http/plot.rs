//! A small plot as SVG, drawn here, so that it is seen without script: the last hour, one or two lines.
//!
//! What it is NOT: it knows no colour; the style sheet does. Words stand beside the drawing, in HTML, so that it may be
//! stretched to any width.

use std::fmt::Write;

/// The whole width, in seconds.
pub(super) const SPAN: u64 = 3600;
const WIDTH: f64 = 600.0;
const HEIGHT: f64 = 80.0;
/// A hole longer than this in the samples is shown as one.
const HOLE: u64 = 25;

/// One line: what it is called, and its points (seconds since the start, value), oldest first. What is not known has no
/// point.
pub(super) struct Line {
    pub(super) name: &'static str,
    pub(super) points: Vec<(u64, f64)>,
}

/// What is drawn.
pub(super) struct Plot<'a> {
    pub(super) title: &'static str,
    /// A value for people, with its unit.
    pub(super) human: &'a dyn Fn(f64) -> String,
    /// The time at the right end, in seconds since the start.
    pub(super) end: u64,
    /// Time of day at the left end, in the middle and at the right end.
    pub(super) times: [String; 3],
    /// 1024 for bytes, else 1: of what the top is a round number.
    pub(super) unit: f64,
    /// Whose highest value is at least this is not drawn larger than it is.
    pub(super) least_top: f64,
    pub(super) lines: Vec<Line>,
}

/// The next of 1, 2, 5, 10, 20, ... 1000, in the greatest unit that fits: of bytes KiB, MiB, ...
fn top(highest: f64, least: f64, unit: f64) -> f64 {
    let wanted = highest.max(least).max(f64::MIN_POSITIVE);
    let mut size = 1.0;
    while unit > 1.0 && wanted > size * 1000.0 {
        size *= unit;
    }
    let decade = 10_f64.powf((wanted / size).log10().floor()) * size;
    [1.0, 2.0, 5.0, 10.0].map(|step| step * decade).into_iter().find(|top| *top >= wanted).unwrap_or(wanted)
}

impl Plot<'_> {
    /// As a `figure`.
    pub(super) fn svg(&self) -> String {
        let values = self.lines.iter().flat_map(|line| line.points.iter().map(|(_, value)| *value));
        let top = top(values.fold(0.0, f64::max), self.least_top, self.unit);
        let said: Vec<String> = self.lines.iter().map(|line| self.said(line)).collect();
        let said = said.join("; ");
        let mut out = format!(
            "<figure><figcaption><b>{}</b><span>{said}</span></figcaption><div class=\"plot\"><span \
             class=\"top\">{}</span><span class=\"zero\">0</span><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{}, the last hour: {said}\">\
             <path class=\"grid\" d=\"M0 1H{WIDTH}M0 {}H{WIDTH}\"/>",
            self.title,
            (self.human)(top),
            self.title,
            HEIGHT / 2.0
        );
        for (index, line) in self.lines.iter().enumerate() {
            if index == 0 {
                let _a_string_takes_all = write!(out, "<path class=\"area\" d=\"{}\"/>", self.path(line, top, true));
            }
            let class = if index == 0 { "" } else { " class=\"second\"" };
            let _a_string_takes_all = write!(out, "<path{class} d=\"{}\"/>", self.path(line, top, false));
        }
        let [from, middle, to] = &self.times;
        let _a_string_takes_all = write!(
            out,
            "</svg></div><div class=\"axis\"><span>{from}</span><span>{middle}</span><span>{to}</span></div></figure>"
        );
        out
    }

    /// `now 12 KiB, at most 3.1 MiB`
    fn said(&self, line: &Line) -> String {
        let name = if line.name.is_empty() { String::new() } else { format!("{} ", line.name) };
        let Some((at, last)) = line.points.last() else { return format!("{name}not known yet") };
        let most = line.points.iter().map(|(_, value)| *value).fold(0.0, f64::max);
        let now = if self.end.saturating_sub(*at) <= HOLE { "now" } else { "last" };
        format!("{name}{now} {}, at most {}", (self.human)(*last), (self.human)(most))
    }

    fn path(&self, line: &Line, top: f64, filled: bool) -> String {
        let mut out = String::new();
        let mut before: Option<u64> = None;
        let mut first = 0.0;
        for (t, value) in &line.points {
            let (x, y) = (self.x(*t), HEIGHT - 1.0 - value / top * (HEIGHT - 2.0));
            let hole = before.is_none_or(|before| t - before > HOLE);
            if hole {
                if filled && before.is_some() {
                    let last = before.map_or(x, |t| self.x(t));
                    let _a_string_takes_all = write!(out, "L{last:.1} {HEIGHT}L{first:.1} {HEIGHT}Z");
                }
                first = x;
            }
            let verb = if hole { 'M' } else { 'L' };
            let _a_string_takes_all = write!(out, "{verb}{x:.1} {y:.1}");
            before = Some(*t);
        }
        if let Some(last) = before {
            if filled {
                let _a_string_takes_all = write!(out, "L{:.1} {HEIGHT}L{first:.1} {HEIGHT}Z", self.x(last));
            } else if line.points.len() == 1 {
                // A point alone is a dot.
                out.push_str("h0.1");
            }
        }
        out
    }

    fn x(&self, t: u64) -> f64 {
        let ago = u32::try_from(self.end.saturating_sub(t).min(SPAN)).map_or(0.0, f64::from);
        WIDTH - ago / 3600.0 * WIDTH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_is_a_round_number() {
        let kib = 1024.0;
        let table = [
            (0.0, 1.0, 1.0, 1.0),
            (3.0, 1.0, 1.0, 5.0),
            (5.0, 1.0, 1.0, 5.0),
            (5.1, 1.0, 1.0, 10.0),
            (1_234_567.0, 1.0, 1.0, 2e6),
            (0.0, kib, kib, kib),
            (300.0 * kib, kib, kib, 500.0 * kib),
            (1010.0 * kib, kib, kib, kib * kib),
            (3.0 * kib * kib, kib, kib, 5.0 * kib * kib),
        ];
        for (highest, least, unit, expected) in table {
            assert!((top(highest, least, unit) - expected).abs() < 1e-6 * expected, "{highest}");
        }
    }

    #[test]
    fn holes_are_holes_and_words_stand_beside() {
        let plot = Plot {
            title: "lag",
            human: &|value| format!("{value:.0} B"),
            end: 3600,
            times: ["a".into(), "b".into(), "c".into()],
            unit: 1.0,
            least_top: 10.0,
            lines: vec![Line { name: "", points: vec![(0, 0.0), (10, 10.0), (1800, 5.0), (3600, 0.0)] }],
        };
        let svg = plot.svg();
        assert!(svg.contains("d=\"M0.0 79.0L1.7 1.0M300.0 40.0M600.0 79.0\""), "{svg}");
        assert!(svg.contains("now 0 B, at most 10 B") && svg.contains(">10 B</span>"), "{svg}");
        let none = Plot { lines: vec![Line { name: "", points: vec![] }], ..plot };
        assert!(none.svg().contains("not known yet") && none.svg().contains("d=\"\""));
    }
}
