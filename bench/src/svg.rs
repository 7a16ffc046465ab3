//! Plots, as SVG that can be read without a program: bars with intervals, and curves of percentiles.

use std::fmt::Write as _;

use crate::{report::number, stats::Median};

/// One bar.
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) value: Option<Median>,
    /// What is written where there is no value.
    pub(crate) absent: &'static str,
}

const WIDTH: f64 = 860.0;
const LEFT: f64 = 290.0;
const RIGHT: f64 = 150.0;
const LINE: f64 = 16.0;
/// Characters of a caption in a line.
const CAPTION: usize = 125;

/// Horizontal bars with their intervals.
pub(crate) fn bars(title: &str, captions: &[String], unit: &str, bars: &[Bar]) -> String {
    let row = 28.0;
    let (mut body, top) = heading(title, captions);
    let most = bars
        .iter()
        .filter_map(|bar| bar.value.map(|value| value.high))
        .fold(0.0, f64::max);
    let scale = (WIDTH - LEFT - RIGHT) / if most > 0.0 { most } else { 1.0 };
    for (index, bar) in bars.iter().enumerate() {
        let y = top + row * index as f64;
        let middle = y + row / 2.0;
        text(&mut body, LEFT - 8.0, middle + 4.0, "end", &bar.name);
        let Some(value) = bar.value else {
            text(&mut body, LEFT + 4.0, middle + 4.0, "start", bar.absent);
            continue;
        };
        let length = value.value * scale;
        let _ = writeln!(
            body,
            r##"<rect x="{LEFT}" y="{:.1}" width="{length:.1}" height="{:.1}" fill="{}"/>"##,
            y + 5.0,
            row - 10.0,
            if bar.name.contains("rota") {
                "#b5541c"
            } else {
                "#7d94a8"
            },
        );
        let (low, high) = (LEFT + value.low * scale, LEFT + value.high * scale);
        let _ = writeln!(
            body,
            r##"<path d="M{low:.1} {middle:.1}H{high:.1}M{low:.1} {0:.1}v8M{high:.1} {0:.1}v8" stroke="#222" fill="none"/>"##,
            middle - 4.0
        );
        let label = format!(
            "{} [{}, {}]",
            number(value.value),
            number(value.low),
            number(value.high)
        );
        text(
            &mut body,
            high.max(LEFT + length) + 6.0,
            middle + 4.0,
            "start",
            &label,
        );
    }
    let bottom = top + row * bars.len() as f64;
    let _ = writeln!(
        body,
        r##"<path d="M{LEFT} {top:.1}V{bottom:.1}" stroke="#222"/>"##
    );
    text(&mut body, LEFT, bottom + 18.0, "start", unit);
    document(&body, bottom + 30.0)
}

/// Curves of percentiles, both axes logarithmic: towards the right it gets rare.
pub(crate) fn curves(
    title: &str,
    captions: &[String],
    unit: &str,
    quantiles: &[f64],
    lines: &[(String, Vec<f64>)],
) -> String {
    const COLOURS: [&str; 8] = [
        "#7d94a8", "#3c6e9f", "#5b8a3a", "#8a6fb0", "#b5541c", "#d08a2e", "#222222", "#a33d5e",
    ];
    let (mut body, top) = heading(title, captions);
    let (left, height) = (80.0, 300.0);
    let right = WIDTH - 40.0;
    let bottom = top + height;
    let values = || {
        lines
            .iter()
            .flat_map(|(_, line)| line)
            .copied()
            .filter(|value| *value > 0.0)
    };
    let low = values()
        .fold(f64::INFINITY, f64::min)
        .max(0.1)
        .log10()
        .floor();
    let high = values().fold(1.0, f64::max).log10().ceil().max(low + 1.0);
    // From the median on; the last is the worst of all.
    let shown: Vec<usize> = (0..quantiles.len())
        .filter(|index| quantiles[*index] >= 0.5)
        .collect();
    let place =
        |position: usize| left + (right - left) * position as f64 / (shown.len() - 1).max(1) as f64;
    let y = |value: f64| bottom - height * (value.max(0.1).log10() - low) / (high - low);
    let mut decade = low;
    while decade <= high {
        let (value, level) = (10f64.powf(decade), y(10f64.powf(decade)));
        let _ = writeln!(
            body,
            r##"<path d="M{left} {level:.1}H{right}" stroke="#ddd"/>"##
        );
        text(&mut body, left - 8.0, level + 4.0, "end", &number(value));
        decade += 1.0;
    }
    for (position, index) in shown.iter().enumerate() {
        let name = match quantiles[*index] {
            1.0 => "max".to_owned(),
            part => format!("p{}", (part * 1e6).round() / 1e4),
        };
        text(&mut body, place(position), bottom + 18.0, "middle", &name);
    }
    text(&mut body, left - 8.0, top - 8.0, "end", unit);
    for (index, (name, line)) in lines.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let points: Vec<_> = shown
            .iter()
            .enumerate()
            .filter_map(|(position, at)| {
                Some(format!("{:.1},{:.1}", place(position), y(*line.get(*at)?)))
            })
            .collect();
        let wide = if name.contains("rota") { 3 } else { 1 };
        let _ = writeln!(
            body,
            r##"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="{wide}"/>"##,
            points.join(" ")
        );
        let key = bottom + 40.0 + LINE * index as f64;
        let _ = writeln!(
            body,
            r##"<path d="M{left} {:.1}h30" stroke="{colour}" stroke-width="{wide}"/>"##,
            key - 4.0
        );
        text(&mut body, left + 38.0, key, "start", name);
    }
    document(&body, bottom + 50.0 + LINE * lines.len() as f64)
}

fn heading(title: &str, captions: &[String]) -> (String, f64) {
    let mut body = String::new();
    let _ = writeln!(
        body,
        r##"<text x="16" y="26" font-size="16" font-weight="bold">{}</text>"##,
        escape(title)
    );
    let mut y = 46.0;
    for line in captions.iter().flat_map(|caption| wrap(caption)) {
        let _ = writeln!(
            body,
            r##"<text x="16" y="{y}" font-size="11" fill="#555">{}</text>"##,
            escape(&line)
        );
        y += 14.0;
    }
    (body, y + 20.0)
}

fn wrap(caption: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in caption.split(' ') {
        let line = lines.last_mut().map_or(0, |line| line.chars().count());
        if line > 0 && line + word.chars().count() >= CAPTION {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

fn text(body: &mut String, x: f64, y: f64, anchor: &str, what: &str) {
    let _ = writeln!(
        body,
        r##"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"##,
        escape(what)
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn document(body: &str, height: f64) -> String {
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0}" font-family="sans-serif" font-size="12" fill="#222">
<rect width="100%" height="100%" fill="#fff"/>
{body}</svg>
"##
    )
}
