//! A page about a batch: which tokens are uncertain, what the parts of the loss are on them, and where its gradient goes.
//!
//! ```
//! use atkd::report::{Report, row_norms};
//! use atkd::{Batch, Logits, LogitsMut, Objective, cpu};
//!
//! let (teacher, student) = ([1.0_f32, 2.0, 0.5, 0.0], [0.0_f32, 1.0, 2.0, 1.5]);
//! let batch = Batch::new(Logits::new(&teacher[..], 2, 2)?, &[0, 1])?;
//! let mut gradient = [0.0_f32; 4];
//! let output = cpu::forward_backward(
//!     &Objective::default(),
//!     &batch,
//!     Logits::new(&student[..], 2, 2)?,
//!     LogitsMut::new(&mut gradient[..], 2, 2)?,
//! )?;
//! let norms = row_norms(Logits::new(&gradient[..], 2, 2)?);
//! let page = Report::new(&output.tokens)
//!     .with_title("A batch of two tokens")
//!     .with_fact("loss", output.loss)
//!     .with_gradient_norms(&norms)?
//!     .to_html();
//! assert!(page.starts_with("<!doctype html>"));
//! # Ok::<(), atkd::Error>(())
//! ```

mod chart;
mod page;

use rayon::prelude::*;

use crate::batch::check_count;
use crate::{Logits, Result, TokenTerms};

/// What [`to_html`](Self::to_html) makes a page of: the terms of a batch's tokens, and what else is known of them.
#[derive(Clone, Debug)]
pub struct Report<'a> {
    tokens: &'a [TokenTerms],
    title: String,
    facts: Vec<(String, String)>,
    labels: Option<&'a [i64]>,
    gradient_norms: Option<&'a [f64]>,
}

impl<'a> Report<'a> {
    /// About tokens with these terms, as [`Output::tokens`](crate::Output::tokens) has them.
    pub fn new(tokens: &'a [TokenTerms]) -> Self {
        let title = "Distillation loss of a batch".into();
        Self { tokens, title, facts: Vec::new(), labels: None, gradient_norms: None }
    }

    /// With another title.
    #[must_use]
    pub fn with_title(mut self, title: impl Into<String>) -> Self {
        self.title = title.into();
        self
    }

    /// With one more line of the table at the top: a setting of the objective, the reduced loss, the step of the training.
    #[must_use]
    pub fn with_fact(mut self, name: impl Into<String>, value: impl ToString) -> Self {
        self.facts.push((name.into(), value.to_string()));
        self
    }

    /// With each token's label.
    ///
    /// # Errors
    /// If there is not one for each token.
    pub fn with_labels(mut self, labels: &'a [i64]) -> Result<Self> {
        check_count("labels", labels.len(), self.tokens.len())?;
        self.labels = Some(labels);
        Ok(self)
    }

    /// With the norm of each token's row of the gradient: see [`row_norms`].
    ///
    /// # Errors
    /// If there is not one for each token.
    pub fn with_gradient_norms(mut self, norms: &'a [f64]) -> Result<Self> {
        check_count("gradient norms", norms.len(), self.tokens.len())?;
        self.gradient_norms = Some(norms);
        Ok(self)
    }

    /// The page: HTML with its style and pictures in it, which loads nothing from elsewhere and has no scripts. Its size
    /// does not depend on the number of tokens, but for a few digits.
    ///
    /// It shows, for easy and hard tokens apart: the teacher's uncertainty and where it parts them; TKD beside DKD;
    /// shares of tokens, loss and gradient; norms of the gradient; the tokens of the largest loss; and means and
    /// percentiles in numbers. Ignored tokens are counted, and in nothing else.
    pub fn to_html(&self) -> String {
        page::html(self)
    }
}

/// The Euclidean norm of each row of a gradient `[tokens, vocab]`.
pub fn row_norms(gradient: Logits) -> Vec<f64> {
    let norm = |token| {
        let row = gradient.row(token);
        (0..row.len()).map(|i| f64::from(row.get(i)).powi(2)).sum::<f64>().sqrt()
    };
    (0..gradient.tokens()).into_par_iter().map(norm).collect()
}
