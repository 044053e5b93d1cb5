//! Pictures of a report, as SVG elements in HTML: histograms, densities, and bars of shares.

use std::fmt::Write;

/// Easy and hard tokens: the classes of their shapes in the style sheet.
pub const GROUPS: [&str; 2] = ["easy", "hard"];

/// Inner size of a histogram in SVG's units, and the room around it for labels.
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 28.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 48.0;

/// An axis of bins of one width. What lies outside counts in the bins at its ends.
#[derive(Clone, Copy)]
pub struct Axis {
    pub low: f64,
    pub high: f64,
    pub bins: usize,
    /// Between two labels, which stand at its multiples.
    pub label_every: f64,
    pub name: &'static str,
    pub label: fn(f64) -> String,
}

impl Axis {
    /// The bin of a value; the first of a NaN, the logarithm of what rounding has left below 0.
    pub fn bin(&self, value: f64) -> usize {
        let bin = (value - self.low) / (self.high - self.low) * self.bins as f64;
        // A negative number converts to 0, and a NaN.
        (bin as usize).min(self.bins - 1)
    }

    fn edge(&self, bin: usize) -> f64 {
        self.low + (self.high - self.low) * bin as f64 / self.bins as f64
    }

    fn share(&self, value: f64) -> f64 {
        ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }

    fn labels(&self) -> impl Iterator<Item = f64> {
        let (first, last) = (self.low / self.label_every, self.high / self.label_every);
        let every = self.label_every;
        (first.ceil() as i64..=last.floor() as i64).map(move |i| i as f64 * every)
    }

    /// What a bin holds, in words.
    fn range(&self, bin: usize) -> String {
        let (from, to) = ((self.label)(self.edge(bin)), (self.label)(self.edge(bin + 1)));
        match bin {
            0 => format!("below {to}"),
            bin if bin + 1 == self.bins => format!("from {from} on"),
            _ => format!("{from} to {to}"),
        }
    }
}

/// Counts of easy and hard tokens in each bin, the hard ones on top; with a line at a value of the axis.
pub fn histogram(axis: &Axis, counts: &[[usize; 2]], line: Option<(f64, &str)>) -> String {
    let highest = counts.iter().map(|[easy, hard]| easy + hard).max().unwrap_or(0).max(1);
    let mut svg = open(LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM, axis.name);
    let step = nice_step(highest);
    for value in (0..=highest).step_by(step) {
        let y = TOP + HEIGHT * (1.0 - value as f64 / highest as f64);
        let right = LEFT + WIDTH;
        let _ =
            write!(svg, r#"<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1}" y2="{y:.1}"/>"#);
        text(&mut svg, "end", LEFT - 8.0, y + 4.0, &thousands(value));
    }
    let width = WIDTH / axis.bins as f64;
    for (bin, of_groups) in counts.iter().enumerate() {
        let mut below = 0;
        for (group, &count) in GROUPS.iter().zip(of_groups) {
            if count > 0 {
                let height = HEIGHT * count as f64 / highest as f64;
                let y = TOP + HEIGHT * (1.0 - (below + count) as f64 / highest as f64);
                let x = LEFT + width * bin as f64;
                let _ = write!(
                    svg,
                    r#"<rect class="{group}" x="{x:.2}" y="{y:.2}" width="{:.2}" height="{height:.2}"><title>{}: {} {group}</title></rect>"#,
                    width - 1.0,
                    axis.range(bin),
                    thousands(count)
                );
            }
            below += count;
        }
    }
    horizontal_labels(&mut svg, axis, LEFT, WIDTH, TOP + HEIGHT);
    if let Some((value, name)) = line {
        let x = LEFT + WIDTH * axis.share(value);
        let bottom = TOP + HEIGHT;
        let _ = write!(
            svg,
            r#"<line class="mark" x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{bottom}"><title>{name}</title></line>"#
        );
    }
    svg + "</svg>"
}

/// How many tokens of a group are in each cell, by shades of its color: `counts[y][x]`, the lowest row first.
pub fn density(group: &str, [across, up]: [&Axis; 2], counts: &[Vec<usize>]) -> String {
    const SIDE: f64 = 280.0;
    let most = counts.iter().flatten().copied().max().unwrap_or(0).max(1);
    let mut svg = open(LEFT + SIDE + RIGHT, TOP + SIDE + BOTTOM, across.name);
    let _ =
        write!(svg, r#"<rect class="frame" x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}"/>"#);
    let cell = SIDE / across.bins as f64;
    for (i, row) in counts.iter().enumerate() {
        for (j, &count) in row.iter().enumerate().filter(|(_, count)| **count > 0) {
            // Logarithmic, since most tokens are in few cells; one token alone is still to be seen.
            let shade = 0.15 + 0.85 * (count as f64).ln_1p() / (most as f64).ln_1p();
            let _ = write!(
                svg,
                r#"<rect class="{group}" x="{:.2}" y="{:.2}" width="{cell:.2}" height="{cell:.2}" fill-opacity="{shade:.2}"><title>TKD {}, DKD {}: {}</title></rect>"#,
                LEFT + cell * j as f64,
                TOP + SIDE - cell * (i + 1) as f64,
                across.range(j),
                up.range(i),
                thousands(count)
            );
        }
    }
    horizontal_labels(&mut svg, across, LEFT, SIDE, TOP + SIDE);
    for value in up.labels() {
        let y = TOP + SIDE * (1.0 - up.share(value));
        text(&mut svg, "end", LEFT - 8.0, y + 4.0, &(up.label)(value));
    }
    let middle = TOP + SIDE / 2.0;
    let _ = write!(
        svg,
        r#"<text class="axis" text-anchor="middle" transform="translate(14 {middle}) rotate(-90)">{}</text>"#,
        up.name
    );
    svg + "</svg>"
}

/// A bar for each quantity: its share on easy tokens, then on hard ones.
pub fn shares(quantities: &[(&str, [f64; 2])]) -> String {
    const ROW: f64 = 34.0;
    const NAMES: f64 = 150.0;
    let bar = LEFT + WIDTH - NAMES;
    let height = ROW * quantities.len() as f64;
    let mut svg = open(LEFT + WIDTH + RIGHT, height, "shares of easy and hard tokens");
    for (i, (name, amounts)) in quantities.iter().enumerate() {
        let y = ROW * i as f64;
        text(&mut svg, "start", 0.0, y + 21.0, name);
        let total: f64 = amounts.iter().sum();
        let mut x = NAMES;
        for (group, amount) in GROUPS.iter().zip(amounts) {
            let share = if total > 0.0 { amount / total } else { 0.0 };
            let width = bar * share;
            let _ = write!(
                svg,
                r#"<rect class="{group}" x="{x:.1}" y="{:.1}" width="{width:.1}" height="{}"><title>{name}: {:.1}% {group}</title></rect>"#,
                y + 4.0,
                ROW - 8.0,
                100.0 * share
            );
            if share > 0.08 {
                let middle = x + width / 2.0;
                let _ = write!(
                    svg,
                    r#"<text class="on-{group}" text-anchor="middle" x="{middle:.1}" y="{:.1}">{:.0}%</text>"#,
                    y + 22.0,
                    100.0 * share
                );
            }
            x += width;
        }
    }
    svg + "</svg>"
}

fn open(width: f64, height: f64, name: &str) -> String {
    format!(
        r#"<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{name}" xmlns="http://www.w3.org/2000/svg">"#
    )
}

fn text(svg: &mut String, anchor: &str, x: f64, y: f64, content: &str) {
    let _ = write!(svg, r#"<text text-anchor="{anchor}" x="{x:.1}" y="{y:.1}">{content}</text>"#);
}

fn horizontal_labels(svg: &mut String, axis: &Axis, left: f64, width: f64, y: f64) {
    let right = left + width;
    let _ = write!(svg, r#"<line class="base" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>"#);
    for value in axis.labels() {
        let x = left + width * axis.share(value);
        text(svg, "middle", x, y + 18.0, &(axis.label)(value));
    }
    let middle = left + width / 2.0;
    let _ = write!(
        svg,
        r#"<text class="axis" text-anchor="middle" x="{middle}" y="{}">{}</text>"#,
        y + 38.0,
        axis.name
    );
}

/// 1, 2 or 5 times a power of ten, so that there are at most five steps.
fn nice_step(highest: usize) -> usize {
    let mut power = 1;
    loop {
        for step in [1, 2, 5].map(|digit| digit * power) {
            if highest / step <= 5 {
                return step;
            }
        }
        power *= 10;
    }
}

/// With a thin space before every three digits.
pub fn thousands(value: usize) -> String {
    let digits = value.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push('\u{2009}');
        }
        grouped.push(digit);
    }
    grouped
}
