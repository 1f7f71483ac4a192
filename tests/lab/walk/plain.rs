//! A page as its reader without script and style has it.

/// What stands on a page for a reader without script, style and plots: one line.
pub fn plain(html: &str) -> String {
    let mut text = String::new();
    let mut rest = html;
    while let Some((before, tag)) = rest.split_once('<') {
        text.push_str(before);
        let (tag, after) = tag.split_once('>').unwrap_or((tag, ""));
        let name = tag.split_whitespace().next().unwrap_or_default().trim_start_matches('/');
        let hidden =
            ["script", "style", "svg"].into_iter().find(|hidden| *hidden == tag.split(' ').next().unwrap_or(""));
        rest = match hidden {
            Some(hidden) => after.split_once(&format!("</{hidden}>")).map_or("", |(_, after)| after),
            None => after,
        };
        if !["strong", "span", "time", "code", "em"].contains(&name) {
            text.push(' ');
        }
    }
    text.push_str(rest);
    let entities = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&#39;", "'"),
        ("&#34;", "\""),
        ("&#60;", "<"),
        ("&#62;", ">"),
    ];
    let text = entities.into_iter().fold(text, |text, (from, to)| text.replace(from, to));
    let text = text.replace("&#38;", "&").replace("&amp;", "&");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
