//! The measurements as a table, CSV files and plots.

use std::fs;
use std::path::Path;

use atkd::{Objective, TokenTerms};
use comfy_table::{CellAlignment, Table, presets};
use plotters::coord::ranged1d::Ranged;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use crate::Result;

/// The palette of Okabe and Ito, which people of any colour vision can tell apart.
const COLORS: [RGBColor; 7] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(204, 121, 167),
];
const GREY: RGBColor = RGBColor(110, 110, 110);
const SIZE: (u32, u32) = (960, 600);
const FONT: (&str, u32) = ("sans-serif", 18);

/// Held-out loss after steps of training.
pub struct Curve {
    pub name: String,
    /// True of a student that trains on samples of its own.
    pub on_policy: bool,
    pub points: Vec<(usize, f64)>,
}

/// One model, measured on the held-out text. Losses are in nats a token.
pub struct Row {
    pub name: String,
    pub loss: f64,
    /// Loss less the baseline's, and the standard error of that over sequences.
    pub difference: Option<(f64, f64)>,
    /// Mean KL divergence from the teacher.
    pub divergence: f64,
    /// Mean reverse KL divergence from the teacher on the model's own samples.
    pub reverse_kl: f64,
}

impl Row {
    /// `time` tokens in a sequence.
    pub fn new(
        name: String,
        terms: &[TokenTerms],
        baseline: Option<&[TokenTerms]>,
        reverse_kl: f64,
        time: usize,
    ) -> Self {
        let difference = baseline.map(|baseline| {
            let differences: Vec<f64> = terms
                .chunks(time)
                .zip(baseline.chunks(time))
                .map(|(a, b)| mean(a.iter().zip(b).map(|(a, b)| a.loss - b.loss)))
                .collect();
            let center = mean(differences.iter().copied());
            let variance = mean(differences.iter().map(|d| (d - center).powi(2)));
            (center, (variance / differences.len() as f64).sqrt())
        });
        Self {
            name,
            loss: mean(terms.iter().map(|token| token.loss)),
            difference,
            divergence: mean(terms.iter().map(|token| token.tkd + token.uncertainty * token.dkd)),
            reverse_kl,
        }
    }
}

/// The share of a batch's tokens that the threshold of the batch before takes for hard or easy wrongly, in the
/// median over batches of so many tokens; none with fewer than two of them, or none hard. The guess that
/// spares the CUDA path a pass over the teacher's logits is as good as that.
pub fn guessed_wrong(margins: &[f64], tokens: usize, selection: &Objective) -> Option<f64> {
    let hard = selection.hard_count(tokens);
    let threshold = |batch: &[f64]| {
        let mut sorted = batch.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted.get(hard.wrapping_sub(1)).copied()
    };
    let batches: Vec<&[f64]> = margins.chunks_exact(tokens).collect();
    let wrong = batches.windows(2).map(|pair| {
        let (guess, exact) = (threshold(pair[0])?, threshold(pair[1])?);
        let count = pair[1].iter().filter(|&&u| (u >= guess) != (u >= exact)).count();
        Some(count as f64 / tokens as f64)
    });
    let mut wrong = wrong.collect::<Option<Vec<f64>>>()?;
    wrong.sort_by(f64::total_cmp);
    wrong.get(wrong.len() / 2).copied()
}

/// 0 of nothing.
pub fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1);
    values.sum::<f64>() / count as f64
}

pub fn create_folder(folder: &Path) -> Result<()> {
    Ok(fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?)
}

pub fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "model",
        "held-out loss",
        "perplexity",
        "loss less cross entropy's",
        "KL from teacher",
        "reverse KL, own samples",
    ]);
    for row in rows {
        let difference = row
            .difference
            .map_or(String::new(), |(difference, error)| format!("{difference:+.3} ± {error:.3}"));
        table.add_row([
            row.name.clone(),
            format!("{:.3}", row.loss),
            format!("{:.1}", row.loss.exp()),
            difference,
            format!("{:.3}", row.divergence),
            format!("{:.3}", row.reverse_kl),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn write(folder: &Path, name: &str, content: String) -> Result<()> {
    let path = folder.join(name);
    Ok(fs::write(&path, content).map_err(|e| format!("{}: {e}", path.display()))?)
}

pub fn write_results(folder: &Path, rows: &[Row]) -> Result<()> {
    let mut csv = String::from(
        "model,held_out_loss,perplexity,loss_difference,standard_error,kl_from_teacher,\
         reverse_kl_of_own_samples\n",
    );
    for row in rows {
        let difference = row.difference.map_or(",".into(), |(d, e)| format!("{d},{e}"));
        let perplexity = row.loss.exp();
        csv += &format!(
            "{},{},{perplexity},{difference},{},{}\n",
            row.name, row.loss, row.divergence, row.reverse_kl
        );
    }
    write(folder, "results.csv", csv)
}

/// `report.html`: what the loss that a student was trained by is on the held-out text after so many steps.
pub fn write_page(folder: &Path, name: &str, steps: usize, terms: &[TokenTerms]) -> Result<()> {
    let page = atkd::report::Report::new(terms)
        .with_title(format!("The student under {name}, on held-out text"))
        .with_fact("steps", steps)
        .with_fact("mean loss", mean(terms.iter().map(|token| token.loss)))
        .with_fact("hard tokens", "those of each batch of held-out text");
    write(folder, "report.html", page.to_html())
}

/// `{name}.csv` and `{name}.svg`, for example `loss.csv`. The plot starts after the first sixth of the steps, where the curves
/// still coincide.
pub fn write_curves(folder: &Path, name: &str, curves: &[Curve], teacher_loss: f64) -> Result<()> {
    let names: Vec<&str> = curves.iter().map(|curve| curve.name.as_str()).collect();
    let mut csv = format!("step,{}\n", names.join(","));
    for i in 0..curves[0].points.len() {
        let losses: Vec<String> =
            curves.iter().map(|curve| curve.points[i].1.to_string()).collect();
        csv += &format!("{},{}\n", curves[0].points[i].0, losses.join(","));
    }
    write(folder, &format!("{name}.csv"), csv)?;

    let last = curves[0].points.last().map_or(0, |point| point.0);
    let shown = || {
        let points = curves.iter().flat_map(|curve| &curve.points);
        points.filter(|point| point.0 * 6 >= last)
    };
    let first = shown().map(|point| point.0).min().unwrap_or(0);
    let losses = || shown().map(|point| point.1).chain([teacher_loss]);
    let (low, high) = (losses().fold(f64::MAX, f64::min), losses().fold(f64::MIN, f64::max));
    let margin = 0.04 * (high - low).max(0.01);

    let path = folder.join(format!("{name}.svg"));
    // The legend finds room to the lower left, since curves fall, on a plot that is the higher the more they are.
    let size = (SIZE.0, SIZE.1 + 12 * curves.len() as u32);
    let area = SVGBackend::new(&path, size).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(
            format!("Held-out loss of one student, trained in {} ways", curves.len()),
            ("sans-serif", 24),
        )
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(72)
        .build_cartesian_2d(first..last.max(first + 1), low - margin..high + margin)?;
    chart
        .configure_mesh()
        .x_desc("training steps")
        .y_desc("cross entropy, nats a token")
        .label_style(FONT)
        .axis_desc_style(FONT)
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .x_label_formatter(&|step| step.to_string())
        .y_label_formatter(&|loss| format!("{loss:.2}"))
        .draw()?;
    chart
        .draw_series(DashedLineSeries::new(
            [(first, teacher_loss), (last, teacher_loss)],
            8,
            6,
            GREY.stroke_width(2),
        ))?
        .label(format!("teacher {teacher_loss:.3}"))
        .legend(|(x, y)| DashedPathElement::new([(x, y), (x + 28, y)], 8, 6, GREY.stroke_width(2)));
    // The first is the baseline. The divergences come twice where some students sample: in the same colors, dashed.
    let colors = COLORS[..1].iter().chain(COLORS[1..].iter().cycle());
    for (curve, &color) in curves.iter().zip(colors) {
        let points = curve.points.iter().copied().filter(|point| point.0 >= first);
        let end = curve.points.last().map_or(f64::NAN, |point| point.1);
        let (label, style) = (format!("{} {end:.3}", curve.name), color.stroke_width(2));
        if curve.on_policy {
            chart
                .draw_series(DashedLineSeries::new(points, 4, 4, style))?
                .label(label)
                .legend(move |(x, y)| DashedPathElement::new([(x, y), (x + 28, y)], 4, 4, style));
        } else {
            chart
                .draw_series(LineSeries::new(points, style))?
                .label(label)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 28, y)], style));
        }
    }
    legend(&mut chart, SeriesLabelPosition::LowerLeft)?;
    Ok(area.present()?)
}

/// `uncertainty.csv` and `uncertainty.svg`: how many tokens are how uncertain to the teacher, with the
/// `hard` most uncertain ones apart. Bins are of the margin, since most uncertainties are next to 1.
pub fn write_uncertainty(folder: &Path, terms: &[TokenTerms], hard: usize) -> Result<()> {
    const LOW: f64 = -8.0;
    const HIGH: f64 = 14.0;
    const BINS_PER_UNIT: f64 = 2.0;
    let mut margins: Vec<f64> = terms.iter().map(|token| token.margin).collect();
    margins.sort_by(|a, b| b.total_cmp(a));
    let last = ((HIGH - LOW) * BINS_PER_UNIT) as usize - 1;
    let mut bins = vec![[0u32; 2]; last + 1];
    for (rank, margin) in margins.iter().enumerate() {
        let bin = (((margin - LOW) * BINS_PER_UNIT) as usize).min(last);
        bins[bin][usize::from(rank < hard)] += 1;
    }
    let edge = |bin: usize| LOW + bin as f64 / BINS_PER_UNIT;
    let uncertainty = |margin: f64| 1.0 / (1.0 + (-margin).exp());
    let mut csv = String::from("margin_from,margin_to,easy_tokens,hard_tokens\n");
    for (i, [easy, hard]) in bins.iter().enumerate() {
        csv += &format!("{},{},{easy},{hard}\n", edge(i), edge(i + 1));
    }
    write(folder, "uncertainty.csv", csv)?;

    let highest = bins.iter().map(|bin| bin[0] + bin[1]).max().unwrap_or(0).max(1);
    let top = highest + highest / 12 + 1;
    let path = folder.join("uncertainty.svg");
    let area = SVGBackend::new(&path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("The teacher's uncertainty of the held-out tokens", ("sans-serif", 24))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(80)
        .build_cartesian_2d(LOW..HIGH, 0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(12)
        .x_desc(
            "teacher's margin u, the log-odds against the target; uncertainty = 1 / (1 + exp(-u))",
        )
        .y_desc("tokens")
        .label_style(FONT)
        .axis_desc_style(FONT)
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .x_label_formatter(&|margin| format!("{margin:.0}"))
        .draw()?;
    for (group, name, color, tokens) in
        [(0, "easy", COLORS[1], terms.len() - hard), (1, "hard", COLORS[2], hard)]
    {
        chart
            .draw_series(bins.iter().enumerate().map(|(i, bin)| {
                let base = if group == 0 { 0 } else { bin[0] };
                let corners = [(edge(i), base), (edge(i + 1), base + bin[group])];
                Rectangle::new(corners, color.filled())
            }))?
            .label(format!("{name}: {tokens} tokens"))
            .legend(move |(x, y)| Rectangle::new([(x, y - 6), (x + 28, y + 6)], color.filled()));
    }
    if let Some(&margin) = hard.checked_sub(1).and_then(|last| margins.get(last)) {
        let line = [(margin.clamp(LOW, HIGH), 0), (margin.clamp(LOW, HIGH), top)];
        chart
            .draw_series(DashedLineSeries::new(line, 6, 4, BLACK.stroke_width(2)))?
            .label(format!("threshold: uncertainty {:.3}", uncertainty(margin)))
            .legend(|(x, y)| {
                DashedPathElement::new([(x, y), (x + 28, y)], 6, 4, BLACK.stroke_width(2))
            });
    }
    legend(&mut chart, SeriesLabelPosition::UpperLeft)?;
    Ok(area.present()?)
}

fn legend<'a, X: Ranged, Y: Ranged>(
    chart: &mut ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>,
    position: SeriesLabelPosition,
) -> Result<()> {
    Ok(chart
        .configure_series_labels()
        .position(position)
        .legend_area_size(36)
        .margin(12)
        .label_font(FONT)
        .background_style(WHITE.mix(0.9))
        .border_style(GREY)
        .draw()?)
}
