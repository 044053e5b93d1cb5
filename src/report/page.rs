//! The page of a report.

use std::fmt::Write;

use super::Report;
use super::chart::{self, Axis, GROUPS, thousands};
use crate::TokenTerms;

const STYLE: &str = include_str!("style.css");

/// Rows of the table of the largest losses.
const WORST: usize = 20;

const MARGIN: Axis = Axis {
    low: -12.0,
    high: 16.0,
    bins: 56,
    label_every: 2.0,
    name: "the teacher's margin u, the log-odds against the target: uncertainty = 1 / (1 + exp(-u))",
    label: |u| format!("{u}"),
};

const TKD: Axis = log_axis("TKD, nats");
const DKD: Axis = log_axis("DKD, nats");

/// Of decimal logarithms.
const fn log_axis(name: &'static str) -> Axis {
    Axis { low: -6.0, high: 2.0, bins: 32, label_every: 2.0, name, label: power_of_ten }
}

fn power_of_ten(exponent: f64) -> String {
    match exponent {
        0.0 => "1".into(),
        _ if exponent.abs() <= 2.0 => {
            // Two digits are enough for the edge of a bin.
            let value = 10_f64.powf(exponent);
            let digits = (1 - value.log10().floor() as i32).max(0) as usize;
            let number = format!("{value:.digits$}");
            match number.contains('.') {
                true => number.trim_end_matches('0').trim_end_matches('.').into(),
                false => number,
            }
        }
        _ => format!("{:.0e}", 10_f64.powf(exponent)),
    }
}

/// One valid token.
struct Token<'a> {
    number: usize,
    terms: &'a TokenTerms,
    norm: Option<f64>,
}

pub fn html(report: &Report) -> String {
    let tokens: Vec<Token> = report
        .tokens
        .iter()
        .enumerate()
        .filter(|(_, terms)| terms.valid)
        .map(|(number, terms)| {
            let norm = report.gradient_norms.map(|norms| norms[number]);
            Token { number, terms, norm }
        })
        .collect();
    let title = escaped(&report.title);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title>\
         <style>{STYLE}</style></head><body><main><h1>{title}</h1>"
    );
    facts(&mut page, report, &tokens);
    if tokens.is_empty() {
        return page + "<p>No token has a label that counts.</p></main></body></html>\n";
    }
    page += &format!(
        "<p class=\"legend\">{}</p>",
        GROUPS.map(|group| format!("<span class=\"{group}\"></span>{group} tokens")).join(" ")
    );
    uncertainty(&mut page, &tokens);
    parts(&mut page, &tokens);
    page += "<section><h2>Shares</h2><p>Of all tokens, of the sums of their terms before the reduction, and of the \
             norms of their gradients. Terms that are not finite are left out.</p>";
    page += &chart::shares(&quantities(&tokens));
    page += "</section>";
    norms(&mut page, &tokens);
    worst(&mut page, report, &tokens);
    numbers(&mut page, &tokens);
    page + "</main></body></html>\n"
}

fn facts(page: &mut String, report: &Report, tokens: &[Token]) {
    let hard = tokens.iter().filter(|token| token.terms.hard).count();
    let non_finite = tokens.iter().filter(|token| !token.terms.loss.is_finite()).count();
    let ignored = report.tokens.len() - tokens.len();
    let counts = [
        ("tokens with a label", tokens.len()),
        ("of these hard", hard),
        ("tokens ignored", ignored),
        ("losses that are not finite", non_finite),
    ];
    let counts = counts.map(|(name, count)| (name.to_string(), thousands(count)));
    *page += "<table class=\"facts\">";
    for (name, value) in report.facts.iter().chain(&counts) {
        let _ = write!(page, "<tr><th>{}</th><td>{}</td></tr>", escaped(name), escaped(value));
    }
    *page += "</table>";
}

fn uncertainty(page: &mut String, tokens: &[Token]) {
    let mut counts = vec![[0; 2]; MARGIN.bins];
    for token in tokens.iter().filter(|token| !token.terms.margin.is_nan()) {
        counts[MARGIN.bin(token.terms.margin)][usize::from(token.terms.hard)] += 1;
    }
    let hard = tokens.iter().filter(|token| token.terms.hard && !token.terms.margin.is_nan());
    let least = hard.min_by(|a, b| a.terms.margin.total_cmp(&b.terms.margin));
    let name = least.map(|token| format!("uncertainty {:.6}", token.terms.uncertainty));
    let line = least.zip(name.as_deref()).map(|(token, name)| (token.terms.margin, name));
    *page += "<section><h2>Uncertainty of the teacher</h2>";
    let _ = match &name {
        Some(name) => {
            write!(page, "<p>The least uncertain hard token: {name} (the dashed line).</p>")
        }
        None => write!(page, "<p>No token is hard.</p>"),
    };
    *page += &chart::histogram(&MARGIN, &counts, line);
    *page += "</section>";
}

fn parts(page: &mut String, tokens: &[Token]) {
    let computed = |token: &&Token| !token.terms.tkd.is_nan() && !token.terms.dkd.is_nan();
    *page += "<section><h2>TKD and DKD of each token</h2>";
    if !tokens.iter().any(|token| computed(&token)) {
        *page += "<p>The divergence of this loss is not computed in parts.</p></section>";
        return;
    }
    *page += "<p>The stronger the color, the more tokens, by the logarithm of their number. Cells at the edges hold what is beyond \
              them, 0 too.</p><div class=\"pair\">";
    for (hard, group) in GROUPS.iter().enumerate() {
        let mut counts = vec![vec![0; TKD.bins]; DKD.bins];
        let of_group = tokens.iter().filter(|token| usize::from(token.terms.hard) == hard);
        for token in of_group.filter(computed) {
            let (x, y) = (TKD.bin(token.terms.tkd.log10()), DKD.bin(token.terms.dkd.log10()));
            counts[y][x] += 1;
        }
        let svg = chart::density(group, [&TKD, &DKD], &counts);
        let _ = write!(page, "<figure><figcaption>{group}</figcaption>{svg}</figure>");
    }
    *page += "</div></section>";
}

/// A quantity of a token, by its name.
type Quantity = (&'static str, fn(&Token) -> f64);

const LOSS: Quantity = ("loss", |token| token.terms.loss);
const GRADIENT: Quantity = ("gradient norm", |token| token.norm.unwrap_or(f64::NAN));

fn quantities(tokens: &[Token]) -> Vec<(&'static str, [f64; 2])> {
    let count: Quantity = ("tokens", |_| 1.0);
    let all =
        [count, ("TKD", |token| token.terms.tkd), ("DKD", |token| token.terms.dkd), LOSS, GRADIENT];
    all.into_iter()
        .map(|(name, of)| {
            let mut sums = [0.0; 2];
            for token in tokens {
                let value = of(token);
                if value.is_finite() {
                    sums[usize::from(token.terms.hard)] += value.max(0.0);
                }
            }
            (name, sums)
        })
        .filter(|(_, sums)| sums.iter().sum::<f64>() > 0.0)
        .collect()
}

fn norms(page: &mut String, tokens: &[Token]) {
    let logarithms: Vec<(f64, bool)> = tokens
        .iter()
        .filter_map(|token| Some((token.norm?.log10(), token.terms.hard)))
        .filter(|(logarithm, _)| !logarithm.is_nan())
        .collect();
    let finite = logarithms.iter().map(|pair| pair.0).filter(|logarithm| logarithm.is_finite());
    let mut finite: Vec<f64> = finite.collect();
    let (low, high) = {
        finite.sort_unstable_by(f64::total_cmp);
        let (Some(&highest), Some(&low)) = (finite.last(), finite.get(finite.len() / 100)) else {
            return;
        };
        // The reduction divides by the number of tokens, so that no range serves all batches.
        let high = highest.floor() + 1.0;
        (low.floor().clamp(high - 8.0, high - 1.0), high)
    };
    let axis = Axis {
        low,
        high,
        bins: 56,
        label_every: 1.0,
        name: "Euclidean norm of the gradient's row",
        label: |exponent| match exponent.fract() {
            0.0 => format!("{:.0e}", 10_f64.powf(exponent)),
            _ => format!("{:.1e}", 10_f64.powf(exponent)),
        },
    };
    let mut counts = vec![[0; 2]; axis.bins];
    for &(logarithm, hard) in &logarithms {
        counts[axis.bin(logarithm)][usize::from(hard)] += 1;
    }
    *page += "<section><h2>Gradient of each token</h2><p>With respect to the student's logits. The first bar holds what \
              is smaller, 0 too.</p>";
    *page += &chart::histogram(&axis, &counts, None);
    *page += "</section>";
}

fn worst(page: &mut String, report: &Report, tokens: &[Token]) {
    let mut order: Vec<&Token> = tokens.iter().collect();
    // Those that are not finite come first.
    let key =
        |token: &Token| if token.terms.loss.is_nan() { f64::INFINITY } else { token.terms.loss };
    let larger = |a: &&Token, b: &&Token| key(b).total_cmp(&key(a)).then(a.number.cmp(&b.number));
    if order.len() > WORST {
        order.select_nth_unstable_by(WORST - 1, larger);
        order.truncate(WORST);
    }
    order.sort_unstable_by(larger);
    let _ = write!(
        page,
        "<section><h2>Largest losses</h2><div class=\"wide\"><table><tr><th>token</th>{}<th></th><th>uncertainty</th>\
         <th>TKD</th><th>DKD</th><th>loss</th>{}</tr>",
        if report.labels.is_some() { "<th>label</th>" } else { "" },
        if report.gradient_norms.is_some() { "<th>gradient norm</th>" } else { "" },
    );
    for Token { number, terms, norm } in order {
        let label = report.labels.map_or(String::new(), |all| format!("<td>{}</td>", all[*number]));
        let group = GROUPS[usize::from(terms.hard)];
        let _ = write!(page, "<tr><td>{number}</td>{label}<td class=\"word\">{group}</td>");
        for value in [terms.uncertainty, terms.tkd, terms.dkd, terms.loss].into_iter().chain(*norm)
        {
            let _ = write!(page, "<td>{}</td>", number_of(value));
        }
        *page += "</tr>";
    }
    *page += "</table></div></section>";
}

fn numbers(page: &mut String, tokens: &[Token]) {
    *page += "<section><h2>In numbers</h2><p>Of finite values.</p><div class=\"wide\"><table><tr><th></th><th></th>\
              <th>tokens</th><th>mean</th><th>median</th><th>90%</th><th>99%</th><th>largest</th></tr>";
    let uncertainty: Quantity = ("uncertainty", |token| token.terms.uncertainty);
    let tkd: Quantity = ("TKD", |token| token.terms.tkd);
    let dkd: Quantity = ("DKD", |token| token.terms.dkd);
    for (name, of) in [uncertainty, tkd, dkd, LOSS, GRADIENT] {
        for (group, hard) in [("all", None), (GROUPS[0], Some(false)), (GROUPS[1], Some(true))] {
            let of_group =
                tokens.iter().filter(|token| hard.is_none_or(|hard| token.terms.hard == hard));
            let mut values: Vec<f64> = of_group.map(of).filter(|value| value.is_finite()).collect();
            let Some(last) = values.len().checked_sub(1) else { continue };
            values.sort_unstable_by(f64::total_cmp);
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let at = |share: f64| values[(share * last as f64).round() as usize];
            let _ = write!(
                page,
                "<tr><td class=\"word\">{name}</td><td class=\"word\">{group}</td><td>{}</td>",
                thousands(values.len())
            );
            for value in [mean, at(0.5), at(0.9), at(0.99), at(1.0)] {
                let _ = write!(page, "<td>{}</td>", number_of(value));
            }
            *page += "</tr>";
        }
    }
    *page += "</table></div></section>";
}

/// Four significant digits.
fn number_of(value: f64) -> String {
    if value.is_nan() {
        return "–".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "∞".into() } else { "−∞".into() };
    }
    let size = value.abs();
    if size != 0.0 && !(1e-3..1e5).contains(&size) {
        return format!("{value:.3e}");
    }
    let digits = if size < 1.0 { 4 } else { (3 - size.log10().floor() as i32).max(0) as usize };
    format!("{value:.digits$}")
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            _ => escaped.push(letter),
        }
    }
    escaped
}
