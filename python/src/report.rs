//! A page about a batch.

use atkd::TokenTerms;
use atkd::report::Report;
use pyo3::prelude::*;

use super::exception;

/// The columns of `Stats`, flat, and what else `atkd.report` says of the tokens: the items of a dictionary.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Columns {
    margin: Vec<f64>,
    uncertainty: Vec<f64>,
    tkd: Vec<f64>,
    dkd: Vec<f64>,
    loss: Vec<f64>,
    hard: Vec<bool>,
    valid: Vec<bool>,
    labels: Option<Vec<i64>>,
    gradient_norms: Option<Vec<f64>>,
}

/// The page as HTML.
#[pyfunction]
pub fn report(
    py: Python,
    title: String,
    facts: Vec<(String, String)>,
    columns: Columns,
) -> PyResult<String> {
    py.detach(|| {
        let tokens: Vec<TokenTerms> = (0..columns.margin.len())
            .map(|i| TokenTerms {
                margin: columns.margin[i],
                uncertainty: columns.uncertainty[i],
                tkd: columns.tkd[i],
                dkd: columns.dkd[i],
                loss: columns.loss[i],
                valid: columns.valid[i],
                hard: columns.hard[i],
            })
            .collect();
        let mut report = Report::new(&tokens).with_title(title);
        for (name, value) in facts {
            report = report.with_fact(name, value);
        }
        if let Some(labels) = &columns.labels {
            report = report.with_labels(labels)?;
        }
        if let Some(norms) = &columns.gradient_norms {
            report = report.with_gradient_norms(norms)?;
        }
        Ok(report.to_html())
    })
    .map_err(exception)
}
