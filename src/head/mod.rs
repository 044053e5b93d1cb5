//! The loss behind the models' last layers, a chunk of tokens at a time, on the CPU: hidden states and weights go in, the
//! loss and the gradients of the student's hidden states, weight and bias come out, and logits of all tokens never
//! exist. With the feature `cuda` a GPU computes the same by `cuda::Head`, of layers on the device.
//!
//! ```
//! use atkd::head::{self, Chunks, Gradients, Layer};
//! use atkd::{Objective, cpu::Session};
//!
//! // Three tokens, four words, hidden sizes of 2 and 1.
//! let (student_hidden, student_weight) = ([1.0_f32, 0.0, 0.5, 0.5, 0.0, 1.0], [0.1_f32; 8]);
//! let (teacher_hidden, teacher_weight) = ([1.0_f32, -1.0, 0.3], [0.0_f32, 1.0, 2.0, 3.0]);
//! let student = Layer::new(&student_hidden[..], &student_weight[..], 2)?;
//! let teacher = Layer::new(&teacher_hidden[..], &teacher_weight[..], 1)?;
//!
//! let (mut hidden, mut weight) = ([0.0_f32; 6], [0.0_f32; 8]);
//! let gradients = Gradients {
//!     hidden: Some((&mut hidden[..]).into()),
//!     weight: Some(&mut weight),
//!     bias: None,
//! };
//! // The labels, and all that a call can be told beside the objective.
//! let session = Session::begin(&Objective::default(), &[2_i64, 0, -100], 4)?;
//! let output = head::loss(session, &student, &teacher, Chunks::default(), gradients)?;
//! assert!(output.loss > 0.0 && output.tokens[0].hard);
//! # Ok::<(), atkd::Error>(())
//! ```
//!
//! # How it computes
//!
//! The logits of a model are `hidden weight^T + bias`, in float32 whatever the dtypes. For one chunk of tokens at a time
//! both models' logits are computed, then the gradient dZ over the student's; from it the chunk's rows of the hidden
//! states' gradient, dZ W, and its addend of the weight's, dZ^T H. That makes four products, none of which is computed twice.
//!
//! The hard tokens are known when all margins are, and margins need the teacher's logits. So the set is predicted for
//! each chunk from the margins so far; when it is known, the tokens whose prediction was wrong, mostly some percent of the
//! first chunks', are computed again: their rows of the hidden states' gradient are overwritten, and the weight's gets the
//! difference. A chunk takes every so many-th token, because neighbours are alike, and a prediction from them would be
//! worse. Nothing is carried from call to call. Nothing is predicted if one chunk holds all tokens, if the session knows the hard
//! tokens or by what they are selected ([`Session::with_hard`], [`Session::with_margins`],
//! [`Session::with_teacher_log_probs`]), or if no gradient depends on them. Means of groups whose sizes only the
//! selection tells (by the median, or within sequences) compute the teacher's logits twice.
//!
//! # What is exact
//!
//! The selection is. Sums over the tokens are in float32: the loss is within 1e-5 relative of float64's, and gradients are
//! within 2e-5 of their largest element, for models that differ; those of models that are nearly equal are differences of
//! logits, which a product rounds by about 1e-6. Two calls with the same arguments give the same bits on one processor,
//! whatever the number of threads; chunks of another length give other last bits. A token whose gradient is not finite for
//! the group that was predicted leaves that in the gradients of weight and bias, whatever its own group. Tokens that are equal may have margins that differ in the last
//! bit, as products of different chunks are rounded otherwise: which of them is hard is then no matter of their index.
//!
//! # Memory
//!
//! Beyond the arguments: two float32 rows of logits per token of a chunk; the float32 copies of a chunk's hidden states,
//! of both models, and of a row of the student's gradient; per token of the call about 300 bytes; and per thread some
//! megabytes, among them the float32 copy, of 1 MB at most, of a part of a weight in half precision.

mod layer;
mod product;

use crate::cpu::{Session, Threads};
use crate::{Elements, ElementsMut, LogitsMut, Output, Result};
pub use layer::{Chunks, GradientsOf, LayerOf};
use product::Weight;

/// A layer on the host.
pub type Layer<'a> = LayerOf<Elements<'a>>;

/// The gradients of a layer on the host.
pub type Gradients<'a> = GradientsOf<ElementsMut<'a>, &'a mut [f32]>;

impl<'a> Layer<'a> {
    /// The weight's rows that count.
    fn weight(&self) -> Weight<'a> {
        let elements = self.weight.slice(0..self.vocab * self.features);
        Weight { elements, columns: self.features }
    }

    /// Writes the hidden states of these tokens, widened.
    fn gather(&self, tokens: &[usize], to: &mut Vec<f32>) {
        to.resize(tokens.len() * self.features, 0.0);
        for (&token, to) in tokens.iter().zip(to.chunks_mut(self.features)) {
            product::widen(self.hidden.slice(self.row(token)), to);
        }
    }

    /// The elements of a token's hidden states.
    fn row(&self, token: usize) -> std::ops::Range<usize> {
        token * self.features..(token + 1) * self.features
    }

    /// Writes the logits of hidden states that were [gathered](Self::gather).
    fn logits(&self, threads: Threads, hidden: &[f32], to: &mut [f32]) {
        let bias = self.bias.map(|bias| bias.slice(0..self.vocab));
        product::logits(threads, hidden, self.weight(), bias, to);
    }
}

/// The loss, each token's terms, and the student's gradients that are wanted: of the call that `session` has begun, with its
/// objective, labels and settings of tokens, to whose stages it is handed in chunks.
///
/// # Errors
/// If a layer or a gradient does not fit the call, a chunk would have no token, or the session was handed rows before.
pub fn loss(
    mut session: Session,
    student: &Layer,
    teacher: &Layer,
    chunks: Chunks,
    gradients: Gradients,
) -> Result<Output> {
    let shape @ [_, vocab] = session.shape();
    student.check("the student's layer", shape)?;
    teacher.check("the teacher's layer", shape)?;
    gradients.check(student)?;
    let tokens = session.valid_tokens();
    // Every so many-th token.
    let count = tokens.len().div_ceil(chunks.tokens(8 * vocab)?);
    let chunk = |first| tokens.iter().skip(first).step_by(count).copied().collect();
    let chunks: Vec<Vec<usize>> = (0..count).map(chunk).collect();
    let longest = chunks.first().map_or(0, Vec::len);

    let threads = session.threads();
    let mut models = Models {
        teacher: Model::new(teacher, threads, longest * vocab),
        // A repair of one token needs two gradients.
        student: Model::new(student, threads, longest.max(2) * vocab),
    };
    let with_gradient = !gradients.is_empty();
    let mut collected = Collected::new(student, threads, gradients);
    if with_gradient && session.selects_before_gradients() {
        for tokens in &chunks {
            session.margins_of(tokens, models.teacher.logits(tokens)?.as_logits());
        }
        session.select()?;
    }
    let predicts =
        with_gradient && !session.knows_hard() && session.objective().depends_on_selection();
    for (i, tokens) in chunks.iter().enumerate() {
        let teacher = models.teacher.logits(tokens)?;
        let teacher = teacher.as_logits();
        if predicts && i + 1 < chunks.len() {
            session.predict(tokens, teacher);
        } else if predicts {
            session.margins_of(tokens, teacher);
            session.select()?;
        }
        let student = models.student.logits(tokens)?;
        if with_gradient {
            session.rows_in_place_of(tokens, teacher, student)?;
            let Model { hidden, logits, .. } = &models.student;
            let gradient = &logits[..tokens.len() * vocab];
            collected.add(hidden, gradient);
            collected.write_hidden(tokens, gradient);
        } else {
            session.forward_rows_of(tokens, teacher, student.as_logits())?;
        }
    }
    // A repair has two gradients beside the teacher's logits.
    for tokens in session.select()?.to_vec().chunks((longest / 2).max(1)) {
        models.repair(&mut session, tokens, &mut collected)?;
    }
    collected.finish();
    session.finish()
}

/// A model's layer, and memory for a chunk of its tokens.
struct Model<'a> {
    layer: &'a Layer<'a>,
    threads: Threads<'a>,
    /// The chunk's hidden states.
    hidden: Vec<f32>,
    /// Its logits, or their gradient.
    logits: Vec<f32>,
}

impl<'a> Model<'a> {
    fn new(layer: &'a Layer, threads: Threads<'a>, logits: usize) -> Self {
        Self { layer, threads, hidden: Vec::new(), logits: vec![0.0; logits] }
    }

    /// Computes the logits of these tokens.
    fn logits(&mut self, tokens: &[usize]) -> Result<LogitsMut<'_>> {
        let vocab = self.layer.vocab;
        self.layer.gather(tokens, &mut self.hidden);
        let logits = &mut self.logits[..tokens.len() * vocab];
        self.layer.logits(self.threads, &self.hidden, logits);
        LogitsMut::new(logits, tokens.len(), vocab)
    }
}

struct Models<'a> {
    teacher: Model<'a>,
    student: Model<'a>,
}

impl Models<'_> {
    /// Computes mispredicted tokens again, of which there are at most half as many as a chunk has, or one.
    fn repair(
        &mut self,
        session: &mut Session,
        tokens: &[usize],
        collected: &mut Collected,
    ) -> Result<()> {
        let count = tokens.len();
        let vocab = self.teacher.layer.vocab;
        let teacher = self.teacher.logits(tokens)?;
        let teacher = teacher.as_logits();
        self.student.logits(tokens)?;
        let (right, wrong) = self.student.logits.split_at_mut(count * vocab);
        let wrong = &mut wrong[..if collected.gradients.adds_up() { right.len() } else { 0 }];
        if !wrong.is_empty() {
            wrong.copy_from_slice(right);
            session.mispredicted_gradients(
                tokens,
                teacher,
                LogitsMut::new(&mut *wrong, count, vocab)?,
            );
        }
        session.repair_in_place(tokens, teacher, LogitsMut::new(&mut *right, count, vocab)?)?;
        collected.write_hidden(tokens, right);
        if !wrong.is_empty() {
            for (right, wrong) in right.iter_mut().zip(&*wrong) {
                *right -= wrong;
            }
            collected.add(&self.student.hidden, right);
        }
        Ok(())
    }
}

/// The gradients so far.
struct Collected<'a> {
    layer: &'a Layer<'a>,
    threads: Threads<'a>,
    gradients: Gradients<'a>,
    /// A chunk's rows of the hidden states' gradient.
    rows: Vec<f32>,
    /// The weight's gradient has no addend yet.
    is_first: bool,
}

impl<'a> Collected<'a> {
    fn new(layer: &'a Layer, threads: Threads<'a>, mut gradients: Gradients<'a>) -> Self {
        if let Some(weight) = &mut gradients.weight {
            weight[layer.weight().elements.len()..].fill(0.0);
        }
        if let Some(bias) = &mut gradients.bias {
            bias.fill(0.0);
        }
        if let Some(hidden) = &mut gradients.hidden {
            // The rows of ignored tokens stay so.
            hidden.fill_zero();
        }
        Self { layer, threads, gradients, rows: Vec::new(), is_first: true }
    }

    /// Adds what follows for weight and bias from the gradient of the logits of hidden states.
    fn add(&mut self, hidden: &[f32], gradient: &[f32]) {
        let Layer { features, vocab, .. } = *self.layer;
        if let Some(weight) = &mut self.gradients.weight {
            let to = &mut weight[..vocab * features];
            let adds = !self.is_first;
            product::weight_gradient(self.threads, gradient, hidden, features, to, adds);
        }
        if let Some(bias) = &mut self.gradients.bias {
            product::add_bias_gradient(self.threads, gradient, &mut bias[..vocab]);
        }
        self.is_first = false;
    }

    /// Writes the rows of the hidden states' gradient that follow from the gradient of these tokens' logits.
    fn write_hidden(&mut self, tokens: &[usize], gradient: &[f32]) {
        let layer = self.layer;
        let Some(hidden) = &mut self.gradients.hidden else { return };
        self.rows.resize(tokens.len() * layer.features, 0.0);
        product::hidden_gradient(self.threads, gradient, layer.weight(), &mut self.rows);
        for (&token, row) in tokens.iter().zip(self.rows.chunks(layer.features)) {
            let mut to = hidden.slice(layer.row(token));
            row.iter().enumerate().for_each(|(i, &value)| to.set(i, value));
        }
    }

    fn finish(&mut self) {
        if let (true, Some(weight)) = (self.is_first, &mut self.gradients.weight) {
            weight.fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Objective, Reduction};

    const TOKENS: usize = 31;
    const VOCAB: usize = 40;
    const FEATURES: usize = 8;

    /// The loss and the gradients of hidden states, weight and bias.
    fn run(session: Session, chunks: Chunks) -> (Output, [Vec<f32>; 3]) {
        let mut random = fastrand::Rng::with_seed(1);
        let mut numbers =
            |count: usize| -> Vec<f32> { (0..count).map(|_| 2.0 * random.f32() - 1.0).collect() };
        let student = (numbers(TOKENS * FEATURES), numbers(VOCAB * FEATURES));
        let teacher = (numbers(TOKENS * FEATURES), numbers(VOCAB * FEATURES));
        let student = Layer::new(&student.0, &student.1, FEATURES).unwrap();
        let teacher = Layer::new(&teacher.0, &teacher.1, FEATURES).unwrap();
        let [mut hidden, mut weight, mut bias] =
            [TOKENS * FEATURES, VOCAB * FEATURES, VOCAB].map(|count| vec![f32::NAN; count]);
        let gradients = Gradients {
            hidden: Some((&mut hidden).into()),
            weight: Some(&mut weight),
            bias: Some(&mut bias),
        };
        let output = loss(session, &student, &teacher, chunks, gradients).unwrap();
        (output, [hidden, weight, bias])
    }

    /// All tokens but the last chunk's, of which no prediction is left to make.
    #[test]
    fn wrong_predictions_of_all_tokens_are_repaired() {
        let labels: Vec<i64> =
            (0..TOKENS as i64).map(|i| if i % 7 == 3 { -100 } else { i % 5 }).collect();
        let group_mean = Objective::default().with_reduction(Reduction::GroupMean).unwrap();
        for objective in [Objective::default(), group_mean.with_ce_weight(0.3).unwrap()] {
            let begin = || Session::begin(&objective, &labels, VOCAB).unwrap();
            let (exact, _) = run(begin(), Chunks::default());
            let hard: Vec<bool> = exact.tokens.iter().map(|token| token.hard).collect();
            let (_, right) = run(begin().with_hard(&hard).unwrap(), Chunks::Tokens(4));
            for chunk in [1, 4, 10] {
                let mut session = begin();
                session.mispredicts = true;
                let (output, found) = run(session, Chunks::Tokens(chunk));
                assert_eq!(output.tokens.iter().map(|token| token.hard).collect::<Vec<_>>(), hard);
                assert!((output.loss - exact.loss).abs() <= 1e-6 * exact.loss);
                for (found, right) in found.iter().flatten().zip(right.iter().flatten()) {
                    assert!((found - right).abs() <= 1e-6, "{found}, but {right}");
                }
            }
        }
    }
}
