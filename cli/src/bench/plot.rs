//! A picture of a benchmark: the bandwidth that variants reach, over the vocabulary.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use super::{Measured, Timing};

/// Tells variants apart, with dashes after as many; those of a whole call come first.
const COLORS: [RGBColor; 8] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(214, 39, 40),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
    RGBColor(227, 119, 194),
    RGBColor(127, 127, 127),
];

/// GB/s over V beside what a copy reaches, for the largest number of tokens measured.
pub fn save(path: &Path, title: &str, measured: &[Measured]) -> Result<()> {
    let tokens = measured.iter().map(|at| at.size.tokens).max().unwrap_or(0);
    let mut sizes: Vec<&Measured> = measured.iter().filter(|at| at.size.tokens == tokens).collect();
    sizes.sort_by_key(|at| at.size.vocab);
    let vocab = |at: &Measured| at.size.vocab as f64;
    let (first, last) = (vocab(sizes[0]), vocab(sizes[sizes.len() - 1]));
    let mut lines = vec![(
        "copying memory".to_owned(),
        sizes.iter().map(|at| (vocab(at), at.copy / 1e9)).collect::<Vec<_>>(),
    )];
    for (name, _) in drawn(sizes[0]) {
        let points = sizes.iter().filter_map(|at| {
            let (_, timing) = drawn(at).find(|(other, _)| *other == name)?;
            Some((vocab(at), at.bytes_per_second(timing) / 1e9))
        });
        lines.push((name.to_owned(), points.collect()));
    }
    let most = lines.iter().flat_map(|(_, points)| points).fold(0.0_f64, |most, at| most.max(at.1));

    let area = SVGBackend::new(path, (1000, 520)).into_drawing_area();
    area.fill(&WHITE)?;
    // Beside the lines, which the legend may not cover.
    let (area_of_chart, legend) = area.split_horizontally(760);
    let mut chart = ChartBuilder::on(&area_of_chart)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(60)
        .build_cartesian_2d((first / 1.1..last * 1.1).log_scale(), 0.0..1.05 * most)
        .map_err(|error| anyhow!("{error}"))?;
    chart
        .configure_mesh()
        .x_desc("vocabulary V")
        .y_desc("GB/s")
        .x_labels(5)
        .x_label_formatter(&|vocab| format!("{vocab:.0}"))
        .y_label_formatter(&|rate| format!("{rate:.0}"))
        .max_light_lines(0)
        .draw()?;
    let mut named = Vec::new();
    for (i, (name, points)) in lines.into_iter().enumerate() {
        let color = if i == 0 { BLACK } else { COLORS[(i - 1) % COLORS.len()] };
        let (style, is_dashed) = (color.stroke_width(2), i > COLORS.len());
        let at_the_end = points.last().map_or(0.0, |&(_, rate)| rate);
        chart.draw_series(points.iter().map(|&at| Circle::new(at, 3, color.filled())))?;
        if is_dashed {
            chart.draw_series(DashedLineSeries::new(points, 6, 4, style))?;
        } else {
            chart.draw_series(LineSeries::new(points, style))?;
        }
        named.push((at_the_end, name, style, is_dashed));
    }
    // In the order in which the lines end.
    named.sort_by(|one, other| other.0.total_cmp(&one.0));
    for (y, (_, name, style, is_dashed)) in (50..).step_by(22).zip(named) {
        let line = [(0, y), (30, y)];
        if is_dashed {
            legend.draw(&DashedPathElement::new(line, 6, 4, style))?;
        } else {
            legend.draw(&PathElement::new(line, style))?;
        }
        legend.draw(&Text::new(name, (38, y - 6), ("sans-serif", 13)))?;
    }
    area.present()?;
    Ok(())
}

/// The timings that move volumes, each with its name in the picture: sizes may differ in their kernel for rows.
fn drawn(at: &Measured) -> impl Iterator<Item = (&str, &Timing)> {
    at.timings.iter().filter(|timing| timing.volumes > 0).map(|timing| {
        let variant = timing.variant.as_str();
        (if variant.starts_with("row_") { "rows alone" } else { variant }, timing)
    })
}
