//! Distributions as lines of a Markdown table, ready for docs/safety.md.

/// Of a list of milliseconds, by nearest rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Percentiles {
    n: usize,
    of: [i64; 5],
}

impl Percentiles {
    pub fn of(mut values: Vec<i64>) -> Percentiles {
        values.sort_unstable();
        let rank = |percent: usize| {
            let index = (values.len() * percent).div_ceil(100).max(1) - 1;
            values.get(index).copied().unwrap_or_default()
        };
        Percentiles { n: values.len(), of: [rank(0), rank(50), rank(90), rank(99), rank(100)] }
    }

    pub fn p99(&self) -> i64 {
        self.of[3]
    }

    pub fn max(&self) -> i64 {
        self.of[4]
    }
}

pub fn table(lines: &[(String, Percentiles)]) -> String {
    let mut text = "| ms | n | least | p50 | p90 | p99 | most |\n|---|---|---|---|---|---|---|".to_owned();
    for (name, Percentiles { n, of: [least, p50, p90, p99, most] }) in lines {
        text.push_str(&format!("\n| {name} | {n} | {least} | {p50} | {p90} | {p99} | {most} |"));
    }
    text
}
